"""From a PTX instruction to a step of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu import undefined
from llmcourse.vgpu.access import compile_access
from llmcourse.vgpu.alu import compile_alu
from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.flow import ENDS
from llmcourse.vgpu.isa import (
    DTYPES,
    WARP_SIZE,
    Instruction,
    SourceLine,
)
from llmcourse.vgpu.lanes import Active, active_lanes, scattered, written
from llmcourse.vgpu.printing import compile_call
from llmcourse.vgpu.warp import WarpFault, WarpOp, compile_warp

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Program, Step

NOTHING_TO_DO = ("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "applypriority",
                 "discard", "setmaxnreg", "pmevent", "brkpt")  # fmt: skip
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
    if instruction.opcode in ENDS or instruction.opcode in NOTHING_TO_DO:
        return Compiled(None)
    found = _step(program, instruction)
    if found is not None:
        step, flops = found
        if program.shuffles:
            step = undefined.follow(program, instruction, step)
        return Compiled(_guarded(program, instruction, step), flops)
    raise PtxError(
        f"{instruction.line or 'this kernel'}: the machine has no {instruction.opcode} instruction "
        f"({instruction.text}).",
        "It covers what NVRTC makes of ordinary CUDA C++; bulk copies, clusters and warpgroups need the GPU.",
        "another way to write that line, or running the kernel on a GPU.",
    )


def _step(program: Program, instruction: Instruction) -> tuple[Step, tuple[str, int] | None] | None:
    """What the instruction does to its active lanes, and its floating-point operations; None if unknown."""
    alu = compile_alu(instruction)
    if alu is not None:
        return _alu_step(program, alu), alu.flops
    for make in (compile_access, compile_call):
        made = make(program, instruction)
        if made is not None:
            return made, None
    operation = compile_warp(instruction)
    if operation is None and instruction.opcode in MATRIX:
        from llmcourse.vgpu.matrix import compile_matrix
        from llmcourse.vgpu.tiles import compile_tile

        tile = compile_tile(program, instruction)
        if tile is not None:
            return _whole_warps(instruction, tile), None
        operation = compile_matrix(instruction)
    if operation is None:
        return None
    return _whole_warps(instruction, _warp_step(program, instruction, operation)), operation.flops


def _guarded(program: Program, instruction: Instruction, step: Step) -> Step:
    """A step that only lanes whose guard holds carry out."""
    if instruction.guard is None:
        return step
    fetch, negated = program.fetch(instruction.guard.register), instruction.guard.negated

    def run(batch: Batch, active: Active) -> None:
        if batch.undefined:
            undefined.check_guard(batch, active, instruction)
        holds = fetch(batch, active)
        if negated:
            holds = np.logical_not(holds)
        if not isinstance(holds, np.ndarray):
            if holds:
                step(batch, active)
            return
        some = active_lanes(active.mask & active.spread(holds), batch.all_live.threads)
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


def _whole_warps(instruction: Instruction, step: Step) -> Step:
    """A step whose warps may lack lanes that it needs: says so with the line, block and thread."""

    def run(batch: Batch, active: Active) -> None:
        try:
            step(batch, active)
        except WarpFault as problem:
            warps = np.flatnonzero(active.by_warp().any(axis=1))
            lane = int(warps[problem.warp]) * WARP_SIZE + problem.lane
            raise batch.fault(
                problem.kind, problem.what, problem.why, problem.fix, instruction.line, lane
            ) from None

    return run


def _warp_step(program: Program, instruction: Instruction, operation: WarpOp) -> Step:
    """Shuffles, votes and matrix products: the lanes of a warp see each other's values.

    None of them orders memory (CUDA C++ Programming Guide, "Warp Shuffle Functions"): the watch over shared
    memory goes on as if they were not there.
    """
    fetches = [
        program.fetch(source, DTYPES[kind])
        for source, kind in zip(operation.sources, operation.source_types, strict=True)
    ]
    targets = [None if d is None or d.name == "_" else program.index[d.name] for d in operation.destinations]
    shuffles = instruction.opcode == "shfl"

    def run(batch: Batch, active: Active) -> None:
        mask = active.by_warp()
        rows = mask.any(axis=1)
        warps: slice | np.ndarray = slice(None) if rows.all() else np.flatnonzero(rows)
        everyone = _everyone(active)
        values = []
        for fetch in fetches:
            value = fetch(batch, everyone)
            if isinstance(value, np.ndarray):
                value = value.reshape(-1, WARP_SIZE)[warps]
            values.append(value)
        exited = ~batch.live.reshape(-1, WARP_SIZE)[warps]
        lost: list[np.ndarray] = []
        results = operation.apply(mask[warps], *values, exited=exited, undefined=lost.append)
        if shuffles and batch.check and (lost or batch.undefined):

            def spread(lanes: np.ndarray) -> np.ndarray:
                full = np.zeros(mask.shape, bool)
                full[warps] = lanes
                return full.reshape(-1)

            def moved(lanes: np.ndarray) -> np.ndarray:
                mine = lanes.reshape(-1, WARP_SIZE)[warps].astype(np.uint32)
                exchange = operation.apply(
                    mask[warps], mine, *values[1:], exited=exited, undefined=lost.append
                )
                return spread(exchange[0] != 0)

            undefined.mark_shuffle(
                batch, active, instruction, targets[0], spread(lost[0]) if lost else None, moved
            )
        for target, result in zip(targets, results, strict=False):
            if target is None:
                continue
            old = batch.registers[target]
            if isinstance(warps, slice):
                value = np.ascontiguousarray(result).reshape(-1)
            else:
                value = old.copy() if isinstance(old, np.ndarray) else np.full(batch.count, old)
                value.reshape(-1, WARP_SIZE)[warps] = result
            batch.registers[target] = written(old, value, active)

    return run


def _everyone(active: Active) -> Active:
    """The same lanes, fetched as whole registers."""
    return active if not active.sparse else Active(active.mask, None, True, active.warps, active.threads)
