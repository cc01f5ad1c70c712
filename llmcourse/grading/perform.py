"""One call of a learner's function, and everything that a judge wants to know about it.

The same code runs in the learner's notebook and in the sandboxed process of a submission. It hands
over copies of the arguments, each array between guard bands; it counts what was asked for; it notes
which arguments were written to; and it rebuilds the result from its numbers (see `plain`).

**Guard bands.** An array argument is a window in a larger buffer whose rest is NaN (for integers, the
largest one). Reading past its end brings NaN into the result; writing past it is seen afterwards.

**Kernels.** A CUDA kernel (`llmcourse.vgpu.cuda.Kernel`) is not run here: called without arguments it gives
its PTX as text, and the judge runs that on arguments and with counters of its own (see `kernel_subject`).

**Not implemented.** A function that raises NotImplementedError was not written yet: a state of its own.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from llmcourse.grading.plain import (
    NotPlainError,
    as_bytes,
    between,
    is_tensor,
    layout,
    plain,
    tensor_laid_out,
    tensor_layout,
)

RECURSION = 1000  # Python's default
LEAK = "leaked_bytes"
NO_FUNCTION = "the notebook defines no"  # said of a name that is called and not there
GUARD = 64  # elements on each side


@dataclass(frozen=True)
class Failure:
    """What a learner's function raised. `line` is the line of the function's own cell, 0 if unknown."""

    kind: str
    message: str
    line: int = 0
    source: str = ""
    trace: str = ""


@dataclass
class Call:
    """One call: what went in, what came out.

    changed, overrun   positions of the arguments that were written to, and past whose ends was written
    grads              with `grads=True`: the gradient of each floating tensor argument, None for others
    costs              counted during the call, by the counters' own names
    """

    args: tuple[Any, ...]
    value: Any = None
    error: Failure | None = None
    changed: tuple[int, ...] = ()
    overrun: tuple[int, ...] = ()
    grads: tuple[Any, ...] | None = None
    costs: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def as_plain(self) -> dict[str, Any]:
        """All but the arguments, as plain data."""
        error = None if self.error is None else dict(vars(self.error))
        return {
            "value": self.value,
            "error": error,
            "changed": self.changed,
            "overrun": self.overrun,
            "grads": self.grads,
            "costs": self.costs,
            "seconds": self.seconds,
        }

    @classmethod
    def from_plain(cls, found: dict[str, Any], args: tuple[Any, ...]) -> Call:
        """The call that another process made with `args`. Raises TypeError, KeyError or ValueError
        for anything that `as_plain` cannot have made."""
        error = found["error"]
        positions = [tuple(int(i) for i in found[name]) for name in ("changed", "overrun")]
        if any(not 0 <= i < len(args) for i in (*positions[0], *positions[1])):
            raise ValueError("no such argument")
        grads = found["grads"]
        if grads is not None and (not isinstance(grads, tuple) or len(grads) != len(args)):
            raise ValueError("one gradient for each argument")
        return cls(
            args,
            found["value"],
            None if error is None else Failure(*_failure_fields(error)),
            positions[0],
            positions[1],
            grads,
            {str(name): int(count) for name, count in found["costs"].items()},
            float(found["seconds"]),
        )


def _failure_fields(error: dict[str, Any]) -> tuple[str, str, int, str, str]:
    from llmcourse.grading.outputs import clean_text

    kind, message, source, trace = (
        clean_text(error[name])[:4000] for name in ("kind", "message", "source", "trace")
    )
    return kind, message, int(error["line"]), source, trace


def perform(
    fn: Callable[..., Any], args: Sequence[Any], watch: Sequence[str] = (), grads: bool = False
) -> Call:
    """Call `fn` on copies of `args`. Nothing that `fn` raises comes out of here, but an interrupt.

    watch   names of counters (see `cost`)
    grads   the arguments' floating tensors ask for a gradient, and the result (or the sum of several
            results) is sent backward with a gradient of ones; both passes are counted

    `leaked_bytes` are counted in a second call, whose result is dropped: what the first one keeps may
    be a cache, what each one keeps is a leak.
    """
    fn = _called(fn)
    given = [Handed(a, grads) for a in args]
    counters = _counters([name for name in watch if name != LEAK], given)
    call = Call(tuple(args))
    began = perf_counter()
    try:
        with _conditions(), ExitStack() as counting:
            counts = [counting.enter_context(c) for c in counters]
            result = fn(*(g.value for g in given))
            if grads:
                _backward(result)
        call.seconds = perf_counter() - began
        for count in counts:
            call.costs.update({name: int(n) for name, n in count.values.items()})
        call.value = plain(result)
        if grads:
            call.grads = tuple(g.gradient() for g in given)
        if LEAK in watch:
            call.costs.update(_left_behind(fn, args, grads))
    except NotPlainError as error:
        call.error = Failure("NotPlainError", f"{error.what} {error.why}", trace=str(error))
    except KeyboardInterrupt:
        raise  # the learner stops the check
    except BaseException as error:
        call.error = failure(error, fn)
    call.seconds = call.seconds or perf_counter() - began
    call.changed = tuple(i for i, g in enumerate(given) if g.changed())
    call.overrun = tuple(i for i, g in enumerate(given) if g.overrun())
    return call


def _called(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What a call of `fn` calls: of a CUDA kernel, what hands over its text."""
    cuda = sys.modules.get("llmcourse.vgpu.cuda")
    return fn.as_text if cuda is not None and issubclass(type(fn), cuda.Kernel) else fn  # type: ignore[attr-defined]


def _left_behind(fn: Callable[..., Any], args: Sequence[Any], grads: bool) -> dict[str, int]:
    given = [Handed(a, grads) for a in args]
    (leak,) = _counters([LEAK], given)
    with _conditions(), leak as count:
        result = fn(*(g.value for g in given))
        if grads:
            _backward(result)
            for g in given:
                g.forget_gradient()
        del result
    return {name: int(n) for name, n in count.values.items()}


class Handed:
    """An argument as the learner's function gets it: a copy, guarded if it is an array."""

    def __init__(self, original: Any, grads: bool = False) -> None:
        self.before = original
        self.value: Any
        self.buffer: np.ndarray | None = None
        if isinstance(original, np.ndarray) and original.ndim:
            self.buffer, self.value = guarded(original)
            self.window, self.around = self.value.view(), self.buffer.copy()
        elif is_tensor(original):
            self.value = tensor_laid_out(original.detach(), tensor_layout(original))
            if grads and original.is_floating_point():
                self.value.requires_grad_()
        elif callable(original):
            self.value = original
        else:  # both rebuilt, so that they are of the same types
            self.before, self.value = (plain(original, "an argument") for _ in range(2))

    def changed(self) -> bool:
        if isinstance(self.before, np.ndarray):
            return not _same_bytes(self.before, self.value)
        return not callable(self.before) and not _same(self.before, self.value)

    def overrun(self) -> bool:
        """Whether anything was written around the array. Asked last: the array gets its numbers back."""
        if self.buffer is None:
            return False
        self.window[...] = self.before
        return not _same_bytes(self.around, self.buffer)

    def forget_gradient(self) -> None:
        if is_tensor(self.value):
            self.value.grad = None

    def gradient(self) -> Any:
        grad = getattr(self.value, "grad", None) if is_tensor(self.value) else None
        return None if grad is None else plain(grad, "a gradient")


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A buffer, and a window in it that holds a copy of `array` in the same layout."""
    order = layout(array)
    step = 2 if order == "gaps" else 1
    buffer = np.full(array.size * step + 2 * GUARD, between(array.dtype), array.dtype)
    inside = buffer[GUARD : GUARD + array.size * step]
    if order == "F":
        window = inside.reshape(array.shape[::-1]).T
    elif order == "gaps":
        window = inside.reshape(*array.shape[:-1], array.shape[-1] * 2)[..., ::2]
    else:
        window = inside.reshape(array.shape)
    window[...] = array
    return buffer, window


def failure(error: BaseException, fn: Callable[..., Any] | None = None) -> Failure:
    """What was raised, and the last line of the learner's own code on the way there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(getattr(fn, "__code__", None), "co_filename", None)
    mine = [f for f in frames if f.filename == own] or frames[1:]  # the first is `perform` itself
    line, source = (mine[-1].lineno or 0, mine[-1].line or "") if mine else (0, "")
    try:
        message = str(error)
    except BaseException:  # an exception of the learner's own can raise here too
        message = ""
    kind = type(error).__name__
    trace = "".join(traceback.format_list(frames[1:][-12:])) + f"{kind}: {message}"
    return Failure(kind, message[:2000], line, source[:300], trace[-4000:])


@contextmanager
def _conditions() -> Iterator[None]:
    """The same for every call, whatever the notebook has set: no warnings, and Python's default recursion
    limit, counted from here (some front ends raise it, and no verdict may hang on that)."""
    before, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back  # type: ignore[assignment]
    sys.setrecursionlimit(depth + RECURSION)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.setrecursionlimit(before)


def _backward(result: Any) -> None:
    results = [r for r in (result if isinstance(result, list | tuple) else [result]) if is_tensor(r)]
    total = sum(r.float().sum() for r in results if r.is_floating_point())
    if is_tensor(total) and total.requires_grad:
        total.backward()


def _counters(watch: Sequence[str], given: Sequence[Handed]) -> list[Any]:
    if not watch:
        return []
    from llmcourse.grading.cost import counter

    arguments = [g.value for g in given]
    return [counter(name)(arguments=arguments) for name in watch]


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, so that a NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _same_tensor(a: Any, b: Any) -> bool:
    import torch

    if type(b) is not torch.Tensor or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(as_bytes(a), as_bytes(b)))


def _same(a: Any, b: Any) -> bool:
    """Whether `b` is still what `a` was. What the function put in its place is asked nothing."""
    if is_tensor(a):
        return _same_tensor(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, np.ndarray | np.generic):
        return _same_bytes(np.asarray(a), np.asarray(b))
    return bool(a == b) or (a != a and b != b)
