"""Residual addition and RMSNorm in one launch, forward and backward.

A transformer block adds its output to the residual stream, and the next block starts by normalising it:

    h = x + residual          y = h / √(mean(h²) + ε) · w

Both h (the stream goes on) and y (what the next layer reads) are needed. For M rows of N columns of b bytes:

    rung      moves                                             launches
    naive     add: 3·M·N·b, then norm: 2·M·N·b = 5·M·N·b        2
    fused     read x and residual, write h and y: 4·M·N·b       1

A fifth of the traffic goes: the norm finds h in registers. The sum is rounded to the tensors' format before
it is normalised, so that fused and unfused give the same numbers, and backward sees the h that forward saw.

Backward. The gradient of h comes from two sides, from the stream (dh) and through the norm (dy):

    d = dh + rms_norm's dx(h, dy)          dx = dresidual = d

RMSNorm's backward kernel adds dh where it writes dx: 4·M·N·b bytes (read h, dy, dh, write d), against 6·M·N·b
for the norm's backward and an addition after it. x and residual get the same tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.kernels import rms_norm as norm
from llmcourse.kernels.checks import (
    Backend,
    check_float,
    check_rows,
    check_shape,
    check_together,
    choose,
    row_stride,
)
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import Plan, ceil_div, launch, rows_in


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y, h) by torch."""
    h = x + residual
    return norm.reference(h, weight, eps), h


def minimum_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes forward: x and residual read, h and y written, w read once, s written."""
    return 4 * rows * columns * itemsize + columns * itemsize + 4 * rows


def minimum_backward_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes backward: h, dy, dh and s read, one gradient written, w read and dw written."""
    return 4 * rows * columns * itemsize + 2 * columns * itemsize + 4 * rows


def naive_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of the addition and of the norm in launches of their own."""
    return 3 * rows * columns * itemsize + norm.minimum_bytes(rows, columns, itemsize)


@triton.jit
def add_kernel(x, residual, h, x_stride, residual_stride, columns, BLOCK: tl.constexpr):
    """naive: the sum alone, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    for start in tl.range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + c, mask=c < columns).to(tl.float32)
        v += tl.load(residual + row * residual_stride + c, mask=c < columns).to(tl.float32)
        tl.store(h + row * columns + c, v.to(h.dtype.element_ty), mask=c < columns)


@triton.jit
def row_kernel(
    x, residual, w, y, h, s, x_stride, residual_stride, rows, columns, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program. y and h are contiguous."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(residual + r * residual_stride + c, mask=inside, other=0.0).to(tl.float32)
    total = v.to(h.dtype.element_ty)
    tl.store(h + r * columns + c, total, mask=inside)
    v = total.to(tl.float32)
    weight = tl.load(w + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=1)[:, None] / columns + eps)
    tl.store(s + r, scale, mask=r < rows)
    tl.store(y + r * columns + c, (v * scale * weight).to(y.dtype.element_ty), mask=inside)


@triton.jit
def looped_kernel(
    x, residual, w, y, h, s, x_stride, residual_stride, columns, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program, BLOCK columns at a time. The second pass reads back the h that the first wrote.

    Between them a barrier, since a thread may read what another of its program wrote.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        v = tl.load(x + row * x_stride + start + c, mask=inside, other=0.0).to(tl.float32)
        v += tl.load(residual + row * residual_stride + start + c, mask=inside, other=0.0).to(tl.float32)
        total = v.to(h.dtype.element_ty)
        tl.store(h + row * columns + start + c, total, mask=inside)
        squares += total.to(tl.float32) * total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + eps)
    tl.store(s + row, scale)
    tl.debug_barrier()
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        v = tl.load(h + row * columns + start + c, mask=inside).to(tl.float32)
        weight = tl.load(w + start + c, mask=inside).to(tl.float32)
        tl.store(y + row * columns + start + c, (v * scale * weight).to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plan: Plan, interpret: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, s): the launch without autograd."""
    columns, rows = x.shape[-1], rows_in(x)
    y, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    s = torch.empty(rows, dtype=torch.float32, device=x.device)
    meta: dict[str, Any] = {"BLOCK": plan.block, "num_warps": plan.warps, "interpret": interpret}
    tensors = (x, residual, weight, y, h, s, row_stride(x), row_stride(residual))
    if plan.kernel == "row":
        launch(row_kernel, ceil_div(rows, plan.rows), *tensors, rows, columns, eps, ROWS=plan.rows, **meta)
    else:
        launch(looped_kernel, rows, *tensors, columns, eps, **meta)
    return y, h, s


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, plan: Plan, interpret: bool
    ) -> tuple[Tensor, Tensor]:
        y, h, s = forward(x, residual, weight, eps, plan, interpret)
        ctx.save_for_backward(h, weight, s)
        ctx.interpret = interpret
        ctx.set_materialize_grads(False)  # an h that nobody uses has no gradient to read
        return y, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        h, weight, s = ctx.saved_tensors
        dy, dh = grads
        if dy is None:
            return dh, dh, None, None, None, None
        d, dw = norm.backward(h, weight, s, dy, dh, interpret=ctx.interpret)
        return d, d, dw, None, None, None


def check(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """Raise unless x and residual are rows of one shape and format, and weight has one number a column."""
    norm.check(x, weight)
    check_float("residual", residual, (x.dtype,))
    check_shape("residual", residual, x.shape, "It is added to x element by element, without broadcasting.")
    check_rows("residual", residual)
    check_together(x=x, residual=residual)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    backend: Backend = "auto",
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, h): h = x + residual and y = RMSNorm(h)·weight; differentiable in all three.

    Shapes   x and residual [..., N] of one shape and format, rows one stride apart; weight [N]; y and h have
             x's shape and format, contiguous.
    Moves    4·M·N·itemsize bytes forward, 4·M·N·itemsize backward (see `minimum_bytes`).
    Keeps    h (which the caller has anyway), weight and 4 bytes a row for backward.
    Raises   ShapeError, DtypeError, StrideError, DeviceError.
    """
    check(x, residual, weight)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x, residual, weight, eps)
    plan = plan or norm.forward_plan(x.shape[-1], x.element_size())
    return _AddRMSNorm.apply(x, residual, weight, eps, plan, chosen == "interpret")


def add_rms_norm_naive(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(y, h) in two launches, the sum through memory: what fusing saves. No backward."""
    check(x, residual, weight)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x, residual, weight, eps)
    columns, rows = x.shape[-1], rows_in(x)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    interpret = chosen == "interpret"
    strides = row_stride(x), row_stride(residual)
    launch(add_kernel, rows, x, residual, h, *strides, columns, BLOCK=4096, num_warps=8, interpret=interpret)
    y, _ = norm.forward(h, weight, eps, norm.forward_plan(columns, h.element_size()), interpret)
    return y, h
