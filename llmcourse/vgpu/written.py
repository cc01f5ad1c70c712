"""Which bytes of shared memory have been written, to find reads of those that nobody wrote."""

from __future__ import annotations

import numpy as np

from llmcourse.vgpu.patterns import Pattern

CHUNK = 1 << 22
"""Lane accesses looked at together."""
UNIT = 8
"""Bytes checked at once, at most."""


class Written:
    """Which bytes have been written: by all blocks, and, once they differ, by each."""

    def __init__(self, blocks: int, nbytes: int) -> None:
        self.blocks = blocks
        self.all = np.zeros(-(-nbytes // UNIT) * UNIT, bool)
        self.each: np.ndarray | None = None

    def mark(self, pattern: Pattern, offset: int, size: int) -> None:
        if self._by_all(pattern, offset, size):
            return
        model = bytes_of(pattern.address, offset, size)
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

    def missing(self, pattern: Pattern, offset: int, size: int) -> tuple[int, int, int] | None:
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

    def _by_all(self, pattern: Pattern, offset: int, size: int) -> bool:
        """Whether every block has written all that the pattern touches in any block."""
        if self.all[pattern.low + offset : pattern.high + offset + size].all():
            return True
        unit = (bits := UNIT | size | offset | pattern.bits) & -bits
        flags = self.all.view(f"u{unit}")
        full = np.full(unit, True).view(f"u{unit}")[0]
        for address in (pattern.address, pattern.odd_address):
            first = (address + offset) // unit
            if not all((flags[first + j] == full).all() for j in range(size // unit)):
                return False
        return True


def bytes_of(address: np.ndarray, offset: int, size: int) -> np.ndarray:
    return (address[:, None] + np.arange(offset, offset + size)).ravel()
