"""The global memory that an interpreted kernel sees: bounds, alignment, bytes, sectors, atomics.

A kernel gets addresses, and arithmetic on addresses loses where they came from. Here every tensor argument
starts at an address of its own, four terabytes away from the next one, so that an address says which
argument it was made from however the kernel computed it. That gives bounds (an address outside its argument
is a fault, before its first byte as well as after its last), the count for each argument, and sectors that
do not depend on where the allocator happened to put a tensor: each storage counts as if it began on a
512-byte boundary, as torch's allocator on a GPU has it.

What is counted of one operation (a `tl.load` of a whole block is one)

    bytes      lanes whose mask is set × bytes of an element: what the program asks for
    sectors    different 32-byte sectors among them: what must be fetched if each is fetched once
    unique     over the whole launch, different bytes and different sectors: what must cross the memory
               at least once

A GPU splits a block among warps, and a sector that two warps touch in one operation is requested twice
there: `sectors` is then the hardware's count or less, never more.

Nothing here knows Triton: addresses and values are NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.isa import SECTOR_BYTES, SourceLine

SPACE = 43
"""log2 of the bytes between two arguments' spaces; each argument lies in the middle of its space."""

Index3 = tuple[int, int, int]
Key = tuple[int, str, str]  # (line, argument, "load" | "store" | "atomic")

_MARKS = {size: int.from_bytes(b"\x01" * size, "little") for size in (1, 2, 4, 8)}
_ADD, _MIN, _MAX = {"ADD", "FADD"}, {"MIN", "UMIN"}, {"MAX", "UMAX"}


@dataclass
class Argument:
    """One tensor argument, as the kernel may touch it.

    storage      the bytes of the whole storage, [nbytes] uint8
    start        byte of the storage at which the tensor's first element lies: where the pointer points
    low, high    bytes of the storage that the kernel may touch: low ≤ byte < high
    itemsize     bytes of an element
    shape        for messages
    key          equal for arguments that share a storage
    """

    name: str
    storage: np.ndarray
    start: int
    low: int
    high: int
    itemsize: int
    shape: tuple[int, ...]
    key: int
    base: int = 0
    written: bool = False
    touched: dict[str, np.ndarray] = field(default_factory=dict)
    _views: dict[np.dtype, np.ndarray] = field(default_factory=dict)

    @property
    def address(self) -> int:
        return self.base + self.start

    def elements(self, dtype: np.dtype) -> np.ndarray:
        """The storage as an array of this format; bytes at its end that fill no element are left out."""
        view = self._views.get(dtype)
        if view is None:
            whole = len(self.storage) // dtype.itemsize * dtype.itemsize
            view = self._views[dtype] = self.storage[:whole].view(dtype)
        return view

    def marks(self, kind: str) -> np.ndarray:
        """One byte for each byte of the storage, 1 where an operation of this kind has touched it."""
        flags = self.touched.get(kind)
        if flags is None:
            size = -(-len(self.storage) // SECTOR_BYTES) * SECTOR_BYTES
            flags = self.touched[kind] = np.zeros(size, np.uint8)
        return flags


@dataclass
class Tally:
    """Operations, bytes and sectors of one line, argument and kind."""

    ops: int = 0
    bytes: int = 0
    sectors: int = 0


class Memory:
    """The arguments of one launch, and what its programs did with them.

    counting   False: bounds and alignment only, which takes half the time
    where      gives the line that an operation counts for
    here       gives the line that a fault names; `where` if None
    """

    def __init__(
        self,
        kernel: str,
        *,
        counting: bool,
        where: Callable[[], SourceLine],
        here: Callable[[], SourceLine] | None = None,
    ) -> None:
        self.kernel, self.counting, self.where, self.here = kernel, counting, where, here or where
        self.program: Index3 = (0, 0, 0)
        self.arguments: dict[int, Argument] = {}
        self.tallies: dict[Key, Tally] = {}

    def add(self, argument: Argument) -> int:
        """Give the argument a place; the address of its first element."""
        space = len(self.arguments) + 1
        argument.base = (space << SPACE) + (1 << (SPACE - 1))
        self.arguments[space] = argument
        return argument.address

    # ── what programs do ─────────────────────────────────────────────────────────────────────────

    def load(
        self, addresses: np.ndarray, mask: np.ndarray | None, other: np.ndarray | None, dtype: np.dtype
    ) -> np.ndarray:
        """Values at addresses (uint64), `other` (or 0) where the mask is not set."""
        mask = _mask(addresses, mask)
        pieces = self._reach("load", addresses, mask, dtype.itemsize)
        if mask is None and len(pieces) == 1:
            argument, index, _ = pieces[0]
            return argument.elements(dtype)[index].reshape(addresses.shape)
        if other is None:
            out = np.zeros(addresses.shape, dtype)
        else:
            out = np.array(np.broadcast_to(other, addresses.shape), dtype)
        flat = out.reshape(-1)
        for argument, index, lanes in pieces:
            flat[lanes] = argument.elements(dtype)[index]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | None) -> None:
        """Write values; where one operation has an address twice, the last lane's value stays."""
        mask = _mask(addresses, mask)
        values = np.broadcast_to(values, addresses.shape).reshape(-1)
        for argument, index, lanes in self._reach("store", addresses, mask, values.dtype.itemsize):
            argument.written = True
            argument.elements(values.dtype)[index] = values if lanes is None else values[lanes]

    def atomic(
        self, operation: str, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | None
    ) -> np.ndarray:
        """Read, change and write, lane after lane; the values before (0 where the mask is not set).

        operation   ADD FADD MIN UMIN MAX UMAX AND OR XOR XCHG
        """
        mask = _mask(addresses, mask)
        values = np.ascontiguousarray(np.broadcast_to(values, addresses.shape)).reshape(-1)
        old = np.zeros(values.shape, values.dtype)
        for argument, index, lanes in self._reach("atomic", addresses, mask, values.dtype.itemsize):
            argument.written = True
            memory = argument.elements(values.dtype)
            lane = np.arange(values.size) if lanes is None else np.flatnonzero(lanes)
            for turn in _turns(index):
                before = memory[index[turn]]
                old[lane[turn]] = before
                memory[index[turn]] = _changed(operation, before, values[lane[turn]])
        return old.reshape(addresses.shape)

    def compare_and_swap(self, addresses: np.ndarray, expected: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Write `values` where memory holds `expected`, lane after lane; the values before."""
        expected = np.broadcast_to(expected, addresses.shape).reshape(-1)
        values = np.broadcast_to(values, addresses.shape).reshape(-1)
        bits = np.dtype(f"u{values.dtype.itemsize}")
        wanted, new = np.ascontiguousarray(expected).view(bits), np.ascontiguousarray(values).view(bits)
        old = np.zeros(values.shape, bits)
        for argument, index, lanes in self._reach("atomic", addresses, None, bits.itemsize):
            argument.written = True
            memory = argument.elements(bits)
            lane = np.arange(values.size) if lanes is None else np.flatnonzero(lanes)
            for turn in _turns(index):
                before = memory[index[turn]]
                old[lane[turn]] = before
                memory[index[turn]] = np.where(before == wanted[lane[turn]], new[lane[turn]], before)
        return old.view(values.dtype).reshape(addresses.shape)

    # ── where it goes, and what is counted ───────────────────────────────────────────────────────

    def _reach(
        self, kind: str, addresses: np.ndarray, mask: np.ndarray | None, itemsize: int
    ) -> list[tuple[Argument, np.ndarray, np.ndarray | None]]:
        """The arguments that these addresses lie in, checked and counted.

        Each with the index of every lane in its storage, in elements of `itemsize` bytes, and with the lanes
        (boolean over the flat addresses; None for all).
        """
        lanes = None if mask is None else mask.reshape(-1)
        flat = addresses.reshape(-1) if lanes is None else addresses.reshape(-1)[lanes]
        if not flat.size:
            if self.counting:
                owner = self.arguments.get(int(addresses.flat[0]) >> SPACE) if addresses.size else None
                self._count(kind, owner.name if owner else "", 1, 0, 0)
            return []
        argument = self.arguments.get(int(flat[0]) >> SPACE)
        if argument is not None:
            offsets = flat - np.uint64(argument.base)
            least, most = int(offsets.min()), int(offsets.max())
            if least >= argument.low and most + itemsize <= argument.high:
                return [(argument, self._checked(kind, argument, offsets, least, most, itemsize, 1), lanes)]
        return self._scattered(kind, addresses, lanes, itemsize)

    def _scattered(
        self, kind: str, addresses: np.ndarray, lanes: np.ndarray | None, itemsize: int
    ) -> list[tuple[Argument, np.ndarray, np.ndarray | None]]:
        """Addresses in several arguments, or outside."""
        flat = addresses.reshape(-1)
        active = np.ones(flat.size, bool) if lanes is None else lanes
        spaces = flat >> np.uint64(SPACE)
        pieces: list[tuple[Argument, np.ndarray, np.ndarray | None]] = []
        for space in np.unique(spaces[active]).tolist():
            argument = self.arguments.get(space)
            mine = active & (spaces == space)
            if argument is None:
                self._nowhere(kind)
            offsets = flat[mine].astype(np.int64) - argument.base
            outside = (offsets < argument.low) | (offsets + itemsize > argument.high)
            if outside.any():
                self._outside(kind, argument, offsets, outside, itemsize)
            least, most = int(offsets.min()), int(offsets.max())
            index = self._checked(
                kind, argument, offsets.astype(np.uint64), least, most, itemsize, not pieces
            )
            pieces.append((argument, index, mine))
        return pieces

    def _checked(
        self,
        kind: str,
        argument: Argument,
        offsets: np.ndarray,
        least: int,
        most: int,
        itemsize: int,
        ops: int,
    ) -> np.ndarray:
        """Indices of aligned offsets, after counting."""
        shift = itemsize.bit_length() - 1
        if shift:
            apart = offsets & np.uint64(itemsize - 1)
            if apart.any():
                self._misaligned(kind, argument, int(offsets[apart.argmax()]), itemsize)
            index = (offsets >> np.uint64(shift)).view(np.int64)
        else:
            index = offsets.view(np.int64)
        if self.counting:
            sectors = _distinct(index >> (5 - shift), least >> 5, most >> 5)
            self._count(kind, argument.name, int(ops), index.size * itemsize, sectors)
            argument.marks(kind).view(f"u{itemsize}")[index] = _MARKS[itemsize]
        return index

    def _count(self, kind: str, argument: str, ops: int, size: int, sectors: int) -> None:
        key = (self.where().line, argument, kind)
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally()
        tally.ops += ops
        tally.bytes += size
        tally.sectors += sectors

    def unique(self) -> dict[str, dict[str, tuple[int, int]]]:
        """kind → {argument: (different bytes, different sectors)}; under "" those of the whole launch."""
        out: dict[str, dict[str, tuple[int, int]]] = {}
        for kind in ("load", "store", "atomic"):
            by_storage: dict[int, np.ndarray] = {}
            found: dict[str, tuple[int, int]] = {}
            for argument in self.arguments.values():
                flags = argument.touched.get(kind)
                if flags is None:
                    continue
                found[argument.name] = _area(flags)
                shared = by_storage.get(argument.key)
                by_storage[argument.key] = flags if shared is None else flags | shared
            if found:
                areas = [_area(flags) for flags in by_storage.values()]
                found[""] = (sum(a for a, _ in areas), sum(b for _, b in areas))
                out[kind] = found
        return out

    # ── faults ───────────────────────────────────────────────────────────────────────────────────

    def _by(self) -> str:
        x, y, z = self.program
        program = f"({x}, {y}, {z})" if z else f"({x}, {y})" if y else str(x)
        return f"program {program} of {self.kernel}"

    def _outside(
        self, kind: str, argument: Argument, offsets: np.ndarray, outside: np.ndarray, itemsize: int
    ) -> NoReturn:
        first = int(offsets[outside.argmax()])
        index = (first - argument.start) // argument.itemsize
        last = (argument.high - argument.start) // argument.itemsize - 1
        lowest = (argument.low - argument.start) // argument.itemsize
        has = f"its elements are {lowest} … {last}" if argument.high > argument.low else "it has no elements"
        many = int(outside.sum())
        lanes = f" {many} of {outside.size} active lanes are outside." if outside.size > 1 else ""
        side = "before its first" if first < argument.low else "beyond its last"
        inside = first >= 0 and first + itemsize <= len(argument.storage)
        why = (
            f"{argument.name} has shape {list(argument.shape)}; the element lies {side}."
            + lanes
            + (
                " The memory there belongs to the larger tensor that it is a view of."
                if inside
                else " A GPU would read or write some other tensor there, or stop with an illegal address."
            )
        )
        fix = {
            "load": "mask=offsets < n (and other=), with the offsets that this pointer was made from.",
            "store": "mask=offsets < n, with the offsets that this pointer was made from.",
            "atomic": "mask=offsets < n, with the offsets that this pointer was made from.",
        }[kind]
        self.fault("out of bounds", f"{kind} of {argument.name}[{index}] by {self._by()}; {has}.", why, fix)

    def _nowhere(self, kind: str) -> NoReturn:
        self.fault(
            "out of bounds",
            f"{kind} by {self._by()} from an address that lies in none of its arguments.",
            "The interpreter knows the memory of the tensors that were passed, and no other: neither address "
            "0 nor one read from a tensor of addresses.",
            "passing each tensor as an argument, and a mask where a pointer may be null.",
        )

    def _misaligned(self, kind: str, argument: Argument, offset: int, itemsize: int) -> NoReturn:
        self.fault(
            "misaligned",
            f"{kind} of {itemsize} bytes at byte {offset} of {argument.name}'s storage by {self._by()}.",
            f"A GPU reads and writes {itemsize} bytes at multiples of {itemsize} only.",
            "the pointer type that the tensor has, or an offset in whole elements of it.",
        )

    def fault(self, kind: str, what: str, why: str, fix: str) -> NoReturn:
        """Raise the fault at the line that is running."""
        raise KernelFault(kind, what, why, fix, line=self.here(), block=self.program)


def _mask(addresses: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """The mask in the addresses' shape; None if it is set everywhere."""
    if mask is None:
        return None
    mask = np.broadcast_to(mask, addresses.shape)
    if mask.dtype != np.bool_:
        mask = mask.astype(bool)
    return None if mask.all() else mask


def _distinct(values: np.ndarray, least: int, most: int) -> int:
    """How many different integers there are, all within least … most."""
    span = most - least + 1
    if span == 1:
        return 1
    if span > 8 * values.size + 1024:
        return int(np.unique(values).size)
    seen = np.zeros(span, bool)
    seen[values - least] = True
    return int(np.count_nonzero(seen))


def _area(flags: np.ndarray) -> tuple[int, int]:
    """(different bytes, different sectors) of flags that begin at a sector."""
    words = flags.view(np.uint64).reshape(-1, SECTOR_BYTES // 8)
    return int(np.count_nonzero(flags)), int(np.count_nonzero(words.any(1)))


def _turns(index: np.ndarray) -> list[np.ndarray]:
    """Positions in rounds, no index twice in one round; equal indices in the order of their positions."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    fresh = np.ones(index.size, bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    if fresh.all():
        return [np.arange(index.size)]
    starts = np.maximum.accumulate(np.where(fresh, np.arange(index.size), 0))
    rank = np.arange(index.size) - starts
    by_rank = np.argsort(rank, kind="stable")
    return [order[part] for part in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1])]


def _changed(operation: str, old: np.ndarray, values: np.ndarray) -> np.ndarray:
    if operation in _ADD:
        return (old + values).astype(old.dtype)
    if operation == "XCHG":
        return values
    if operation in ("AND", "OR", "XOR"):
        bitwise = {"AND": np.bitwise_and, "OR": np.bitwise_or, "XOR": np.bitwise_xor}[operation]
        return bitwise(old, values)
    if operation in _MIN | _MAX:
        signed = operation in ("MIN", "MAX")
        kind = f"{'i' if signed else 'u'}{old.dtype.itemsize}"
        if old.dtype.kind not in "iu":
            return np.fmin(old, values) if operation in _MIN else np.fmax(old, values)
        a, b = old.view(kind), values.view(kind)
        return (np.minimum(a, b) if operation in _MIN else np.maximum(a, b)).view(old.dtype)
    raise ValueError(f"unknown atomic operation {operation}")
