"""Where a kernel's arrays lie: addresses, bounds and the bytes behind them.

One address space holds the arguments, the module's global and constant variables, with a gap around each
so that a wrong index falls into no one's memory. Shared memory and local memory have windows of their own
high above, for pointers that a kernel passes around without saying where they point (generic addresses).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmcourse.errors import CourseError
from llmcourse.vgpu.isa import Variable

SHARED_WINDOW = 1 << 44
LOCAL_WINDOW = 1 << 45
ALIGN = 512
"""A GPU's allocator places every allocation on a multiple of 512 bytes; sectors are counted from there."""
GAP = 1 << 20
SHARED_GAP = 1 << 10
"""Between shared arrays; a multiple of 128 bytes, so that each word stays in its bank."""


class ArgumentError(CourseError, TypeError):
    """An argument that a kernel cannot take."""


@dataclass(frozen=True)
class Span:
    """One array's place: bytes start ≤ address < stop."""

    start: int
    stop: int
    name: str
    itemsize: int


class Spans:
    """The arrays of one address space, in order, to tell which an address belongs to."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = sorted(spans, key=lambda s: s.start)
        self.starts = np.array([s.start for s in self.spans], np.int64)
        self.stops = np.array([s.stop for s in self.spans], np.int64)

    def inside(self, low: int, high: int) -> bool:
        """Whether all of low..high (exclusive) lies in one array."""
        i = int(np.searchsorted(self.starts, low, "right")) - 1
        return i >= 0 and high <= int(self.stops[i])

    def outside(self, address: np.ndarray, size: int) -> np.ndarray:
        """bool [n]: accesses of `size` bytes that no array holds whole."""
        if not len(self.starts):
            return np.ones(len(address), bool)
        i = np.searchsorted(self.starts, address, "right") - 1
        return (i < 0) | (address + size > self.stops[np.maximum(i, 0)])

    def describe(self, address: int) -> str:
        """What lies next to an address that is in no array."""
        if not self.spans:
            return "there is no array in this memory"
        near = min(self.spans, key=lambda s: min(abs(address - s.start), abs(address - s.stop)))
        count = (near.stop - near.start) // near.itemsize
        index = (address - near.start) // near.itemsize
        return f"that would be element {index} of {near.name}, which has {count} of {near.itemsize} bytes"


@dataclass
class GlobalMemory:
    """The arguments' bytes and the module's variables, in one block of memory.

    data       uint8 [bytes]; `views[dtype]` the same as wider types
    symbols    address of each variable of the module
    addresses  for each argument its address, None where it is no array
    """

    data: np.ndarray
    spans: Spans
    symbols: dict[str, int]
    addresses: list[int | None]
    _copies: list[tuple[np.ndarray, int, bool]] = field(default_factory=list)
    views: dict[np.dtype, np.ndarray] = field(default_factory=dict)

    def view(self, dtype: np.dtype) -> np.ndarray:
        found = self.views.get(dtype)
        if found is None:
            found = self.views[dtype] = self.data.view(dtype)
        return found

    def copy_back(self) -> None:
        """Write what the kernel left into the caller's arrays.

        Raises   ArgumentError if the kernel wrote to an array that is read-only.
        """
        for raw, address, writable in self._copies:
            now = self.data[address : address + len(raw)]
            if writable:
                raw[:] = now
            elif not np.array_equal(raw, now):
                raise ArgumentError(
                    "the kernel wrote to an array that is read-only.",
                    "NumPy was told that this array must not change (its flag writeable is False).",
                    "passing array.copy().",
                )

    def text(self, address: int) -> bytes:
        """The C string at an address."""
        stop = address
        while stop < len(self.data) and self.data[stop]:
            stop += 1
        return self.data[address:stop].tobytes()


def place(arguments: Sequence[object], names: Sequence[str], variables: Sequence[Variable]) -> GlobalMemory:
    """Lay out arguments (NumPy arrays among them) and a module's global and constant variables.

    Arrays that share memory share it here too. An array that starts inside its storage (a view) keeps its
    distance from the storage's start modulo 512 bytes, so that alignment counts as it would on a GPU.
    """
    ranges: list[tuple[int, int, int]] = []
    for i, a in enumerate(arguments):
        if isinstance(a, np.ndarray):
            low, high = np.lib.array_utils.byte_bounds(a) if a.size else (a.ctypes.data, a.ctypes.data)
            ranges.append((low, high, i))
    groups: list[tuple[int, int, list[int]]] = []
    for low, high, i in sorted(ranges):
        if groups and low < groups[-1][1]:
            groups[-1] = (groups[-1][0], max(groups[-1][1], high), [*groups[-1][2], i])
        else:
            groups.append((low, high, [i]))
    at, spans, symbols = GAP, [], {}
    for v in variables:
        at = -(-at // max(v.align, 16)) * max(v.align, 16)
        symbols[v.name] = at
        spans.append(Span(at, at + v.size, f"the variable {v.name}", max(1, len(v.initial) and v.align)))
        at += v.size + 256
    addresses: list[int | None] = [None] * len(arguments)
    copies: list[tuple[np.ndarray, int, bool]] = []
    for low, high, members in groups:
        first = arguments[members[0]]
        assert isinstance(first, np.ndarray)
        gap = min(max(GAP, high - low), 64 * GAP)
        at = -(-(at + gap) // ALIGN) * ALIGN + (low - _storage_start(first)) % ALIGN
        for i in members:
            array = arguments[i]
            assert isinstance(array, np.ndarray)
            start = at + np.lib.array_utils.byte_bounds(array)[0] - low if array.size else at
            addresses[i] = at + array.ctypes.data - low if array.size else at
            stop = start + (
                np.lib.array_utils.byte_bounds(array)[1] - low - (start - at) if array.size else 0
            )
            spans.append(Span(start, stop, names[i], array.itemsize))
        if high > low:
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
            writable = all(a.flags.writeable for i in members if isinstance(a := arguments[i], np.ndarray))
            copies.append((raw, at, writable))
        at += high - low
    data = np.zeros(-(-(at + GAP) // 16) * 16, np.uint8)  # untouched gaps take no memory
    for v in variables:
        start = symbols[v.name]
        data[start : start + len(v.initial)] = np.frombuffer(v.initial, np.uint8)
    for raw, start, _ in copies:
        data[start : start + len(raw)] = raw
    return GlobalMemory(data, Spans(_merged(spans)), symbols, addresses, copies)


def _merged(spans: list[Span]) -> list[Span]:
    """Overlapping spans as one, under the first's name."""
    out: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.stop)):
        if out and span.start < out[-1].stop:
            last = out.pop()
            span = Span(last.start, max(last.stop, span.stop), last.name, last.itemsize)
        out.append(span)
    return out


def _storage_start(array: np.ndarray) -> int:
    while isinstance(array.base, np.ndarray):
        array = array.base
    storage = getattr(array.base, "untyped_storage", None)
    return storage().data_ptr() if storage is not None else array.ctypes.data


@dataclass(frozen=True)
class SharedLayout:
    """Where the shared arrays of a kernel lie in its block's memory.

    offsets   address of each variable; `dynamic` of the array that the launch sizes
    nbytes    what the machine allocates, gaps included; `used` what a GPU would
    """

    offsets: dict[str, int]
    spans: Spans
    nbytes: int
    used: int


def lay_out_shared(variables: Sequence[Variable], dynamic: int) -> SharedLayout:
    """Static arrays one after the other, then the dynamic one, which all `extern __shared__` names share."""
    offsets: dict[str, int] = {}
    spans: list[Span] = []
    dense = gaps = 0
    static = [v for v in variables if v.size]
    for v in sorted(static, key=lambda v: -v.align):
        dense = -(-dense // v.align) * v.align
        offsets[v.name] = dense + gaps
        item = v.align if v.type == "b8" else max(1, v.size // max(1, v.size))
        spans.append(Span(dense + gaps, dense + gaps + v.size, f"the shared array {_plain(v.name)}", item))
        dense += v.size
        gaps += SHARED_GAP
    open_ended = [v for v in variables if not v.size]
    if open_ended or dynamic:
        align = max([v.align for v in open_ended], default=16)
        dense = -(-dense // align) * align
        for v in open_ended:
            offsets[v.name] = dense + gaps
        if dynamic:
            spans.append(Span(dense + gaps, dense + gaps + dynamic, "the dynamic shared memory", 4))
        dense += dynamic
    nbytes = -(-(dense + gaps + 16) // 16) * 16
    return SharedLayout(offsets, Spans(spans), nbytes, dense)


def _plain(name: str) -> str:
    """The variable's own name in what the compiler calls it: _ZZ8mm_tiledE2sA → sA."""
    import re

    found = re.match(r"_ZZ.*E(\d+)(\w+)$", name)
    while found and int(found[1]) > len(found[2]):
        found = re.match(r".*?(\d+)(\w+)$", found[2])
    return found[2][: int(found[1])] if found else name
