"""y = x Wᵀ for a 2:4 packed W [N, K] and x [M, K], reading what stays and where it was, no more.

Decoding waits for weights, so 9/16 of the bytes is up to 16/9 of the speed, if finding the inputs that
belong to the weights costs less than what is no longer read. A gather from memory for each weight would not.
But a weight that stays is one of four neighbours, so its input is one of four numbers, which are in
registers already:

    select   M ≤ 4      of four inputs, each weight picks its own: two selects on two bits; multiply, add
    expand   any M      two weights become four again, by selects, in registers; tensor cores multiply. All
                        rows of x share the unpacking, and the zeros are multiplied like the rest

`select` saves bytes and half of the arithmetic, `expand` saves bytes only. With large M reading the weights
takes little of the time, and both lose to a dense product, or to one on sparse tensor cores.
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton


@triton.jit
def _tile(
    values, indices, rows, inside, start, K, v_stride, i_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """First and second weights of a tile's groups [BLOCK_N, BLOCK_K / 16, 4]; its index words [.., 1]."""
    WORDS: tl.constexpr = BLOCK_K // 16
    kept, word = tl.arange(0, BLOCK_K // 2), tl.arange(0, WORDS)
    line = rows.to(tl.int64)[:, None]
    v_in = inside[:, None] & (start // 2 + kept < K // 2)[None, :]
    i_in = inside[:, None] & (start // 16 + word < K // 16)[None, :]
    v = tl.load(values + line * v_stride + (start // 2 + kept)[None, :], mask=v_in, other=0.0)
    words = tl.load(indices + line * i_stride + (start // 16 + word)[None, :], mask=i_in, other=0)
    first, second = tl.split(tl.reshape(v, (BLOCK_N, WORDS, 4, 2)))
    return first, second, words.to(tl.int32)[:, :, None]


@triton.jit
def select_kernel(
    x, values, indices, y, N, K, FILLED, x_stride, v_stride, i_stride, y_stride,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs a program, for M rows of x. FILLED is K filled up to whole words."""
    WORDS: tl.constexpr = BLOCK_K // 16
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, column = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, BLOCK_K)
    bit = (1 << (4 * tl.arange(0, 4)))[None, None, None, :]
    acc = tl.zeros((M, BLOCK_N, WORDS, 4), tl.float32)
    for start in tl.range(0, FILLED, BLOCK_K, num_stages=STAGES):
        first, second, words = _tile(
            values, indices, rows, rows < N, start, FILLED, v_stride, i_stride, BLOCK_N, BLOCK_K
        )
        at = x + m.to(tl.int64)[:, None] * x_stride + (start + column)[None, :]
        line = tl.load(at, mask=(start + column < K)[None, :], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(line, (M, 1, WORDS, 4, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        words = words[None, :, :, :]
        # The first place is 0, 1 or 2, the second 1, 2 or 3: two bits each, and two selects are enough.
        a = tl.where((words & bit) != 0, x1, tl.where((words & (2 * bit)) != 0, x2, x0))
        b = tl.where((words & (4 * bit)) == 0, x2, tl.where((words & (8 * bit)) != 0, x3, x1))
        acc += first.to(tl.float32)[None, :, :, :] * a
        acc += second.to(tl.float32)[None, :, :, :] * b
    out = tl.sum(tl.reshape(acc, (M, BLOCK_N, BLOCK_K // 4)), axis=2)
    y += m.to(tl.int64)[:, None] * y_stride + rows[None, :]
    tl.store(y, out.to(y.dtype.element_ty), mask=(rows < N)[None, :])


@triton.jit
def expand_kernel(
    x, values, indices, y, workspace, counters, M, N, K, FILLED, x_stride, v_stride, i_stride, y_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STAGES:
    tl.constexpr,
):  # fmt: skip
    """Program (i, s) adds part s of K to tile i [BLOCK_N, BLOCK_M] of yᵀ. counters are 0 before and after.

    workspace [SPLITS, M, N] of float32 holds the parts' sums; the last program of a tile to finish adds them
    up in order, as in `matmul_splitk`.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m, column = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    length = tl.cdiv(tl.cdiv(FILLED, BLOCK_K), SPLITS) * BLOCK_K
    begin = part * length
    end = tl.minimum(begin + length, FILLED)
    bit = (1 << (4 * tl.arange(0, 4)))[None, None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        first, second, words = _tile(
            values, indices, rows, rows < N, start, end, v_stride, i_stride, BLOCK_N, BLOCK_K
        )
        zero = tl.zeros_like(first)
        i0, i1, j0, j1 = (
            (words & bit) != 0,
            (words & (2 * bit)) != 0,
            (words & (4 * bit)) != 0,
            (words & (8 * bit)) != 0,
        )
        w0 = tl.where(i0 | i1, zero, first)
        w1 = tl.where(i0, first, tl.where(j1, zero, second))
        w2 = tl.where(i1, first, tl.where(j0, zero, second))
        w3 = tl.where(j0 & j1, second, zero)
        w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_N, BLOCK_K))
        at = x + m.to(tl.int64)[:, None] * x_stride + (start + column)[None, :]
        # `end` is a multiple of 16 and may lie behind K.
        there = (m < M)[:, None] & ((start + column < K) & (start + column < end))[None, :]
        line = tl.load(at, mask=there, other=0.0)
        acc = tl.dot(w, tl.trans(line), acc, input_precision="ieee")
    inside = (rows < N)[:, None] & (m < M)[None, :]
    place = m.to(tl.int64)[None, :] * y_stride + rows[:, None]
    if SPLITS == 1:
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
    else:
        sums = workspace + m.to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(sums + part * M * N, acc, mask=inside)
        # Written by all threads before one counts this program in; read by the last after all are counted.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for s in range(SPLITS):
                total += tl.load(sums + s * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)
            tl.store(counters + tile, 0)
