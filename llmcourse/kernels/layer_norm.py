"""LayerNorm (Ba, Kiros and Hinton 2016, arXiv:1607.06450), forward and backward.

    μ[r] = mean_c x[r, c]      s[r] = 1 / √(mean_c (x[r, c] − μ[r])² + ε)      y = (x − μ)·s·w + b

As RMSNorm, with a mean taken out first and a bias added last. For M rows of N columns of b bytes, forward:

    rung      moves                                         launches
    naive     M·N·(4·b + 8) or so                           4
    row       2·M·N·b + 2·N·b + 8·M                         1     a row in registers
    looped    2·M·N·b if L2 holds a row, else 4·M·N·b       1     any width, three passes

The variance is the mean of squared distances from the mean, found *after* the mean. The shorter formula,
mean(x²) − mean(x)², needs one pass but subtracts two nearly equal numbers when |μ| is much larger than the
spread, and in float32 nothing may remain of the difference. In registers the second pass costs no traffic.

Backward. With x̂ = (x − μ)·s and ĝ = dy·w,

    dx = s·(ĝ − mean_c ĝ − x̂·mean_c(ĝ·x̂))      dw = Σ_r dy·x̂      db = Σ_r dy

dw and db are summed by a fixed number of programs, each over its share of the rows, as in RMSNorm. Moves
3·M·N·b bytes, and 16·programs·N for the partial sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.kernels.checks import (
    Backend,
    as_rows,
    check_float,
    check_rows,
    check_together,
    check_vector,
    choose,
    row_stride,
)
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import (
    Plan,
    ceil_div,
    launch,
    multiprocessors,
    power_of_two,
    row_plan,
    rows_in,
    walking_plan,
)

# reference


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm by torch: statistics in float32, then back to x's format."""
    y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), None, eps)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def minimum_bytes(rows: int, columns: int, itemsize: int, *, bias: bool = True) -> int:
    """Bytes forward: x read, y written, w and b read once, μ and s written."""
    return 2 * rows * columns * itemsize + (1 + bias) * columns * itemsize + 8 * rows


def minimum_backward_bytes(rows: int, columns: int, itemsize: int, *, bias: bool = True) -> int:
    """Bytes backward: x, dy, μ and s read, dx written, w read, dw and db written."""
    return 3 * rows * columns * itemsize + (2 + bias) * columns * itemsize + 8 * rows


def naive_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of the four launches: x read three times, a float32 tensor written and read, y written."""
    return rows * columns * (4 * itemsize + 8) + 2 * columns * itemsize + 20 * rows


# naive: four kernels


@triton.jit
def mean_kernel(x, mean, x_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(mean + row, tl.sum(v, axis=0) / columns)


@triton.jit
def deviation_kernel(x, mean, s, x_stride, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    v = tl.where(c < columns, v - tl.load(mean + row), 0.0)
    tl.store(s + row, tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps))


@triton.jit
def standardise_kernel(x, mean, s, z, x_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns).to(tl.float32)
    tl.store(z + row * columns + c, (v - tl.load(mean + row)) * tl.load(s + row), mask=c < columns)


@triton.jit
def affine_kernel(z, w, b, y, columns, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(z + row * columns + c, mask=c < columns) * tl.load(w + c, mask=c < columns).to(tl.float32)
    if BIAS:
        v += tl.load(b + c, mask=c < columns).to(tl.float32)
    tl.store(y + row * columns + c, v.to(y.dtype.element_ty), mask=c < columns)


# good, forward


@triton.jit
def row_kernel(
    x, w, b, y, mean, s, x_stride, rows, columns, eps,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program. y is contiguous."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(v, axis=1)[:, None] / columns
    v = tl.where(inside, v - mu, 0.0)
    scale = tl.rsqrt(tl.sum(v * v, axis=1)[:, None] / columns + eps)
    tl.store(mean + r, mu, mask=r < rows)
    tl.store(s + r, scale, mask=r < rows)
    v = v * scale * tl.load(w + c, mask=c < columns, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(b + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(y + r * columns + c, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def looped_kernel(
    x, w, b, y, mean, s, x_stride, columns, eps, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program, BLOCK columns at a time, read three times: mean, variance, result."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * columns
    c = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        v = tl.load(x + start + c, mask=start + c < columns, other=0.0, eviction_policy="evict_last")
        total += v.to(tl.float32)
    mu = tl.sum(total, axis=0) / columns
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        v = tl.load(x + start + c, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        v = tl.where(inside, v - mu, 0.0)
        squares += v * v
    scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + eps)
    tl.store(mean + row, mu)
    tl.store(s + row, scale)
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        v = tl.load(x + start + c, mask=inside, eviction_policy="evict_first").to(tl.float32)
        v = (v - mu) * scale * tl.load(w + start + c, mask=inside).to(tl.float32)
        if BIAS:
            v += tl.load(b + start + c, mask=inside).to(tl.float32)
        tl.store(y + start + c, v.to(y.dtype.element_ty), mask=inside)


# good, backward


@triton.jit
def backward_kernel(
    x, w, mean, s, dy, dx, partial_w, partial_b, x_stride, dy_stride, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every program takes ROWS rows at a time, and adds up its own dw and db [BLOCK]."""
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(w + c, mask=c < columns, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (r < rows) & (c < columns)
        v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
        mu = tl.load(mean + r, mask=r < rows, other=0.0)
        scale = tl.load(s + r, mask=r < rows, other=0.0)
        v = (v - mu) * scale  # beyond the last column not 0, but g is
        dw += g * v
        db += g
        g *= weight
        along = tl.sum(g * v, axis=1)[:, None] / columns
        d = (g - tl.sum(g, axis=1)[:, None] / columns - v * along) * scale
        tl.store(dx + r * columns + c, d.to(dx.dtype.element_ty), mask=inside)
    columns_here = tl.arange(0, BLOCK)
    at = program.to(tl.int64) * columns + columns_here
    tl.store(partial_w + at, tl.sum(dw, axis=0), mask=columns_here < columns)
    tl.store(partial_b + at, tl.sum(db, axis=0), mask=columns_here < columns)


@triton.jit
def looped_backward_kernel(
    x, w, mean, s, dy, dx, partial_w, partial_b, x_stride, dy_stride, rows, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """As backward_kernel, for rows of any width: each row in two passes, dw and db added up in `partial`."""
    program = tl.program_id(0)
    partial_w += program.to(tl.int64) * columns
    partial_b += program.to(tl.int64) * columns
    c = tl.arange(0, BLOCK)
    for row in tl.range(program, rows, tl.num_programs(0)):
        r = row.to(tl.int64)
        mu = tl.load(mean + r)
        scale = tl.load(s + r)
        total = tl.zeros((BLOCK,), tl.float32)
        dots = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, columns, BLOCK):
            inside = start + c < columns
            v = tl.load(x + r * x_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dy + r * dy_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            g *= tl.load(w + start + c, mask=inside, other=0.0).to(tl.float32)
            total += g
            dots += g * (v - mu)
        mean_g = tl.sum(total, axis=0) / columns
        along = tl.sum(dots, axis=0) * scale / columns
        for start in tl.range(0, columns, BLOCK):
            inside = start + c < columns
            v = tl.load(x + r * x_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            v = (v - mu) * scale
            g = tl.load(dy + r * dy_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(w + start + c, mask=inside, other=0.0).to(tl.float32)
            d = (g * weight - mean_g - v * along) * scale
            tl.store(dx + r * columns + start + c, d.to(dx.dtype.element_ty), mask=inside)
            dw = tl.load(partial_w + start + c, mask=inside, other=0.0)
            tl.store(partial_w + start + c, dw + g * v, mask=inside)
            db = tl.load(partial_b + start + c, mask=inside, other=0.0)
            tl.store(partial_b + start + c, db + g, mask=inside)


# wrappers

ROW_BYTES = 65536  # forward: widest row held in registers without spilling
BACKWARD_ROW_LIMIT = 8192  # backward holds x, dy, w, dw and db
PARTIAL_BYTES = 18 << 20  # of partial sums, so that they stay in the L2 cache


def forward_plan(columns: int, itemsize: int = 4) -> Plan:
    """Rung and sizes of the forward kernel for rows of this width."""
    return row_plan(columns) if columns * itemsize <= ROW_BYTES else Plan("looped", block=8192, warps=16)


def backward_plan(rows: int, columns: int, itemsize: int, device: torch.device) -> Plan:
    """Rung and sizes of the backward kernel. A program keeps x, dy, w, dw and db of a row at once."""
    if columns > BACKWARD_ROW_LIMIT:
        programs = max(1, min(rows, multiprocessors(device), PARTIAL_BYTES // (8 * columns)))
        return Plan("looped", block=8192, warps=32, programs=programs)
    return walking_plan(rows, columns, itemsize, device)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, plan: Plan, interpret: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, μ, s) of rows x [..., N]: the launch without autograd."""
    columns, rows = x.shape[-1], rows_in(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, s = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    b = weight if bias is None else bias  # a pointer that is not read without BIAS
    meta: dict[str, Any] = {
        "BIAS": bias is not None,
        "BLOCK": plan.block,
        "num_warps": plan.warps,
        "interpret": interpret,
    }
    stride = row_stride(x)
    if plan.kernel == "row":
        grid = ceil_div(rows, plan.rows)
        launch(row_kernel, grid, x, weight, b, y, mean, s, stride, rows, columns, eps, ROWS=plan.rows, **meta)
    else:
        launch(looped_kernel, rows, x, weight, b, y, mean, s, stride, columns, eps, **meta)
    return y, mean, s


def backward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    s: Tensor,
    dy: Tensor,
    *,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db) of LayerNorm, the last two in float32."""
    columns, rows = x.shape[-1], rows_in(x)
    plan = plan or backward_plan(rows, columns, x.element_size(), x.device)
    dy, dy_stride = as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    looped = plan.kernel == "looped"
    new = torch.zeros if looped or rows == 0 else torch.empty
    partial = new(2, max(plan.programs, 1), columns, dtype=torch.float32, device=x.device)
    kernel = looped_backward_kernel if looped else backward_kernel
    meta: dict[str, Any] = {"BLOCK": plan.block, "num_warps": plan.warps, "interpret": interpret}
    if not looped:
        meta |= {"ROWS": plan.rows, "STAGES": plan.stages}
    launch(
        kernel, plan.programs if rows else 0,
        x, weight, mean, s, dy, dx, partial[0], partial[1], row_stride(x), dy_stride, rows, columns, **meta,
    )  # fmt: skip
    dw, db = partial.sum(1)
    return dx, dw, db


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, plan: Plan, interpret: bool
    ) -> Tensor:
        y, mean, s = forward(x, weight, bias, eps, plan, interpret)
        ctx.save_for_backward(x, weight, mean, s)
        ctx.interpret, ctx.bias_dtype = interpret, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, mean, s = ctx.saved_tensors
        dx, dw, db = backward(x, weight, mean, s, grads[0], interpret=ctx.interpret)
        bias_grad = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
        return dx, dw.to(weight.dtype), bias_grad, None, None, None


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless x is rows that the kernels can read and weight and bias have one number a column."""
    check_float("x", x)
    check_rows("x", x)
    check_vector("weight", weight, x.shape[-1])
    check_together(x=x, weight=weight)
    if bias is not None:
        check_vector("bias", bias, x.shape[-1])
        check_together(x=x, bias=bias)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: Backend = "auto",
    plan: Plan | None = None,
) -> Tensor:
    """(x − mean) / √(variance + ε) · weight + bias along the last dimension; differentiable.

    Shapes   x [..., N] of float32, float16 or bfloat16, rows one stride apart; weight and bias [N]; returns
             x's shape and format, contiguous. Statistics are float32, the variance is the biased one.
    Moves    2·M·N·itemsize bytes forward, 3·M·N·itemsize backward (see `minimum_bytes`).
    Keeps    x, weight and 8 bytes a row for backward.
    Raises   ShapeError, DtypeError, StrideError, DeviceError.
    """
    check(x, weight, bias)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x, weight, bias, eps)
    plan = plan or forward_plan(x.shape[-1], x.element_size())
    return _LayerNorm.apply(x, weight, bias, eps, plan, chosen == "interpret")


def layer_norm_naive(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: Backend = "auto"
) -> Tensor:
    """LayerNorm in four launches through memory: what fusing saves. No backward."""
    check(x, weight, bias)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x, weight, bias, eps)
    columns, rows = x.shape[-1], rows_in(x)
    mean, s = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    z = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b = weight if bias is None else bias
    meta: dict[str, Any] = {
        "BLOCK": power_of_two(columns),
        "num_warps": 8,
        "interpret": chosen == "interpret",
    }
    stride = row_stride(x)
    launch(mean_kernel, rows, x, mean, stride, columns, **meta)
    launch(deviation_kernel, rows, x, mean, s, stride, columns, eps, **meta)
    launch(standardise_kernel, rows, x, mean, s, z, stride, columns, **meta)
    launch(affine_kernel, rows, z, weight, b, y, columns, BIAS=bias is not None, **meta)
    return y
