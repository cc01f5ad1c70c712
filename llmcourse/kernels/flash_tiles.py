"""What the FlashAttention kernels share: which tile a program takes, which keys it sees, how a tile comes.

**Which tile.** A program is a number. Programs that run at the same time should read the same keys and
values, so that these come from the L2 cache: programs of one head follow one another. But under a causal
mask the blocks of a head differ in work, and the last programs of a launch should be light ones, or a few
multiprocessors work while the others wait. So the blocks of a head are taken from the heaviest to the
lightest, and HEADS heads side by side: with 1 head the keys of one head are in use at a time; with all of
them the order is by weight over the whole launch.

**Packed sequences.** Sequences of unequal length lie one after another, and `cu_seqlens` holds where each
begins and where the last one ends. A program reads its own sequence's two numbers and from there on knows
nothing of the others: every row is masked by its own sequence's end.

**How a tile comes.** Through pointers, each thread computing addresses, with masks at the edges; or through a
tensor descriptor of [B, H, tokens, D], from which Hopper's copy engine (TMA) fetches the block
[1, 1, BLOCK, BLOCK_D] by itself, zeros beyond the edges. The numbers are the same.
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.matmul_tiled import grouped_tile


@triton.jit
def place(program, blocks, heads, batches, HEADS: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(block, head, batch) of a program: in bands of HEADS heads, block after block, each of all heads."""
    row, block = grouped_tile(program, heads * batches, blocks, HEADS)
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, row % heads, row // heads


@triton.jit
def bounds(cu_seqlens, batch, length):
    """(first row, rows) of a sequence: of a packed one by its numbers, else 0 and the length of all."""
    if cu_seqlens is None:
        return 0, length
    else:
        first = tl.load(cu_seqlens + batch)
        return first, tl.load(cu_seqlens + batch + 1) - first


@triton.jit
def load_tile(
    x, batch, head, row, rows, token_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D] of x from `row` on; zeros from `rows` on (if MASKED) and beyond D.

    x   a descriptor, or a pointer to the first row of this batch and head
    """
    if DESCRIPTOR:
        return x.load([batch, head, row, 0]).reshape([BLOCK, BLOCK_D])
    else:
        i = tl.arange(0, BLOCK)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        # 64 bits for the distance to the tile, 32 within it: a register less for each address.
        at = x + tl.cast(row, tl.int64) * token_stride + (i * token_stride + d)
        if MASKED and BLOCK_D != D:
            return tl.load(at, mask=(i < rows - row) & (d < D), other=0.0)
        elif MASKED:
            return tl.load(at, mask=i < rows - row, other=0.0)
        elif BLOCK_D != D:
            return tl.load(at, mask=d < D, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def store_tile(x, tile, row, rows, token_stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the part of a tile that lies within `rows` and D; x points to this batch and head."""
    i = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    at = x + tl.cast(row, tl.int64) * token_stride + (i * token_stride + d)
    tl.store(at, tile.to(x.dtype.element_ty), mask=(i < rows - row) & (d < D))


@triton.jit
def at_head(x, batch, head, row, batch_stride, head_stride, token_stride):
    """A pointer to a row of one head. Tensors can have more than 2³¹ elements: 64 bits."""
    return (
        x
        + tl.cast(batch, tl.int64) * batch_stride
        + tl.cast(head, tl.int64) * head_stride
        + tl.cast(row, tl.int64) * token_stride
    )


@triton.jit
def key_range(first, last, keys, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys the queries at positions first … last see: (low, full_low, full_high, high).

    Blocks of keys from low to high hold all that any of them sees. In those from full_low to full_high every
    query sees every key, so that no mask is needed. All but high are multiples of BLOCK_N.
    """
    low, full_low = 0, 0
    high = keys
    full_high = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.minimum(keys, tl.maximum(last + 1, 0))
        full_high = tl.minimum(keys, tl.maximum(first + 1, 0)) // BLOCK_N * BLOCK_N
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = (tl.maximum(last - window + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_low = tl.minimum(full_low, (high + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        full_high = tl.maximum(full_high, full_low)
    return low, full_low, full_high, high


@triton.jit
def query_range(
    first, last, queries, offset, window,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which queries see the keys first … last: (low, full_low, full_high, high), as in `key_range`.

    offset   position of query 0: keys − queries
    """
    low, full_low = 0, 0
    high = queries
    full_high = queries // BLOCK_M * BLOCK_M
    if CAUSAL:
        low = tl.maximum(first - offset, 0) // BLOCK_M * BLOCK_M
        full_low = (tl.maximum(last - offset, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if WINDOW:
        high = tl.minimum(queries, tl.maximum(last + window - offset, 0))
        full_high = tl.minimum(queries, tl.maximum(first + window - offset, 0)) // BLOCK_M * BLOCK_M
    if CAUSAL:
        full_low = tl.minimum(full_low, (high + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
        full_high = tl.maximum(full_high, full_low)
    return low, full_low, full_high, high


@triton.jit
def seen(position, key, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query at this position sees this key: [BLOCK_M, BLOCK_N], or transposed with its arguments.

    A causal query of this sequence is before its end, so that it needs no comparison with it.
    """
    yes = key <= position if CAUSAL else key < keys
    if WINDOW:
        yes = yes & (key > position - window)
    return yes
