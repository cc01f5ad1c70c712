"""The PTX machine: runs a kernel on NumPy arrays, all lanes of many blocks in lockstep, and counts.

`execute` takes blocks in batches of up to 65,536 threads. Within a batch one instruction is one or a few
NumPy operations over all lanes; when lanes diverge, the machine runs the lowest basic block in which a lane
waits (see `flow`), with the other lanes switched off. Memory instructions work out, per warp, which sectors
and banks their lanes touch (see `requests`), so the counts are those of the hardware's own counters.

What it is not: a timing model. It has no caches, no scoreboard and no clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmcourse.vgpu import flow
from llmcourse.vgpu.alu import CARRY
from llmcourse.vgpu.barriers import Barriers
from llmcourse.vgpu.counters import Counters
from llmcourse.vgpu.faults import Index3, KernelFault, PtxError
from llmcourse.vgpu.isa import (
    DTYPES,
    WARP_SIZE,
    Address,
    Immediate,
    Kernel,
    Module,
    Negated,
    Operand,
    Register,
    SourceLine,
    Special,
    Symbol,
)
from llmcourse.vgpu.lanes import Active, active_lanes
from llmcourse.vgpu.memory import (
    ArgumentError,
    GlobalMemory,
    SharedLayout,
    lay_out_shared,
    place,
)
from llmcourse.vgpu.undefined import Mark, check_guard

BATCH_LANES = 1 << 16
STEP_LIMIT = 1_000_000
DONE = 1 << 30
PARKED = 1 << 29
PATIENCE = 2048
"""Steps without a meeting of all lanes, a barrier or an exit, after which spinning is suspected."""

Step = Callable[["Batch", Active], None]
Value = Any
"""A register's value: an array over lanes, or a NumPy scalar that holds for all of them."""
Fetch = Callable[["Batch", Active], Value]


@dataclass
class Run:
    """What a launch gave: its counters, the host seconds it took, and what the kernel printed."""

    counters: Counters
    seconds: float
    printed: str


def execute(
    kernel: Kernel,
    module: Module,
    grid: Index3,
    block: Index3,
    arguments: Sequence[object],
    *,
    dynamic_shared: int = 0,
    check: bool = True,
    step_limit: int = STEP_LIMIT,
    seconds: float | None = None,
    names: Sequence[str] | None = None,
) -> Run:
    """Run a kernel on the CPU.

    arguments   NumPy arrays for pointers (written in place), numbers or bytes for values, one a parameter
    check       watch shared memory for races and for reads of what nobody wrote; bounds, alignment and
                barriers are always watched
    step_limit  basic blocks after which the launch is called endless
    seconds     processor time after which it is, too; None for no such limit
    names       what the arguments are called in messages

    Raises   KernelFault where the kernel does something illegal (the arrays hold what it had written),
             PtxError for an instruction that the machine has not, ArgumentError for wrong arguments.
    """
    started = time.perf_counter()
    program = program_of(kernel)
    names = list(names or (f"argument {i}" for i in range(len(arguments))))
    memory = place(arguments, names, [v for v in module.variables.values() if v.space in ("global", "const")])
    launch = Launch(
        kernel,
        grid,
        block,
        memory,
        lay_out_shared(
            [v for v in (*module.variables.values(), *kernel.variables.values()) if v.space == "shared"],
            dynamic_shared,
        ),
        _parameters(kernel, arguments, memory, names),
        Counters(),
        check,
        step_limit,
        dynamic_shared,
        None if seconds is None else time.thread_time() + seconds,
    )
    try:
        with np.errstate(all="ignore"):
            blocks = grid[0] * grid[1] * grid[2]
            lanes = -(-(block[0] * block[1] * block[2]) // WARP_SIZE) * WARP_SIZE
            per_batch = max(1, BATCH_LANES // lanes)
            for first in range(0, blocks, per_batch):
                Batch(program, launch, np.arange(first, min(blocks, first + per_batch))).run()
    finally:
        memory.copy_back()
    launch.finish()
    return Run(launch.counters, time.perf_counter() - started, "".join(launch.printed))


class Launch:
    """What all batches of a launch share."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Index3,
        block: Index3,
        memory: GlobalMemory,
        shared: SharedLayout,
        parameters: dict[str, bytes],
        counters: Counters,
        check: bool,
        step_limit: int,
        dynamic_shared: int,
        deadline: float | None,
    ) -> None:
        self.kernel, self.grid, self.block = kernel, grid, block
        self.memory, self.shared, self.parameters = memory, shared, parameters
        self.counters, self.check, self.step_limit = counters, check, step_limit
        self.dynamic_shared, self.deadline = dynamic_shared, deadline
        self.printed: list[str] = []
        self.steps = 0
        sectors = len(memory.data) // 32 + 1
        self.touched = {kind: np.zeros(sectors, bool) for kind in ("load", "store")}
        self.local_offsets, self.local_bytes = _lay_out_local(kernel)

    def spent(self) -> bool:
        """Whether the launch has used up what it may."""
        return self.steps > self.step_limit or (
            self.deadline is not None and time.thread_time() > self.deadline
        )

    def finish(self) -> None:
        for kind, touched in self.touched.items():
            count = 32 * int(np.count_nonzero(touched))
            self.counters.whole[f"global_{kind}_unique_bytes"] = count


def _lay_out_local(kernel: Kernel) -> tuple[dict[str, int], int]:
    offsets, at = {}, 0
    for v in kernel.variables.values():
        if v.space == "local":
            at = -(-at // v.align) * v.align
            offsets[v.name] = at
            at += v.size
    return offsets, -(-at // 16) * 16


def _parameters(
    kernel: Kernel, arguments: Sequence[object], memory: GlobalMemory, names: Sequence[str]
) -> dict[str, bytes]:
    """Each parameter's bytes."""
    if len(arguments) != len(kernel.parameters):
        raise ArgumentError(
            f"{kernel.name} takes {len(kernel.parameters)} arguments, and {len(arguments)} were passed.",
            "Each parameter of the kernel needs one value.",
            "as many arguments as the kernel's signature has.",
        )
    out = {}
    for parameter, argument, address, name in zip(
        kernel.parameters, arguments, memory.addresses, names, strict=True
    ):
        if address is not None:
            data = address.to_bytes(8, "little")
        elif isinstance(argument, bytes):
            data = argument
        elif isinstance(argument, np.generic) and parameter.type == "b8":  # a structure of this size
            data = argument.tobytes()
        else:
            data = np.asarray(argument).astype(DTYPES.get(parameter.type, np.dtype("u1"))).tobytes()
        if len(data) != parameter.size:
            raise ArgumentError(
                f"{name} of {kernel.name} has {len(data)} bytes; the parameter has {parameter.size}.",
                "Pointers take arrays, numbers take numbers, structures take bytes of their size.",
                "an argument of the kind that the signature names.",
            )
        out[parameter.name] = data
    return out


class Program:
    """A kernel made ready: basic blocks in order, each a list of steps and how it ends."""

    def __init__(self, kernel: Kernel) -> None:
        from llmcourse.vgpu.instructions import compile_instruction

        self.kernel = kernel
        registers = kernel.registers | {CARRY.name: CARRY.type}
        self.index = {name: i for i, name in enumerate(registers)}
        self.initial = [DTYPES[kind].type(0) for kind in registers.values()]
        self.read = _registers_read(kernel)
        self.shuffles = any(instruction.opcode == "shfl" for instruction in kernel.code)
        self.blocks = flow.blocks_of(kernel)
        self.steps: list[list[Step]] = []
        self.tallies: list[dict[int, dict[str, int]]] = []
        for block in self.blocks:
            code = kernel.code[block.start : block.stop]
            compiled = [compile_instruction(self, instruction, self.number) for instruction in code]
            self.steps.append([c.step for c in compiled if c.step is not None])
            tally: dict[int, dict[str, int]] = {}
            for instruction, c in zip(code, compiled, strict=True):
                counts = tally.setdefault(self.number(instruction.line), {"instructions": 0})
                counts["instructions"] += 1
                if c.flops:
                    counts[c.flops[0]] = counts.get(c.flops[0], 0) + c.flops[1]
            self.tallies.append(tally)
        self.ends = [kernel.code[b.stop - 1] for b in self.blocks]
        self.guards = [None if e.guard is None else self.fetch(e.guard.register) for e in self.ends]

    def place(self, line: SourceLine | None) -> SourceLine | None:
        """The main file's line behind an instruction: of a header's, the line that used it."""
        while line is not None and line.file != self.main_file and line.inlined_at is not None:
            line = line.inlined_at
        return line

    def number(self, line: SourceLine | None) -> int:
        """The number of the line that an instruction counts for, 0 if it is not known."""
        place = self.place(line)
        return place.line if place is not None else 0

    @property
    def main_file(self) -> str:
        return self.kernel.files.get(1, "")

    def fetch(self, operand: Operand, dtype: np.dtype | None = None) -> Fetch:
        """How to get an operand's value: over all lanes, over the active ones where few are, or a scalar."""
        if isinstance(operand, Register):
            index = self.index[operand.name]

            def register(batch: Batch, active: Active) -> Value:
                value = batch.registers[index]
                if active.sparse and isinstance(value, np.ndarray):
                    return value[active.lanes]
                return value

            return register
        if isinstance(operand, Special):
            name = operand.name

            def special(batch: Batch, active: Active) -> Value:
                value = batch.special(name)
                return value[active.lanes] if active.sparse and isinstance(value, np.ndarray) else value

            return special
        if isinstance(operand, Symbol):
            symbol = operand
            return lambda batch, active: np.uint64(batch.symbol(symbol.name) + symbol.offset)
        if isinstance(operand, Negated):
            inner = self.fetch(operand.register)
            return lambda batch, active: np.logical_not(inner(batch, active))
        if isinstance(operand, Immediate):
            constant = _constant(operand.value, dtype or np.dtype("u4"))
            return lambda batch, active: constant
        raise AssertionError(operand)


def _constant(value: int | np.floating, dtype: np.dtype) -> Value:
    if isinstance(value, np.floating):
        return value if value.dtype.itemsize != dtype.itemsize else np.array(value).view(dtype)[()]
    if dtype.kind == "?":
        return np.bool_(value != 0)
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)[()]


def _registers_read(kernel: Kernel) -> set[str]:
    """Names of the registers that some instruction reads, addresses included (its first operand aside)."""
    found: set[str] = set()

    def visit(operand: object) -> None:
        if isinstance(operand, Register):
            found.add(operand.name)
        elif isinstance(operand, Negated):
            found.add(operand.register.name)
        elif isinstance(operand, Address):
            visit(operand.base)
        elif hasattr(operand, "parts"):
            for part in operand.parts:
                visit(part)

    for instruction in kernel.code:
        first, *rest = instruction.operands or (None,)
        if instruction.opcode in (
            "st",
            "red",
            "bra",
            "vprintf",
            "__assertfail",
            "bar",
            "barrier",
        ) or not isinstance(first, Register):
            visit(first)
        for operand in rest:
            visit(operand)
        if instruction.guard is not None:
            found.add(instruction.guard.register.name)
    return found


_PROGRAMS: dict[int, tuple[Kernel, Program]] = {}


def program_of(kernel: Kernel) -> Program:
    """The kernel compiled for the machine, kept for its next launch."""
    found = _PROGRAMS.get(id(kernel))
    if found is None or found[0] is not kernel:
        if len(_PROGRAMS) > 64:
            _PROGRAMS.clear()
        found = _PROGRAMS[id(kernel)] = kernel, Program(kernel)
    return found[1]


class Batch:
    """Some blocks of a launch, running together."""

    def __init__(self, program: Program, launch: Launch, blocks: np.ndarray) -> None:
        self.program, self.launch = program, launch
        self.memory, self.counters, self.check = launch.memory, launch.counters, launch.check
        threads = int(np.prod(launch.block))
        self.threads_per_block = threads
        self.lanes_per_block = -(-threads // WARP_SIZE) * WARP_SIZE
        self.blocks = blocks
        self.count = len(blocks) * self.lanes_per_block
        self.registers: list[np.ndarray] = list(program.initial)  # type: ignore[arg-type]
        self.thread = np.tile(np.arange(self.lanes_per_block, dtype=np.uint32), len(blocks))
        self.block_slot = np.repeat(np.arange(len(blocks)), self.lanes_per_block)
        self._special: dict[str, np.ndarray] = {}
        self.shared_stride = launch.shared.nbytes
        self.shared = np.zeros(len(blocks) * self.shared_stride, np.uint8)
        self.shared_base = self.block_slot * self.shared_stride
        self.shared_views: dict[np.dtype, np.ndarray] = {}
        self.local = np.zeros(self.count * launch.local_bytes, np.uint8)
        self.exists = self.thread < threads
        self.live = self.exists
        self.all_live = active_lanes(self.live, int(np.count_nonzero(self.live)))
        self.at: int | None = 0  # the block where every live lane is, None while they are apart
        self.pc = np.where(self.live, 0, DONE).astype(np.int32)
        self.since_meeting = 0
        self.barrier: Barriers | None = None
        self.pending_copies: list[object] = []
        self.copy_group = 0
        self.undefined: dict[int, Mark] = {}
        self.monitor = None
        if launch.check and launch.shared.used:
            from llmcourse.vgpu.races import SharedMonitor

            spans = {s.name: (s.start, s.stop - s.start) for s in launch.shared.spans.spans}
            self.monitor = SharedMonitor(
                len(blocks),
                self.shared_stride,
                self.lanes_per_block,
                block_index=self.block_index,
                thread_index=self.thread_index,
                symbols=spans,
                place=program.place,
            )

    # ── where lanes are ──

    def thread_index(self, thread: int) -> Index3:
        x, y, _ = self.launch.block
        return thread % x, thread // x % y, thread // (x * y)

    def block_index(self, slot: int) -> Index3:
        x, y, _ = self.launch.grid
        block = int(self.blocks[slot])
        return block % x, block // x % y, block // (x * y)

    def fault(
        self, kind: str, what: str, why: str, fix: str, line: SourceLine | None, lane: int
    ) -> KernelFault:
        return KernelFault(
            kind,
            what,
            why,
            fix,
            line=self.program.place(line),
            block=self.block_index(lane // self.lanes_per_block),
            thread=self.thread_index(lane % self.lanes_per_block),
        )

    def special(self, name: str) -> np.ndarray:
        value = self._special.get(name)
        if value is None:
            value = self._special[name] = self._make_special(name)
        return value

    def _make_special(self, name: str) -> np.ndarray:
        (bx, by, bz), (gx, gy, gz) = self.launch.block, self.launch.grid
        u = np.uint32
        sizes = {
            "%ntid.x": bx, "%ntid.y": by, "%ntid.z": bz,
            "%nctaid.x": gx, "%nctaid.y": gy, "%nctaid.z": gz,
            "%dynamic_smem_size": self.launch.dynamic_shared, "%total_smem_size": self.launch.shared.used,
            "%nwarpid": self.lanes_per_block // WARP_SIZE, "%smid": 0, "%nsmid": 1, "%gridid": 0,
        }  # fmt: skip
        if name in sizes:
            return u(sizes[name])  # type: ignore[return-value]
        t = self.thread
        block = self.blocks.astype(np.uint32)
        lane = t % u(WARP_SIZE)

        def spread(per_block: np.ndarray) -> np.ndarray:
            return np.repeat(per_block, self.lanes_per_block)

        if name == "%tid.x":
            return t if by == bz == 1 else t % u(bx)
        if name == "%tid.y":
            return t // u(bx) % u(by)
        if name == "%tid.z":
            return t // u(bx * by)
        if name == "%ctaid.x":
            return spread(block % u(gx))
        if name == "%ctaid.y":
            return spread(block // u(gx) % u(gy))
        if name == "%ctaid.z":
            return spread(block // u(gx * gy))
        if name == "%laneid":
            return lane
        if name == "%warpid":
            return t // u(WARP_SIZE)
        one = u(1) << lane
        below = one - u(1)
        masks = {
            "%lanemask_eq": one,
            "%lanemask_lt": below,
            "%lanemask_le": below | one,
            "%lanemask_gt": ~(below | one),
            "%lanemask_ge": ~below,
        }
        if name in masks:
            return masks[name]
        if name in ("%clock", "%clock_hi"):
            return u(self.launch.steps)  # type: ignore[return-value]
        if name in ("%clock64", "%globaltimer"):
            return np.uint64(self.launch.steps)  # type: ignore[return-value]
        raise PtxError(
            f"the machine has no register {name}.",
            "It has threadIdx, blockIdx, blockDim, gridDim, lanes, warps and clocks of a plain launch.",
            "computing the value from these.",
        )

    def symbol(self, name: str) -> int:
        launch = self.launch
        for table in (launch.shared.offsets, launch.local_offsets, launch.memory.symbols):
            if name in table:
                return table[name]
        raise PtxError(
            f"the kernel uses {name}, which this module does not define.",
            "A variable that is only declared has no memory.",
            "defining it in the same source.",
        )

    # ── running ──

    def run(self) -> None:
        program, launch = self.program, self.launch
        executed: dict[int, list[int]] = {}
        try:
            while True:
                launch.steps += 1
                if launch.spent():
                    raise self._endless()
                if self.at is None:
                    index, mask = self._turn()
                    if index >= PARKED:
                        if self.barrier is None or not self.barrier.waiting:
                            break
                        self.barrier.release()
                        self.since_meeting = 0
                        continue
                    active = active_lanes(mask, self.all_live.threads)
                    if active.whole:
                        self.at, active = index, self.all_live
                else:
                    index, active = self.at, self.all_live
                    if not active.threads:
                        break
                seen = executed.setdefault(index, [0, 0])
                seen[0] += active.warps
                seen[1] += active.threads
                for step in program.steps[index]:
                    step(self, active)
                self._leave(index, active)
            if self.monitor is not None:
                self.monitor.finish()
        finally:
            self._tally(executed)

    def _turn(self) -> tuple[int, np.ndarray]:
        """The block to run next and the lanes that wait there: the lowest.

        A lane that spins until another writes a flag would keep the others from ever writing it. So when
        lanes have not met for long, every other turn goes to those that the lowest block keeps waiting:
        other warps first, and other lanes of its warps if there are none.
        """
        index = int(self.pc.min())
        mask = self.pc == index
        self.since_meeting += 1
        if self.since_meeting > PATIENCE and self.since_meeting % 2:
            busy = np.repeat(mask.reshape(-1, WARP_SIZE).any(axis=1), WARP_SIZE)
            for excluded in (busy, mask):
                others = np.where(excluded, DONE, self.pc)
                lowest = int(others.min())
                if lowest < PARKED:
                    return lowest, others == lowest
        return index, mask

    def _tally(self, executed: dict[int, list[int]]) -> None:
        for index, (warps, threads) in executed.items():
            for line, counts in self.program.tallies[index].items():
                at = self.counters.at(line)
                for name, count in counts.items():
                    if name == "instructions":
                        at[name] += count * warps
                        at["thread_instructions"] += count * threads
                    elif name == "flops_tensor":
                        at[name] += count * warps
                    else:
                        at[name] += count * threads

    def _leave(self, index: int, active: Active) -> None:
        """Move lanes on from the end of a block."""
        block, end = self.program.blocks[index], self.program.ends[index]
        opcode = end.opcode
        if self.undefined and end.guard is not None and opcode in flow.ENDS:
            check_guard(self, active, end)
        if opcode == "bra":
            counts = self.counters.at(self.program.number(end.line))
            counts["branches"] += active.warps
            guard = self.program.guards[index]
            if guard is None:
                self._go(active, block.taken[0])
                return
            assert end.guard is not None
            assert block.next is not None
            taken = guard(self, active)
            if end.guard.negated:
                taken = np.logical_not(taken)
            if not isinstance(taken, np.ndarray):
                self._go(active, block.taken[0] if taken else block.next)
                return
            taken = active.spread(taken)
            yes = active.mask & taken
            number = int(np.count_nonzero(yes))
            if number == active.threads:
                self._go(active, block.taken[0])
            elif number == 0:
                self._go(active, block.next)
            else:
                no = active.mask & ~taken
                both = yes.reshape(-1, WARP_SIZE).any(1) & no.reshape(-1, WARP_SIZE).any(1)
                counts["divergent_branches"] += int(np.count_nonzero(both))
                self._split()
                self.pc[yes] = block.taken[0]
                self.pc[no] = block.next
        elif opcode in ("ret", "exit"):
            self._exit(index, active)
        elif opcode in ("bar", "barrier"):
            self._barriers().arrive(end, active, block.next)
        elif opcode == "brx":
            self._indexed(index, active)
        elif opcode == "trap":
            raise self.fault(
                "assertion",
                "the kernel stopped itself with a trap.",
                "__trap() ends the launch with an error.",
                "looking at the condition that leads there.",
                end.line,
                int(np.flatnonzero(active.mask)[0]),
            )
        else:
            assert block.next is not None
            self._go(active, block.next)

    def _split(self) -> None:
        """From one place for all lanes to a place for each."""
        if self.at is not None:
            self.pc = np.where(self.live, self.at, DONE).astype(np.int32)
            self.at = None

    def _go(self, active: Active, index: int) -> None:
        if self.at is not None and active.whole:
            self.at, self.since_meeting = index, 0
        else:
            self._split()
            self.pc[active.mask] = index

    def _indexed(self, index: int, active: Active) -> None:
        block, end = self.program.blocks[index], self.program.ends[index]
        which = self.program.fetch(end.operands[0])(self, active)
        if not isinstance(which, np.ndarray):
            self._go(active, block.taken[int(which)])
            return
        self._split()
        lanes = np.flatnonzero(active.mask)
        values = which if active.sparse else which[lanes]
        self.pc[lanes] = np.array(block.taken, np.int32)[values]

    def _exit(self, index: int, active: Active) -> None:
        block, end = self.program.blocks[index], self.program.ends[index]
        leaving = active.mask
        if end.guard is not None:
            holds = active.spread(self.program.guards[index](self, active))  # type: ignore[misc]
            leaving = active.mask & (np.logical_not(holds) if end.guard.negated else holds)
        self._split()
        self.since_meeting = 0
        if block.next is not None:
            self.pc[active.mask] = block.next
        self.pc[leaving] = DONE
        self.live = self.live & ~leaving
        self.all_live = active_lanes(self.live, int(np.count_nonzero(self.live)))

    def _barriers(self) -> Barriers:
        if self.barrier is None:
            self.barrier = Barriers(self)
        return self.barrier

    def _endless(self) -> KernelFault:
        lane = int(np.flatnonzero(self.live)[0]) if self.live.any() else 0
        at = self.at if self.at is not None else int(self.pc[self.live].min())
        line = self.program.ends[at].line if at < len(self.program.ends) else None
        return self.fault(
            "endless",
            f"the launch did not end within {min(self.launch.steps, self.launch.step_limit):,} steps.",
            "A step is one basic block run by the lanes that wait there. A loop whose condition stays true, "
            "or that waits for a thread which cannot come, has no end.",
            "checking that every lane's loop counter moves, or a higher step_limit for a long kernel.",
            line,
            lane,
        )
