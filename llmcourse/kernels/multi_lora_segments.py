"""Many LoRA adapters in one prefill: stretches of rows that share an adapter (Punica's SGMV).

    rows of x   0 0 0 0 0 | 1 1 1 | 0 0 | – –        lengths (5, 3, 2, 2), adapters (0, 1, 0, −1)

In decode a row has an adapter of its own; in prefill a whole prompt has one, so that A and B serve many rows
and the products go to tensor cores. The host knows the stretches, because it put the batch together; it cuts
each into tiles of BLOCK rows, and a program finds in a small table (first row, end row, adapter) what is its.
Stretches may have any length: a tile never reaches over a border, and rows without adapter have no tile.

Two launches again: v = x·Aᵀ, [N, P, R], and y += s·v·Bᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import Backend, choose, row_stride
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import ceil_div, launch, power_of_two
from llmcourse.kernels.multi_lora import Bank, check, corrected


class Tiles(NamedTuple):
    """Rows of a stretch, features of K and columns of y that a program holds at once, and its warps."""

    rows: int = 32
    block_k: int = 64
    block_m: int = 128
    shrink_warps: int = 2
    expand_warps: int = 4


def tiles_for(device: torch.device) -> Tiles:
    """Without tensor cores for `tl.dot` (a T4), a product's operands fill the registers sooner."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return SMALL if old else Tiles()


SMALL = Tiles(16, 32, 32, 4, 4)


@triton.jit
def segment_shrink_kernel(
    x, tiles, a, v, x_stride, K,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """v[rows of a tile, part, :] = x·Aᵀ."""
    tile = tiles + 3 * tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    row = tl.load(tile) + tl.arange(0, BLOCK_N)[:, None]
    mine = row < tl.load(tile + 1)
    a += (tl.load(tile + 2).to(tl.int64) * parts + part) * RANK * K
    x += row.to(tl.int64) * x_stride
    r = tl.arange(0, BLOCK_R)[None, :]
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        features = tl.load(x + start + k[None, :], mask=mine & inside[None, :], other=0.0)
        weights = tl.load(a + r * K + start + k[:, None], mask=(r < RANK) & inside[:, None], other=0.0)
        acc = tl.dot(features, weights, acc, input_precision="ieee")
    to = v + (row.to(tl.int64) * parts + part) * RANK + r
    tl.store(to, acc.to(v.dtype.element_ty), mask=mine & (r < RANK))


@triton.jit
def segment_expand_kernel(
    v, tiles, b, scale, y, y_stride, COLUMNS, first0, end0, first1, end1, first2, end2,
    RANK: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y[rows of a tile, BLOCK_M columns of one part] += s·v·Bᵀ."""
    tile = tiles + 3 * tl.program_id(0)
    across = tl.program_id(1)
    tiles0 = tl.cdiv(end0 - first0, BLOCK_M)
    tiles1 = tl.cdiv(end1 - first1, BLOCK_M)
    part = (across >= tiles0).to(tl.int32) + (across >= tiles0 + tiles1).to(tl.int32)
    first = tl.where(part == 0, first0, tl.where(part == 1, first1, first2))
    end = tl.where(part == 0, end0, tl.where(part == 1, end1, end2))
    above = tl.where(part > 0, end0 - first0, 0) + tl.where(part > 1, end1 - first1, 0)
    at = (across - tl.where(part > 0, tiles0, 0) - tl.where(part > 1, tiles1, 0)) * BLOCK_M
    row = tl.load(tile) + tl.arange(0, BLOCK_N)[:, None]
    mine = row < tl.load(tile + 1)
    adapter = tl.load(tile + 2)
    r = tl.arange(0, BLOCK_R)
    m = at + tl.arange(0, BLOCK_M)[None, :]
    inside = m < end - first
    from_ = v + (row.to(tl.int64) * PARTS + part) * RANK + r[None, :]
    down = tl.load(from_, mask=mine & (r[None, :] < RANK), other=0.0)
    b += (adapter.to(tl.int64) * COLUMNS + above) * RANK
    weights = tl.load(b + m * RANK + r[:, None], mask=inside & (r[:, None] < RANK), other=0.0)
    delta = tl.dot(down, weights, input_precision="ieee") * tl.load(scale + adapter)
    y += row.to(tl.int64) * y_stride + first + m
    old = tl.load(y, mask=mine & inside, other=0.0).to(tl.float32)
    tl.store(y, (old + delta).to(y.dtype.element_ty), mask=mine & inside)


def tiles_of(lengths: Sequence[int], adapters: Sequence[int], block: int) -> list[tuple[int, int, int]]:
    """(first row, end row, adapter) of every tile of at most `block` rows; rows without adapter have none."""
    out, start = [], 0
    for length, adapter in zip(lengths, adapters, strict=True):
        end = start + length
        if adapter >= 0:
            out += [(at, min(at + block, end), adapter) for at in range(start, end, block)]
        start = end
    return out


def reference(y: Tensor, x: Tensor, lengths: Sequence[int], adapters: Sequence[int], bank: Bank) -> Tensor:
    """The same, stretch by stretch, in torch."""
    start = 0
    for length, adapter in zip(lengths, adapters, strict=True):
        rows = slice(start, start + length)
        if adapter >= 0:
            y[rows] = corrected(y[rows], x[rows], adapter, bank)
        start += length
    return y


def multi_lora_segments(
    y: Tensor,
    x: Tensor,
    lengths: Sequence[int],
    adapters: Sequence[int],
    bank: Bank,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Add to each stretch of rows the correction of its adapter; returns y, changed in place. No gradient.

    Shapes   y [N, M], x [N, K]; lengths sum to N, adapters name one of the bank for each, −1 for none
    Moves    A and B once for every 32 rows, from the L2 cache after the first; v [N, P, R] in x's format
    Raises   ShapeError, DtypeError, StrideError, DeviceError.
    """
    check(y, x, bank)
    fine = len(lengths) == len(adapters) and sum(lengths) == len(x) and min(lengths, default=0) >= 0
    if not fine or max(adapters, default=-1) >= bank.a.shape[0]:
        raise ShapeError(
            f"lengths {tuple(lengths)} and adapters {tuple(adapters)} came for {len(x)} rows.",
            f"The stretches make up all rows, and each has one of {bank.a.shape[0]} adapters or −1.",
            f"lengths that add up to {len(x)}, and as many adapters.",
        )
    chosen = choose(backend, x, y, bank.a)
    if chosen == "reference":
        return reference(y, x, lengths, adapters, bank)
    sizes = tiles_for(x.device)
    table = tiles_of(lengths, adapters, sizes.rows)
    if not table:
        return y
    tiles = torch.tensor(table, dtype=torch.int32, device=x.device)
    return run(y, x, tiles, bank, sizes, chosen == "interpret")


def run(y: Tensor, x: Tensor, tiles: Tensor, bank: Bank, sizes: Tiles, interpret: bool) -> Tensor:
    """Both launches, for tiles [T, 3] int32 of at most `sizes.rows` rows. y is changed in place."""
    n, features = x.shape
    _, parts, rank, _ = bank.a.shape
    v = torch.empty(n, parts, rank, dtype=bank.a.dtype, device=x.device)
    common: dict[str, Any] = {
        "RANK": rank,
        "BLOCK_N": sizes.rows,
        "BLOCK_R": max(16, power_of_two(rank)),  # a tensor core's smallest tile
        "interpret": interpret,
    }
    launch(
        segment_shrink_kernel, (len(tiles), parts), x, tiles, bank.a, v, row_stride(x), features,
        BLOCK_K=sizes.block_k, num_warps=sizes.shrink_warps, num_stages=4, **common,
    )  # fmt: skip
    across = sum(ceil_div(end - first, sizes.block_m) for first, end in bank.parts)
    ends = [n for part in (*bank.parts, (0, 0), (0, 0))[:3] for n in part]
    launch(
        segment_expand_kernel, (len(tiles), across), v, tiles, bank.b, bank.scale, y, row_stride(y),
        bank.columns, *ends, PARTS=parts, BLOCK_M=sizes.block_m, num_warps=sizes.expand_warps, **common,
    )  # fmt: skip
    return y
