"""Watching what `llmcourse.autograd` keeps for backward, apart from what its arguments hold anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llmcourse.autograd import memory
from llmcourse.autograd.buffers import owner
from llmcourse.grading.cost_memory import Memory, Tally, array_range


class _Watch(memory.SavedBytes):
    def __init__(self, arguments: Sequence[object]) -> None:
        super().__init__()
        self.arguments, self.own, self.given = Memory(arguments), Tally(), Tally()

    def _tally(self, saved: memory.Saved) -> tuple[Tally, int]:
        where = array_range(saved.array)[0]
        return (self.given if where in self.arguments else self.own), where

    def _hold(self, saved: memory.Saved) -> None:
        tally, where = self._tally(saved)
        tally.hold(where, owner(saved.array).nbytes)

    def _drop(self, saved: memory.Saved) -> None:
        tally, where = self._tally(saved)
        tally.drop(where)


@contextmanager
def watch_saved(arguments: Sequence[object]) -> Iterator[tuple[Tally, Tally]]:
    """Follow what operations of this block save: (memory of its own, memory of the arguments)."""
    watch = _Watch(arguments)
    memory._active.append(watch)
    try:
        yield watch.own, watch.given
    finally:
        memory._active.remove(watch)
