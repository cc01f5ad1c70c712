"""Matrix product of fp8 (e4m3) with scales.

e4m3 has 3 bits of mantissa and reaches from 2⁻⁹ to 448. A matrix is stored as numbers in that range times a
scale in float32, one for the whole matrix or one for each row of A and column of B. The scales do not take
part in the sum along K, so they are multiplied in at the end, once an element of C:

    C[i, j] = scale_a[i] · scale_b[j] · Σ_k A[i, k]·B[k, j]

The tensor cores do twice bf16's FLOPs on half its bytes. What it costs, beside the rounding of the inputs:
Hopper's tensor cores keep about 14 bits while they add fp8 products. `fast_accum=False` moves the sum to
a float32 accumulator after every 128 products, which takes registers and a quarter of the speed at 8192³;
cuBLAS loses less by it (record `matmul`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import Backend, DtypeError, check_float, check_together, choose
from llmcourse.kernels.matmul import ACTIVATIONS, check_operands, chosen_options
from llmcourse.kernels.matmul_launch import Operands, launch
from llmcourse.kernels.matmul_plan import Config

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def quantize(x: Tensor, per: Literal["tensor", "row", "column"] = "tensor") -> tuple[Tensor, Tensor]:
    """x ≈ q · scale, with q in e4m3 and the largest magnitude of each group at 448.

    Shapes   x [M, N]; scale [] for "tensor", [M, 1] for "row", [1, N] for "column", float32.
    """
    magnitude = x.abs().float()
    dims = {"tensor": (0, 1), "row": (1,), "column": (0,)}[per]
    largest = magnitude.amax(dims, keepdim=per != "tensor")
    scale = largest.clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def reference(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The same product with the inputs in float32, by torch."""
    out = a.float() @ b.float() * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)
    return ACTIVATIONS[activation](out if bias is None else out + bias.float()).to(out_dtype)


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
    backend: Backend = "auto",
    rung: str = "",
    config: Config | None = None,
) -> Tensor:
    """activation(scale_a · scale_b · (a·b) + bias) for e4m3 matrices; no gradient.

    Shapes   a [M, K], b [K, N], scale_a [] or [M, 1], scale_b [] or [1, N]; returns [M, N] in out_dtype.
    Layout   fastest with K contiguous in both: rows of a, columns of b, as for torch._scaled_mm.
    Raises   ShapeError, DtypeError, DeviceError, StrideError, UnknownNameError.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dtype != E4M3:
            raise DtypeError(
                f"{name} is {str(x.dtype).removeprefix('torch.')}, expected float8_e4m3fn.",
                "The scales belong to numbers that were divided by them when they were rounded to fp8.",
                f"{name}, scale_{name} = quantize({name}).",
            )
    check_operands(a, b, bias, activation, rung)
    check_float("out", torch.empty(0, dtype=out_dtype))
    for name, scale, lines in (("scale_a", scale_a, a.shape[0]), ("scale_b", scale_b, b.shape[1])):
        check_scale(name, scale, lines)
    check_together(a=a, scale_a=scale_a, scale_b=scale_b)
    chosen = choose(backend, a, b)
    options = None
    if chosen != "reference" and rung != "reference" and 0 not in (*a.shape, *b.shape):
        size = out_dtype.itemsize
        options = chosen_options(a, b, rung, config, out_itemsize=size, fast_accum=fast_accum)
    if options is None or options.config is None:
        return reference(a, b, scale_a, scale_b, bias, activation, out_dtype)
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    operands = Operands(a, b, out, bias, scale_a, scale_b, activation, fast_accum)
    launch(options.rung, operands, options.config)
    return out


def check_scale(name: str, scale: Tensor, lines: int) -> None:
    check_float(name, scale, (torch.float32,))
    if scale.numel() not in (1, lines) or not scale.is_contiguous():
        kind = "row of a" if name == "scale_a" else "column of b"
        raise ShapeError(
            f"{name} has {scale.numel()} numbers (shape {tuple(scale.shape)}, strides {scale.stride()}).",
            f"It is one number for the whole matrix, or {lines} side by side, one for each {kind}.",
            f"{name} = quantize(…)[1].",
        )
