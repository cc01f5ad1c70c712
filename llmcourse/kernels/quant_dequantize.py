"""Quantized weights written out in 16 bits, for products of so many rows that cuBLAS is the better way.

    out [N, K] = scale · (codes − zero)      N·K·(bits/8 + 2) bytes, and scales

Above some number of rows a product is limited by its multiplications and no longer by the bytes of the
weights; unpacking them again for every tile of rows is then work for nothing. Once written they are read by
the best matrix product there is, and the memory is free again after it.
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.quant_unpack import unpack_e4m3


@triton.jit
def dequantize_kernel(
    packed,
    scale,
    zero,
    out,
    N,
    K,
    stride_wn,
    stride_sn,
    stride_sg,
    GROUP,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, j): a tile of BLOCK_N × BLOCK_K weights. GROUP is any number from 1."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.minimum(rows, N - 1).to(tl.int64)
    WIDTH: tl.constexpr = BLOCK_K * BITS // 8
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    codes = tl.load(
        packed + line[:, None] * stride_wn + place[None, :], mask=place < (K * BITS + 7) // 8, other=0
    )
    if BITS == 4:
        codes = tl.interleave(codes & 15, codes >> 4)
    own = line[:, None] * stride_sn + (columns // GROUP)[None, :] * stride_sg
    factor = tl.load(scale + own, mask=columns < K, other=0.0).to(tl.float32)
    if zero is None:
        middle = tl.full((1, 1), 1 << (BITS - 1), tl.float32)
    else:
        middle = tl.load(zero + own, mask=columns < K, other=0).to(tl.float32)
    if E4M3:
        weights = unpack_e4m3(codes, tl.float32, False) * factor
    else:
        weights = (codes.to(tl.float32) - middle) * factor
    tl.store(out + line[:, None] * K + columns[None, :], weights.to(out.dtype.element_ty), mask=inside)
