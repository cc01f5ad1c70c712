"""Vector addition: the smallest kernel, and already at the limit of the memory.

    out[i] = x[i] + y[i]

Reads x and y and writes out: 3·n·itemsize bytes for n FLOPs, a twelfth of a FLOP a byte in float32. No
arrangement of the arithmetic helps; what counts is to keep enough loads in flight.

Ladder
    reference   torch
    naive       32 elements a program: one warp, one element a thread. Correct, but each thread has
                4 bytes in flight, and starting a program costs more than its work
    good        1024 or more elements a program: each thread loads 16 bytes at a time
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import Backend, StrideError, check_float, check_shape, check_together, choose
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import Plan, ceil_div, launch


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    """out[i] = x[i] + y[i] for BLOCK consecutive i a program; the last program masks what lies beyond n."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, mask=inside).to(tl.float32) + tl.load(y + i, mask=inside).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


NAIVE = Plan("naive", block=32, warps=1)
GOOD = Plan("good", block=2048, warps=8)


def reference(x: Tensor, y: Tensor) -> Tensor:
    """x + y by torch."""
    return x + y


def minimum_bytes(n: int, itemsize: int) -> int:
    """Bytes that must cross the memory: two vectors read, one written."""
    return 3 * n * itemsize


class _VectorAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, plan: Plan, interpret: bool) -> Tensor:
        out = torch.empty_like(x)
        grid = ceil_div(x.numel(), plan.block)
        launch(
            add_kernel,
            grid,
            x,
            y,
            out,
            x.numel(),
            BLOCK=plan.block,
            num_warps=plan.warps,
            interpret=interpret,
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], grads[0], None, None


def vector_add(x: Tensor, y: Tensor, *, backend: Backend = "auto", plan: Plan = GOOD) -> Tensor:
    """x + y for tensors of one shape and format, contiguous; differentiable.

    Moves    3·n·itemsize bytes for n FLOPs (backward: none, the gradient is passed on).
    Raises   ShapeError, DtypeError, DeviceError, StrideError.
    """
    check_float("x", x)
    check_float("y", y, (x.dtype,))
    check_shape("y", y, x.shape, "The kernel adds element i to element i; it does not broadcast.")
    check_together(x=x, y=y)
    for name, t in (("x", x), ("y", y)):
        if not t.is_contiguous():
            raise StrideError(
                f"{name} of shape {tuple(t.shape)} has strides {t.stride()}.",
                "The kernel walks through memory from the first element to the last.",
                f"{name}.contiguous().",
            )
    if plan.block & (plan.block - 1):
        raise ShapeError(
            f"plan.block is {plan.block}.",
            "A block of a Triton program has a power of two of elements.",
            "a power of two.",
        )
    chosen = choose(backend, x, y)
    if chosen == "reference":
        return reference(x, y)
    return _VectorAdd.apply(x, y, plan, chosen == "interpret")
