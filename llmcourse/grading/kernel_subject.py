"""A learner's CUDA kernel as its judge holds it: PTX text, run on the PTX machine of the judge's own process.

    learner's process                       this process
    ─────────────────                       ────────────────────────────────────────────────
    %%cuda … compiled there
    vector_add          ── three texts ──▶  read with limits, run with launches of the judge's own,
                                            counted by the machine, compared with NumPy

So neither values nor counters can be forged: whatever text arrives is judged by what it does, also if
somebody wrote it by hand. The text is fetched once for a verdict; it cannot be one kernel for the values
and another for the counters.

**What a text may cost.** It is not trusted either. Its length, its instructions, registers, variables and
branches are limited before anything is prepared. A launch has a number of steps and two seconds of processor
time, all launches together have ten, and a kernel that did not end once is not launched again. `printf` says
nothing here. Whatever goes wrong in reading or running it is a verdict on the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from time import thread_time
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from llmcourse.errors import CourseError
from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.outputs import clean_text
from llmcourse.grading.trial import RaisedError, Subject
from llmcourse.vgpu import isa, machine, ptx
from llmcourse.vgpu.arguments import bind
from llmcourse.vgpu.counters import Counters
from llmcourse.vgpu.faults import KernelFault, PtxError
from llmcourse.vgpu.flow import ENDS
from llmcourse.vgpu.launch import check_launch, size3
from llmcourse.vgpu.memory import lay_out_shared

MAX_PTX = 200_000  # characters; a tile of 16 × 16, unrolled, takes 30,000
MAX_SOURCE = 50_000
MAX_SIZE = 12_000  # instructions, registers and variables of the module
MAX_BRANCHES = 600
MAX_LOCAL = 8 << 10  # bytes of local memory a thread
MAX_GLOBAL = 1 << 20  # bytes of __device__ and __constant__ variables
MAX_LANES = 1 << 14  # threads of one launch
STEPS = 2_000  # basic blocks that one launch may run
SECONDS = 2.0  # of processor time, for one launch
ALL_SECONDS = 10.0  # for all launches of a verdict
MAX_TEXT = 2_000  # of a message

NO_KERNEL = 'a cell that starts with %%cuda and defines "__global__ void {name}(…)".'


class JudgedKernel:
    """One kernel, read and ready: `name` is the exercise's, `entry` that in the PTX.

    fault   that of a launch that did not end

    Raises   PtxError for text that is no PTX, or more of it than a kernel of a lab has.
    """

    def __init__(self, name: str, entry: str, text: str, source: str = "") -> None:
        self.name, self.source = name, source
        self.fault: KernelFault | None = None
        self.left = ALL_SECONDS
        if len(text) > MAX_PTX:
            raise _too_much(f"{len(text):,} characters of PTX", f"{MAX_PTX:,}")
        self.module, self.kernel = _read(text, entry)

    @classmethod
    def from_plain(cls, found: Any, name: str) -> JudgedKernel:
        """The kernel that a learner's process sent. `name` is what the exercise calls it.

        Raises   Mismatch for anything that is no kernel of that name, PtxError as above.
        """
        fields = ("name", "ptx", "source")
        texts = (
            [str(found.get(f)) for f in fields if type(found.get(f)) is str] if type(found) is dict else []
        )
        if len(texts) < len(fields):
            raise Mismatch(f"{name} is no CUDA kernel, but gives {describe(found)}", tries=_no_kernel(name))
        entry, text, source = texts
        return cls(name, entry, text, clean_text(source[:MAX_SOURCE]))

    def run(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[object],
        *,
        shared: int = 0,
        names: Sequence[str] = (),
    ) -> Counters:
        """Launch on the machine; arrays are written in place.

        Raises   KernelFault with its line's text for what a kernel may not do; CourseError for a launch that
                 it does not fit.
        """
        if self.fault is not None:
            raise self.fault
        blocks, threads = size3(grid, "grid"), size3(block, "block")
        check_launch(
            self.name,
            blocks,
            threads,
            max_threads=self.kernel.max_threads,
            static_shared=_bytes(self.module, self.kernel, "shared"),
            dynamic_shared=shared,
        )
        assert np.prod(blocks) * np.prod(threads) <= MAX_LANES, "a launch of the judge's own is too large"
        given = [a.data for a in bind(self.name, self.kernel.parameters, None, arguments)]
        began = thread_time()
        try:
            run = machine.execute(
                self.kernel,
                self.module,
                blocks,
                threads,
                given,
                dynamic_shared=shared,
                step_limit=STEPS,
                seconds=min(SECONDS, self.left),
                names=list(names) or None,
            )
        except KernelFault as fault:
            if fault.kind == "endless":
                fault.fix = (
                    "checking that every loop comes to its end: kernels of this lab take far fewer steps."
                )
                self.fault = fault
            raise
        except CourseError:
            raise
        except Exception as error:  # PTX that no compiler wrote: a form that the machine does not expect
            raise PtxError(
                f"{self.name} cannot be run ({type(error).__name__}: {str(error)[:200]}).",
                "Its PTX has something that the machine does not expect.",
                "the kernel object that a %%cuda cell makes; if it is one, the machine is at fault.",
            ) from None
        finally:
            self.left -= thread_time() - began
        return run.counters

    def line(self, number: int) -> str:
        """A line of the source, empty where there is none."""
        lines = self.source.splitlines()
        return lines[number - 1].strip()[:200] if 0 < number <= len(lines) else ""


class JudgedLauncher:
    """`vector_add[grid, block](a, b, c, n)` in an instructor's cell: runs here, counts, writes in place."""

    def __init__(self, subject: Subject, shape: Sequence[Any]) -> None:
        self.subject, self.shape = subject, shape

    def __call__(self, *arguments: object) -> Counters:
        """Raises   RaisedError, Mismatch or CourseError, whichever the kernel deserves."""
        grid, block, *shared = self.shape
        return kernel_of(self.subject).run(grid, block, arguments, shared=shared[0] if shared else 0)


_fetched: WeakKeyDictionary[Subject, JudgedKernel] = WeakKeyDictionary()


def kernel_of(subject: Subject) -> JudgedKernel:
    """The kernel that is judged, fetched from its process once.

    Raises   RaisedError for a process that gives none, Mismatch for what is none.
    """
    if subject not in _fetched:
        call = subject.call(())
        if call.error is not None:
            raise RaisedError(call)
        try:
            _fetched[subject] = JudgedKernel.from_plain(call.value, subject.name)
        except CourseError as error:
            raise refused(error) from None
    return _fetched[subject]


def refused(error: CourseError, line: str = "") -> Mismatch:
    """An error in three parts as a failed check: what and why, and what to try."""
    what = f"{error.what}\n{line}" if line else error.what
    return Mismatch(
        clean_text(f"{what[:MAX_TEXT]}\n{error.why[:MAX_TEXT]}"), tries=clean_text(error.fix[:MAX_TEXT])
    )


@lru_cache(maxsize=48)
def _read(text: str, entry: str) -> tuple[isa.Module, isa.Kernel]:
    """The module and its kernel, made ready for the machine."""
    module = ptx.parse(text, MAX_SIZE)
    if entry not in module.kernels:
        raise PtxError(
            f"this PTX has no kernel called {entry[:80]}.",
            f"It has {', '.join(module.kernels)[:200] or 'none'}.",
            "the kernel object that a %%cuda cell makes.",
        )
    found = module.kernels[entry]
    kernel = replace(found, code=[_silent(i) for i in found.code])
    module = isa.Module({entry: kernel}, module.variables, module.target)
    _check_sizes(module, kernel)
    try:
        machine.program_of(kernel)
    except PtxError:
        raise
    except Exception as error:
        raise PtxError(
            f"this PTX cannot be run ({type(error).__name__}: {str(error)[:200]}).",
            "An instruction has operands that it cannot have.",
            "the kernel object that a %%cuda cell makes.",
        ) from None
    return module, kernel


def _check_sizes(module: isa.Module, kernel: isa.Kernel) -> None:
    branches = len(kernel.labels) + sum(i.opcode in ENDS for i in kernel.code)
    if branches > MAX_BRANCHES:
        raise _too_much(f"{branches:,} branches and labels", f"{MAX_BRANCHES:,}")
    for space, most in (("local", MAX_LOCAL), ("global", MAX_GLOBAL), ("const", MAX_GLOBAL)):
        if (used := _bytes(module, kernel, space)) > most:
            raise _too_much(f"{used:,} bytes of {space} variables", f"{most:,}")


def _bytes(module: isa.Module, kernel: isa.Kernel, space: str) -> int:
    variables = [v for v in (*module.variables.values(), *kernel.variables.values()) if v.space == space]
    return (
        lay_out_shared(variables, 0).used if space == "shared" else sum(v.size + v.align for v in variables)
    )


def _silent(instruction: isa.Instruction) -> isa.Instruction:
    """printf as an instruction that does nothing: its text could be of any length."""
    return replace(instruction, opcode="pmevent") if instruction.opcode == "vprintf" else instruction


def _too_much(what: str, most: str) -> PtxError:
    return PtxError(
        f"this kernel has {what}.",
        f"A kernel of this lab takes a small part of the {most} that are read.",
        "less unrolling, and smaller arrays.",
    )


def _no_kernel(name: str) -> str:
    return NO_KERNEL.format(name=name)
