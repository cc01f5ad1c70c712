"""Loads, stores and atomics: bounds, counts, data.

What the machine learns about a set of addresses (bounds, bank pattern, flat index) it keeps with the register
array that held them, so that sixteen loads from one pointer at sixteen offsets are analysed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmcourse.vgpu import requests
from llmcourse.vgpu.faults import KernelFault, PtxError
from llmcourse.vgpu.isa import (
    DTYPES,
    SECTOR_BYTES,
    WARP_SIZE,
    Address,
    Immediate,
    Instruction,
    Operand,
    Register,
    Symbol,
    Vector,
)
from llmcourse.vgpu.lanes import Active, scattered
from llmcourse.vgpu.memory import LOCAL_WINDOW, SHARED_WINDOW

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Fetch, Program, Step

Kind = Literal["load", "store", "atomic", "copy"]
"""copy: what an asynchronous copy writes; the hardware counts it apart from stores."""
SPACES = ("param", "global", "shared", "local", "const")
NAMES = {"load": "load", "store": "store", "atomic": "atomic operation", "copy": "copy"}


def space_of(instruction: Instruction) -> str:
    """The memory an instruction names, "generic" if it names none. `shared::cta` is shared."""
    for m in instruction.modifiers:
        name = m.split("::")[0]
        if name in SPACES:
            return name
    return "generic"


def compile_access(program: Program, instruction: Instruction) -> Step | None:
    """The step of a memory instruction, None if it is none."""
    from llmcourse.vgpu import asynchronous, atomics

    opcode = instruction.opcode
    if opcode in ("ld", "ldu"):
        return (
            _parameter(program, instruction)
            if space_of(instruction) == "param"
            else _load(program, instruction)
        )
    if opcode == "st":
        return _store(program, instruction)
    if opcode in ("atom", "red"):
        return atomics.compile_atomic(program, instruction)
    if opcode == "cvta":
        return _convert_address(program, instruction)
    if opcode == "isspacep":
        return _is_space(program, instruction)
    if opcode == "cp":
        return asynchronous.compile_copy(program, instruction)
    return None


# ── addresses ──


@dataclass(eq=False)
class Addresses:
    """What is known about the addresses in a register, for one set of lanes.

    base    the register's value (kept, so that its identity stays its own), or a number
    bytes   int64 [active lanes]
    """

    base: np.ndarray | int
    bytes: np.ndarray
    low: int
    high: int
    known: dict[object, object] = field(default_factory=dict)


def addresses_of(batch: Batch, active: Active, value: np.ndarray | int) -> Addresses:
    """Look up or work out what `value`, a register of addresses, holds for these lanes."""
    key = id(value)
    found = active.cache.get(key)
    if isinstance(found, Addresses) and found.base is value:
        return found
    if isinstance(value, np.ndarray):
        lanes = value if active.lanes is None else value[active.lanes]
        # An address of 32 bits is a shared one; as 64 it must not be negative.
        lanes = lanes.view(np.int64) if lanes.dtype.itemsize == 8 else lanes.astype(np.int64)
    else:
        lanes = np.full(active.threads, int(value), np.int64)
    made = Addresses(value, lanes, int(lanes.min()), int(lanes.max()))
    if len(active.cache) > 512:
        active.cache.clear()
    active.cache[key] = made
    return made


def whole(program: Program, operand: Operand) -> Callable[[Batch], np.ndarray | int]:
    """The base of an address as the register holds it, over all lanes."""
    if isinstance(operand, Register):
        index = program.index[operand.name]
        return lambda batch: batch.registers[index]
    if isinstance(operand, Symbol):
        symbol = operand
        return lambda batch: batch.symbol(symbol.name) + symbol.offset
    assert isinstance(operand, Immediate)
    value = operand.value
    return lambda batch: int(value)


# ── steps ──


def _parameter(program: Program, instruction: Instruction) -> Step:
    """ld.param: the same value for every lane."""
    where = instruction.operands[1]
    assert isinstance(where, Address)
    dtype = DTYPES[instruction.modifiers[-1]]
    parts = parts_of(instruction.operands[0])
    base = where.base
    if not isinstance(base, Symbol):
        raise PtxError(
            f"{instruction.line}: a parameter is read at an address that is computed ({instruction.text}).",
            "The machine keeps parameters by name; arrays inside of them can be indexed by constants only.",
            "copying the array to __constant__ or global memory.",
        )
    offset = base.offset + where.offset
    targets = [(program.index[p.name], DTYPES[p.type]) for p in parts if p is not None]

    def step(batch: Batch, active: Active) -> None:
        from llmcourse.vgpu.instructions import put

        data = batch.launch.parameters[base.name]
        for i, (target, register) in enumerate(targets):
            at = offset + i * dtype.itemsize
            value = np.frombuffer(data, dtype, 1, at)[0]
            put(batch, active, target, widen(value, register))

    return step


def _load(program: Program, instruction: Instruction) -> Step:
    where = instruction.operands[1]
    assert isinstance(where, Address)
    dtype = DTYPES[plain_type(instruction)]
    parts = parts_of(instruction.operands[0])
    base, offset, space = whole(program, where.base), where.offset, space_of(instruction)
    targets = [None if p is None else (program.index[p.name], DTYPES[p.type]) for p in parts]
    size = dtype.itemsize * len(parts)

    def step(batch: Batch, active: Active) -> None:
        view, index, _ = locate(batch, active, instruction, space, base(batch), offset, size, "load", dtype)
        for i, target in enumerate(targets):
            if target is None:
                continue
            value = widen(view[index if i == 0 else index + i], target[1])
            batch.registers[target[0]] = scattered(batch.registers[target[0]], value, active)

    return step


def _store(program: Program, instruction: Instruction) -> Step:
    where = instruction.operands[0]
    assert isinstance(where, Address)
    dtype = DTYPES[plain_type(instruction)]
    sources = instruction.operands[1]
    parts = sources.parts if isinstance(sources, Vector) else (sources,)
    fetches = [stored(program, p, dtype) for p in parts]
    base, offset, space = whole(program, where.base), where.offset, space_of(instruction)
    size = dtype.itemsize * len(parts)

    def step(batch: Batch, active: Active) -> None:
        values = [fetch(batch, active) for fetch in fetches]
        view, index, _ = locate(
            batch, active, instruction, space, base(batch), offset, size, "store", dtype, values
        )
        for i, value in enumerate(values):
            view[index if i == 0 else index + i] = value

    return step


def stored(program: Program, operand: Operand | None, dtype: np.dtype) -> Fetch:
    """A source of a store: active lanes' values (or a scalar), as the memory's type."""
    assert operand is not None
    fetch = program.fetch(operand, dtype)

    def values(batch: Batch, active: Active) -> np.ndarray:
        value = active.own(fetch(batch, active))
        if value.dtype.itemsize == dtype.itemsize:
            return value.view(dtype)
        return value.astype(f"u{value.dtype.itemsize}").astype(f"u{dtype.itemsize}").view(dtype)

    return values


def plain_type(instruction: Instruction) -> str:
    name = instruction.modifiers[-1]
    if name not in DTYPES:
        raise PtxError(
            f"{instruction.line}: the machine has no {instruction.text}.",
            f"It loads and stores numbers up to 64 bits and vectors of them; {name} is none.",
            "smaller accesses.",
        )
    return name


def parts_of(operand: Operand) -> list[Register | None]:
    if isinstance(operand, Vector):
        return [p if isinstance(p, Register) else None for p in operand.parts]
    assert isinstance(operand, Register)
    return [None if operand.name == "_" else operand]


def widen(value: np.ndarray, register: np.dtype) -> np.ndarray:
    """A loaded value as its register's type: narrower integers keep their sign if their type has one."""
    if value.dtype == register:
        return value
    if value.dtype.itemsize == register.itemsize:
        return value.view(register)
    return value.astype(f"{value.dtype.kind}{register.itemsize}").view(register)


# ── where the data lie ──


def locate(
    batch: Batch,
    active: Active,
    instruction: Instruction,
    space: str,
    base: np.ndarray | int,
    offset: int,
    size: int,
    kind: Kind,
    dtype: np.dtype,
    values: list[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, Addresses]:
    """Check and count an access of `size` bytes a lane.

    Returns  (memory as dtype, index in it of each active lane's first element, what the addresses are)
    Raises   KernelFault if an address is in no array or not a multiple of the size.
    """
    where = addresses_of(batch, active, base)
    if space == "generic":
        space, where, offset = _resolve(batch, active, instruction, where, offset)
    _aligned(batch, active, instruction, where, offset, size, kind)
    if space == "shared":
        return _shared(batch, active, instruction, where, offset, size, kind, dtype, values)
    if space == "local":
        return _local(batch, active, instruction, where, offset, size, kind, dtype)
    _bounds(batch, active, instruction, where, offset, size, kind, space)
    address = where.bytes + offset if offset else where.bytes
    if space == "global":
        _count_global(batch, active, instruction, where, address, offset, size, kind)
    shift = dtype.itemsize.bit_length() - 1
    return batch.memory.view(dtype), address >> shift if shift else address, where


def _resolve(
    batch: Batch, active: Active, instruction: Instruction, where: Addresses, offset: int
) -> tuple[str, Addresses, int]:
    """Which memory generic addresses point into."""
    if where.high < SHARED_WINDOW:
        return "global", where, offset
    for window, space, above in ((LOCAL_WINDOW, "local", 1 << 62), (SHARED_WINDOW, "shared", LOCAL_WINDOW)):
        if window <= where.low and where.high < above:
            known = where.known.get(space)
            if not isinstance(known, Addresses):
                shifted = where.bytes - window
                known = Addresses(shifted, shifted, where.low - window, where.high - window)
                where.known[space] = known
            return space, known, offset
    raise batch.fault(
        "unsupported",
        f"lanes reach into different memories with one instruction ({instruction.text}).",
        "A pointer holds a shared address in some lanes and a global one in others.",
        "separate loads in separate branches.",
        instruction.line,
        int(np.flatnonzero(active.mask)[0]),
    )


def _aligned(
    batch: Batch,
    active: Active,
    instruction: Instruction,
    where: Addresses,
    offset: int,
    size: int,
    kind: str,
) -> None:
    if size == 1:
        return
    key = ("aligned", size)
    left = where.known.get(key)
    if left is None:
        rest = where.bytes & (size - 1)
        left = int(rest[0]) if (rest == rest[0]).all() else -1
        where.known[key] = left
    if left == -1:
        bad = ((where.bytes + offset) & (size - 1)) != 0
        if not bad.any():
            return
        first = int(bad.argmax())
    elif (left + offset) & (size - 1):  # type: ignore[operator]
        first = 0
    else:
        return
    address = int(where.bytes[first]) + offset
    raise batch.fault(
        "misaligned",
        f"a {size}-byte {NAMES[kind]} at an address that is no multiple of {size}, {address % size} past.",
        "The hardware moves 2, 4, 8 or 16 bytes only from multiples of as many.",
        "an index that is a multiple of the vector's length, or smaller loads.",
        instruction.line,
        _lane(active, first),
    )


def _lane(active: Active, position: int) -> int:
    return position if active.lanes is None else int(active.lanes[position])


def _bounds(
    batch: Batch,
    active: Active,
    instruction: Instruction,
    where: Addresses,
    offset: int,
    size: int,
    kind: str,
    space: str,
) -> None:
    spans = batch.launch.shared.spans if space == "shared" else batch.memory.spans
    if spans.inside(where.low + offset, where.high + offset + size):
        return
    address = where.bytes + offset
    bad = spans.outside(address, size)
    if bad.any():
        first, lanes = int(bad.argmax()), int(np.count_nonzero(bad))
        raise batch.fault(
            "out of bounds",
            f"{space} {NAMES[kind]} out of bounds: {spans.describe(int(address[first]))}; "
            f"{lanes} lane{'s' if lanes > 1 else ''} at once, the first is",
            "Memory beside an array belongs to others: a GPU reads what it finds there, or overwrites it.",
            "a condition such as `if (i < n)` around the access, or another index.",
            instruction.line,
            _lane(active, first),
        )


def _count_global(
    batch: Batch,
    active: Active,
    instruction: Instruction,
    where: Addresses,
    address: np.ndarray,
    offset: int,
    size: int,
    kind: str,
) -> None:
    key = ("sectors", kind == "atomic", offset % SECTOR_BYTES)
    sectors = where.known.get(key)
    if sectors is None:
        if kind == "atomic":
            sectors = requests.atomic_sectors(address, active.lanes)
        else:
            sectors = requests.sectors(requests.rows_of(address, active.lanes))
        where.known[key] = sectors
    counts = batch.counters.at(batch.program.number(instruction.line))
    counts[f"global_{kind}_requests"] += active.warps
    counts[f"global_{kind}_sectors"] += sectors  # type: ignore[operator]
    counts[f"global_{kind}_bytes"] += active.threads * size
    if kind in batch.launch.touched:
        batch.launch.touched[kind][address >> 5] = True


def _shared(
    batch: Batch,
    active: Active,
    instruction: Instruction,
    where: Addresses,
    offset: int,
    size: int,
    kind: Kind,
    dtype: np.dtype,
    values: list[np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray, Addresses]:
    _bounds(batch, active, instruction, where, offset, size, kind, "shared")
    key = ("banks", size, offset % 4)
    found: object = where.known.get(key)
    if found is None:
        # Adding a multiple of 4 bytes rotates the banks and changes no conflict.
        mask = None if active.lanes is None else active.warps_taking_part()
        found = requests.wavefronts(requests.rows_of(where.bytes + offset % 4, active.lanes), size, mask)
        where.known[key] = found
    assert isinstance(found, tuple)
    passes, conflicts = found
    counts = batch.counters.at(batch.program.number(instruction.line))
    counts[f"shared_{kind}_requests"] += active.warps
    counts[f"shared_{kind}_wavefronts"] += passes
    counts[f"shared_{kind}_bank_conflicts"] += conflicts
    counts[f"shared_{kind}_bytes"] += active.threads * size
    if batch.monitor is not None:
        seen: Literal["load", "store", "atomic"] = "store" if kind == "copy" else kind
        batch.monitor.access(seen, where.base, offset, size, active.lanes, instruction, values)
    view = batch.shared_views.get(dtype)
    if view is None:
        view = batch.shared_views[dtype] = batch.shared.view(dtype)
    shift = dtype.itemsize.bit_length() - 1
    flat = where.known.get(("flat", shift))
    if flat is None:
        own = batch.shared_base if active.lanes is None else batch.shared_base[active.lanes]
        flat = (where.bytes + own) >> shift
        where.known["flat", shift] = flat
    if offset and not offset & (dtype.itemsize - 1) and offset > 0:
        return view[offset >> shift :], flat, where  # type: ignore[return-value]
    return view, (flat + (offset >> shift) if offset else flat), where  # type: ignore[operator,return-value]


def _local(
    batch: Batch,
    active: Active,
    instruction: Instruction,
    where: Addresses,
    offset: int,
    size: int,
    kind: str,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray, Addresses]:
    """Local memory is a thread's own; the hardware interleaves it by 4-byte words, so that lanes which use
    the same element coalesce."""
    limit = batch.launch.local_bytes
    if where.low + offset < 0 or where.high + offset + size > limit:
        bad = (where.bytes + offset < 0) | (where.bytes + offset + size > limit)
        raise batch.fault(
            "out of bounds",
            f"local {NAMES[kind]} out of bounds: byte {int((where.bytes + offset)[bad.argmax()])} of {limit}",
            "An array declared inside a kernel has the elements it was declared with.",
            "checking the index.",
            instruction.line,
            _lane(active, int(bad.argmax())),
        )
    address = where.bytes + offset
    lane = np.arange(batch.count) if active.lanes is None else active.lanes
    interleaved = (address >> 2) * (4 * WARP_SIZE) + (lane % WARP_SIZE) * 4
    counts = batch.counters.at(batch.program.number(instruction.line))
    counts[f"local_{kind}_requests"] += active.warps
    words = max(1, size // 4)
    sectors = requests.sectors(requests.rows_of(interleaved, active.lanes))
    counts[f"local_{kind}_sectors"] += sectors * words
    shift = dtype.itemsize.bit_length() - 1
    return batch.local.view(dtype), (address + lane * limit) >> shift, where


# ── pointers ──


def _convert_address(program: Program, instruction: Instruction) -> Step:
    """cvta: between a memory's own addresses and generic ones."""
    space = space_of(instruction)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    delta = np.uint64(window)
    to_generic = "to" not in instruction.modifiers
    target = instruction.operands[0]
    assert isinstance(target, Register)
    index = program.index[target.name]
    fetch = program.fetch(instruction.operands[1], np.dtype("u8"))

    def step(batch: Batch, active: Active) -> None:
        from llmcourse.vgpu.instructions import put

        value = fetch(batch, active)
        if window:
            value = value + delta if to_generic else value - delta
        put(batch, active, index, value)

    return step


def _is_space(program: Program, instruction: Instruction) -> Step:
    space = space_of(instruction)
    low, high = {
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, 1 << 62),
        "global": (0, SHARED_WINDOW),
        "const": (0, 0),
    }[space]
    target = instruction.operands[0]
    assert isinstance(target, Register)
    index = program.index[target.name]
    fetch = program.fetch(instruction.operands[1], np.dtype("u8"))

    def step(batch: Batch, active: Active) -> None:
        from llmcourse.vgpu.instructions import put

        value = fetch(batch, active)
        put(batch, active, index, (value >= np.uint64(low)) & (value < np.uint64(high)))

    return step


__all__ = ["KernelFault", "addresses_of", "compile_access", "locate", "space_of", "stored", "whole", "widen"]
