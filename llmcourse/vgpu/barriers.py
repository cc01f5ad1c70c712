"""Barriers: which lanes wait, and when they go on.

`__syncthreads()` (bar.sync) holds a lane until every thread of its block has come to the same barrier. On
a GPU a block in which some threads cannot come hangs, or goes on with wrong data; here that is a fault which
names the barrier and a thread that is missing. `__syncwarp()` (bar.warp.sync) does the same for the lanes of
a warp that its mask names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu.faults import KernelFault, PtxError
from llmcourse.vgpu.isa import WARP_SIZE, Immediate, Instruction, Register
from llmcourse.vgpu.lanes import Active

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch

ALL_THREADS = -1
IDS = 16


class Barriers:
    """The lanes of a batch that wait at barriers.

    resume   block in which a waiting lane goes on, -1 for lanes that do not wait
    number   the barrier it waits at; `wanted` how many threads that barrier needs (ALL_THREADS: every one)
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        count = batch.count
        self.resume = np.full(count, -1, np.int32)
        self.number = np.zeros(count, np.int32)
        self.wanted = np.full(count, ALL_THREADS, np.int32)
        self.site = np.zeros(count, np.int32)
        self.value = np.zeros(count, bool)
        self.sites: list[Instruction] = []
        self.arrived = np.zeros((len(batch.blocks), IDS), np.int64)

    @property
    def waiting(self) -> bool:
        return bool((self.resume >= 0).any())

    def arrive(self, instruction: Instruction, active: Active, resume: int | None) -> None:
        """Active lanes have come to a barrier at the end of their block."""
        assert resume is not None
        batch = self.batch
        if instruction.has("warp"):
            self._warp(instruction, active, resume)
            return
        line = batch.program.number(instruction.line)
        batch.counters.at(line)["barriers"] += active.warps
        plain = (
            not instruction.has("red", "arrive")
            and len(instruction.operands) == 1
            and isinstance(instruction.operands[0], Immediate)
        )
        if plain and batch.at is not None and active.whole and batch.live is batch.exists:
            if batch.monitor is not None:
                batch.monitor.barrier(None)
            batch.at = resume
            return
        batch._split()
        lanes = np.flatnonzero(active.mask)
        operands = list(instruction.operands)
        if instruction.has("red"):
            operands = operands[1:]
        number = self._values(operands[0], active)
        count_given = len(operands) > 1 and not (instruction.has("red") and len(operands) == 2)
        wanted = self._values(operands[1], active) if count_given else ALL_THREADS
        if instruction.has("arrive"):
            np.add.at(self.arrived, (batch.block_slot[lanes], number), 1)
            batch.pc[lanes] = resume
            return
        if instruction.has("red"):
            self.value[lanes] = self._values(operands[-1], active)
        from llmcourse.vgpu.machine import PARKED

        self.resume[lanes] = resume
        self.number[lanes] = number
        self.wanted[lanes] = wanted
        self.site[lanes] = self._site(instruction)
        batch.pc[lanes] = PARKED

    def _values(self, operand: object, active: Active) -> np.ndarray:
        assert isinstance(operand, Register | Immediate) or hasattr(operand, "register")
        return active.own_each(self.batch.program.fetch(operand)(self.batch, active))  # type: ignore[arg-type]

    def _site(self, instruction: Instruction) -> int:
        for i, known in enumerate(self.sites):
            if known is instruction:
                return i
        self.sites.append(instruction)
        return len(self.sites) - 1

    def release(self) -> None:
        """No lane can run: let those go whose barrier is complete.

        Raises   KernelFault if no barrier is, or if threads of one block wait at different ones.
        """
        batch = self.batch
        blocks = len(batch.blocks)
        waiting = (self.resume >= 0).reshape(blocks, -1)
        live = batch.live.reshape(blocks, -1)
        go = np.zeros(blocks, bool)
        for slot in np.flatnonzero(waiting.any(axis=1)):
            go[slot] = self._complete(int(slot), waiting[slot], live[slot])
        if not go.any():
            raise self._deadlock()
        lanes = np.flatnonzero(go[batch.block_slot] & (self.resume >= 0) & self._released)
        self._reduce(lanes)
        batch.pc[lanes] = self.resume[lanes]
        self.resume[lanes] = -1
        if batch.monitor is not None:
            batch.monitor.barrier(go)

    _released: np.ndarray

    def _complete(self, slot: int, waiting: np.ndarray, live: np.ndarray) -> bool:
        batch = self.batch
        first = slot * batch.lanes_per_block
        span = slice(first, first + batch.lanes_per_block)
        if not hasattr(self, "_released") or len(self._released) != batch.count:
            self._released = np.zeros(batch.count, bool)
        self._released[span] = False
        released = False
        for number in np.unique(self.number[span][waiting]):
            here = waiting & (self.number[span] == number)
            wanted = int(self.wanted[span][here][0])
            arrived = int(np.count_nonzero(here)) + int(self.arrived[slot, number])
            if wanted == ALL_THREADS:
                self._same_place(slot, here, live)
                if not here[live].all():
                    continue
            elif arrived < wanted:
                continue
            self.arrived[slot, number] = 0
            self._released[span] |= here
            released = True
        return released

    def _same_place(self, slot: int, here: np.ndarray, live: np.ndarray) -> None:
        """Every thread of the block must come to this barrier, and to the same one."""
        batch = self.batch
        first = slot * batch.lanes_per_block
        exists = batch.exists[first : first + batch.lanes_per_block]
        sites = np.unique(self.site[first : first + batch.lanes_per_block][here])
        lines = {self.sites[s].line.line for s in sites if self.sites[s].line is not None}  # type: ignore[union-attr]
        instruction = self.sites[sites[0]]
        gone = exists & ~live
        one = int(np.flatnonzero(here)[0])
        if gone.any():
            raise self._divergent(
                instruction,
                first + one,
                f"__syncthreads() after {int(np.count_nonzero(gone))} of the block's threads have returned; "
                f"thread {_text(batch, int(np.flatnonzero(gone)[0]))} is one, and waiting is",
            )
        if len(lines) > 1:
            other = int(np.flatnonzero(here & (self.site[first : first + len(here)] != sites[0]))[0])
            raise self._divergent(
                instruction,
                first + one,
                f"threads of a block wait at different barriers, lines {', '.join(map(str, sorted(lines)))}; "
                f"thread {_text(batch, other)} at another than",
            )

    def _divergent(self, instruction: Instruction, lane: int, what: str) -> KernelFault:
        return self.batch.fault(
            "divergent barrier",
            what,
            "A barrier waits for every thread of the block. Under a condition that differs between them, or "
            "after an early return, some never come: a GPU then hangs or goes on with half of the data.",
            "taking __syncthreads() out of the condition, and guarding the loads and stores instead.",
            instruction.line,
            lane,
        )

    def _reduce(self, lanes: np.ndarray) -> None:
        """Results of __syncthreads_count, _and and _or."""
        batch = self.batch
        for site in np.unique(self.site[lanes]) if len(self.sites) else ():
            instruction = self.sites[site]
            if not instruction.has("red"):
                continue
            mine = lanes[self.site[lanes] == site]
            slots = batch.block_slot[mine]
            total = np.bincount(slots, weights=self.value[mine], minlength=len(batch.blocks)).astype(
                np.uint32
            )
            size = np.bincount(slots, minlength=len(batch.blocks))
            target = instruction.operands[0]
            if not isinstance(target, Register):
                raise PtxError("a barrier without a result.", "bar.red gives one.", "a newer compiler.")
            if instruction.has("popc"):
                result = total[slots]
            elif instruction.has("and"):
                result = (total == size)[slots]
            else:
                result = (total > 0)[slots]
            index = batch.program.index[target.name]
            old = batch.registers[index]
            new = old.copy() if isinstance(old, np.ndarray) else np.full(batch.count, old)
            new[mine] = result
            batch.registers[index] = new

    def _warp(self, instruction: Instruction, active: Active, resume: int) -> None:
        """bar.warp.sync: lanes that the mask names must be here."""
        batch = self.batch
        lanes = np.flatnonzero(active.mask)
        mask = np.zeros(batch.count, np.uint32)
        mask[lanes] = self._values(instruction.operands[0], active)
        bits = np.uint32(1) << np.arange(WARP_SIZE, dtype=np.uint32)
        wanted = np.bitwise_or.reduce(mask.reshape(-1, WARP_SIZE), axis=1)[:, None] & bits != 0
        missing = wanted & batch.live.reshape(-1, WARP_SIZE) & ~active.by_warp()
        if missing.any():
            lane = int(np.flatnonzero(missing.reshape(-1))[0])
            raise batch.fault(
                "divergent barrier",
                f"__syncwarp() names thread {_text(batch, lane)}, which is not there; waiting is",
                "Its mask must name exactly the lanes that come to it together.",
                "the mask of the lanes in this branch, or __syncwarp() after the branches have met.",
                instruction.line,
                int(lanes[0]),
            )
        if batch.monitor is not None:
            batch.monitor.warp_barrier(None if active.whole else np.asarray(active.by_warp().any(axis=1)))
        batch._go(active, resume)

    def _deadlock(self) -> KernelFault:
        batch = self.batch
        lane = int(np.flatnonzero(self.resume >= 0)[0])
        instruction = self.sites[self.site[lane]]
        slot = lane // batch.lanes_per_block
        first = slot * batch.lanes_per_block
        here = (self.resume >= 0)[first : first + batch.lanes_per_block]
        wanted = int(self.wanted[lane])
        need = "every thread" if wanted == ALL_THREADS else f"{wanted} threads"
        return batch.fault(
            "deadlock",
            f"barrier {int(self.number[lane])} waits for {need}, {int(np.count_nonzero(here))} have come and "
            "no other can. Waiting is",
            "All other threads of the block wait elsewhere or have ended.",
            "the same number of arrivals as the barrier expects, in every path through the kernel.",
            instruction.line,
            lane,
        )


def _text(batch: Batch, lane: int) -> str:
    from llmcourse.vgpu.faults import index_text

    return index_text(batch.thread_index(lane % batch.lanes_per_block))
