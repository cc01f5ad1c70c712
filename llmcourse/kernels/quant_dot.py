"""Product of a few rows with quantized weights on tensor cores: codes go from memory to registers as codes.

    out [M, N] = x [M, K] · (scale · (codes − zero)) [N, K]ᵀ

A tile of BLOCK_N × BLOCK_K weights comes into shared memory as it is stored, two codes to a byte, so that a
quarter of bfloat16's bytes are on their way for the same number of weights. From there each thread takes the
bytes that its part of the tensor-core operand needs, makes floats of them in registers (`quant_unpack.py`),
and they go into the product; no 16-bit weight is ever written anywhere.

Three things make that cheap:

 -  Even and odd columns are two products. Code 2j is the low half of byte j and 2j + 1 the high half; pulling
    them apart gives two operands of half the length, and x is pulled apart likewise. Nothing is interleaved.
 -  The scale waits. BLOCK_K divides the group, so that all weights of a row in one step share a scale: the
    product is of small integers, and its sum is multiplied, BLOCK_K times fewer multiplications.
 -  The weights are the left operand: BLOCK_N of their rows meet BLOCK_M columns of x, 8 at the least, so that
    batch 1 pads 1 row to 8, where the usual order would pad it to 16.

As in `matmul_splitk.py`, K is cut into `splits` parts, so that every multiprocessor reads, and the last
program of a tile adds the parts in order: the result is the same in every run.
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.quant_unpack import unpack_e4m3, unpack_int4, unpack_int8


@triton.jit
def quant_dot_kernel(
    x,
    packed,
    scale,
    zero,
    out,
    workspace,
    counters,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_sn,
    stride_sg,
    splits,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBSTEPS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRED: tl.constexpr,
    E4M3: tl.constexpr,
    QUICK: tl.constexpr,
):
    """Program (i, s) adds part s of K to tile i. counters [tiles] of int32 are 0 before and after.

    packed, stride_wn    uint8 [N, ⌈K·BITS/8⌉], and the bytes from row to row
    scale, zero          [N, G] of one pair of strides (0 where one number serves all); zero may be None
    GROUP                a multiple of BLOCK_K; 0: one scale a row
    splits               no constant, so that one compiled kernel serves all but 1, which Triton makes one
    SUBSTEPS             of BLOCK_K codes each are loaded in one step: 64 bytes of a row are half a cache line
    E4M3                 the bytes are floats, and no codes
    PAIRED               x is given as int32 [M, K/2]: columns 2j and 2j + 1 of 16 bits side by side
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the last read the last one again: no mask on the weights, and nothing of it is stored.
    line = tl.minimum(rows, N - 1).to(tl.int64)
    STEP: tl.constexpr = BLOCK_K * SUBSTEPS
    length = tl.cdiv(tl.cdiv(K, STEP), splits) * STEP
    start = part * length
    stop = tl.minimum(start + length, K)
    w = packed + line[:, None] * stride_wn
    x += batch.to(tl.int64)[None, :] * stride_xm
    s = scale + line * stride_sn
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # One step ahead: a load of 2 bytes for each row is too short for the pipeline through shared memory.
    if GROUP:
        following = tl.load(s + tl.minimum(start, K - 1) // GROUP * stride_sg)
    for step in tl.range(start, stop, STEP, num_stages=STAGES):
        for i in tl.static_range(SUBSTEPS):
            k = step + i * BLOCK_K
            if zero is None:
                middle = tl.full((1, 1), 1 << (BITS - 1), tl.float32)
            else:
                z = zero + line * stride_sn
                middle = tl.load(z + tl.minimum(k, K - 1) // GROUP * stride_sg if GROUP else z)
                middle = middle.to(tl.float32)[:, None]
            real = batch[None, :] < M
            total = None if GROUP else acc
            if BITS == 4:
                total = product_int4(
                    w, x, middle, total, real, k, K, out.dtype.element_ty, BLOCK_K, EVEN_K, PAIRED, QUICK
                )
            else:
                total = product_int8(
                    w, x, middle, total, real, k, K, out.dtype.element_ty, BLOCK_K, EVEN_K, E4M3, QUICK
                )
            if GROUP:
                acc += total * following.to(tl.float32)[:, None]
                ahead = tl.minimum(k + BLOCK_K, K - 1)
                following = tl.load(s + ahead // GROUP * stride_sg)
            else:
                acc = total
    if not GROUP:
        acc *= tl.load(s).to(tl.float32)[:, None]
    inside = (batch[None, :] < M) & (rows[:, None] < N)
    place = batch.to(tl.int64)[None, :] * N + rows[:, None]
    if splits == 1:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)
    else:
        sums = workspace + place
        tl.store(sums + part * M * N, acc, mask=inside)
        # As in matmul_splitk.py: written before counted (release), counted before read (acquire).
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1:
            tl.debug_barrier()
            result = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for p in range(splits):
                result += tl.load(sums + p * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
            tl.store(counters + tile, 0)


@triton.jit
def product_int4(
    w,
    x,
    middle,
    total,
    real,
    k,
    K,
    into: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRED: tl.constexpr,
    QUICK: tl.constexpr,
):
    """total + (codes − middle) [BLOCK_N, BLOCK_K] · x: columns k, k + 1, … of rows that begin at w and x."""
    byte = k // 2 + tl.arange(0, BLOCK_K // 2)
    known = byte < (K + 1) // 2
    codes = tl.load(w + byte[None, :]) if EVEN_K else tl.load(w + byte[None, :], mask=known[None, :], other=0)
    if PAIRED:
        within = real if EVEN_K else real & known[:, None]
        pairs = tl.load(x + byte[:, None], mask=within, other=0)
        x_even = (pairs & 0xFFFF).to(tl.uint16).to(into, bitcast=True)
        x_odd = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(into, bitcast=True)
    else:
        column = 2 * byte[:, None]
        x_even = tl.load(x + column, mask=real & (column < K), other=0.0)
        x_odd = tl.load(x + column + 1, mask=real & (column + 1 < K), other=0.0)
    low, high = unpack_int4(codes, middle, into, QUICK)
    total = tl.dot(low, x_even, total, input_precision="ieee")
    return tl.dot(high, x_odd, total, input_precision="ieee")


@triton.jit
def product_int8(
    w,
    x,
    middle,
    total,
    real,
    k,
    K,
    into: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    E4M3: tl.constexpr,
    QUICK: tl.constexpr,
):
    """As `product_int4`, for a code a byte."""
    column = k + tl.arange(0, BLOCK_K)
    known = column < K
    codes = (
        tl.load(w + column[None, :]) if EVEN_K else tl.load(w + column[None, :], mask=known[None, :], other=0)
    )
    x_tile = tl.load(x + column[:, None], mask=real if EVEN_K else real & known[:, None], other=0.0)
    weights = unpack_e4m3(codes, into, QUICK) if E4M3 else unpack_int8(codes, middle, into, QUICK)
    return tl.dot(weights, x_tile, total, input_precision="ieee")
