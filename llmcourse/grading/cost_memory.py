"""Two notions under every memory counter: which memory a value stands on, and how much is held at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


class Memory:
    """The memory under some values, as ranges of addresses.

    Takes arrays, tensors (torch's and the course's), modules, and lists, tuples and dicts of them. Anything
    else stands on no memory that counts. A view stands on all of its owner's memory. The values are held:
    else their addresses could be given out again.
    """

    def __init__(self, values: Iterable[object]) -> None:
        self._values = list(values)
        self._ranges: set[tuple[int, int]] = set()
        for value in self._values:
            self._add(value)

    def __contains__(self, address: int) -> bool:
        return any(start <= address < end for start, end in self._ranges)

    def _add(self, value: Any) -> None:
        torch, autograd = sys.modules.get("torch"), sys.modules.get("llmcourse.autograd.tensor")
        if isinstance(value, np.ndarray):
            self._ranges.add(array_range(value))
        elif torch is not None and isinstance(value, torch.Tensor):
            from llmcourse.grading.cost_torch import address, storages

            self._ranges |= {(address(s), address(s) + s.nbytes()) for s in storages(value)}
        elif torch is not None and isinstance(value, torch.nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                self._add(tensor)
        elif autograd is not None and isinstance(value, autograd.Tensor):
            self._add(value.data)
        elif isinstance(value, list | tuple):
            for item in value:
                self._add(item)
        elif isinstance(value, Mapping):
            for item in value.values():
                self._add(item)


class Tally:
    """Bytes held now and at most; a piece of memory counts once, however many hold it."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._holders: dict[int, tuple[int, int]] = {}  # address → (holders, bytes)

    def hold(self, address: int, nbytes: int) -> None:
        holders, known = self._holders.get(address, (0, 0))
        self._holders[address] = holders + 1, known
        self.resize(address, nbytes)

    def resize(self, address: int, nbytes: int) -> None:
        holders, known = self._holders[address]
        self._holders[address] = holders, nbytes
        self.held += nbytes - known
        self.peak = max(self.peak, self.held)

    def drop(self, address: int) -> None:
        holders, nbytes = self._holders.pop(address)
        if holders > 1:
            self._holders[address] = holders - 1, nbytes
        else:
            self.held -= nbytes


def array_range(array: np.ndarray) -> tuple[int, int]:
    """First address and end of the memory of the array that owns what `array` shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    low, high = np.lib.array_utils.byte_bounds(array)
    return low, high
