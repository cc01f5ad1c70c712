"""Values that a shuffle took from a lane which was not there, followed until something depends on them.

`__shfl_down_sync(0xffff, v, 8)` on 16 lanes gives lanes 8–15 the register of lanes 16–23: an undefined value.
That alone is no mistake, the upper half of a reduction is thrown away; storing it, branching on it or
computing an address with it is. So the machine marks the register in those lanes, marks what is computed from
it, lane by lane, and reports the first use that matters. Only kernels with a shuffle pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.isa import Address, Instruction, Negated, Pair, Register, Vector
from llmcourse.vgpu.lanes import Active

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Program, Step

NO_RESULT = ("st", "red", "vprintf", "__assertfail", "stmatrix")
"""Instructions whose first operand is read."""
USES = (*NO_RESULT, "atom", "cp", "vote", "match", "redux", "wmma", "mma", "ldmatrix", "movmatrix", "call")
"""Instructions that let a value out of its lane."""
LOADS = ("ld", "ldu")


@dataclass(frozen=True)
class Mark:
    """bool [all lanes] in which a register is undefined, and the shuffle that made it so."""

    lanes: np.ndarray
    shuffle: Instruction


def follow(program: Program, instruction: Instruction, step: Step) -> Step:
    """A step that also carries marks from what it reads to what it writes, or reports their use."""
    first, *rest = instruction.operands or (None,)
    has_result = instruction.opcode not in NO_RESULT
    reads = [program.index[r.name] for o in (rest if has_result else (first, *rest)) for r in registers_in(o)]
    writes = [program.index[r.name] for r in registers_in(first)] if has_result else []
    names = program.index
    if instruction.opcode == "shfl":
        return step  # marks by itself
    selects = instruction.opcode == "selp" and len(rest) == 3

    def run(batch: Batch, active: Active) -> None:
        marks = batch.undefined
        if not marks:
            step(batch, active)
            return
        read = [marks[i] for i in reads if i in marks]
        if read and instruction.opcode in (*USES, *LOADS):
            check(batch, active.mask, read, instruction)
            read = []
        if read and selects:
            lanes = _selected(batch, names, rest, marks)
        elif read:
            lanes = np.logical_or.reduce([mark.lanes for mark in read])
        step(batch, active)
        for index in writes:
            put_mark(batch, active, index, lanes if read else None, read[0].shuffle if read else None)

    return run


def _selected(
    batch: Batch, index: dict[str, int], operands: Sequence[object], marks: dict[int, Mark]
) -> np.ndarray:
    """Undefined lanes of selp d, a, b, p: only the chosen source matters."""
    nothing = np.zeros(batch.count, bool)

    def lanes_of(operand: object) -> np.ndarray:
        found = [marks[index[r.name]].lanes for r in registers_in(operand) if index[r.name] in marks]
        return found[0] if found else nothing

    (predicate,) = registers_in(operands[2])
    chosen = np.where(batch.registers[index[predicate.name]], lanes_of(operands[0]), lanes_of(operands[1]))
    return chosen | lanes_of(operands[2])


def mark_shuffle(
    batch: Batch,
    active: Active,
    instruction: Instruction,
    target: int | None,
    lost: np.ndarray | None,
    moved: Callable[[np.ndarray], np.ndarray],
) -> None:
    """A shuffle was carried out: mark its result, and the copies of a value that was marked before.

    lost    bool [all lanes] that read a lane which was not there, None if there are none
    moved   gives, for bool [all lanes] of the source, the same after the exchange
    """
    value, *others = ([r.name for r in registers_in(o)] for o in instruction.operands[1:])
    index, marks = batch.program.index, batch.undefined
    read = [marks[index[name]] for names in others for name in names if index[name] in marks]
    check(batch, active.mask, read, instruction)
    came = [marks[index[name]] for name in value if index[name] in marks]
    lanes = np.zeros(batch.count, bool) if lost is None else lost
    for mark in came:
        lanes = lanes | moved(mark.lanes)
    if target is not None:
        put_mark(
            batch,
            active,
            target,
            lanes,
            instruction if lost is not None else came[0].shuffle if came else None,
        )


def check_guard(batch: Batch, active: Active, instruction: Instruction) -> None:
    """Raise if active lanes decide on an undefined predicate whether they carry the instruction out."""
    assert instruction.guard is not None
    mark = batch.undefined.get(batch.program.index[instruction.guard.register.name])
    if mark is not None:
        check(batch, active.mask, [mark], instruction)


def put_mark(
    batch: Batch, active: Active, index: int, lanes: np.ndarray | None, shuffle: Instruction | None
) -> None:
    """A register was written by the active lanes: undefined in `lanes` of them, defined in the others."""
    old = batch.undefined.get(index)
    new = np.zeros(batch.count, bool) if lanes is None else lanes & active.mask
    if old is not None:
        new |= old.lanes & ~active.mask
    if new.any():
        origin = shuffle or (old.shuffle if old else None)
        assert origin is not None
        batch.undefined[index] = Mark(new, origin)
    else:
        batch.undefined.pop(index, None)


def check(batch: Batch, lanes: np.ndarray, read: list[Mark], user: Instruction) -> None:
    """Raise if one of the marks is set in `lanes`, which let the value out."""
    for mark in read:
        bad = mark.lanes & lanes
        if bad.any():
            raise _fault(batch, int(bad.argmax()), mark.shuffle, user)


def _fault(batch: Batch, lane: int, shuffle: Instruction, user: Instruction) -> KernelFault:
    does = {"bra": "branches on", "st": "stores", "ld": "loads from an address that depends on"}
    here, there = batch.program.number(user.line), batch.program.number(shuffle.line)
    where = f"line {here}" if here != there else "this line"
    return batch.fault(
        "uninitialised",
        f"this shuffle reads a lane that takes no part in it, and {where} {does.get(user.opcode, 'uses')} "
        "what it got",
        "The register of a lane that does not execute the shuffle (it is in another branch, has returned, or "
        "lies beyond the end of the block) is undefined.",
        "letting every lane of the warp reach the shuffle (with 0, for a sum), or offsets smaller than the "
        "number of lanes that take part.",
        shuffle.line,
        lane,
    )


def registers_in(operand: object) -> Iterator[Register]:
    """All registers that an operand names, those inside addresses and vectors included."""
    if isinstance(operand, Register):
        if operand.name != "_":
            yield operand
    elif isinstance(operand, Negated):
        yield operand.register
    elif isinstance(operand, Pair):
        yield from (r for r in (operand.first, operand.second) if r is not None and r.name != "_")
    elif isinstance(operand, Address):
        yield from registers_in(operand.base)
    elif isinstance(operand, Vector):
        for part in operand.parts:
            yield from registers_in(part)
