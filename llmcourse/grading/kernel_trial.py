"""Launches of a learner's kernel inside a check, and what may be asked of their counters.

    @vector_add.check("threads past the end do nothing")
    def tail(t: Trial) -> None:
        a, b = t.normal(100, dtype=np.float32), t.normal(100, dtype=np.float32)
        run = launch(t, 2, 64, a, b, out(100), 100)
        t.close(run.arrays[0], a + b, "c")

Every launch is a call of the trial: its arguments stand in the message, its outcome (values, fault, the
counters in `watch`) is what a named mistake is recognised by. Counters have the names of
`llmcourse.vgpu.counters`; only those that a check asks for belong in `watch`, since two kernels with the
same mistake need not have the same number of instructions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmcourse.errors import CourseError
from llmcourse.grading.compare import Mismatch
from llmcourse.grading.kernel_subject import JudgedKernel, kernel_of, refused
from llmcourse.grading.perform import Call, Failure
from llmcourse.grading.trial import RaisedError, Trial
from llmcourse.vgpu.counters import Counters
from llmcourse.vgpu.faults import KernelFault, index_text

UNWRITTEN = {"f": -98_765.4, "i": -987_654_321, "u": 3_306_640_000}
"""What stands in an array for results: no result, and unlike NaN changed by adding to it."""


@dataclass(frozen=True)
class Out:
    """An array that the kernel is to write. All others must be as they were."""

    array: np.ndarray


def out(*shape: int, dtype: Any = np.float32) -> Out:
    """An array for results, filled with what no result is."""
    return Out(unwritten(*shape, dtype=dtype))


def unwritten(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """What an array for results holds where nothing was written."""
    kind = np.dtype(dtype)
    return np.full(shape, UNWRITTEN[kind.kind], kind)


@dataclass(frozen=True)
class Launched:
    """One launch: the `Out` arrays as the kernel left them, in order, and what the machine counted."""

    arrays: tuple[np.ndarray, ...]
    counters: Counters
    kernel: JudgedKernel

    def worst(self, *names: str) -> str:
        """The source line with the most of these counters, for a message: `line 7: tile[x][y]`."""
        shares = {n: sum(c.get(name, 0) for name in names) for n, c in self.counters.lines.items()}
        number = max(shares, key=lambda n: shares[n], default=0)
        text = self.kernel.line(number)
        return f"line {number}: {text}" if text and shares[number] else ""


def launch(
    t: Trial,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *arguments: Any,
    shared: int = 0,
    watch: Sequence[str] = (),
) -> Launched:
    """Launch the judged kernel on copies of the arguments.

    watch   counters that belong to what this check is about

    Raises   Mismatch for a fault, in its three parts; for an array written that is not an `Out`.
    """
    kernel = _kernel_of(t)
    inputs = [a.array if isinstance(a, Out) else a for a in arguments]
    given = [a.copy() if isinstance(a, np.ndarray) else a for a in inputs]
    shown = (_size(grid), _size(block), *inputs)
    names = t.arguments[2 : 2 + len(given)]
    try:
        counters = kernel.run(grid, block, given, shared=shared, names=names)
    except CourseError as error:
        kind = symptom(error) if isinstance(error, KernelFault) else type(error).__name__
        _record(t, Call(shown, error=Failure(kind, str(error))))
        raise refused(error, _line_of(error, kernel)) from None
    changed = tuple(i + 2 for i, a in enumerate(arguments) if _was_written(a, given[i]))
    arrays = tuple(g for g, a in zip(given, arguments, strict=True) if isinstance(a, Out))
    _record(t, Call(shown, arrays, changed=changed, costs={name: counters[name] for name in watch}))
    t.unchanged()
    return Launched(arrays, counters, kernel)


_DEEDS = re.compile(r"\b(?:global|shared|local|load|store|atomic|reads?|writes?|wrote|__\w+|barriers)\b")
_ELEMENT = re.compile(r"global .*(element -?\d+ of \w+)")


def symptom(fault: KernelFault) -> str:
    """A fault by what two kernels with the same mistake share: not its line, nor their arrays' names.

    race … this thread writes … which thread 3 read …   →  race: shared writes read __syncthreads
    global load out of bounds: … element 64 of x …      →  out of bounds: global load element 64 of x
    __shfl_sync … waits … (block 0, thread 1)           →  divergent barrier: __shfl_sync thread 1
    """
    said = _DEEDS.findall(fault.what)
    if element := _ELEMENT.search(fault.what):
        said.append(element[1])
    if fault.kind in ("divergent barrier", "uninitialised") and fault.thread is not None:
        said.append(f"thread {index_text(fault.thread)}")
    return " ".join([f"{fault.kind}:", *said])


def _kernel_of(t: Trial) -> JudgedKernel:
    try:
        return kernel_of(t.subject)
    except RaisedError as error:
        _record(t, error.call)
        raise


def _record(t: Trial, call: Call) -> None:
    t.calls.append(call)
    t.counts.append(0)


def _was_written(argument: Any, now: Any) -> bool:
    return isinstance(argument, np.ndarray) and argument.tobytes() != now.tobytes()


def _size(size: int | Sequence[int]) -> Any:
    return size if isinstance(size, int) else tuple(size)


def _line_of(error: CourseError, kernel: JudgedKernel) -> str:
    """The line of a fault with its number, as it stands in the cell."""
    line = error.line if isinstance(error, KernelFault) else None
    text = kernel.line(line.line) if line is not None else ""
    return f"    {line.line} │ {text}" if line is not None and text else ""


# ── counters ─────────────────────────────────────────────────────────────────────────────────────


def written(t: Trial, got: np.ndarray, expected: np.ndarray, what: str, **tolerance: float) -> None:
    """Like `t.close`, for an `Out` array, of which `expected` leaves some elements `unwritten`.

    Says so where an element was not written, or was and is none of the result's.
    """
    empty = unwritten(dtype=got.dtype)
    for wrong, says, others in (
        ((got == empty) & (expected != empty), "was not written", "nor were"),
        ((got != empty) & (expected == empty), "is past the end and was written", "so were"),
    ):
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            more = int(wrong.sum()) - 1
            count = f", {others} {more} more of {got.size}" if more else ""
            raise Mismatch(f"{what}[{', '.join(map(str, first))}] {says}{count}")
    t.close(got, expected, what, **tolerance)


def at_most(run: Launched, name: str, most: float, why: str, tries: str) -> None:
    """A counter stays within a bound; if not, `why` says what the bound stands for."""
    count = run.counters[name]
    if count > most:
        at = run.worst(name)
        raise Mismatch(f"{name} = {count:,}, expected at most {most:,.6g}: {why}" + _at(at), tries=tries)


def moves(run: Launched, loaded: float, stored: float, why: str, tries: str) -> None:
    """Global memory sees at most so many bytes each way, and no atomics, which move bytes as well."""
    at_most(run, "global_load_bytes", loaded, why, tries)
    at_most(run, "global_store_bytes", stored, why, tries)
    at_most(run, "global_atomic_requests", 0, "plain loads and stores do", tries)


def per_request(run: Launched, kind: str, most: float, tries: str) -> None:
    """`kind` ("load", "store") of global memory takes at most so many sectors a request."""
    name = f"global_{kind}"
    requests, sectors = run.counters[f"{name}_requests"], run.counters[f"{name}_sectors"]
    if requests and sectors > most * requests:
        at = run.worst(f"{name}_sectors")
        raise Mismatch(
            f"{name}_sectors / {name}_requests = {sectors / requests:.4g}, expected at most {most:g}"
            + _at(at),
            tries=tries,
        )


def no_conflicts(run: Launched, tries: str) -> None:
    """Every access to shared memory takes the least wavefronts that its width needs."""
    names = [f"shared_{kind}_bank_conflicts" for kind in ("load", "store", "atomic", "copy")]
    for name in names:
        if count := run.counters[name]:
            requests = run.counters[name.replace("bank_conflicts", "requests")]
            at = run.worst(name)
            raise Mismatch(f"{name} = {count:,} in {requests:,} requests, expected 0" + _at(at), tries=tries)


def _at(line: str) -> str:
    return f"\n{line}" if line else ""
