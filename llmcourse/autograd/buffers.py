"""Which memory an array stands on, and whether it was written to since.

A NumPy array is either the owner of its memory or a view of another array's. Reshape, transpose and
basic indexing make views: new shape and strides, same bytes. Two questions of the engine are about
the memory and not about the view: how many bytes does keeping this array keep alive (all of its
owner's), and has anybody written there since it was kept (through any view)?

NumPy does not tell when an array is written. The engine's own in-place methods (`add_`, `mul_`,
`copy_`, `t[i] = …`) report to `bump`; a write to the raw `tensor.data` is not seen.
"""

from __future__ import annotations

import weakref

import numpy as np

_versions: dict[int, int] = {}  # id(owner) → writes so far; the entry goes when the owner does


def owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory `array` stands on: itself, or the last array along its chain of bases."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def version(array: np.ndarray) -> int:
    """How many in-place writes the memory under `array` has seen."""
    return _versions.get(id(owner(array)), 0)


def bump(array: np.ndarray) -> None:
    """Record one in-place write to the memory under `array`."""
    memory = owner(array)
    if id(memory) not in _versions:
        # ids are reused: forget this one together with the memory it stood for.
        weakref.finalize(memory, _versions.pop, id(memory), None).atexit = False
    _versions[id(memory)] = version(memory) + 1
