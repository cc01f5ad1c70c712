"""Product of one row with quantized weights on the ordinary units: no tensor cores.

    out [N] = Σ_g scale[:, g] · Σ_{k in group g} (code[:, k] − zero[:, g]) · x[k]

One row of x is a vector, and each weight is used once: two operations for half a byte. So the product is
done by multiply-adds in float32, and what counts is how the bytes come:

 -  A program takes BLOCK_N rows and CHUNKS·CHUNK of their columns at a time, all of them loaded at once,
    16 bytes (32 codes) a thread and load. It is the loads in flight that draw the bandwidth: 3 TB/s times a
    memory latency of 0.6 µs are 14 KB that each of an H100's 132 multiprocessors must have asked for and not
    yet received, and several times that where they all begin and end together.
 -  The codes of one group are summed first, and the sum multiplied by the scale: one multiplication for CHUNK
    codes.
 -  Codes become float16 by `unpack_int4`'s exponent, whatever x's format: exact to 2048.

For GPUs whose `tl.dot` has no tensor cores (sm_75), and as the rung below `quant_dot.py` elsewhere.
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.quant_unpack import unpack_e4m3, unpack_int4, unpack_int8


@triton.jit
def quant_gemv_kernel(
    x,
    packed,
    scale,
    zero,
    out,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_sn,
    stride_sg,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRED: tl.constexpr,
    E4M3: tl.constexpr,
    QUICK: tl.constexpr,
):
    """Program (i, m): BLOCK_N outputs of row m. CHUNK, a power of two, divides GROUP (0: one scale a row).

    PAIRED   x is given as int32 [M, K/2], stride_xm in its elements: columns 2j and 2j + 1 side by side
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    line = tl.minimum(rows, N - 1).to(tl.int64)
    WIDTH: tl.constexpr = CHUNK * BITS // 8
    chunk = tl.arange(0, CHUNKS)
    columns = (K * BITS + 7) // 8
    place = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    center: tl.constexpr = 1 << (BITS - 1)
    acc = tl.zeros((BLOCK_N, CHUNKS), tl.float32)
    for k in range(0, K, CHUNKS * CHUNK):
        at = k * BITS // 8
        w = packed + line[:, None, None] * stride_wn + (place + at)[None, :, :]
        known = (place < columns - at)[None, :, :]
        codes = tl.load(w) if EVEN_K else tl.load(w, mask=known, other=0)
        if GROUP:
            group = (k + chunk * CHUNK) // GROUP
            within = (k + chunk * CHUNK)[None, :] < K
            own = line[:, None] * stride_sn + group[None, :] * stride_sg
            factor = tl.load(scale + own, mask=within, other=0.0).to(tl.float32)
        if zero is None:
            middle = tl.full((1, 1, 1), center, tl.float32)
        elif GROUP:
            middle = tl.load(zero + own, mask=within, other=0).to(tl.float32)[:, :, None]
        else:
            middle = tl.load(zero + line * stride_sn).to(tl.float32)[:, None, None]
        if BITS == 4:
            if PAIRED:
                pairs = tl.load(x + row * stride_xm + place + at, mask=place < columns - at, other=0)
                x_even = (pairs & 0xFFFF).to(tl.uint16).to(out.dtype.element_ty, bitcast=True)
                x_odd = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(out.dtype.element_ty, bitcast=True)
            else:
                even = x + row * stride_xm + k + 2 * place
                x_even = tl.load(even, mask=2 * place < K - k, other=0.0)
                x_odd = tl.load(even + 1, mask=2 * place + 1 < K - k, other=0.0)
            low, high = unpack_int4(codes, middle, tl.float16, QUICK)
            product = low.to(tl.float32) * x_even.to(tl.float32)[None, :, :]
            product += high.to(tl.float32) * x_odd.to(tl.float32)[None, :, :]
        else:
            x_tile = tl.load(x + row * stride_xm + k + place, mask=place < K - k, other=0.0).to(tl.float32)
            weights = (
                unpack_e4m3(codes, tl.float16, QUICK)
                if E4M3
                else unpack_int8(codes, middle, tl.float16, QUICK)
            )
            product = weights.to(tl.float32) * x_tile[None, :, :]
        total = tl.sum(product, axis=2)
        acc += total * factor if GROUP else total
    result = tl.sum(acc, axis=1)
    if not GROUP:
        result *= tl.load(scale + line * stride_sn).to(tl.float32)
    tl.store(out + row * N + rows, result.to(out.dtype.element_ty), mask=rows < N)
