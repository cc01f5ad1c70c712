"""Products of INT8 with INT8 (W8A8): both sides are codes, the sum is an exact integer, scales come last.

    out[i, j] = x_scale[i] · w_scale[j] · Σ_k x[i, k]·w[j, k]

Weight-only quantization saves bytes and still multiplies in 16 bits, which is right for a few rows. With many
rows multiplying takes the time, and tensor cores multiply 8-bit integers twice as fast as bfloat16. For that
the activations must be codes too, made on the fly, a scale for each row (`quantize_rows`): a token's outlier
costs that token its precision and no other. Both scales are constant along K, so that they stay out of the
sum; a scale that changes along K (groups) would have to go in, and turn the sum of integers into one of
floats. A sum of 2¹⁷ products of codes still fits into int32: 127² · 2¹⁷ < 2³¹.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import Backend, DtypeError, check_float, check_rows, check_together, choose
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import ceil_div, launch, power_of_two
from llmcourse.kernels.matmul_plan import device_of
from llmcourse.kernels.matmul_splitk import counters_for

LARGEST = 127
SMALLEST = 1e-12
LONGEST = 1 << 17


@dataclass(frozen=True)
class Int8Plan:
    """Tile sizes (block_m rows of x, block_n of weights, block_k along K), warps, stages, parts of K.

    group_m   tiles of x that take turns with one tile of weights before the next
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1
    group_m: int = 8


TILES = {  # rows of x at the most: tiles; the last serves all larger numbers
    8: Int8Plan(8, 64, 128, 4, 4),
    16: Int8Plan(16, 64, 128, 4, 4),
    32: Int8Plan(32, 64, 128, 4, 4),
    64: Int8Plan(64, 64, 128, 4, 3),
    1 << 30: Int8Plan(128, 128, 128, 8, 3),
}
NARROW = Int8Plan(128, 64, 128, 4, 4)  # where wider tiles would be fewer than two for each multiprocessor
INTERPRETED = Int8Plan(16, 32, 32, 4, 2, splits=2, group_m=2)


def pick(m: int, n: int, k: int, multiprocessors: int = 132) -> Int8Plan:
    """Tiles for x [m, k] times weights [n, k]; K in parts where there are few tiles."""
    plan = next(plan for rows, plan in TILES.items() if m <= rows)
    tiles = ceil_div(m, plan.block_m) * ceil_div(n, plan.block_n)
    if m > 64 and tiles < 2 * multiprocessors:
        plan = NARROW
    splits = max(1, min(round(2 * multiprocessors / tiles), k // plan.block_k // 4, 8)) if m <= 64 else 1
    return Int8Plan(**{**vars(plan), "splits": splits})


def quantize_rows(x: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """x [M, K] ≈ codes · scale: int8 [M, K] from −127 to 127, and float32 [M, 1].

    One read of x and one write of the codes. A row of zeros gets a scale that is not 0.
    """
    check_float("x", x)
    check_rows("x", x)
    if x.dim() != 2:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}.", "Each row of a matrix gets a scale.", "x.flatten(0, -2)."
        )
    if choose(backend, x) == "reference":
        largest = x.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST)
        scale = largest / torch.full_like(largest, LARGEST)  # by a number, CUDA would multiply by 1/127
        return (x.float() / scale).round().to(torch.int8), scale
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = min(power_of_two(k), 4096)
    meta = {"BLOCK": block, "num_warps": 4 if block <= 1024 else 8}
    launch(quantize_rows_kernel, m, x, codes, scale, x.stride(0), k, interpret=not x.is_cuda, **meta)
    return codes, scale


@triton.jit
def quantize_rows_kernel(x, codes, scale, stride, K, BLOCK: tl.constexpr):
    """A row a program; of a row longer than BLOCK, the second reading comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        known = start + column < K
        value = tl.load(x + row * stride + start + column, mask=known, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    size = tl.math.div_rn(tl.maximum(tl.max(largest, axis=0), 1e-12), 127.0)
    tl.store(scale + row, size)
    for start in range(0, K, BLOCK):
        known = start + column < K
        value = tl.load(x + row * stride + start + column, mask=known, other=0.0).to(tl.float32)
        # 1.5·2²³ + v has no place for a fraction of v: the sum rounds it, to even where it is a half.
        whole = (tl.math.div_rn(value, size) + 12582912.0) - 12582912.0
        tl.store(codes + row * K + start + column, whole.to(tl.int8), mask=known)


def int8_matmul(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
    plan: Int8Plan | None = None,
) -> Tensor:
    """x_scale · w_scale · (x · weightᵀ), the sum exact in int32; no gradient.

    Shapes   x int8 [M, K], weight int8 [N, K] (`Quantized.codes`), x_scale float [M, 1] or [1, 1], w_scale
             float [N, 1] or [1, 1]; returns [M, N] in out_dtype
    Raises   ShapeError (also for K above 2¹⁷, whose sums may not fit), DtypeError, DeviceError.
    """
    check_int8(x, weight, x_scale, w_scale)
    check_float("out", torch.empty(0, dtype=out_dtype))
    (m, k), n = x.shape, weight.shape[0]
    if choose(backend, x, weight) == "reference" or 0 in (m, n, k):
        total = (x.double() @ weight.double().T).float()  # exact: float64 holds integers to 2⁵³
        return (total * x_scale.float() * w_scale.float().view(1, -1)).to(out_dtype)
    if plan is None:
        plan = pick(m, n, k, device_of(x)[1]) if x.is_cuda else INTERPRETED
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    grid, arguments, meta = launch_of(x.contiguous(), weight.contiguous(), x_scale, w_scale, out, plan)
    launch(int8_kernel, grid, *arguments, interpret=not x.is_cuda, **meta)
    return out


def launch_of(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, out: Tensor, plan: Int8Plan
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """(grid, arguments, constants) of the launch that writes out [M, N]; x and weight are contiguous."""
    (m, k), n, splits = x.shape, weight.shape[0], plan.splits
    sums = torch.empty((splits, m, n) if splits > 1 else (1,), dtype=torch.int32, device=x.device)
    tiles = ceil_div(m, plan.block_m) * ceil_div(n, plan.block_n)
    tensors = (x, weight, x_scale, w_scale, out, sums, counters_for(tiles, x.device))
    sizes = (m, n, k, int(x_scale.numel() > 1), int(w_scale.numel() > 1), splits)
    meta = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k}
    meta |= {"GROUP_M": plan.group_m, "STAGES": plan.stages}
    meta |= {"num_warps": plan.warps, "num_stages": plan.stages}
    return (tiles, splits), (*tensors, *sizes), meta


@triton.jit
def int8_kernel(
    x,
    weight,
    x_scale,
    w_scale,
    out,
    workspace,
    counters,
    M,
    N,
    K,
    stride_xs,
    stride_ws,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (i, s) adds part s of K to tile i; weights are the left operand, as in `quant_dot.py`."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, part = tl.program_id(0), tl.program_id(1)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    batch = (first + tile % (GROUP_M * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile % (GROUP_M * tiles_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    start = part * length
    stop = tl.minimum(start + length, K)
    w = weight + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * K
    x += tl.minimum(batch, M - 1).to(tl.int64)[None, :] * K
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        known = k + inner < K
        w_tile = tl.load(w + (k + inner)[None, :], mask=known[None, :], other=0)
        x_tile = tl.load(x + (k + inner)[:, None], mask=known[:, None], other=0)
        acc = tl.dot(w_tile, x_tile, acc, out_dtype=tl.int32)
    inside = (batch[None, :] < M) & (rows[:, None] < N)
    place = batch.to(tl.int64)[None, :] * N + rows[:, None]
    last = True
    if splits > 1:
        tl.store(workspace + part * M * N + place, acc, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1
        tl.debug_barrier()
    if last:
        if splits > 1:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
            for p in range(splits):
                acc += tl.load(workspace + p * M * N + place, mask=inside, other=0, cache_modifier=".cg")
            tl.store(counters + tile, 0)
        factor = tl.load(w_scale + rows * stride_ws, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        factor *= tl.load(x_scale + batch * stride_xs, mask=batch < M, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, (acc.to(tl.float32) * factor).to(out.dtype.element_ty), mask=inside)


def check_int8(x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor) -> None:
    for name, codes in (("x", x), ("weight", weight)):
        if codes.dtype != torch.int8:
            raise DtypeError(
                f"{name} is {str(codes.dtype).removeprefix('torch.')}, expected int8.",
                "The tensor cores multiply codes from −127 to 127; what they stand for is in the scales.",
                "x, x_scale = quantize_rows(x); weight, w_scale = quantized.codes, quantized.scale.",
            )
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] > LONGEST:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}.",
            f"Each sum runs along a row of both, which are of one length of at most {LONGEST:,}.",
            f"x [M, K] and weight [N, K], K ≤ {LONGEST}.",
        )
    for name, scale, lines in (("x_scale", x_scale, x.shape[0]), ("w_scale", w_scale, weight.shape[0])):
        check_float(name, scale)
        if tuple(scale.shape) not in ((lines, 1), (1, 1)) or not scale.is_contiguous():
            raise ShapeError(
                f"{name} has shape {tuple(scale.shape)}.",
                "A scale belongs to a row, or to the whole matrix: inside the sum of integers is none.",
                f"{name} of shape ({lines}, 1) or (1, 1), contiguous.",
            )
    check_together(x=x, weight=weight, x_scale=x_scale, w_scale=w_scale)
