"""Matrix product: the ladder from one program a tile to the tensor cores' pace.

    C [M, N] = A [M, K] · B [K, N]      2·M·N·K FLOPs, (M·K + K·N + M·N)·itemsize bytes at the least

A product of 8192³ in bf16 does 2731 FLOPs for each byte it must move. An H100 does about 230 in the time of
a byte, so memory is not the limit, *if* every element fetched is used often enough once it is near. Each
rung brings the data nearer, or keeps the tensor cores busy for more of the time:

    rung        file                    idea
    reference   torch                   cuBLAS on a GPU
    naive       matmul_tiled.py         a tile of C a program, row by row: A and B re-read M/BLOCK_M times
    grouped     matmul_tiled.py         the same tiles in another order, so that re-reads hit the L2 cache
    descriptor  matmul_persistent.py    tiles copied by the hardware (TMA), straight into shared memory
    persistent  matmul_persistent.py    a program a multiprocessor; loads run under the last tile's end
    split_k     matmul_splitk.py        few rows (decoding): K is cut, so that all multiprocessors load

`matmul` takes the rung that fits (`pick` in matmul_plan.py says which and why). fp8 is in matmul_fp8.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.kernels.checks import Backend, StrideError, check_float, check_shape, check_together, choose
from llmcourse.kernels.matmul_launch import Operands, launch
from llmcourse.kernels.matmul_plan import INTERPRETED, RUNGS, Choice, Config, no_descriptor, pick

ACTIVATIONS = {
    "": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def reference(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str = "") -> Tensor:
    """activation(a·b + bias) by torch."""
    out = a @ b
    return ACTIVATIONS[activation](out if bias is None else out + bias)


def minimum_bytes(m: int, n: int, k: int, itemsize: int) -> int:
    """Bytes that must cross the memory: both inputs read once, the result written once."""
    return (m * k + k * n + m * n) * itemsize


def flops(m: int, n: int, k: int) -> int:
    """A multiplication and an addition for each of M·N·K products."""
    return 2 * m * n * k


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "",
    backend: Backend = "auto",
    rung: str = "",
    config: Config | None = None,
) -> Tensor:
    """activation(a·b + bias), differentiable.

    Shapes   a [M, K], b [K, N], bias [N]; returns [M, N] in a's format. Any strides: W.T is not copied.
    Sums     in float32, also for bfloat16 and float16.
    rung     one of RUNGS; "" for the one that fits these shapes and this device
    config   tile sizes; None for the rung's own
    Raises   ShapeError, DtypeError, DeviceError, StrideError, UnknownNameError.
    """
    check_float("a", a)
    check_float("b", b, (a.dtype,))
    check_operands(a, b, bias, activation, rung)
    chosen = choose(backend, a, b)
    if chosen == "reference" or rung == "reference" or 0 in (*a.shape, *b.shape):
        return reference(a, b, bias, activation)
    options = chosen_options(a, b, rung, config)
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, bias))
    if wants_gradient and activation:
        # The gradient of the activation needs its input, which the fused epilogue does not keep.
        return ACTIVATIONS[activation](_Matmul.apply(a, b, bias, "", options))
    return _Matmul.apply(a, b, bias, activation, options)


def check_operands(a: Tensor, b: Tensor, bias: Tensor | None, activation: str, rung: str) -> None:
    """Everything but number formats, for this file and for fp8."""
    if a.dim() != 2 or b.dim() != 2:
        raise ShapeError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}.",
            "A kernel multiplies two matrices; leading dimensions must be merged into the rows first.",
            "a.flatten(0, -2).",
        )
    if a.shape[1] != b.shape[0]:
        turned = " (b's other dimension fits)" if a.shape[1] == b.shape[1] else ""
        raise ShapeError(
            f"a has {a.shape[1]} columns and b has {b.shape[0]} rows.",
            f"Each sum runs along a row of a and down a column of b, which must be of one length{turned}.",
            "b.T." if turned else f"b of shape ({a.shape[1]}, N).",
        )
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (b.shape[1],), "One number is added to each column.")
        if bias.stride(0) != 1 and bias.numel() > 1:
            raise StrideError(
                f"bias has stride {bias.stride(0)}.",
                "The kernel reads its elements side by side.",
                "bias.contiguous().",
            )
    check_together(a=a, b=b, **({} if bias is None else {"bias": bias}))
    if activation not in ACTIVATIONS:
        names = ", ".join(filter(None, ACTIVATIONS))
        raise UnknownNameError(
            f"there is no activation {activation!r}.",
            f"The epilogue knows {names}.",
            "one of these, or '' and a function of your own on the result.",
        )
    if rung and rung not in RUNGS:
        raise UnknownNameError(
            f"there is no rung {rung!r}.", f"The ladder has {', '.join(RUNGS)}.", "one of these."
        )


def chosen_options(
    a: Tensor,
    b: Tensor,
    rung: str,
    config: Config | None,
    *,
    out_itemsize: int = 0,
    fast_accum: bool = True,
) -> Choice:
    """The rung and tiles that will run, or why those asked for cannot."""
    if a.is_cuda:
        choice = pick(a, b, out_itemsize=out_itemsize, fast_accum=fast_accum)
    else:
        choice = Choice("grouped", "interpreted", INTERPRETED)
    if not rung or rung == choice.rung:
        return Choice(choice.rung, choice.why, config or choice.config)
    reason = no_descriptor(a, b, out_itemsize=out_itemsize)
    if rung in ("descriptor", "persistent") and reason:
        raise StrideError(
            f"the rung {rung!r} cannot read these matrices: {reason}.",
            "A tensor descriptor takes a base and line distances that are multiples of 16 bytes.",
            "padding the matrix to such a width, or rung='grouped', which reads any strides.",
        )
    return Choice(rung, "asked for", config or default_config(a, b, rung, fast_accum))


def default_config(a: Tensor, b: Tensor, rung: str, fast_accum: bool) -> Config:
    """Tiles for a rung that is not the one `pick` would take on this device."""
    from llmcourse.kernels import matmul_plan as plan

    if not a.is_cuda:
        return INTERPRETED
    (m, k), n, size = a.shape, b.shape[1], a.dtype.itemsize
    capability, multiprocessors = plan.device_of(a)
    if rung == "split_k":
        return plan.skinny(m, n, k, size, multiprocessors)
    if rung in ("descriptor", "persistent") and capability >= 90 and size < 4:
        return plan.best_tiles(m, n, plan.tiles_for(size, fast_accum, rung), multiprocessors)
    return plan.grouped(capability, size, aligned=not plan.no_input_descriptor(a, b))


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, activation: str, choice: Choice
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
        assert choice.config is not None
        launch(choice.rung, Operands(a, b, out, bias, activation=activation), choice.config)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """dA = dC·Bᵀ, dB = Aᵀ·dC, dbias = Σ rows of dC: two products of the same FLOPs as the forward one."""
        a, b = ctx.saved_tensors
        grad = grads[0].contiguous()  # sum().backward() sends one number with both strides 0
        backend: Backend = "triton" if grad.is_cuda else "interpret"
        grad_a = matmul(grad, b.T, backend=backend) if ctx.needs_input_grad[0] else None
        grad_b = matmul(a.T, grad, backend=backend) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_a, grad_b, grad_bias, None, None
