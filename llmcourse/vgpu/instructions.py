"""From a PTX instruction to a step of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu.access import compile_access
from llmcourse.vgpu.alu import compile_alu
from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.flow import ENDS
from llmcourse.vgpu.isa import (
    WARP_SIZE,
    Instruction,
    Pair,
    Register,
    SourceLine,
    Vector,
)
from llmcourse.vgpu.lanes import Active, active_lanes, scattered, written
from llmcourse.vgpu.printing import compile_call
from llmcourse.vgpu.warp import WarpFault, compile_warp

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Program, Step

NOTHING_TO_DO = ("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "applypriority",
                 "discard", "setmaxnreg", "pmevent", "brkpt", "isspacep_")  # fmt: skip
MATRIX = ("wmma", "mma", "ldmatrix", "stmatrix", "movmatrix")


@dataclass(frozen=True)
class Compiled:
    """step   what the machine runs, None for what only ends a block
    flops  (counter, operations a lane), or a warp for the tensor cores"""

    step: Step | None
    flops: tuple[str, int] | None = None


def compile_instruction(
    program: Program, instruction: Instruction, number: Callable[[SourceLine | None], int]
) -> Compiled:
    """Raises   PtxError naming the source line if the machine has no such instruction."""
    if instruction.opcode in ENDS:
        return Compiled(None)
    if instruction.opcode in NOTHING_TO_DO:
        return Compiled(None)
    alu = compile_alu(instruction)
    if alu is not None:
        step = _alu_step(program, alu)
        return Compiled(_guarded(program, instruction, step), alu.flops)
    for make in (compile_access, compile_call):
        made = make(program, instruction)
        if made is not None:
            return Compiled(_guarded(program, instruction, made))
    operation: object = compile_warp(instruction)
    if operation is None and instruction.opcode in MATRIX:
        from llmcourse.vgpu.matrix import compile_matrix

        operation = compile_matrix(instruction)
    if operation is not None:
        step = _warp_step(program, instruction, operation)
        return Compiled(_guarded(program, instruction, step), getattr(operation, "flops", None))
    raise PtxError(
        f"{instruction.line or 'this kernel'}: the machine has no {instruction.opcode} instruction "
        f"({instruction.text}).",
        "It covers what NVRTC makes of ordinary CUDA C++; bulk copies, clusters and warpgroups need the GPU.",
        "another way to write that line, or running the kernel on a GPU.",
    )


def _guarded(program: Program, instruction: Instruction, step: Step) -> Step:
    """A step that only lanes whose guard holds carry out."""
    if instruction.guard is None:
        return step
    fetch, negated = program.fetch(instruction.guard.register), instruction.guard.negated

    def run(batch: Batch, active: Active) -> None:
        holds = fetch(batch, active)
        if negated:
            holds = np.logical_not(holds)
        if not isinstance(holds, np.ndarray):
            if holds:
                step(batch, active)
            return
        if active.sparse:
            full = np.zeros(batch.count, bool)
            full[active.lanes] = holds
            holds = full
        some = active_lanes(active.mask & holds, batch.all_live.threads)
        if some.threads:
            step(batch, some)

    return run


def _alu_step(program: Program, alu: object) -> Step:
    apply = alu.apply  # type: ignore[attr-defined]
    fetches = [program.fetch(source) for source in alu.sources]  # type: ignore[attr-defined]
    targets = [
        None if d is None or d.name == "_" else program.index[d.name]
        for d in alu.destinations  # type: ignore[attr-defined]
    ]
    if len(targets) == 1 and targets[0] is not None and len(fetches) in (1, 2, 3):
        return _single(apply, fetches, targets[0])

    def several(batch: Batch, active: Active) -> None:
        results = apply(*(fetch(batch, active) for fetch in fetches))
        if not isinstance(results, tuple):
            results = (results,)
        for target, result in zip(targets, results, strict=True):
            if target is not None:
                put(batch, active, target, result)

    return several


def _single(apply: Callable[..., np.ndarray], fetches: list, target: int) -> Step:
    """The common case, one result of up to three sources, without a loop."""
    if len(fetches) == 1:
        (one,) = fetches

        def run1(batch: Batch, active: Active) -> None:
            put(batch, active, target, apply(one(batch, active)))

        return run1
    if len(fetches) == 2:
        first, second = fetches

        def run2(batch: Batch, active: Active) -> None:
            put(batch, active, target, apply(first(batch, active), second(batch, active)))

        return run2
    a, b, c = fetches

    def run3(batch: Batch, active: Active) -> None:
        put(batch, active, target, apply(a(batch, active), b(batch, active), c(batch, active)))

    return run3


def put(batch: Batch, active: Active, target: int, value: np.ndarray) -> None:
    """Write a register: one value for every lane, for every active lane where few are, or a scalar."""
    if active.whole:
        batch.registers[target] = value
    elif active.sparse:
        batch.registers[target] = scattered(batch.registers[target], value, active)
    else:
        batch.registers[target] = written(batch.registers[target], value, active)


def _warp_step(program: Program, instruction: Instruction, operation: object) -> Step:
    """Shuffles, votes and matrix products: the lanes of a warp see each other's values."""
    fetches = [program.fetch(source) for source in operation.sources]  # type: ignore[attr-defined]
    targets = [
        None if d is None or d.name == "_" else program.index[d.name]
        for d in operation.destinations  # type: ignore[attr-defined]
    ]
    apply = operation.apply  # type: ignore[attr-defined]

    def run(batch: Batch, active: Active) -> None:
        mask = active.by_warp()
        warps = np.flatnonzero(mask.any(axis=1)) if not active.whole else slice(None)
        values = []
        for fetch in fetches:
            value = fetch(batch, _everyone(active))
            if not isinstance(value, np.ndarray):
                value = np.full(batch.count, value)
            values.append(value.reshape(-1, WARP_SIZE)[warps])
        try:
            results = apply(mask[warps], *values)
        except WarpFault as problem:
            numbers = np.arange(len(mask))[warps]
            lane = int(numbers[problem.warp]) * WARP_SIZE + problem.lane
            raise batch.fault(
                getattr(problem, "kind", "divergent barrier"),
                str(problem),
                getattr(problem, "why", "The lanes of a warp that exchange values must all be there."),
                getattr(problem, "fix", "a mask that names exactly the lanes which reach this line."),
                instruction.line,
                lane,
            ) from None
        if not isinstance(results, tuple):
            results = (results,)
        for target, result in zip(targets, results, strict=True):
            if target is None:
                continue
            if isinstance(warps, slice):
                value = np.ascontiguousarray(result).reshape(-1)
            else:
                old = batch.registers[target]
                value = old.copy() if isinstance(old, np.ndarray) else np.full(batch.count, old)
                value.reshape(-1, WARP_SIZE)[warps] = result
            batch.registers[target] = written(batch.registers[target], value, active)
        if batch.monitor is not None:
            batch.monitor.warp_barrier(None if active.whole else np.asarray(mask.any(axis=1)))

    return run


def _everyone(active: Active) -> Active:
    """The same lanes, fetched as whole registers."""
    return active if not active.sparse else Active(active.mask, None, True, active.warps, active.threads)


def registers_of(operand: object) -> list[Register | None]:
    """The registers of a destination: one, a pair's or a vector's."""
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Pair):
        return [operand.first, operand.second]
    if isinstance(operand, Vector):
        return [p if isinstance(p, Register) else None for p in operand.parts]
    raise AssertionError(operand)
