"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), forward and backward.

    s[r] = 1 / √(mean_c x[r, c]² + ε)          y[r, c] = x[r, c]·s[r]·w[c]

Forward, for M rows of N columns of b bytes:

    rung      moves                                         launches
    naive     M·N·(3·b + 8), see `naive_bytes`              3
    row       2·M·N·b + N·b + 4·M                           1     a row in registers
    looped    2·M·N·b if L2 holds a row, else 3·M·N·b       1     any width

Kept for backward: x, w and s, 4 bytes a row; x̂ = x·s is computed again, which costs no memory traffic.

Backward. With ĝ = dy·w,

    dx = s·(ĝ − x̂·mean_c(ĝ·x̂))          dw = Σ_r dy·x̂

dx is one more row kernel. dw sums down the columns, across all rows: a program would need the rows of all
others. So there are only as many programs as the GPU runs at once; each walks through its share of the rows
and keeps its own sum of dw in registers; in the end it writes one partial sum, [programs, N], and a second
small launch adds those up. Moves 3·M·N·b (read x and dy, write dx) and 8·programs·N for the partial sums.
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


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm by torch: statistics in float32, then back to x's format."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def minimum_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes forward: x read, y written, w read once, s written."""
    return 2 * rows * columns * itemsize + columns * itemsize + 4 * rows


def minimum_backward_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes backward: x, dy and s read, dx written, w read and dw written."""
    return 3 * rows * columns * itemsize + 2 * columns * itemsize + 4 * rows


def naive_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of the three launches: x read twice, a float32 tensor written and read, y written."""
    return rows * columns * (3 * itemsize + 8) + columns * itemsize + 8 * rows


# naive: three kernels


@triton.jit
def mean_square_kernel(x, s, x_stride, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(s + row, tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps))


@triton.jit
def scale_kernel(x, s, z, x_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns).to(tl.float32)
    tl.store(z + row * columns + c, v * tl.load(s + row), mask=c < columns)


@triton.jit
def weight_kernel(z, w, y, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(z + row * columns + c, mask=c < columns) * tl.load(w + c, mask=c < columns).to(tl.float32)
    tl.store(y + row * columns + c, v.to(y.dtype.element_ty), mask=c < columns)


# good, forward


@triton.jit
def row_kernel(
    x, w, y, s, x_stride, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS whole rows a program. y is contiguous."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=1)[:, None] / columns + eps)
    tl.store(s + r, scale, mask=r < rows)
    tl.store(y + r * columns + c, (v * scale * weight).to(y.dtype.element_ty), mask=inside)


@triton.jit
def looped_kernel(x, w, y, s, x_stride, columns, eps, BLOCK: tl.constexpr):
    """One row a program, BLOCK columns at a time, read twice."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * columns
    c = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        v = tl.load(x + start + c, mask=start + c < columns, other=0.0, eviction_policy="evict_last")
        squares += v.to(tl.float32) * v.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + eps)
    tl.store(s + row, scale)
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        v = tl.load(x + start + c, mask=inside, eviction_policy="evict_first").to(tl.float32)
        weight = tl.load(w + start + c, mask=inside).to(tl.float32)
        tl.store(y + start + c, (v * scale * weight).to(y.dtype.element_ty), mask=inside)


# good, backward


@triton.jit
def backward_kernel(
    x, w, s, dy, dh, dx, partial, x_stride, dy_stride, dh_stride, rows, columns,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every program takes ROWS rows at a time, and adds up its own dw [BLOCK], written to `partial`.

    ADD adds dh to dx: the gradient that reaches the same tensor on another way (see add_rms_norm).
    """
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(w + c, mask=c < columns, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (r < rows) & (c < columns)
        v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(s + r, mask=r < rows, other=0.0)
        v *= scale
        dw += g * v
        g *= weight
        d = (g - v * (tl.sum(g * v, axis=1)[:, None] / columns)) * scale
        if ADD:
            d += tl.load(dh + r * dh_stride + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + r * columns + c, d.to(dx.dtype.element_ty), mask=inside)
    columns_here = tl.arange(0, BLOCK)
    at = partial + program.to(tl.int64) * columns + columns_here
    tl.store(at, tl.sum(dw, axis=0), mask=columns_here < columns)


@triton.jit
def looped_backward_kernel(
    x, w, s, dy, dh, dx, partial, x_stride, dy_stride, dh_stride, rows, columns,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As backward_kernel, for rows of any width: each row in two passes, dw added up in `partial` (zeros).

    A program's row of `partial` is its own, so that reading, adding and writing it needs no atomics.
    """
    program = tl.program_id(0)
    partial += program.to(tl.int64) * columns
    c = tl.arange(0, BLOCK)
    for row in tl.range(program, rows, tl.num_programs(0)):
        r = row.to(tl.int64)
        scale = tl.load(s + r)
        dots = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, columns, BLOCK):
            inside = start + c < columns
            v = tl.load(x + r * x_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dy + r * dy_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(w + start + c, mask=inside, other=0.0).to(tl.float32)
            dots += g * weight * v
        mean = tl.sum(dots, axis=0) * scale / columns
        for start in tl.range(0, columns, BLOCK):
            inside = start + c < columns
            v = tl.load(x + r * x_stride + start + c, mask=inside, other=0.0).to(tl.float32) * scale
            g = tl.load(dy + r * dy_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(w + start + c, mask=inside, other=0.0).to(tl.float32)
            d = (g * weight - v * mean) * scale
            if ADD:
                d += tl.load(dh + r * dh_stride + start + c, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + r * columns + start + c, d.to(dx.dtype.element_ty), mask=inside)
            before = tl.load(partial + start + c, mask=inside, other=0.0)
            tl.store(partial + start + c, before + g * v, mask=inside)


# wrappers

ROW_BYTES = 65536  # forward: widest row held in registers without spilling
BACKWARD_ROW_LIMIT = 8192  # backward holds x, dy, w and dw
PARTIAL_BYTES = 18 << 20  # of partial sums, so that they stay in the L2 cache


def forward_plan(columns: int, itemsize: int = 4) -> Plan:
    """Rung and sizes of the forward kernel for rows of this width."""
    return row_plan(columns) if columns * itemsize <= ROW_BYTES else Plan("looped", block=16384, warps=32)


def backward_plan(rows: int, columns: int, itemsize: int, device: torch.device) -> Plan:
    """Rung and sizes of the backward kernel. A program keeps x, dy, w and dw of a row at once."""
    if columns > BACKWARD_ROW_LIMIT:
        programs = max(1, min(rows, multiprocessors(device), PARTIAL_BYTES // (4 * columns)))
        return Plan("looped", block=16384, warps=32, programs=programs)
    return walking_plan(rows, columns, itemsize, device)


def forward(x: Tensor, weight: Tensor, eps: float, plan: Plan, interpret: bool) -> tuple[Tensor, Tensor]:
    """(y, s) of rows x [..., N]: the launch without autograd."""
    columns, rows = x.shape[-1], rows_in(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = torch.empty(rows, dtype=torch.float32, device=x.device)
    meta: dict[str, Any] = {"BLOCK": plan.block, "num_warps": plan.warps, "interpret": interpret}
    stride = row_stride(x)
    if plan.kernel == "row":
        grid = ceil_div(rows, plan.rows)
        launch(row_kernel, grid, x, weight, y, s, stride, rows, columns, eps, ROWS=plan.rows, **meta)
    else:
        launch(looped_kernel, rows, x, weight, y, s, stride, columns, eps, **meta)
    return y, s


def backward(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    dy: Tensor,
    dh: Tensor | None = None,
    *,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dx, dw) of RMSNorm; dh, if given, is added to dx."""
    columns, rows = x.shape[-1], rows_in(x)
    plan = plan or backward_plan(rows, columns, x.element_size(), x.device)
    dy, dy_stride = as_rows(dy)
    add = dh is not None
    dh, dh_stride = as_rows(dh) if dh is not None else (dy, dy_stride)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    looped = plan.kernel == "looped"
    new = torch.zeros if looped or rows == 0 else torch.empty
    partial = new(max(plan.programs, 1), columns, dtype=torch.float32, device=x.device)
    kernel = looped_backward_kernel if looped else backward_kernel
    meta: dict[str, Any] = {"ADD": add, "BLOCK": plan.block, "num_warps": plan.warps, "interpret": interpret}
    if not looped:
        meta |= {"ROWS": plan.rows, "STAGES": plan.stages}
    launch(
        kernel, plan.programs if rows else 0,
        x, weight, s, dy, dh, dx, partial, row_stride(x), dy_stride, dh_stride, rows, columns, **meta,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plan: Plan, interpret: bool) -> Tensor:
        y, s = forward(x, weight, eps, plan, interpret)
        ctx.save_for_backward(x, weight, s)
        ctx.interpret = interpret
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, s = ctx.saved_tensors
        dx, dw = backward(x, weight, s, grads[0], interpret=ctx.interpret)
        return dx, dw, None, None, None


def check(x: Tensor, weight: Tensor) -> None:
    """Raise unless x is rows that the kernels can read and weight has one number a column."""
    check_float("x", x)
    check_rows("x", x)
    check_vector("weight", weight, x.shape[-1])
    check_together(x=x, weight=weight)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: Backend = "auto", plan: Plan | None = None
) -> Tensor:
    """x / √(mean(x²) + ε) · weight along the last dimension; differentiable in x and weight.

    Shapes   x [..., N] of float32, float16 or bfloat16, rows one stride apart; weight [N]; returns x's shape
             and format, contiguous. Statistics are float32.
    Moves    2·M·N·itemsize bytes forward, 3·M·N·itemsize backward (see `minimum_bytes`).
    Keeps    x, weight and 4 bytes a row for backward.
    Raises   ShapeError, DtypeError, StrideError, DeviceError.
    """
    check(x, weight)
    chosen = choose(backend, x, weight)
    if chosen == "reference":
        return reference(x, weight, eps)
    plan = plan or forward_plan(x.shape[-1], x.element_size())
    return _RMSNorm.apply(x, weight, eps, plan, chosen == "interpret")


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: Backend = "auto") -> Tensor:
    """RMSNorm in three launches through memory: what fusing saves. No backward."""
    check(x, weight)
    chosen = choose(backend, x, weight)
    if chosen == "reference":
        return reference(x, weight, eps)
    columns, rows = x.shape[-1], rows_in(x)
    s = torch.empty(rows, dtype=torch.float32, device=x.device)
    z = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = power_of_two(columns)
    meta: dict[str, Any] = {"BLOCK": block, "num_warps": 8, "interpret": chosen == "interpret"}
    launch(mean_square_kernel, rows, x, s, row_stride(x), columns, eps, **meta)
    launch(scale_kernel, rows, x, s, z, row_stride(x), columns, **meta)
    launch(weight_kernel, rows, z, weight, y, columns, **meta)
    return y
