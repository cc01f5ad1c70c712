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

As in `matmul_splitk.py`, K is cut into SPLITS parts, so that every multiprocessor reads, and the last program
of a tile adds the parts in order: the result is the same in every run.
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.quant_unpack import unpack_int4, unpack_int8


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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRED: tl.constexpr,
    QUICK: tl.constexpr,
):
    """Program (i, s) adds part s of K to tile i. counters [tiles] of int32 are 0 before and after.

    packed, stride_wn    uint8 [N, ⌈K·BITS/8⌉] (or e4m3 [N, K]) and the bytes from row to row
    scale, zero          [N, G] of one pair of strides (0 where one number serves all); zero may be None
    GROUP                a multiple of BLOCK_K; 0: one scale a row
    PAIRED               x is given as int32 [M, K/2]: columns 2j and 2j + 1 of 16 bits side by side
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    real = batch[None, :] < M
    # Rows within the last read the last one again: no mask on the weights, and nothing of it is stored.
    line = tl.minimum(rows, N - 1).to(tl.int64)
    DTYPE: tl.constexpr = out.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_K * BITS // 8  # bytes of a row in one step
    place = tl.arange(0, WIDTH)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start = part * length
    stop = tl.minimum(start + length, K)
    columns = (K * BITS + 7) // 8
    w = packed + line[:, None] * stride_wn + place[None, :]
    s = scale + line * stride_sn
    here = batch.to(tl.int64)[None, :] * stride_xm + place[:, None] * (2 if BITS == 4 and not PAIRED else 1)
    center: tl.constexpr = 1 << (BITS - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # One step ahead, since a load of 2 bytes for each row cannot go through the pipeline of shared memory.
    if GROUP:
        following = tl.load(s + tl.minimum(start, K - 1) // GROUP * stride_sg)
    for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        at = k * BITS // 8
        codes = tl.load(w + at) if EVEN_K else tl.load(w + at, mask=place[None, :] < columns - at, other=0)
        if zero is None:
            middle = tl.full((1, 1), center, tl.float32)
        else:
            z = zero + line * stride_sn
            middle = tl.load(z + k // GROUP * stride_sg if GROUP else z).to(tl.float32)[:, None]
        # Columns within K meet zeros of x, whatever was read for them as codes.
        within = real if EVEN_K else real & (place[:, None] < columns - at)
        if BITS == 4:
            if PAIRED:
                pairs = tl.load(x + here + at, mask=within, other=0)
                x_even = (pairs & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
                x_odd = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
            else:
                even, odd = 2 * place[:, None] < K - k, 2 * place[:, None] + 1 < K - k
                x_even = tl.load(x + here + k, mask=real & even, other=0.0)
                x_odd = tl.load(x + here + k + 1, mask=real & odd, other=0.0)
            low, high = unpack_int4(codes, middle, DTYPE, QUICK)
            total = tl.dot(low, x_even, None if GROUP else acc, input_precision="ieee")
            total = tl.dot(high, x_odd, total, input_precision="ieee")
        else:
            x_tile = tl.load(x + here + k, mask=within, other=0.0)
            is_code: tl.constexpr = codes.dtype == tl.uint8
            weights = unpack_int8(codes, middle, DTYPE, QUICK) if is_code else codes.to(DTYPE)
            total = tl.dot(weights, x_tile, None if GROUP else acc, input_precision="ieee")
        if GROUP:
            acc += total * following.to(tl.float32)[:, None]
            ahead = tl.minimum(k + BLOCK_K, K - 1)
            following = tl.load(s + ahead // GROUP * stride_sg)
        else:
            acc = total
    if not GROUP:
        acc *= tl.load(s).to(tl.float32)[:, None]
    inside = real & (rows[:, None] < N)
    place_out = batch.to(tl.int64)[None, :] * N + rows[:, None]
    if SPLITS == 1:
        tl.store(out + place_out, acc.to(out.dtype.element_ty), mask=inside)
    else:
        sums = workspace + place_out
        tl.store(sums + part * M * N, acc, mask=inside)
        # As in matmul_splitk.py: written before counted (release), counted before read (acquire).
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            result = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for p in range(SPLITS):
                result += tl.load(sums + p * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out + place_out, result.to(out.dtype.element_ty), mask=inside)
            tl.store(counters + tile, 0)
