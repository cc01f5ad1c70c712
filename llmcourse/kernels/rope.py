"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), forward and backward.

The D features of a head are D/2 pairs (i, i + D/2). The pair i of the token at position p turns by an angle
whose cos and sin the tables hold in row p:

    out[i]       = x[i]·cos[p, i] − x[i + D/2]·sin[p, i]
    out[i + D/2] = x[i + D/2]·cos[p, i] + x[i]·sin[p, i]

For x of E elements of b bytes:

    rung      moves                                                                   launches
    naive     turned copy (−x₂, x₁): 2·E·b, then x·cos + turned·sin: 3·E·b = 5·E·b    2
    fused     read x, write out: 2·E·b                                                1

plus the tables, which all heads of a token share: where these lie side by side in memory, one program takes
several of them, so that the tables' row is read once for all; elsewhere the L2 cache gives it again.

Backward turns the other way: the same kernel with −sin. Nothing but the tables is kept.

Queries and keys can be turned in one launch where one projection made them: they lie side by side in
memory, and `qkv[..., : Hq + Hk, :]` is a view of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import (
    Backend,
    DtypeError,
    StrideError,
    check_float,
    check_shape,
    check_together,
    choose,
)
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import Plan, ceil_div, launch, power_of_two


def reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """The formula by torch, in float32 inside."""
    length = x.shape[2]
    where: Any = slice(0, length) if positions is None else positions
    c, s = cos[where].float(), sin[where].float()
    if positions is not None:
        c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)


def minimum_bytes(elements: int, itemsize: int, *, tables: int = 0) -> int:
    """Bytes forward or backward: x read, out written, and the rows of the tables in use read once."""
    return 2 * elements * itemsize + tables


def naive_bytes(elements: int, itemsize: int, *, tables: int = 0) -> int:
    """Bytes of the two launches."""
    return 5 * elements * itemsize + tables


@triton.jit
def turn_kernel(x, out, half, BLOCK: tl.constexpr):
    """naive, first half: (x₁, x₂) → (−x₂, x₁) for rows of contiguous heads."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    at = row * 2 * half + i
    a = tl.load(x + at, mask=i < half)
    b = tl.load(x + at + half, mask=i < half)
    tl.store(out + at, -b, mask=i < half)
    tl.store(out + at + half, a, mask=i < half)


@triton.jit
def combine_kernel(
    x, turned, cos, sin, positions, out, heads, length, table, cos_stride, sin_stride, half,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """naive, second half: x·cos + turned·sin, one head of one token a program."""
    row = tl.program_id(0).to(tl.int64)
    token = row // (heads * length) * length + row % length
    p = tl.load(positions + token) if POSITIONS else token % length
    i = tl.arange(0, BLOCK)
    known = (i < half) & (p >= 0) & (p < table)
    c = tl.load(cos + p * cos_stride + i, mask=known, other=float("nan")).to(tl.float32)
    s = tl.load(sin + p * sin_stride + i, mask=known, other=float("nan")).to(tl.float32)
    for side in tl.static_range(2):
        at = (row * 2 + side) * half + i
        v = tl.load(x + at, mask=i < half).to(tl.float32) * c
        v += tl.load(turned + at, mask=i < half).to(tl.float32) * s
        tl.store(out + at, v.to(out.dtype.element_ty), mask=i < half)


@triton.jit
def rope_kernel(
    x, cos, sin, positions, out,
    x_batch, x_head, x_token, out_batch, out_head, out_token, cos_stride, sin_stride, p_batch, p_token,
    heads, length, table, half,
    POSITIONS: tl.constexpr, BACKWARD: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of TOKENS tokens a program: [HEADS, TOKENS, BLOCK] pairs, and the tables [TOKENS, BLOCK].

    A position that the tables lack gives NaN, not foreign memory.
    """
    token_groups, head_groups = tl.cdiv(length, TOKENS), tl.cdiv(heads, HEADS)
    group = tl.program_id(0) // token_groups
    t = (tl.program_id(0) % token_groups * TOKENS + tl.arange(0, TOKENS)[None, :, None]).to(tl.int64)
    h = (group % head_groups * HEADS + tl.arange(0, HEADS)[:, None, None]).to(tl.int64)
    batch = (group // head_groups).to(tl.int64)
    i = tl.arange(0, BLOCK)[None, None, :]
    if POSITIONS:
        p = tl.load(positions + batch * p_batch + t * p_token, mask=t < length, other=-1).to(tl.int64)
    else:
        p = t
    known = (i < half) & (p >= 0) & (p < table)
    c = tl.load(cos + p * cos_stride + i, mask=known, other=float("nan")).to(tl.float32)
    s = tl.load(sin + p * sin_stride + i, mask=known, other=float("nan")).to(tl.float32)
    if BACKWARD:
        s = -s
    inside = (h < heads) & (t < length) & (i < half)
    x += batch * x_batch + h * x_head + t * x_token + i
    out += batch * out_batch + h * out_head + t * out_token + i
    a = tl.load(x, mask=inside).to(tl.float32)
    b = tl.load(x + half, mask=inside).to(tl.float32)
    tl.store(out, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def rope_plan(x: Tensor) -> Plan:
    """`rows` heads of `block` tokens a program, neighbours in memory: up to 4096 elements.

    x [B, H, S, D]. Where a token's heads lie side by side (from a projection), a program takes heads, which
    share the tables' row; where a head's tokens do, it takes tokens of one head.
    """
    _, heads, length, head_dim = x.shape
    pairs = power_of_two(head_dim // 2)
    if x.stride(1) <= x.stride(2) or length == 1:
        rows = min(power_of_two(heads), max(1, 2048 // pairs))
        tokens = min(power_of_two(length), max(1, 2048 // (pairs * rows)))
    else:
        rows, tokens = 1, min(power_of_two(length), max(1, 1024 // pairs))
    return Plan("fused", rows, tokens, warps=max(1, min(8, rows * tokens * pairs // 256)))


def turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    plan: Plan,
    *,
    backward: bool,
    interpret: bool,
) -> Tensor:
    """The launch without autograd: x [B, H, S, D] turned, forwards or backwards."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:  # a gradient may come in any layout
        x = x.contiguous()
    out = torch.empty_like(x)
    batch, heads, length, head_dim = x.shape
    p = cos if positions is None else positions  # a pointer that is not read without POSITIONS
    p_strides = (0, 0) if positions is None else positions.stride()
    launch(
        rope_kernel, batch * ceil_div(length, plan.block) * ceil_div(heads, plan.rows),
        x, cos, sin, p, out, *x.stride()[:3], *out.stride()[:3], cos.stride(0), sin.stride(0), *p_strides,
        heads, length, cos.shape[0], head_dim // 2,
        POSITIONS=positions is not None, BACKWARD=backward,
        HEADS=plan.rows, TOKENS=plan.block, BLOCK=power_of_two(head_dim // 2),
        num_warps=plan.warps, interpret=interpret,
    )  # fmt: skip
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, plan: Plan, interpret: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.plan, ctx.interpret = plan, interpret
        return turn(x, cos, sin, positions, plan, backward=False, interpret=interpret)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin, positions = ctx.saved_tensors
        dx = turn(grads[0], cos, sin, positions, ctx.plan, backward=True, interpret=ctx.interpret)
        return dx, None, None, None, None, None


def check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """Raise unless the tables and the positions fit x."""
    check_float("x", x)
    if x.dim() != 4 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}.",
            "The kernel turns pairs of features of [batch, heads, tokens, head_dim], so head_dim is even.",
            "x.view(B, S, H, D).transpose(1, 2).",
        )
    batch, _, length, head_dim = x.shape
    if head_dim > 1 and x.stride(-1) != 1:
        raise StrideError(
            f"x of shape {tuple(x.shape)} has strides {x.stride()}.",
            "The kernel reads the features of a head side by side; the other dimensions may lie anyhow.",
            "x.contiguous().",
        )
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        if table.dim() != 2 or table.shape != cos.shape or table.shape[1] != head_dim // 2:
            raise ShapeError(
                f"{name} has shape {tuple(table.shape)}.",
                f"It holds a number for each position and each of the {head_dim // 2} pairs of a head.",
                f"shape [positions, {head_dim // 2}] for both tables.",
            )
        if table.shape[1] > 1 and table.stride(1) != 1:
            raise StrideError(
                f"{name} has strides {table.stride()}.",
                "The kernel reads the pairs of a position side by side.",
                f"{name}.contiguous().",
            )
    check_together(x=x, cos=cos, sin=sin)
    if positions is None:
        if len(cos) < length:
            raise ShapeError(
                f"{length} tokens and tables of {len(cos)} positions.",
                "Without positions token t is turned by row t of the tables.",
                f"tables of {length} positions or more.",
            )
        return
    if positions.dtype not in (torch.int32, torch.int64):
        raise DtypeError(
            f"positions are {str(positions.dtype).removeprefix('torch.')}.",
            "They are row numbers of the tables.",
            "positions.long().",
        )
    check_shape("positions", positions, (batch, length), "It holds a row of the tables for each token.")
    check_together(x=x, positions=positions)
    if (
        not x.is_cuda
        and positions.numel()
        and not 0 <= int(positions.min()) <= int(positions.max()) < len(cos)
    ):
        raise ShapeError(
            f"positions go from {int(positions.min())} to {int(positions.max())}.",
            f"The tables hold positions 0 to {len(cos) - 1}.",
            "longer tables.",
        )


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    backend: Backend = "auto",
    plan: Plan | None = None,
) -> Tensor:
    """x with its pairs (i, i + D/2) turned by their position; differentiable in x.

    Shapes   x [B, H, S, D], D even and contiguous, the rest of any strides; cos and sin [T, D/2] of any float
             format; positions [B, S] int32 or int64 (None: 0 … S − 1). Returns x's shape, format and layout.
    Moves    2·B·H·S·D·itemsize bytes and the tables, forward and backward alike.
    Keeps    the tables and positions for backward, not x.
    Raises   ShapeError, DtypeError, StrideError, DeviceError. On a GPU the positions are not looked at (that
             would wait for the device): one outside the tables gives NaN.
    """
    check(x, cos, sin, positions)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x, cos, sin, positions)
    plan = plan or rope_plan(x)
    return _Rope.apply(x, cos, sin, positions, plan, chosen == "interpret")


def rope_naive(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """RoPE in two launches, the turned copy through memory: what fusing saves. x contiguous; no backward."""
    check(x, cos, sin, positions)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x, cos, sin, positions)
    x = x.contiguous()
    batch, heads, length, head_dim = x.shape
    turned, out = (torch.empty_like(x) for _ in range(2))
    p = cos if positions is None else positions.contiguous()
    rows, half = batch * heads * length, head_dim // 2
    meta: dict[str, Any] = {"BLOCK": power_of_two(half), "num_warps": 1, "interpret": chosen == "interpret"}
    launch(turn_kernel, rows, x, turned, half, **meta)
    launch(
        combine_kernel, rows, x, turned, cos, sin, p, out,
        heads, length, cos.shape[0], cos.stride(0), sin.stride(0), half,
        POSITIONS=positions is not None, **meta,
    )  # fmt: skip
    return out
