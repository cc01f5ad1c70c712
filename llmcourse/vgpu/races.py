"""Data races and uninitialised reads in shared memory, found while a kernel runs.

Two accesses to the same byte *race* when different threads of a block make them, nothing orders them, and
not both are loads or both atomics. `__syncthreads()` orders everything before it, in its block, with
everything after it; `__syncwarp()` does so within its warp. Running in lockstep orders nothing: on a GPU the
warps, and since Volta the lanes of a warp, go on at their own pace. Two stores of the same value are let
pass: many threads that raise one flag are common and harmless.

Whether a race exists does not depend on the order of the accesses, so the monitor only writes them down and
looks when a barrier ends the *epoch*. Most epochs need no look at single lanes:

- loads alone, or atomics alone, cannot race; nor can accesses whose address intervals do not meet;
- blocks mostly do the same thing: where all blocks access the same addresses by the same threads, one stands
  for all, and only the others (at the edges of a grid, say) are looked at themselves;
- a loop repeats itself: an epoch of the same accesses as one found clean is clean.

Else the rule is this. Take the accesses of one epoch to one byte. They are *alike* if all are loads, all
are atomics, or all are stores of the same value. If they come from several warps and are not all alike,
there is a race; and also if those within one warp, between two `__syncwarp()`, come from several lanes and
are not all alike. (Were no two accesses of different warps in conflict, each would have to be of the same
kind, and every other one too by way of it.)

What this does not know: order by locks or flags that threads spin on, and barriers of some warps only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmcourse.vgpu.faults import Index3, KernelFault, index_text
from llmcourse.vgpu.isa import WARP_SIZE, Instruction, SourceLine

Kind = Literal["load", "store", "atomic"]

MAX_GRANULE = 8
CHUNK = 1 << 22
"""Bytes, and lane accesses, that one look at an epoch may work on at a time."""
REMEMBERED = 512
"""Address patterns and verdicts kept for reuse."""


class SharedMonitor:
    """Watches the shared memory of a batch of blocks.

    blocks, threads   blocks in the batch, and threads of each, padded to whole warps
    nbytes            shared memory of a block
    block_index       number of a block in the batch → blockIdx; `thread_index` likewise → threadIdx
    symbols           what to call the arrays: name → (offset, bytes)

    Arrays passed in must not change afterwards: the monitor keeps them until the epoch's end, and takes an
    array that it has seen for the same addresses.
    """

    def __init__(
        self,
        blocks: int,
        nbytes: int,
        threads: int,
        *,
        block_index: Callable[[int], Index3] | None = None,
        thread_index: Callable[[int], Index3] | None = None,
        symbols: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.blocks, self.nbytes, self.threads = blocks, nbytes, threads
        self._block_index = block_index or (lambda b: (b, 0, 0))
        self._thread_index = thread_index or (lambda t: (t, 0, 0))
        self._symbols = dict(symbols or {})
        self._written = _Written(blocks, nbytes)
        self._patterns = _Patterns(blocks, threads)
        self._clean: set[tuple[object, ...]] = set()
        self._log: list[_Access] = []
        self._logged: set[tuple[object, ...]] = set()
        self._writes = False
        self._clock = 0
        self._since: np.ndarray | None = None
        self._warp_epoch: int | np.ndarray = 0
        self._loose, self._loose_limit = 0, CHUNK

    def access(
        self,
        kind: Kind,
        base: np.ndarray | np.generic | int,
        offset: int,
        size: int,
        lanes: np.ndarray | None,
        instruction: Instruction,
        values: object = None,
    ) -> None:
        """Note one access by many lanes, lane l being thread l % threads of block l // threads.

        base     byte address within the block's shared memory: one for each lane of the batch, one for each
                 of `lanes`, or one for all
        lanes    ascending numbers of the lanes that take part, or a mask; None if all do
        values   what is stored: like base, or a sequence of such for a vector; None if unknown
        Raises   KernelFault "uninitialised" for a load of bytes that nobody has written.
        """
        pattern = self._patterns.find(base, lanes)
        if not pattern.size:
            return
        epoch = self._warp_epoch
        if kind != "store":
            key = (kind, pattern.serial, offset, size, epoch if isinstance(epoch, int) else id(epoch))
            if key in self._logged:
                return
            if not (kind == "atomic" and "exch" in instruction.modifiers):
                missing = self._written.missing(pattern, offset, size)
                if missing is not None:
                    raise self._uninitialised(kind, *missing, size, instruction)
            self._logged.add(key)
        if kind != "load":
            self._writes = True
            self._written.mark(pattern, offset, size)
        self._log.append(
            _Access(self._clock, kind, pattern, offset, size, instruction, epoch, values, lanes, self.threads)
        )
        self._clock += 1
        self._loose += pattern.loose
        if self._loose > self._loose_limit:
            self._thin_out()

    def barrier(self, blocks: np.ndarray | None = None) -> None:
        """bar.sync completed for these blocks ([blocks] bool), or for all. Raises KernelFault "race"."""
        whole = blocks is None or bool(blocks.all())
        if whole and self._since is None:
            self._look(self._log, None)
            self._reset()
            return
        passing = np.ones(self.blocks, bool) if blocks is None else blocks
        since = np.zeros(self.blocks, np.int64) if self._since is None else self._since
        for start in np.unique(since[passing]).tolist():
            self._look([a for a in self._log if a.time >= start], passing & (since == start))
        since = np.where(passing, self._clock, since)
        self._log = [a for a in self._log if (a.pattern.present() & (since <= a.time)).any()]
        self._logged.clear()
        self._since = since
        if not self._log:
            self._reset()

    def warp_barrier(self, warps: np.ndarray | None = None) -> None:
        """bar.warp.sync completed for these warps ([blocks * threads // 32] bool), or for all."""
        if warps is None or bool(warps.all()):
            self._warp_epoch = self._warp_epoch + 1
        else:
            epochs = self._warp_epoch
            if isinstance(epochs, int):
                epochs = np.full(self.blocks * self.threads // WARP_SIZE, epochs, np.int64)
            self._warp_epoch = epochs + warps

    def finish(self) -> None:
        """The kernel ended: look at what came after the last barrier. Raises KernelFault "race"."""
        self.barrier(None)

    def _reset(self) -> None:
        self._log = []
        self._logged.clear()
        self._writes = False
        self._clock, self._since = 0, None
        self._warp_epoch = 0
        self._loose, self._loose_limit = 0, CHUNK

    # ── looking at an epoch ──

    def _look(self, log: Sequence[_Access], blocks: np.ndarray | None) -> None:
        """Raise if accesses of `log` race in one of the blocks ([blocks] bool, None for all)."""
        if not self._writes:
            return
        key: tuple[object, ...] | None = None
        if blocks is None and all(isinstance(a.epoch, int) for a in log):
            key = tuple((a.kind, a.pattern.serial, a.offset, a.size, a.epoch) for a in log)
            if key in self._clean:
                return
        by_value = False
        for group in _meeting(log):
            if len({a.kind for a in group}) == 1 and group[0].kind != "store":
                continue
            by_value |= self._look_at_lanes(group, blocks)
        if key is not None and not by_value:
            if len(self._clean) >= REMEMBERED:
                self._clean.clear()
            self._clean.add(key)

    def _look_at_lanes(self, group: list[_Access], blocks: np.ndarray | None) -> bool:
        """Raise if these accesses race. True if only equal values of stores spoke against it."""
        among = np.arange(self.blocks) if blocks is None else np.flatnonzero(blocks)
        odd = np.zeros(self.blocks, bool)
        for access in group:
            if access.pattern.odd is not None:
                odd[access.pattern.odd] = True
            if isinstance(access.epoch, np.ndarray):
                rows = access.epoch.reshape(self.blocks, -1)
                odd |= (rows != rows[self._patterns.model]).any(axis=1)
        alike = among[~odd[among]]
        by_value = False
        for chunk in self._chunks(group, np.concatenate([alike[:1], among[odd[among]]])):
            bad, unsure = _Epoch(self, group, chunk).verdict(values=False)
            if bad is not None:
                raise self._race(group, int(chunk[bad]))
            by_value |= unsure
        if by_value and not _store_one_value(group):
            for chunk in self._chunks(group, among):
                bad, _ = _Epoch(self, group, chunk).verdict(values=True)
                if bad is not None:
                    raise self._race(group, int(chunk[bad]))
        return by_value

    def _chunks(self, group: Sequence[_Access], blocks: np.ndarray) -> list[np.ndarray]:
        low, high = _interval(group)
        cost = max(high - low, sum(a.size for a in group) * self.threads)
        step = max(1, CHUNK // max(1, cost))
        return [blocks[i : i + step] for i in range(0, len(blocks), step)]

    def _thin_out(self) -> None:
        """Forget repeated loads and atomics of blocks that share no pattern: two lanes a byte tell as much.

        Of all loads (atomics) of one granule in one warp epoch it is enough to keep one, and one by another
        warp, or else by another lane: the same warps or lanes stay involved in the same kinds of access.
        """
        for kind in ("load", "atomic"):
            group = [a for a in self._log if a.kind == kind and a.pattern.loose]
            if group:
                kept = iter(_needed(self, group))
                self._log = [next(kept) if a.kind == kind and a.pattern.loose else a for a in self._log]
        self._log = [a for a in self._log if a.pattern.size]
        self._loose = sum(a.pattern.loose for a in self._log)
        self._loose_limit = max(CHUNK, 2 * self._loose)

    # ── what was found ──

    def _race(self, group: list[_Access], block: int) -> KernelFault:
        epoch = _Epoch(self, group, np.array([block]), values=True)
        first, second = epoch.first_pair()
        a, b = group[first.access], group[second.access]
        one_warp = first.thread // WARP_SIZE == second.thread // WARP_SIZE
        low = max(first.address, second.address)
        size = min(first.address + a.size, second.address + b.size) - low
        element = self._name(low, min(a.size, b.size), size)
        other = index_text(self._thread_index(first.thread))
        doing = {"load": "reads", "store": "writes", "atomic": "updates"}
        done = {"load": "read", "store": "wrote", "atomic": "atomically updated"}
        barrier = "__syncwarp()" if one_warp else "__syncthreads()"
        if a.time == b.time:
            what = f"race in shared memory: this thread and thread {other} write {element} in one instruction"
        else:
            what = (
                f"race in shared memory: this thread {doing[b.kind]} {element}, which thread {other} "
                f"{done[a.kind]}{_at(a.instruction.line)}, with no {barrier} between"
            )
        why = (
            "The lanes of a warp need not run in step; nothing says which of the two accesses comes first."
            if one_warp
            else "Warps run in any order; nothing says which of the two accesses comes first."
        )
        return KernelFault(
            "race",
            what,
            why,
            _advice(a, b, barrier),
            line=b.instruction.line,
            block=self._block_index(block),
            thread=self._thread_index(second.thread),
        )

    def _uninitialised(
        self, kind: Kind, block: int, thread: int, address: int, size: int, instruction: Instruction
    ) -> KernelFault:
        verb = "reads" if kind == "load" else "updates"
        return KernelFault(
            "uninitialised",
            f"this thread {verb} {self._name(address, size, size)}, which nobody has written",
            "Shared memory starts with whatever an earlier block left there; it is not zero.",
            "storing to every element that is read later (the tail of a tile and the padding too), then "
            "__syncthreads().",
            line=instruction.line,
            block=self._block_index(block),
            thread=self._thread_index(thread),
        )

    def _name(self, address: int, itemsize: int, size: int) -> str:
        """`element 5 of tile (bytes 20–23)`, an element being as large as the smaller access."""
        for name, (start, length) in self._symbols.items():
            if start <= address < start + length:
                inside = address - start
                return f"element {inside // itemsize} of {name} (bytes {inside}–{inside + size - 1})"
        return f"bytes {address}–{address + size - 1} of shared memory"


def _at(line: SourceLine | None) -> str:
    return f" at {line}" if line else ""


def _advice(a: _Access, b: _Access, barrier: str) -> str:
    first, second = a.instruction.line, b.instruction.line
    if a.kind == b.kind == "store":
        return (
            "an element of its own for each thread, one writing thread (if (threadIdx.x == 0)), or an atomic."
        )
    if first is not None and second is not None and first.line == second.line:
        return f"splitting the line: read into a variable, {barrier}, then write."
    between = f" between line {first.line} and line {second.line}" if first and second else " between them"
    if first and second and first.line > second.line:
        between = f" after line {first.line}, before the loop comes back to line {second.line}"
    return f"{barrier}{between}."


# ── where lanes point ──


class _Pattern:
    """The addresses of one access, lane by lane, without its offset.

    threads, address   of the model block: [k]
    odd                blocks that differ from it, ascending, with all that they access in `odd_block`,
                       `odd_thread`, `odd_address`; None if there are none
    low, high          lowest and highest address over all blocks
    bits               all addresses or-ed: its lowest set bit is an alignment of each of them
    """

    count = 0

    def __init__(
        self,
        blocks: int,
        threads: np.ndarray,
        address: np.ndarray,
        odd: np.ndarray | None = None,
        odd_block: np.ndarray | None = None,
        odd_thread: np.ndarray | None = None,
        odd_address: np.ndarray | None = None,
    ) -> None:
        _Pattern.count += 1
        self.serial = _Pattern.count
        self.blocks, self.threads, self.address = blocks, threads, address
        self.odd = odd
        none = np.zeros(0, np.int64)
        self.odd_block = none if odd_block is None else odd_block
        self.odd_thread = none if odd_thread is None else odd_thread
        self.odd_address = none if odd_address is None else odd_address
        self.loose = len(self.odd_block)
        parts = [p for p in (address, self.odd_address) if p.size]
        self.size = sum(p.size for p in parts)
        self.low = min((int(p.min()) for p in parts), default=0)
        self.high = max((int(p.max()) for p in parts), default=0)
        self.bits = 0
        for part in parts:
            self.bits |= int(np.bitwise_or.reduce(part))
        self._present: np.ndarray | None = None

    def present(self) -> np.ndarray:
        """[blocks] bool: blocks with a lane in it."""
        if self._present is None:
            here = np.full(self.blocks, bool(self.threads.size))
            if self.odd is not None:
                here[self.odd] = False
                here[self.odd_block] = True
            self._present = here
        return self._present

    def keep(self, chosen: np.ndarray) -> _Pattern:
        """The same with some accesses of the odd blocks left out."""
        return _Pattern(
            self.blocks,
            self.threads,
            self.address,
            self.odd,
            self.odd_block[chosen],
            self.odd_thread[chosen],
            self.odd_address[chosen],
        )

    def events(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(position in `blocks`, thread, address) of each lane's access in these blocks (ascending)."""
        if self.odd is None:
            k = len(self.threads)
            if len(blocks) == 1:
                return np.zeros(k, np.int64), self.threads, self.address
            return (
                np.repeat(np.arange(len(blocks)), k),
                np.tile(self.threads, len(blocks)),
                np.tile(self.address, len(blocks)),
            )
        same = np.ones(self.blocks, bool)
        same[self.odd] = False
        position = np.full(self.blocks, -1, np.int64)
        position[blocks] = np.arange(len(blocks))
        alike = np.flatnonzero(same[blocks])
        where = position[self.odd_block]
        chosen = where >= 0
        return (
            np.concatenate([np.repeat(alike, len(self.threads)), where[chosen]]),
            np.concatenate([np.tile(self.threads, len(alike)), self.odd_thread[chosen]]),
            np.concatenate([np.tile(self.address, len(alike)), self.odd_address[chosen]]),
        )


@dataclass(eq=False)
class _LaneSet:
    """Some lanes of the batch, by block; `alike`: blocks with the same threads as the model block."""

    block: np.ndarray
    thread: np.ndarray
    cuts: np.ndarray
    alike: np.ndarray
    model: slice


class _Patterns:
    """Finds the pattern of a base array and a set of lanes; remembers those of arrays seen before."""

    def __init__(self, blocks: int, threads: int) -> None:
        self.blocks, self.threads = blocks, threads
        self.model = blocks // 2  # in the middle of the grid: blocks at its edges are the unusual ones
        self._every_thread = np.arange(threads)
        self._found: dict[tuple[object, ...], tuple[object, object, _Pattern]] = {}
        self._sets: dict[int, tuple[weakref.ref[np.ndarray], _LaneSet]] = {}

    def find(self, base: np.ndarray | np.generic | int, lanes: np.ndarray | None) -> _Pattern:
        scalar = not isinstance(base, np.ndarray) or base.ndim == 0
        key = (int(base) if scalar else id(base), scalar, id(lanes))
        found = self._found.get(key)
        if found is not None and (scalar or found[0]() is base) and (lanes is None or found[1]() is lanes):  # type: ignore[operator]
            return found[2]
        pattern = self._make(base, scalar, lanes)
        if len(self._found) >= REMEMBERED:
            self._found.clear()
        self._found[key] = (
            None if scalar else weakref.ref(base),  # type: ignore[arg-type]
            None if lanes is None else weakref.ref(lanes),
            pattern,
        )
        return pattern

    def _make(self, base: np.ndarray | np.generic | int, scalar: bool, lanes: np.ndarray | None) -> _Pattern:
        if lanes is None:
            if scalar:
                return _Pattern(self.blocks, self._every_thread, np.full(self.threads, int(base), np.int64))
            rows = np.asarray(base).reshape(self.blocks, self.threads)
            row = rows[self.model]
            odd = np.flatnonzero((rows != row).any(axis=1))
            if not odd.size:
                return _Pattern(self.blocks, self._every_thread, row.astype(np.int64))
            return _Pattern(
                self.blocks,
                self._every_thread,
                row.astype(np.int64),
                odd,
                np.repeat(odd, self.threads),
                np.tile(self._every_thread, len(odd)),
                rows[odd].ravel().astype(np.int64),
            )
        group = self._lane_set(lanes)
        address: np.ndarray
        if scalar:
            address = np.full(len(group.thread), int(base), np.int64)
        else:
            mine = base if len(base) == len(group.thread) else base[lanes]  # type: ignore[arg-type,index]
            address = np.asarray(mine, np.int64)
        model = address[group.model]
        same: np.ndarray = group.alike
        if len(model) and not scalar:
            candidates = np.flatnonzero(same)
            at = group.cuts[candidates][:, None] + np.arange(len(model))
            same = same.copy()
            same[candidates] = (address[at] == model).all(axis=1)
        if same.all():
            return _Pattern(self.blocks, group.thread[group.model], model)
        rest = ~same[group.block]
        return _Pattern(
            self.blocks,
            group.thread[group.model],
            model,
            np.flatnonzero(~same),
            group.block[rest],
            group.thread[rest],
            address[rest],
        )

    def _lane_set(self, lanes: np.ndarray) -> _LaneSet:
        found = self._sets.get(id(lanes))
        if found is not None and found[0]() is lanes:
            return found[1]
        numbers = np.flatnonzero(lanes) if lanes.dtype == bool else lanes
        block = numbers // self.threads
        thread = numbers - block * self.threads
        cuts = np.searchsorted(numbers, np.arange(self.blocks + 1) * self.threads)
        counts = np.diff(cuts)
        model = slice(int(cuts[self.model]), int(cuts[self.model + 1]))
        alike: np.ndarray = counts == counts[self.model]
        if counts[self.model]:
            rows = np.flatnonzero(alike)
            at = cuts[rows][:, None] + np.arange(counts[self.model])
            alike[rows] = (thread[at] == thread[model]).all(axis=1)
        made = _LaneSet(block, thread, cuts[:-1], alike, model)
        if len(self._sets) >= REMEMBERED:
            self._sets.clear()
        self._sets[id(lanes)] = weakref.ref(lanes), made
        return made


class _Written:
    """Which bytes have been written: by all blocks, and, once they differ, by each."""

    def __init__(self, blocks: int, nbytes: int) -> None:
        self.blocks = blocks
        self.all = np.zeros(-(-nbytes // MAX_GRANULE) * MAX_GRANULE, bool)
        self.each: np.ndarray | None = None

    def mark(self, pattern: _Pattern, offset: int, size: int) -> None:
        if self._by_all(pattern, offset, size):
            return
        model = _bytes(pattern.address, offset, size)
        if pattern.odd is None:
            self.all[model] = True
            if self.each is not None:
                self.each[:, model] = True
            return
        if self.each is None:
            self.each = np.tile(self.all, (self.blocks, 1))
        same = np.ones(self.blocks, bool)
        same[pattern.odd] = False
        self.each[np.flatnonzero(same)[:, None], model] = True
        for j in range(size):
            self.each[pattern.odd_block, pattern.odd_address + (offset + j)] = True
        within = slice(pattern.low + offset, pattern.high + offset + size)
        self.all[within] = self.each[:, within].all(axis=0)

    def missing(self, pattern: _Pattern, offset: int, size: int) -> tuple[int, int, int] | None:
        """(block, thread, address) of the first lane that would read what is not written, None if all is."""
        if self._by_all(pattern, offset, size):
            return None
        step = max(1, CHUNK // (size * max(1, len(pattern.threads))))
        for first in range(0, self.blocks, step):
            chunk = np.arange(first, min(self.blocks, first + step))
            slot, thread, address = pattern.events(chunk)
            bad = np.zeros(len(slot), bool)
            for j in range(size):
                at = address + (offset + j)
                bad |= ~(self.all[at] if self.each is None else self.each[chunk[slot], at])
            if bad.any():
                order = np.flatnonzero(bad)
                best = order[np.lexsort((thread[order], slot[order]))[0]]
                return int(chunk[slot[best]]), int(thread[best]), int(address[best]) + offset
        return None

    def _by_all(self, pattern: _Pattern, offset: int, size: int) -> bool:
        """Whether every block has written all that the pattern touches in any block."""
        if self.all[pattern.low + offset : pattern.high + offset + size].all():
            return True
        unit = (bits := MAX_GRANULE | size | offset | pattern.bits) & -bits
        flags = self.all.view(f"u{unit}")
        full = np.full(unit, True).view(f"u{unit}")[0]
        for address in (pattern.address, pattern.odd_address):
            first = (address + offset) // unit
            if not all((flags[first + j] == full).all() for j in range(size // unit)):
                return False
        return True


def _bytes(address: np.ndarray, offset: int, size: int) -> np.ndarray:
    return (address[:, None] + np.arange(offset, offset + size)).ravel()


# ── one epoch ──


@dataclass(eq=False)
class _Access:
    """One instruction by many lanes. `epoch` counts warp barriers before it, for all or for each warp."""

    time: int
    kind: Kind
    pattern: _Pattern
    offset: int
    size: int
    instruction: Instruction
    epoch: int | np.ndarray
    values: object
    lanes: np.ndarray | None
    threads: int

    @property
    def low(self) -> int:
        return self.pattern.low + self.offset

    @property
    def high(self) -> int:
        return self.pattern.high + self.offset + self.size

    def stored(self, lane: np.ndarray, granule: int) -> np.ndarray:
        """What these lanes store, cut in granules: [lanes, size // granule] unsigned."""
        parts = self.values if isinstance(self.values, list | tuple) else [self.values]
        columns = []
        at: np.ndarray | None = None
        for part in parts:
            array = np.asarray(part)
            if array.ndim == 0:
                array = np.broadcast_to(array, lane.shape)
            else:
                if self.lanes is not None and len(array) != self.pattern.blocks * self.threads:
                    if at is None:
                        numbers = np.flatnonzero(self.lanes) if self.lanes.dtype == bool else self.lanes
                        at = np.searchsorted(numbers, lane)
                    array = array[at]
                else:
                    array = array[lane]
            columns.append(np.ascontiguousarray(array).reshape(len(lane), -1).view(np.uint8))
        whole = np.concatenate(columns, axis=1)[:, : self.size]
        return np.ascontiguousarray(whole).view(f"<u{granule}")


def _interval(group: Sequence[_Access]) -> tuple[int, int]:
    return min(a.low for a in group), max(a.high for a in group)


def _meeting(log: Sequence[_Access]) -> list[list[_Access]]:
    """Accesses in groups whose address intervals do not meet, each in order of time."""
    groups: list[list[_Access]] = []
    reach = -1
    for access in sorted(log, key=lambda a: a.low):
        if access.low >= reach:
            groups.append([])
        groups[-1].append(access)
        reach = max(reach, access.high)
    for group in groups:
        group.sort(key=lambda a: a.time)
    return groups


def _store_one_value(group: Sequence[_Access]) -> bool:
    """Whether all stores of the group store the same scalar, in the same width."""
    stores = [a for a in group if a.kind == "store"]
    values = [a.values for a in stores]
    if any(not isinstance(v, np.generic) and not (isinstance(v, np.ndarray) and v.ndim == 0) for v in values):
        return False
    return len({(np.asarray(v).tobytes(), a.size) for v, a in zip(values, stores, strict=True)}) == 1 and all(
        np.asarray(v).dtype.itemsize == a.size for v, a in zip(values, stores, strict=True)
    )


@dataclass(frozen=True)
class _Event:
    access: int
    thread: int
    address: int


class _Epoch:
    """The accesses of one epoch in some blocks, granule by granule.

    A granule is the largest unit, up to 8 bytes, of which every access takes whole ones.
    """

    def __init__(
        self, monitor: SharedMonitor, group: Sequence[_Access], blocks: np.ndarray, values: bool = False
    ) -> None:
        self.group, self.blocks, self.threads = group, blocks, monitor.threads
        self.low, high = _interval(group)
        bits = MAX_GRANULE
        for access in group:
            bits |= access.size | access.offset | access.pattern.bits
        self.granule = bits & -bits
        self.span = (high - self.low) // self.granule
        self.epochs = len({a.epoch if isinstance(a.epoch, int) else id(a.epoch) for a in group}) > 1
        warps = monitor.threads // WARP_SIZE
        key, thread, kind, when, which = [], [], [], [], []
        for index, access in enumerate(group):
            slot, threads, address = access.pattern.events(blocks)
            first = slot * self.span + (address + (access.offset - self.low)) // self.granule
            for j in range(access.size // self.granule):
                key.append(first + j)
                thread.append(threads)
            pieces = access.size // self.granule
            kind.append(np.full(len(first) * pieces, _CODES[access.kind], np.uint8))
            which.append(np.full(len(first) * pieces, index))
            if self.epochs:
                epoch = access.epoch
                if isinstance(epoch, np.ndarray):
                    epoch = epoch[blocks[slot] * warps + threads // WARP_SIZE]
                when.append(np.tile(np.broadcast_to(epoch, len(first)), pieces))
        self.key, self.thread = np.concatenate(key), np.concatenate(thread)
        self.kind, self.which = np.concatenate(kind), np.concatenate(which)
        self.when = np.concatenate(when) if self.epochs else None
        self.value = self._values() if values else None

    def _values(self) -> np.ndarray:
        """What each store's granule receives; where that is unknown, a number unlike any other's."""
        out = np.zeros(len(self.key), np.uint64)
        known = np.ones(len(self.key), bool)
        at = 0
        for access in self.group:
            slot, threads, _ = access.pattern.events(self.blocks)
            pieces = access.size // self.granule
            stop = at + pieces * len(slot)
            if access.kind == "store" and len(slot):
                if access.values is None:
                    known[at:stop] = False
                else:
                    stored = access.stored(self.blocks[slot] * self.threads + threads, self.granule)
                    out[at:stop] = stored.T.ravel()
            at = stop
        self.known = known
        return out

    def verdict(self, values: bool) -> tuple[int | None, bool]:
        """(position of a block with a race or None, whether only stores of equal values could excuse it)."""
        if values and self.value is None:
            self.value = self._values()
        if self.when is None:
            return self._unlike(self.key, self.thread)
        bad, unsure = self._unlike(self.key, self.thread // WARP_SIZE)
        if bad is not None:
            return bad, unsure
        whole = self.key * (self.threads // WARP_SIZE) + self.thread // WARP_SIZE
        _, names = np.unique(np.stack([whole, self.when]), axis=1, return_inverse=True)
        bad, also = self._unlike(names.ravel(), self.thread, self.key)
        return bad, unsure or also

    def _unlike(
        self, key: np.ndarray, owner: np.ndarray, place: np.ndarray | None = None
    ) -> tuple[int | None, bool]:
        """Whether accesses of one key come from several owners and are not alike."""
        if not len(key):
            return None, False
        count = int(key.max()) + 1
        any_owner = np.empty(count, owner.dtype)
        any_owner[key] = owner
        several = np.zeros(count, bool)
        several[key[any_owner[key] != owner]] = True
        if not several.any():
            return None, False
        kinds = np.zeros((3, count), bool)
        for code in range(3):
            kinds[code, key[self.kind == code]] = True
        wrong = several & (kinds.sum(axis=0) > 1)
        unsure = several & kinds[_CODES["store"]] & ~wrong
        if self.value is not None and unsure.any():
            some = np.empty(count, np.uint64)
            some[key] = self.value
            differs = (some[key] != self.value) | ~self.known
            wrong[key[differs & unsure[key]]] = True
        if not wrong.any():
            return None, bool(unsure.any())
        where = key if place is None else place
        return int(where[wrong[key]].min()) // self.span, bool(unsure.any())

    def first_pair(self) -> tuple[_Event, _Event]:
        """The two accesses of the earliest race (by its later access), in order of time."""
        order = np.lexsort((self.thread, self.which))
        seen: dict[int, list[int]] = {}
        for i in order.tolist():
            for j in seen.setdefault(int(self.key[i]), []):
                if self._conflict(j, i):
                    return self._event(j), self._event(i)
            seen[int(self.key[i])].append(i)
        raise AssertionError("the two ways to look for a race disagree")

    def _conflict(self, i: int, j: int) -> bool:
        if self.thread[i] == self.thread[j]:
            return False
        same_warp = self.thread[i] // WARP_SIZE == self.thread[j] // WARP_SIZE
        if same_warp and self.when is not None and self.when[i] != self.when[j]:
            return False
        if self.kind[i] != self.kind[j]:
            return True
        if self.kind[i] != _CODES["store"]:
            return False
        assert self.value is not None
        return bool(self.value[i] != self.value[j]) or not bool(self.known[i] and self.known[j])

    def _event(self, i: int) -> _Event:
        access = self.group[int(self.which[i])]
        slot, _, address = access.pattern.events(self.blocks)
        first = int(np.flatnonzero(self.which == self.which[i])[0])
        return _Event(
            int(self.which[i]), int(self.thread[i]), int(address[(i - first) % len(slot)]) + access.offset
        )


_CODES: dict[Kind, int] = {"load": 0, "store": 1, "atomic": 2}


def _needed(monitor: SharedMonitor, group: Sequence[_Access]) -> list[_Access]:
    """The accesses (all loads or all atomics) without the repetitions that cannot make a difference."""
    low, _ = _interval(group)
    bits = MAX_GRANULE
    for access in group:
        bits |= access.size | access.offset | access.pattern.bits
    granule = bits & -bits
    warps = monitor.threads // WARP_SIZE
    keys, threads, owners = [], [], []
    for index, access in enumerate(group):
        p = access.pattern
        epoch = access.epoch
        if isinstance(epoch, np.ndarray):
            epoch = epoch[p.odd_block * warps + p.odd_thread // WARP_SIZE]
        first = (p.odd_address + (access.offset - low)) // granule
        for j in range(access.size // granule):
            keys.append(np.stack([p.odd_block, first + j, np.broadcast_to(epoch, len(first))]))
            threads.append(p.odd_thread)
            owners.append(np.stack([np.full(len(first), index), np.arange(len(first))]))
    _, name = np.unique(np.concatenate(keys, axis=1), axis=1, return_inverse=True)
    name = name.ravel()
    thread, owner = np.concatenate(threads), np.concatenate(owners, axis=1)
    _, first_at = np.unique(name, return_index=True)
    one = thread[first_at][name]
    strange = np.where(thread // WARP_SIZE != one // WARP_SIZE, 0, np.where(thread != one, 1, 2))
    order = np.lexsort((strange, name))
    _, second = np.unique(name[order], return_index=True)
    second_at = order[second]
    chosen = np.concatenate([first_at, second_at[strange[second_at] < 2]])
    out = []
    for index, access in enumerate(group):
        keep = np.zeros(access.pattern.loose, bool)
        keep[owner[1, chosen[owner[0, chosen] == index]]] = True
        out.append(
            _Access(
                access.time,
                access.kind,
                access.pattern.keep(keep),
                access.offset,
                access.size,
                access.instruction,
                access.epoch,
                access.values,
                access.lanes,
                access.threads,
            )
        )
    return out
