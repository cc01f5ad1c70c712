"""cp.async: copies from global to shared memory that finish at a wait.

The bytes are read when the copy is issued and appear in shared memory when the thread waits for its group:
a kernel that forgets the wait finds the old contents, as it may on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu.access import addresses_of, locate, space_of, whole
from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.isa import Address, Immediate, Instruction
from llmcourse.vgpu.lanes import Active

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Program, Step


@dataclass
class Pending:
    """A copy under way: `group` counts commits; the shared store is done when its turn comes."""

    group: int
    active: Active
    base: np.ndarray | int
    offset: int
    size: int
    data: np.ndarray
    instruction: Instruction


def compile_copy(program: Program, instruction: Instruction) -> Step:
    """cp.async of 4, 8 or 16 bytes, its commit_group, wait_group and wait_all."""
    modifiers = instruction.modifiers
    if "commit_group" in modifiers:
        return _commit
    if "wait_group" in modifiers or "wait_all" in modifiers:
        left = instruction.operands[0] if instruction.operands else Immediate(0)
        assert isinstance(left, Immediate)
        keep, everything = int(left.value), "wait_all" in modifiers

        def wait(batch: Batch, active: Active) -> None:
            until = batch.copy_group + 1 if everything else batch.copy_group - keep
            _finish(batch, until)

        return wait
    if "bulk" in modifiers or modifiers[0] != "async" or "mbarrier" in modifiers:
        raise PtxError(
            f"{instruction.line}: the machine has no {instruction.text}.",
            "Of asynchronous copies it has cp.async with groups; bulk (TMA) copies need a GPU.",
            "cp.async of 16 bytes a thread (__pipeline_memcpy_async).",
        )
    target, source = instruction.operands[:2]
    size = instruction.operands[2]
    assert isinstance(target, Address)
    assert isinstance(source, Address)
    assert isinstance(size, Immediate)
    nbytes = int(size.value)
    used = program.fetch(instruction.operands[3]) if len(instruction.operands) > 3 else None
    to, of = whole(program, target.base), whole(program, source.base)
    unit = np.dtype("u4")

    def copy(batch: Batch, active: Active) -> None:
        limit = None if used is None else np.asarray(active.own(used(batch, active)))
        if limit is not None and (limit == 0).all():
            data = np.zeros((active.threads, nbytes // 4), np.uint32)
        else:
            view, index, _ = locate(
                batch, active, instruction, "global", of(batch), source.offset, nbytes, "load", unit
            )
            data = view[index[:, None] + np.arange(nbytes // 4)]
            if limit is not None:
                inside = np.arange(nbytes // 4) * 4 < np.broadcast_to(limit, active.threads)[:, None]
                data = np.where(inside, data, 0)
        addresses_of(batch, active, to(batch))
        batch.pending_copies.append(
            Pending(batch.copy_group, active, to(batch), target.offset, nbytes, data, instruction)
        )

    return copy


def _commit(batch: Batch, active: Active) -> None:
    batch.copy_group += 1


def _finish(batch: Batch, until: int) -> None:
    """Let the copies of groups before `until` arrive."""
    later: list[object] = []
    for pending in batch.pending_copies:
        assert isinstance(pending, Pending)
        if pending.group >= until:
            later.append(pending)
            continue
        space = "generic" if space_of(pending.instruction) == "generic" else "shared"
        view, index, _ = locate(
            batch,
            pending.active,
            pending.instruction,
            space,
            pending.base,
            pending.offset,
            pending.size,
            "copy",
            np.dtype("u4"),
        )
        for i in range(pending.size // 4):
            view[index + i] = pending.data[:, i]
    batch.pending_copies = later
