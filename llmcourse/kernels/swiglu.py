"""SwiGLU (Shazeer 2020, arXiv:2002.05202), the gate of a transformer's MLP, forward and backward.

    out = silu(gate)·up,      silu(g) = g·σ(g),      σ(g) = 1 / (1 + e^(−g))

For M rows of F columns of b bytes:

    rung      moves                                                    launches
    naive     silu: 2·M·F·b, product: 3·M·F·b = 5·M·F·b                2
    fused     read gate and up, write out: 3·M·F·b                     1

Backward, from the inputs alone (σ is computed again, silu(gate) is not kept):

    dup = dout·silu(gate)          dgate = dout·up·σ·(1 + gate·(1 − σ))

reads gate, up and dout and writes dgate and dup: 5·M·F·b. Kept: gate and up, which their projection made
anyway, and not the 1 or 2 intermediates of as many bytes that separate operations save.

One projection usually makes both, as the halves of gate_up [M, 2F]. Given packed, the gradient is written
packed too, and no concatenation follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import (
    Backend,
    as_rows,
    check_float,
    check_rows,
    check_shape,
    check_together,
    choose,
    row_stride,
)
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import Plan, ceil_div, launch, rows_in


def reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate)·up by torch, in float32 inside."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def minimum_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes forward, for `columns` of the result: gate and up read, out written."""
    return 3 * rows * columns * itemsize


def minimum_backward_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes backward: gate, up and dout read, dgate and dup written."""
    return 5 * rows * columns * itemsize


def naive_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of silu and product in launches of their own."""
    return 5 * rows * columns * itemsize


@triton.jit
def silu_kernel(gate, out, gate_stride, columns, BLOCK: tl.constexpr):
    """naive, first half."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_stride + c, mask=c < columns).to(tl.float32)
    tl.store(out + row * columns + c, (g * tl.sigmoid(g)).to(out.dtype.element_ty), mask=c < columns)


@triton.jit
def product_kernel(a, b, out, b_stride, columns, BLOCK: tl.constexpr):
    """naive, second half."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(a + row * columns + c, mask=c < columns).to(tl.float32)
    v *= tl.load(b + row * b_stride + c, mask=c < columns).to(tl.float32)
    tl.store(out + row * columns + c, v.to(out.dtype.element_ty), mask=c < columns)


@triton.jit
def forward_kernel(gate, up, out, gate_stride, up_stride, columns, BLOCK: tl.constexpr):
    """BLOCK columns of one row a program. out is contiguous."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    g = tl.load(gate + row * gate_stride + c, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + c, mask=inside).to(tl.float32)
    tl.store(out + row * columns + c, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gate, up, dout, dgate, dup, gate_stride, up_stride, dout_stride, grad_stride, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of one row a program. dgate and dup have one row stride."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    g = tl.load(gate + row * gate_stride + c, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + c, mask=inside).to(tl.float32)
    d = tl.load(dout + row * dout_stride + c, mask=inside).to(tl.float32)
    sigma = tl.sigmoid(g)
    tl.store(dup + row * grad_stride + c, (d * g * sigma).to(dup.dtype.element_ty), mask=inside)
    d *= u * sigma * (1.0 + g * (1.0 - sigma))
    tl.store(dgate + row * grad_stride + c, d.to(dgate.dtype.element_ty), mask=inside)


PLAN = Plan("fused", block=2048, warps=8)


def forward(gate: Tensor, up: Tensor, plan: Plan, interpret: bool) -> Tensor:
    """The launch without autograd."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    columns = gate.shape[-1]
    launch(
        forward_kernel, rows_in(gate) * ceil_div(columns, plan.block),
        gate, up, out, row_stride(gate), row_stride(up), columns,
        BLOCK=plan.block, num_warps=plan.warps, interpret=interpret,
    )  # fmt: skip
    return out


def backward(
    gate: Tensor, up: Tensor, dout: Tensor, dgate: Tensor, dup: Tensor, plan: Plan, interpret: bool
) -> None:
    """Write dgate and dup, which may be the halves of one tensor."""
    dout, dout_stride = as_rows(dout)
    columns = gate.shape[-1]
    launch(
        backward_kernel, rows_in(gate) * ceil_div(columns, plan.block),
        gate, up, dout, dgate, dup, row_stride(gate), row_stride(up), dout_stride, row_stride(dgate), columns,
        BLOCK=plan.block, num_warps=plan.warps, interpret=interpret,
    )  # fmt: skip


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, plan: Plan, interpret: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.plan, ctx.interpret = plan, interpret
        return forward(gate, up, plan, interpret)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        backward(gate, up, grads[0], dgate, dup, ctx.plan, ctx.interpret)
        return dgate, dup, None, None


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, plan: Plan, interpret: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.plan, ctx.interpret = plan, interpret
        gate, up = gate_up.chunk(2, dim=-1)
        return forward(gate, up, plan, interpret)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        (gate, up), (dgate, dup) = gate_up.chunk(2, dim=-1), grad.chunk(2, dim=-1)
        backward(gate, up, grads[0], dgate, dup, ctx.plan, ctx.interpret)
        return grad, None, None


def check(gate: Tensor, up: Tensor | None) -> None:
    """Raise unless these are rows that the kernels can read."""
    check_float("gate", gate)
    check_rows("gate", gate)
    if up is not None:
        check_float("up", up, (gate.dtype,))
        check_shape("up", up, gate.shape, "Each column of gate multiplies the same column of up.")
        check_rows("up", up)
        check_together(gate=gate, up=up)
    elif gate.shape[-1] % 2:
        raise ShapeError(
            f"a packed gate_up of {gate.shape[-1]} columns.",
            "Its first half is the gate and its second half the values; an odd number has no half.",
            "an even last dimension, or swiglu(gate, up).",
        )


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: Backend = "auto", plan: Plan = PLAN) -> Tensor:
    """silu(gate)·up; differentiable.

    Shapes   gate and up [..., F] of one format, rows one stride apart; or gate [..., 2F] alone, the gate in
             its first half and up in its second. Returns [..., F], contiguous.
    Moves    3·M·F·itemsize bytes forward, 5·M·F·itemsize backward.
    Keeps    its inputs for backward.
    Raises   ShapeError, DtypeError, StrideError, DeviceError.
    """
    check(gate, up)
    chosen = choose(backend, gate)
    if chosen == "reference":
        return reference(gate, up)
    if up is None:
        return _PackedSwiGLU.apply(gate, plan, chosen == "interpret")
    return _SwiGLU.apply(gate, up, plan, chosen == "interpret")


def swiglu_naive(gate: Tensor, up: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """silu(gate)·up in two launches, silu(gate) through memory: what fusing saves. No backward."""
    check(gate, up)
    chosen = choose(backend, gate)
    if chosen == "reference":
        return reference(gate, up)
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    a, out = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    columns = gate.shape[-1]
    grid = rows_in(gate) * ceil_div(columns, PLAN.block)
    meta: dict[str, Any] = {
        "BLOCK": PLAN.block,
        "num_warps": PLAN.warps,
        "interpret": chosen == "interpret",
    }
    launch(silu_kernel, grid, gate, a, row_stride(gate), columns, **meta)
    launch(product_kernel, grid, a, up, out, row_stride(up), columns, **meta)
    return out
