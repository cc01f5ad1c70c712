"""Products with weights of 4 and 8 bits: out [M, N] = x [M, K] · (scale · (codes − zero)) [N, K]ᵀ.

A decoding step multiplies a few rows with a weight matrix. Each weight is read once and used M times, so the
step takes as long as the weights' bytes do; a code of 4 bits with a scale in 16 for each 128 of them has

    (4 + 16/128) / 16 = 0.26      of bfloat16's bytes, and that is the most it can gain.

It gains nothing where the weights are first written out in 16 bits: that moves *more* bytes than reading them
in 16 bits would have. So the kernels read codes, and make floats of them in registers:

    rung         file                   idea
    reference    this one               torch unpacks, torch multiplies
    gemv         quant_gemv.py          rows of codes, multiply-adds on the ordinary units
    dot          quant_dot.py           codes become a tensor-core operand in registers; K is cut in parts
    dequantize   quant_dequantize.py    many rows: written out after all, and multiplied by cuBLAS

`quant_matmul` takes the rung that fits (`pick` in quant_plan.py says which and why). Activations stay in
16 bits (W4A16, W8A16); `quant_int8.py` multiplies int8 with int8, `matmul_fp8.py` fp8 with fp8.

The layout is `compress.quantize.Quantized.packed()`: rows of codes without gaps, low bits first, signed codes
stored + 2^(bits−1). Code 2j is the low half of byte j.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.kernels.checks import Backend, DtypeError, check_float, check_together, choose
from llmcourse.kernels.launch import ceil_div, launch
from llmcourse.kernels.matmul_plan import device_of
from llmcourse.kernels.matmul_splitk import counters_for
from llmcourse.kernels.quant_dequantize import dequantize_kernel
from llmcourse.kernels.quant_dot import quant_dot_kernel
from llmcourse.kernels.quant_gemv import quant_gemv_kernel
from llmcourse.kernels.quant_plan import INTERPRETED, RUNGS, Choice, QuantPlan, chunk_of, pick, step_of

FP8 = torch.float8_e4m3fn


def quant_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bits: int = 4,
    group: int | None = 128,
    *,
    backend: Backend = "auto",
    plan: QuantPlan | None = None,
) -> Tensor:
    """x · Wᵀ for quantized W, differentiable in x (W is frozen).

    x        [..., K], float16, bfloat16 or float32; returns [..., N] in its format, summed in float32
    packed   uint8 [N, ⌈K·bits/8⌉], as `Quantized.packed()` gives it; with bits = 8 also float8_e4m3fn [N, K]
    scale    [N, G] of G = ⌈K / group⌉ (or [1, 1]: one for all), any float format, any strides
    zero     None: codes are stored + 2^(bits−1); else uint8 of scale's shape, and W = scale·(code − zero)
    bits     4 or 8
    group    codes of a row that share a scale, a multiple of 32 to be fast; None or −1: as many as scale says
    plan     how to launch; None for the one that fits. plan.rung is a key of quant_plan.RUNGS
    Moves    N·K·bits/8 bytes of codes and the scales, once, for up to 64 rows.
    Raises   ShapeError, DtypeError, DeviceError, UnknownNameError.
    """
    size = check_operands(x, packed, scale, zero, bits, group)
    if plan is not None and plan.rung not in RUNGS:
        raise UnknownNameError(
            f"there is no rung {plan.rung!r}.",
            f"Quantized products have {', '.join(RUNGS)}.",
            "one of these.",
        )
    return _QuantMatmul.apply(x, packed, scale, zero, bits, size, choose(backend, x, packed), plan)


class _QuantMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group: int,
        backend: str,
        plan: QuantPlan | None,
    ) -> Tensor:
        ctx.save_for_backward(packed, scale, zero)
        ctx.options = bits, group, x.shape[-1], backend
        rows = x.reshape(-1, x.shape[-1])
        if backend == "reference":
            weight = unpacked(packed, scale, zero, bits, group, x.shape[-1], x.dtype)
            return torch.nn.functional.linear(x, weight)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        chosen = plan or chosen_for(rows, packed.shape[0], bits, group).plan
        return run(rows, packed, scale, zero, bits, group, chosen).view(*x.shape[:-1], packed.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """dx = dout · W. The weights are written out for it, and kept for no longer."""
        packed, scale, zero = ctx.saved_tensors
        bits, group, columns, backend = ctx.options
        weight = dequantize(packed, scale, zero, bits, group, columns, grads[0].dtype, backend=backend)
        return grads[0] @ weight, None, None, None, None, None, None, None


def chosen_for(x: Tensor, n: int, bits: int, group: int) -> Choice:
    """The plan for these rows, and why."""
    m, k = x.shape
    if not x.is_cuda:
        step = min(INTERPRETED.block_k, step_of(group, k))
        plan = QuantPlan("dequantize") if step < 32 or 0 in (m, n, k) else replace(INTERPRETED, block_k=step)
        return Choice(plan, "interpreted")
    capability, multiprocessors = device_of(x)
    return pick(
        m, n, k, bits=bits, group=group, itemsize=x.dtype.itemsize, capability=capability,
        multiprocessors=multiprocessors,
    )  # fmt: skip


def run(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, plan: QuantPlan
) -> Tensor:
    """Launch a plan: compiled where x [M, K] is on a GPU, else interpreted."""
    (m, k), n = x.shape, packed.shape[0]
    if plan.rung in ("reference", "dequantize") or 0 in (m, n, k):
        backend: Backend = "reference" if plan.rung == "reference" else "triton" if x.is_cuda else "interpret"
        return x @ dequantize(packed, scale, zero, bits, group, k, x.dtype, backend=backend).T
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    kernel, grid, arguments, meta = launch_of(x, packed, scale, zero, out, bits, group, plan, quick=x.is_cuda)
    launch(kernel, grid, *arguments, interpret=not x.is_cuda, **meta)
    return out


def launch_of(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    out: Tensor,
    bits: int,
    group: int,
    plan: QuantPlan,
    *,
    quick: bool,
) -> tuple[Any, tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """(kernel, grid, arguments, constants) of the plan's launch, which writes out [M, N].

    quick   codes become floats by inline PTX, which the interpreter cannot run
    """
    (m, k), n = x.shape, packed.shape[0]
    packed, e4m3 = bytes_of(packed)
    by_group = group if group < k else 0
    paired = bits == 4 and pairs_of(x)
    rows = x.view(torch.int32) if paired else x
    even = k % (plan.block_k * plan.substeps) == 0
    meta = {"BITS": bits, "GROUP": by_group, "BLOCK_N": plan.block_n, "EVEN_K": even, "PAIRED": paired}
    meta |= {"E4M3": e4m3, "num_warps": plan.warps, "num_stages": plan.stages}
    sizes = (rows.stride(0), packed.stride(0), *scale_strides(scale))
    if plan.rung == "gemv":
        chunk = min(chunk_of(by_group, 128) if by_group else 128, plan.block_k)
        meta |= {"CHUNK": chunk, "CHUNKS": plan.block_k // chunk, "QUICK": quick}
        grid = (ceil_div(n, plan.block_n), m)
        return quant_gemv_kernel, grid, (rows, packed, scale, zero, out, n, k, *sizes), meta
    if by_group % plan.block_k:
        raise ShapeError(
            f"a step of {plan.block_k} codes with groups of {group}.",
            "All codes of a row in one step are multiplied by one scale after they were summed.",
            f"QuantPlan(…, block_k={chunk_of(group, 256)}).",
        )
    splits = plan.splits
    sums = torch.empty((splits, m, n) if splits > 1 else (1,), dtype=torch.float32, device=x.device)
    tiles = ceil_div(n, plan.block_n) * ceil_div(m, plan.block_m)
    meta |= {"BLOCK_M": plan.block_m, "BLOCK_K": plan.block_k, "SUBSTEPS": plan.substeps}
    meta |= {"STAGES": plan.stages, "QUICK": quick and x.dtype.itemsize == 2}
    tensors = (rows, packed, scale, zero, out, sums, counters_for(tiles, x.device))
    return quant_dot_kernel, (tiles, splits), (*tensors, m, n, k, *sizes, splits), meta


def bytes_of(packed: Tensor) -> tuple[Tensor, bool]:
    """(codes as bytes, whether they are e4m3): a GPU without that type can read its bits all the same."""
    return (packed.view(torch.uint8), True) if packed.dtype == FP8 else (packed, False)


def pairs_of(x: Tensor) -> bool:
    """Whether the rows of x [M, K] of 16-bit numbers can be read as pairs, aligned to 4 bytes."""
    even = x.shape[1] % 2 == 0 and (x.shape[0] == 1 or x.stride(0) % 2 == 0)
    return x.dtype.itemsize == 2 and even and x.storage_offset() % 2 == 0 and x.data_ptr() % 4 == 0


def scale_strides(scale: Tensor) -> tuple[int, int]:
    """0 along a dimension in which one scale serves all."""
    return tuple(0 if size == 1 else stride for size, stride in zip(scale.shape, scale.stride(), strict=True))  # type: ignore[return-value]


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int | None,
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "auto",
) -> Tensor:
    """The weights [N, columns] that the codes stand for, computed in float32 and rounded once."""
    n = packed.shape[0]
    size = columns if group is None or group < 0 else group
    if choose(backend, packed) == "reference" or 0 in (n, columns):
        return unpacked(packed, scale, zero, bits, size, columns, dtype)
    out = torch.empty(n, columns, dtype=dtype, device=packed.device)
    packed, e4m3 = bytes_of(packed)
    arguments = (packed, scale, zero, out, n, columns, packed.stride(0), *scale_strides(scale), size)
    grid = (ceil_div(n, 16), ceil_div(columns, 256))
    meta = {"BITS": bits, "E4M3": e4m3, "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4}
    launch(dequantize_kernel, grid, *arguments, interpret=not packed.is_cuda, **meta)
    return out


def unpacked(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize` by torch."""
    if packed.dtype == FP8:
        points = packed.float()
    else:
        codes = packed
        if bits == 4:
            codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]
        points = codes.float() - (1 << (bits - 1) if zero is None else spread(zero, group, columns))
    return (points * spread(scale, group, columns)).to(dtype)


def spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    """[N, G] → float32 that multiplies [N, columns]."""
    if per_group.shape[1] == 1:
        return per_group.float()
    return per_group.float().repeat_interleave(group, dim=1)[:, :columns]


def check_operands(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | None
) -> int:
    """Codes that share a scale; raises what `quant_matmul` says."""
    check_float("x", x)
    check_float("scale", scale)
    if bits not in (4, 8):
        raise ShapeError(
            f"codes of {bits} bits.",
            "The kernels take bytes apart into halves, or as they are; other codes lie across bytes.",
            "bits=4 or 8 (store 3-bit codes as 4), or Quantized.dequantize() and torch.matmul.",
        )
    if packed.dtype != torch.uint8 and not (packed.dtype == FP8 and bits == 8 and zero is None):
        raise DtypeError(
            f"packed is {str(packed.dtype).removeprefix('torch.')}, with {bits} bits a code.",
            "Codes are stored in bytes without gaps, low bits first; of floats, only e4m3 is read.",
            "Quantized.packed().",
        )
    if x.dim() == 0 or packed.dim() != 2 or packed.shape[1] != -(-x.shape[-1] * bits // 8):
        columns = x.shape[-1] if x.dim() else 0
        raise ShapeError(
            f"packed has shape {tuple(packed.shape)} and x {tuple(x.shape)}.",
            f"{columns} codes of {bits} bits are {-(-columns * bits // 8)} bytes a row of packed.",
            f"packed of shape (N, {-(-columns * bits // 8)}).",
        )
    if packed.stride(1) != 1 and packed.shape[1] > 1:
        raise ShapeError(
            f"packed has strides {packed.stride()}.",
            "A thread reads 16 bytes side by side, 32 codes of one row.",
            "packed.contiguous().",
        )
    n, k = packed.shape[0], x.shape[-1]
    size = max(k, 1) if group is None or group < 0 else group
    groups = -(-k // size) if size else 0
    if size < 1 or tuple(scale.shape) not in ((n, groups), (1, 1)):
        raise ShapeError(
            f"scale has shape {tuple(scale.shape)}, for groups of {size} in weights of {n} × {k}.",
            "Each row has a scale for each group of its codes, the last of them for what is left.",
            f"scale of shape ({n}, {-(-k // max(size, 1))}), or (1, 1) for one scale in all.",
        )
    if scale.shape[1] == 1:
        size = max(size, k)
    check_together(x=x, packed=packed, scale=scale)
    if zero is not None:
        check_together(x=x, zero=zero)
        if (
            zero.dtype != torch.uint8
            or zero.shape != scale.shape
            or scale_strides(zero) != scale_strides(scale)
        ):
            raise ShapeError(
                f"zero is {str(zero.dtype).removeprefix('torch.')} of shape {tuple(zero.shape)}.",
                "It is a code itself, one beside each scale, and is found where the scale is.",
                f"zero of uint8 and of scale's shape {tuple(scale.shape)} and strides.",
            )
    return size
