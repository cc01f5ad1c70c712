"""Where the elements of a matrix tile live in the registers of a warp, and how they get there from memory.

A tensor-core instruction multiplies small matrices that are spread over the 32 lanes of a warp. Lane l is
number t = l % 4 in group g = l // 4. A register of A or B covers 8 rows (of B: columns) by
4·e along k, where e elements fit in a register: lane l holds row g, k = e·t … e·t + e − 1. An accumulator
covers 8 × 8: lane l holds row g, columns 2t and 2t + 1 (PTX ISA, "Matrix Fragments for mma").

For `wmma` PTX leaves the layout open. Here it is that of the `mma` instructions which the compiler makes of
it (ptxas 13.0 for sm_75, sm_80 and sm_90, read from the machine code with nvdisasm), and so are the memory
accesses, which decide the counters:

- an operand stored along k: one 4-byte load per register, from shared memory `ldmatrix`, 16 bytes a row;
- a 16-bit one stored across k: 8 × 8 blocks are loaded along memory and turned inside the warp (`movmatrix`,
  `ldmatrix.trans`); an 8-bit one: a load of one byte per element;
- accumulators: neighbouring columns as one 8- or 16-byte access if they are neighbours in memory;
- m8n32k16 is computed as the transposed product, so its accumulator is held transposed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llmcourse.vgpu.isa import WARP_SIZE, Address, Instruction, Operand, Vector

BITS = {
    "f64": 64,
    "f32": 32,
    "s32": 32,
    "tf32": 32,
    "f16": 16,
    "bf16": 16,
    "b16": 16,
    "s8": 8,
    "u8": 8,
    "e4m3": 8,
    "e5m2": 8,
    "s4": 4,
    "u4": 4,
}
"""Types that a fragment can have → bits of an element."""

_LANE = np.arange(WARP_SIZE)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")


@dataclass(frozen=True)
class Layout:
    """rows, cols: [registers, 32 lanes, elements of a register], of a tile of `shape`."""

    shape: tuple[int, int]
    bits: int
    rows: np.ndarray
    cols: np.ndarray

    @property
    def registers(self) -> int:
        return len(self.rows)


@lru_cache(maxsize=256)
def layout_of(role: str, m: int, n: int, k: int, type_: str) -> Layout:
    """The fragment of A [m, k], B [k, n] or of the accumulator C (or D) [m, n] in a product m × n × k."""
    bits = BITS[type_]
    turned = m == 8 and n == 32
    if role == "c":
        rows, cols = _accumulator(n, m, bits) if turned else _accumulator(m, n, bits)
        return Layout((m, n), bits, cols, rows) if turned else Layout((m, n), bits, rows, cols)
    outer = m if role == "a" else n
    across, along = _operand(outer, k, bits, paired=(role == "a") != turned)
    if role == "a":
        return Layout((m, k), bits, across, along)
    return Layout((k, n), bits, along, across)


def _operand(outer: int, k: int, bits: int, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """(row or column, k) of each element. Registers go along k; of a paired operand, by two blocks of 8."""
    each = max(1, 32 // bits)
    depth = 4 * each
    pair = 2 if paired and outer >= 16 else 1
    across, along = [], []
    for block in range(0, outer, 8 * pair):
        for start in range(0, k, depth):
            for half in range(pair):
                across.append(np.repeat((block + 8 * half + _GROUP)[:, None], each, axis=1))
                along.append(start + each * _IN_GROUP[:, None] + np.arange(each))
    return np.array(across), np.array(along)


def _accumulator(m: int, n: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    each = 2 if bits == 16 else 1
    rows, cols = [], []
    for row in range(0, m, 16):
        for col in range(0, n, 8):
            for half in range(0, min(16, m), 8):
                for first in range(0, 2, each):
                    rows.append(np.repeat((row + half + _GROUP)[:, None], each, axis=1))
                    cols.append(col + 2 * _IN_GROUP[:, None] + first + np.arange(each))
    return np.array(rows), np.array(cols)


# ── memory ──


@dataclass(frozen=True)
class Request:
    """One memory instruction of a warp: lane l < lanes accesses `count` neighbouring elements.

    They start at element major[l] · stride + minor[l] from the lane's pointer.
    """

    major: np.ndarray
    minor: np.ndarray
    count: int
    lanes: int = WARP_SIZE


@dataclass(frozen=True)
class FragmentPlan:
    """A load or store of a whole fragment, as the memory accesses that the hardware makes of it.

    pointer      where the tile starts (for ldmatrix and stmatrix: where each lane's row starts)
    stride       elements between rows (columns, of a tile stored by columns): an operand, or `default_stride`
    parts        the registers, in order; None for one that is not wanted
    itemsize     bytes of an element
    """

    name: str
    store: bool
    pointer: Address
    stride: Operand | None
    default_stride: int
    parts: tuple[Operand | None, ...]
    itemsize: int
    requests: tuple[Request, ...]
    _places: np.ndarray
    """[unique registers, 32, elements]: each element's place among all that the requests move."""

    pointer_alignment: int
    """Bytes of which the pointer must be a multiple: a lane's share of the tile (PTX ISA, "Matrix Storage for
    WMMA"). `stride_alignment` likewise of stride · itemsize; CUDA C++ asks for no more than 16."""
    stride_alignment: int

    @property
    def register_bytes(self) -> int:
        return self._places.shape[2] * self.itemsize

    def assemble(self, loaded: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Registers [W, 32] (unsigned), one for each part, from what each request loaded.

        loaded   for each request [W, 32, count] of an unsigned type of `itemsize`
        """
        warps = loaded[0].shape[0]
        flat = np.concatenate([array.reshape(warps, -1) for array in loaded], axis=1)
        unique = np.take(flat, self._places, axis=1).view(f"<u{self.register_bytes}")[..., 0]
        return tuple(unique[:, i % unique.shape[1]] for i in range(len(self.parts)))

    def scatter(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What each request stores, [W, 32, count] unsigned of `itemsize`, from the parts' values [W, 32]."""
        unique = np.stack(
            [np.ascontiguousarray(p).view(f"<u{self.register_bytes}") for p in parts[: len(self._places)]],
            axis=1,
        )
        warps = unique.shape[0]
        elements = unique[..., None].view(f"<u{self.itemsize}").reshape(warps, -1)
        sizes = [WARP_SIZE * r.count for r in self.requests]
        flat = np.zeros((warps, sum(sizes)), elements.dtype)
        flat[:, self._places.ravel()] = elements
        cut = np.split(flat, np.cumsum(sizes)[:-1], axis=1)
        return [c.reshape(warps, WARP_SIZE, r.count) for c, r in zip(cut, self.requests, strict=True)]


def fragment_accesses(instruction: Instruction, target: str = "sm_80") -> FragmentPlan | None:
    """The plan of wmma.load, wmma.store, ldmatrix or stmatrix; None for others, and for forms not known.

    target   sm_75 loads at most two 8 × 8 blocks from shared memory at a time, later ones four
    """
    if instruction.opcode == "wmma" and instruction.has("load", "store"):
        return _wmma_plan(instruction, target)
    if instruction.opcode in ("ldmatrix", "stmatrix"):
        return _matrix_plan(instruction)
    return None


def shape_of(instruction: Instruction) -> tuple[int, int, int] | None:
    """(m, n, k) of the modifier m16n8k16."""
    for modifier in instruction.modifiers:
        if found := _SHAPE.match(modifier):
            return int(found[1]), int(found[2]), int(found[3])
    return None


def types_of(instruction: Instruction) -> list[str]:
    return [m for m in instruction.modifiers if m in BITS]


def _wmma_plan(instruction: Instruction, target: str) -> FragmentPlan | None:
    shape, types = shape_of(instruction), types_of(instruction)
    store = instruction.has("store")
    role = "c" if store else next((m for m in instruction.modifiers if m in ("a", "b", "c")), None)
    operands = instruction.operands
    if shape is None or len(types) != 1 or role is None or BITS[types[0]] < 8 or len(operands) < 2:
        return None
    pointer, vector = operands[:2] if store else operands[1::-1]
    if not isinstance(pointer, Address):
        return None
    parts = vector.parts if isinstance(vector, Vector) else (vector,)
    layout = layout_of(role, *shape, types[0])
    by_row = instruction.has("row")
    if len(parts) % layout.registers:
        return None
    blocks = 0
    if instruction.has("shared") and not store and role != "c" and layout.bits <= 16:
        blocks = 4 if layout.bits == 16 and _number(target) >= 80 else 2
    requests, places = _plan(layout, by_row, blocks)
    itemsize = layout.bits // 8
    return FragmentPlan(
        name=f"wmma::{'store' if store else 'load'}_matrix_sync",
        store=store,
        pointer=pointer,
        stride=operands[2] if len(operands) > 2 else None,
        default_stride=layout.shape[1] if by_row else layout.shape[0],
        parts=parts,
        itemsize=itemsize,
        requests=requests,
        _places=places,
        pointer_alignment=len(parts) * max(4, itemsize),
        stride_alignment=min(16, len(parts) * max(4, itemsize)),
    )


def _number(target: str) -> int:
    return int(re.sub(r"\D", "", target) or 0)


def _plan(layout: Layout, by_row: bool, blocks: int) -> tuple[tuple[Request, ...], np.ndarray]:
    """Requests for a tile, and each element's place in them. `blocks`: registers that one ldmatrix fills."""
    major, minor = (layout.rows, layout.cols) if by_row else (layout.cols, layout.rows)
    each = major.shape[2]
    along = bool((major == major[:, :, :1]).all()) and each * layout.bits >= 32
    requests: list[Request] = []
    if blocks and (along or layout.bits == 16):
        per_row = 128 // layout.bits
        while layout.registers % blocks:
            blocks //= 2
        row = np.arange(8)
        for first in range(0, layout.registers, blocks):
            tiles = range(first, first + blocks)
            majors = np.concatenate([major[i].min() + row for i in tiles])
            minors = np.concatenate([np.full(8, minor[i].min()) for i in tiles])
            fill = WARP_SIZE - len(majors)
            requests.append(Request(_padded(majors, fill), _padded(minors, fill), per_row, len(majors)))
    elif along:
        width = 1
        if layout.registers % 2 == 0 and each == 1 and (minor[1::2] == minor[::2] + 1).all():
            width = 2 if (major[1::2] == major[::2]).all() else 1
        for i in range(0, layout.registers, width):
            requests.append(Request(major[i, :, 0], minor[i, :, 0], width * each))
    elif layout.bits == 16:
        for i in range(layout.registers):
            requests.append(Request(major[i].min() + _GROUP, minor[i].min() + 2 * _IN_GROUP, 2))
    else:
        for i in range(layout.registers):
            requests += [Request(major[i, :, j], minor[i, :, j], 1) for j in range(each)]
    return tuple(requests), _places(requests, major, minor)


def _padded(values: np.ndarray, fill: int) -> np.ndarray:
    return np.concatenate([values, np.full(fill, values[0])])


def _places(requests: Sequence[Request], major: np.ndarray, minor: np.ndarray) -> np.ndarray:
    """Each element's place in the requests' data laid end to end, from its coordinates."""
    place = np.full((major.max() + 1, minor.max() + 1), -1)
    at = 0
    for request in requests:
        lane = np.arange(request.lanes)
        for j in range(request.count):
            place[request.major[lane], request.minor[lane] + j] = at + lane * request.count + j
        at += WARP_SIZE * request.count
    return place[major, minor]


def _matrix_plan(instruction: Instruction) -> FragmentPlan | None:
    """ldmatrix{.x1, .x2, .x4}{.trans}.b16: lane i gives the address of row i % 8 of matrix i // 8."""
    store = instruction.opcode == "stmatrix"
    number = next((int(m[1:]) for m in instruction.modifiers if m in ("x1", "x2", "x4")), None)
    if number is None or not instruction.has("m8n8") or not instruction.has("b16"):
        return None
    pointer, vector = instruction.operands[:2] if store else instruction.operands[1::-1]
    parts = vector.parts if isinstance(vector, Vector) else (vector,)
    if not isinstance(pointer, Address) or len(parts) != number:
        return None
    matrix = np.arange(number)[:, None, None]
    row, col = _GROUP[:, None], 2 * _IN_GROUP[:, None] + np.arange(2)
    if instruction.has("trans"):
        row, col = col, row
    zero = np.zeros(WARP_SIZE, np.int64)
    return FragmentPlan(
        name=f"{instruction.opcode}.x{number}",
        store=store,
        pointer=pointer,
        stride=None,
        default_stride=0,
        parts=parts,
        itemsize=2,
        requests=(Request(zero, zero, 8, 8 * number),),
        _places=(matrix * 8 + row) * 8 + col,
        pointer_alignment=16,
        stride_alignment=1,
    )
