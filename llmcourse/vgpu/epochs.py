"""The accesses between two barriers, and the rule that finds a race among them.

Take the accesses of one epoch to one granule of memory. They are *alike* if all are loads, all are atomics,
or all are stores of the same value. If they come from several warps and are not all alike, there is a race;
and also if those within one warp, between two `__syncwarp()`, come from several lanes and are not all alike.
(Were no two accesses of different warps in conflict, each would have to be of the other's kind, and so every
one of the same kind.) No order in time enters, so a few scatters and gathers over all accesses decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmcourse.vgpu.isa import WARP_SIZE, Instruction
from llmcourse.vgpu.patterns import Pattern

Kind = Literal["load", "store", "atomic"]
_CODES: dict[Kind, int] = {"load": 0, "store": 1, "atomic": 2}

MAX_GRANULE = 8


@dataclass(eq=False)
class Access:
    """One instruction by many lanes. `epoch` counts warp barriers before it, for all or for each warp."""

    time: int
    kind: Kind
    pattern: Pattern
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


def interval(group: Sequence[Access]) -> tuple[int, int]:
    return min(a.low for a in group), max(a.high for a in group)


def meeting(log: Sequence[Access]) -> list[list[Access]]:
    """Accesses in groups whose address intervals do not meet, each in order of time."""
    groups: list[list[Access]] = []
    reach = -1
    for access in sorted(log, key=lambda a: a.low):
        if access.low >= reach:
            groups.append([])
        groups[-1].append(access)
        reach = max(reach, access.high)
    for group in groups:
        group.sort(key=lambda a: a.time)
    return groups


def store_one_value(group: Sequence[Access]) -> bool:
    """Whether all stores of the group store the same scalar, in the same width."""
    stores = [a for a in group if a.kind == "store"]
    values = [a.values for a in stores]
    if any(not isinstance(v, np.generic) and not (isinstance(v, np.ndarray) and v.ndim == 0) for v in values):
        return False
    return len({(np.asarray(v).tobytes(), a.size) for v, a in zip(values, stores, strict=True)}) == 1 and all(
        np.asarray(v).dtype.itemsize == a.size for v, a in zip(values, stores, strict=True)
    )


@dataclass(frozen=True)
class Event:
    access: int
    thread: int
    address: int


class Epoch:
    """The accesses of one epoch in some blocks, granule by granule.

    A granule is the largest unit, up to 8 bytes, of which every access takes whole ones.
    """

    def __init__(
        self, group: Sequence[Access], blocks: np.ndarray, threads: int, values: bool = False
    ) -> None:
        self.group, self.blocks, self.threads = group, blocks, threads
        self.low, high = interval(group)
        bits = MAX_GRANULE
        for access in group:
            bits |= access.size | access.offset | access.pattern.bits
        self.granule = bits & -bits
        self.span = (high - self.low) // self.granule
        self.epochs = len({a.epoch if isinstance(a.epoch, int) else id(a.epoch) for a in group}) > 1
        warps = threads // WARP_SIZE
        key, thread, kind, when, which = [], [], [], [], []
        for index, access in enumerate(group):
            slot, lane, address = access.pattern.events(blocks)
            first = slot * self.span + (address + (access.offset - self.low)) // self.granule
            for j in range(access.size // self.granule):
                key.append(first + j)
                thread.append(lane)
            pieces = access.size // self.granule
            kind.append(np.full(len(first) * pieces, _CODES[access.kind], np.uint8))
            which.append(np.full(len(first) * pieces, index))
            if self.epochs:
                epoch = access.epoch
                if isinstance(epoch, np.ndarray):
                    epoch = epoch[blocks[slot] * warps + lane // WARP_SIZE]
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

    def first_pair(self) -> tuple[Event, Event]:
        """The two accesses of the earliest race (by its later access), in order of time.

        Of the races of one instruction one between warps, if there is any: what cures that cures the others.
        """
        found: tuple[int, int] | None = None
        seen: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for i in np.lexsort((self.thread, self.which)).tolist():
            if found is not None and self.which[i] != self.which[found[1]]:
                break
            before = seen.setdefault(int(self.key[i]), {})
            for j in (j for alike in before.values() for j in alike):
                if self._conflict(j, i):
                    if self.thread[i] // WARP_SIZE != self.thread[j] // WARP_SIZE:
                        return self._event(j), self._event(i)
                    found = found or (j, i)
            alike = before.setdefault(self._sort_of(i), [])
            if len(alike) < 2 and all(self.thread[i] != self.thread[j] for j in alike):
                alike.append(i)
        if found is None:
            raise AssertionError("the two ways to look for a race disagree")
        return self._event(found[0]), self._event(found[1])

    def _sort_of(self, i: int) -> tuple[int, ...]:
        """Accesses of one sort are in conflict with the same ones, if by other threads: two will do."""
        assert self.value is not None
        when = 0 if self.when is None else int(self.when[i])
        return (
            int(self.kind[i]),
            int(self.value[i]),
            int(self.known[i]),
            when,
            int(self.thread[i]) // WARP_SIZE,
        )

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

    def _event(self, i: int) -> Event:
        access = self.group[int(self.which[i])]
        slot, _, address = access.pattern.events(self.blocks)
        first = int(np.flatnonzero(self.which == self.which[i])[0])
        return Event(
            int(self.which[i]), int(self.thread[i]), int(address[(i - first) % len(slot)]) + access.offset
        )


def needed(group: Sequence[Access], threads: int) -> list[Access]:
    """The accesses (all loads or all atomics) without the repetitions that cannot make a difference."""
    low, _ = interval(group)
    bits = MAX_GRANULE
    for access in group:
        bits |= access.size | access.offset | access.pattern.bits
    granule = bits & -bits
    warps = threads // WARP_SIZE
    keys, lanes, owners = [], [], []
    for index, access in enumerate(group):
        p = access.pattern
        epoch = access.epoch
        if isinstance(epoch, np.ndarray):
            epoch = epoch[p.odd_block * warps + p.odd_thread // WARP_SIZE]
        first = (p.odd_address + (access.offset - low)) // granule
        for j in range(access.size // granule):
            keys.append(np.stack([p.odd_block, first + j, np.broadcast_to(epoch, len(first))]))
            lanes.append(p.odd_thread)
            owners.append(np.stack([np.full(len(first), index), np.arange(len(first))]))
    _, name = np.unique(np.concatenate(keys, axis=1), axis=1, return_inverse=True)
    name = name.ravel()
    thread, owner = np.concatenate(lanes), np.concatenate(owners, axis=1)
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
        out.append(replace(access, pattern=access.pattern.keep(keep)))
    return out
