"""Memory as `tracemalloc` sees it: every Python object, and every NumPy array in a domain of its own.

tracemalloc is one for the whole process. Blocks here may lie inside each other, and inside somebody
else's tracing: they start it if it is off, stop it if they started it, and put back the peak that they
had to reset.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from llmcourse.grading.cost import CostError


@contextmanager
def _tracing() -> Iterator[Callable[[], None]]:
    """tracemalloc is on in this block. What is given raises CostError if it was not on throughout."""
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    witness = object()  # its own trace goes when tracing is stopped or cleared

    def unbroken() -> None:
        if tracemalloc.get_object_traceback(witness) is None:
            raise CostError(
                "tracemalloc was stopped or cleared while memory was being counted.",
                "What was allocated before that is no longer known.",
                "leaving tracemalloc alone inside the counted block; read its figures outside.",
            )

    try:
        yield unbroken
    finally:
        if ours and tracemalloc.is_tracing():
            tracemalloc.stop()


@contextmanager
def numpy_memory() -> Iterator[Callable[[], int]]:
    """Gives a function: bytes of NumPy arrays that were made since the start of the block and are alive.

    Where tracing was on before, an array of that time that the block frees is taken off the count.
    """
    with _tracing() as unbroken:
        before = _numpy_bytes()

        def alive() -> int:
            unbroken()
            return max(0, _numpy_bytes() - before)

        yield alive


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Gives a function: the most bytes allocated since the start of the block, above those at its start."""
    with _tracing() as unbroken:
        start, earlier = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()

        def peak() -> int:
            unbroken()
            return tracemalloc.get_traced_memory()[1] - start

        try:
            yield peak
        finally:
            now, highest = tracemalloc.get_traced_memory()
            if earlier > highest:
                # A peak cannot be set. An allocation up to it, never touched, has the same effect.
                np.empty(earlier - now, np.uint8)


def _numpy_bytes() -> int:
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
