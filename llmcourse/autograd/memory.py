"""Counting what a graph keeps for its backward pass, in bytes.

    with saved_bytes() as kept:
        loss = model(x)
    kept.bytes          # held now: every distinct buffer once, however many operations share it
    loss.backward()
    kept.bytes          # 0: each operation lets go of its buffers as soon as it has used them

A buffer counts with all of its memory, even where only a view of it was saved: the view keeps the
whole of it alive. Each buffer has a role. Parameters are in memory anyway, inputs belong to the
caller; only activations are the price of training.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llmcourse.autograd.buffers import owner, version

T = TypeVar("T")
ROLES = ("parameter", "input", "activation")
_active: list[SavedBytes] = []


@dataclass
class _Buffer:
    nbytes: int
    role: str
    holders: int = 0


class Saved:
    """One array that an operation keeps, with the version its memory had when it was kept."""

    __slots__ = ("array", "counters", "operation", "role", "version")

    def __init__(self, array: np.ndarray, operation: str, role: str) -> None:
        self.array, self.operation, self.role = array, operation, role
        self.version = version(array)
        self.counters = tuple(_active)
        for counter in self.counters:
            counter._hold(self)

    @property
    def nbytes(self) -> int:
        return owner(self.array).nbytes

    def __del__(self) -> None:
        for counter in self.counters:
            counter._drop(self)


class SavedBytes:
    """What the operations recorded inside one `saved_bytes()` block keep for backward.

    bytes      held now, in bytes
    peak       the most ever held
    timeline   (operation, bytes held after it) for every buffer kept (forward) or let go (backward)
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.peak = 0
        self.timeline: list[tuple[str, int]] = []
        self._buffers: dict[int, _Buffer] = {}

    def by_role(self) -> dict[str, int]:
        """Bytes held now for each of parameter, input and activation."""
        return {role: sum(b.nbytes for b in self._buffers.values() if b.role == role) for role in ROLES}

    def _hold(self, saved: Saved) -> None:
        buffer = self._buffers.setdefault(id(owner(saved.array)), _Buffer(saved.nbytes, saved.role))
        if buffer.holders == 0:
            self.bytes += buffer.nbytes
            self.peak = max(self.peak, self.bytes)
        buffer.holders += 1
        self.timeline.append((saved.operation, self.bytes))

    def _drop(self, saved: Saved) -> None:
        key = id(owner(saved.array))
        buffer = self._buffers[key]
        buffer.holders -= 1
        if buffer.holders == 0:
            self.bytes -= buffer.nbytes
            del self._buffers[key]
        self.timeline.append((saved.operation, self.bytes))


@contextmanager
def saved_bytes() -> Iterator[SavedBytes]:
    """Count what operations recorded in this block keep for backward (see `SavedBytes`).

    The counter goes on following those operations after the block, until they let go.
    """
    counter = SavedBytes()
    _active.append(counter)
    try:
        yield counter
    finally:
        _active.remove(counter)


def traced_peak(run: Callable[[], T]) -> tuple[int, T]:
    """The most bytes this process allocated at one time during `run()`, and its result.

    Asks Python's allocator, which NumPy reports every array to, and not the engine: an independent
    check of what `saved_bytes` counts. What was allocated before is not included.
    """
    tracemalloc.start()
    try:
        result = run()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()
