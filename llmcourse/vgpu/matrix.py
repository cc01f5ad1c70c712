"""Tensor-core products: wmma.mma and mma.sync, and the transpose inside a warp, movmatrix.

`fragments` says which lane holds which element. Here the fragments of all warps become stacks of small
matrices, are multiplied, and go back. Products are exact and summed in double precision, and the sum is
rounded once to the accumulator's type; integers are exact. Tensor cores differ from that a little: they add
in a narrower format and cut off bits, on Hopper markedly so for fp8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmcourse.vgpu.float8 import from_float8
from llmcourse.vgpu.fragments import Layout, layout_of, shape_of, types_of
from llmcourse.vgpu.isa import WARP_SIZE, Instruction, Operand, Register, Vector
from llmcourse.vgpu.warp import Members, Values, WarpFault, WarpOp, bits_of

_REGISTER_TYPE = {"f64": "f64", "f32": "f32", "s32": "s32"}
"""Types that fill a register by themselves; the others are packed in b32."""


def compile_matrix(instruction: Instruction) -> WarpOp | None:
    """The WarpOp of a matrix product or of movmatrix; None for others, and for forms not known."""
    if instruction.opcode == "mma" or (instruction.opcode == "wmma" and instruction.has("mma")):
        return _product(instruction)
    if instruction.opcode == "movmatrix":
        return _movmatrix(instruction)
    return None


def check_whole_warps(name: str, active: np.ndarray) -> None:
    """Matrix instructions need all 32 lanes: a warp of [W, 32] `active` with some of them is a WarpFault."""
    part = active.any(axis=1) & ~active.all(axis=1)
    if part.any():
        warp = int(np.flatnonzero(part)[0])
        raise WarpFault(
            "divergent barrier",
            warp,
            int(active[warp].argmax()),
            f"{name} is executed by some lanes of a warp only, {int(bits_of(active)[warp, 0]):#010x}",
            "All 32 lanes together carry out a matrix instruction; without some the result is undefined.",
            "a block size that is a multiple of 32, and a branch around it that whole warps take.",
        )


def _product(instruction: Instruction) -> WarpOp | None:
    """wmma.mma.sync.aligned.row.row.shape.{d.c or d.a.b.c}, mma.sync.aligned.shape.row.col.d.a.b.c."""
    shape, types = shape_of(instruction), types_of(instruction)
    if instruction.opcode == "wmma" and len(types) == 2:
        types = [types[0], "f16", "f16", types[1]]
    if shape is None or len(types) != 4 or len(instruction.operands) != 4:
        return None
    if instruction.has("sp", "block_scale", "xor", "and"):
        return None
    m, n, k = shape
    if shape == (8, 8, 4) and types[1] != "f64":
        return None  # four small products in one, of Volta alone
    vectors = [v.parts if isinstance(v, Vector) else (v,) for v in instruction.operands]
    roles = ("c", "a", "b", "c")
    layouts = [layout_of(role, m, n, k, type_) for role, type_ in zip(roles, types, strict=True)]
    for parts, layout in zip(vectors, layouts, strict=True):
        if not layout.registers or len(parts) % layout.registers:
            return None
    destinations, *sources = vectors
    counts = [len(parts) for parts in sources]
    d_type, a_type, b_type, c_type = types
    exact = d_type == "s32"
    saturate = instruction.has("satfinite")
    name = "wmma::mma_sync" if instruction.opcode == "wmma" else f"mma.sync.m{m}n{n}k{k}"

    def run(members: Members, values: Values) -> tuple[np.ndarray, ...]:
        check_whole_warps(name, members.active)
        warps = len(members.active)
        cut = np.cumsum(counts)
        a = gather(values[: cut[0]], layouts[1], a_type, warps)
        b = gather(values[cut[0] : cut[1]], layouts[2], b_type, warps)
        c = gather(values[cut[1] :], layouts[3], c_type, warps)
        total = np.matmul(a, b) + c
        if exact and saturate:
            total = np.clip(total, -(2.0**31), 2.0**31 - 1)
        return spread(total, layouts[0], d_type, len(destinations))

    return WarpOp(
        name=name,
        sources=tuple(_operand(part) for parts in sources for part in parts),
        source_types=tuple(
            _REGISTER_TYPE.get(type_, "b32")
            for type_, parts in zip(types[1:], sources, strict=True)
            for _ in parts
        ),
        destinations=tuple(d if isinstance(d, Register) else None for d in destinations),
        run=run,
        flops=("flops_tensor", 2 * m * n * k),
    )


def _operand(part: Operand | None) -> Operand:
    assert part is not None
    return part


def gather(parts: Sequence[np.ndarray], layout: Layout, type_: str, warps: int) -> np.ndarray:
    """Registers [W, 32] → matrices [W, rows, cols] float64."""
    registers = np.empty((warps, layout.registers, WARP_SIZE), parts[0].dtype)
    for i in range(layout.registers):
        registers[:, i] = parts[i]
    elements = unpack(registers, type_)
    rows, cols = layout.shape
    place = np.empty(rows * cols, np.int64)
    place[(layout.rows * cols + layout.cols).ravel()] = np.arange(rows * cols)
    return np.take(elements.reshape(warps, -1), place, axis=1).reshape(warps, rows, cols).astype(np.float64)


def spread(matrices: np.ndarray, layout: Layout, type_: str, count: int) -> tuple[np.ndarray, ...]:
    """Matrices [W, rows, cols] float64 → `count` registers [W, 32] of the type, over again if need be."""
    values = np.ascontiguousarray(matrices[:, layout.rows, layout.cols])
    if type_ == "s32":
        values = values.astype(np.int64).astype(np.int32)
    elif type_ == "f16":
        values = values.astype(np.float16).view(np.uint32)
    else:
        values = values.astype({"f32": np.float32, "f64": np.float64}[type_])
    return tuple(values[:, i % layout.registers, :, 0] for i in range(count))


def unpack(registers: np.ndarray, type_: str) -> np.ndarray:
    """[…] registers → […, elements], lowest bits first, in a type that holds them exactly."""
    whole = registers[..., None]
    if type_ in ("f64", "f32", "s32"):
        return whole
    if type_ == "f16":
        return whole.view(np.float16)
    if type_ == "bf16":
        return (whole.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_ == "tf32":
        return (whole & np.uint32(0xFFFFE000)).view(np.float32)
    if type_ in ("s8", "u8"):
        return whole.view(np.int8 if type_ == "s8" else np.uint8)
    if type_ in ("s4", "u4"):
        nibbles = (whole >> (4 * np.arange(8, dtype=np.uint32))) & np.uint32(15)
        return (
            np.where(nibbles > 7, nibbles.astype(np.int8) - 16, nibbles.astype(np.int8))
            if type_ == "s4"
            else nibbles
        )
    return np.asarray(from_float8(whole.view(np.uint8), f"{type_}x2")).view(np.float16)


def _movmatrix(instruction: Instruction) -> WarpOp | None:
    """movmatrix.sync.aligned.m8n8.trans.b16 d, a: an 8 × 8 matrix of 16-bit elements, turned."""
    if len(instruction.operands) != 2 or not instruction.has("trans"):
        return None
    target = instruction.operands[0]
    lane, half = np.arange(WARP_SIZE)[:, None], np.arange(2)
    row, col = lane // 4, 2 * (lane % 4) + half
    source = (col * 4 + row // 2) * 2 + row % 2  # where the element (col, row) is held

    def run(members: Members, values: Values) -> tuple[np.ndarray, ...]:
        check_whole_warps("movmatrix", members.active)
        whole = np.ascontiguousarray(np.broadcast_to(values[0], members.active.shape))
        halves = whole.view(np.uint16)
        return (np.take(halves, source.ravel(), axis=1).view(np.uint32),)

    return WarpOp(
        name="movmatrix",
        sources=instruction.operands[1:],
        source_types=("b32",),
        destinations=(target if isinstance(target, Register) else None,),
        run=run,
    )
