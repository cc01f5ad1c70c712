"""Where the lanes of a batch point, block by block, learned once for each register.

Most instructions access the same addresses in every block. A `Pattern` keeps those of one block, the model,
and in full those of the blocks that differ. It is found again by the identity of the arrays it came from,
which the machine never changes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np

REMEMBERED = 512
"""Patterns and sets of lanes kept for reuse."""


class Pattern:
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
        Pattern.count += 1
        self.serial = Pattern.count
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

    def keep(self, chosen: np.ndarray) -> Pattern:
        """The same with some accesses of the odd blocks left out."""
        return Pattern(
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
class LaneSet:
    """Some lanes of the batch, by block; `alike`: blocks with the same threads as the model block."""

    block: np.ndarray
    thread: np.ndarray
    cuts: np.ndarray
    alike: np.ndarray
    model: slice


class Patterns:
    """Finds the pattern of a base array and a set of lanes; remembers those of arrays seen before."""

    def __init__(self, blocks: int, threads: int) -> None:
        self.blocks, self.threads = blocks, threads
        self.model = blocks // 2  # in the middle of the grid: blocks at its edges are the unusual ones
        self._every_thread = np.arange(threads)
        self._found: dict[tuple[object, ...], tuple[object, object, Pattern]] = {}
        self._sets: dict[int, tuple[weakref.ref[np.ndarray], LaneSet]] = {}

    def find(self, base: np.ndarray | np.generic | int, lanes: np.ndarray | None) -> Pattern:
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

    def _make(self, base: np.ndarray | np.generic | int, scalar: bool, lanes: np.ndarray | None) -> Pattern:
        if lanes is None:
            if scalar:
                return Pattern(self.blocks, self._every_thread, np.full(self.threads, int(base), np.int64))
            rows = np.asarray(base).reshape(self.blocks, self.threads)
            row = rows[self.model]
            odd = np.flatnonzero((rows != row).any(axis=1))
            if not odd.size:
                return Pattern(self.blocks, self._every_thread, row.astype(np.int64))
            return Pattern(
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
            return Pattern(self.blocks, group.thread[group.model], model)
        rest = ~same[group.block]
        return Pattern(
            self.blocks,
            group.thread[group.model],
            model,
            np.flatnonzero(~same),
            group.block[rest],
            group.thread[rest],
            address[rest],
        )

    def _lane_set(self, lanes: np.ndarray) -> LaneSet:
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
        made = LaneSet(block, thread, cuts[:-1], alike, model)
        if len(self._sets) >= REMEMBERED:
            self._sets.clear()
        self._sets[id(lanes)] = weakref.ref(lanes), made
        return made
