"""What FlashAttention must compute and move: FLOPs by visible pairs, bytes by the tiles that are loaded.

A FLOP count that is the same for every kernel makes times comparable: 4·D FLOPs for each pair of a query and
a key that it sees (a product with k and one with v, a multiplication and an addition each), 10·D backward
(five products). What a kernel computes beyond that (the hidden half of a tile at the diagonal, weights
computed twice) is its own loss.

The bytes are those that the programs ask for. Most of them come from the L2 cache on a GPU, as the keys of a
head are asked for by every block of queries; what memory must give at least is `minimum_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmcourse.kernels.flash_plan import Plan, Tiles
from llmcourse.kernels.launch import ceil_div

STATISTIC = 4
"""Bytes of a query's log-sum-exp or delta."""


@dataclass(frozen=True)
class Sizes:
    """An attention's sizes: B batch, Hq query heads, Hkv key/value heads, S queries, T keys, D head dim."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    itemsize: int = 2
    causal: bool = False
    window: int = 0

    @classmethod
    def of(cls, q: Tensor, k: Tensor, *, causal: bool = False, window: int | None = None) -> Sizes:
        """Of q [B, Hq, S, D] and k [B, Hkv, T, D]."""
        (batch, heads, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
        size = q.element_size()
        return cls(batch, heads, kv_heads, queries, keys, head_dim, size, causal, window or 0)


def visible_pairs(queries: int, keys: int, *, causal: bool = False, window: int = 0) -> int:
    """Pairs of a query and a key that it sees, the queries being the last S of T positions."""
    if not causal:
        return queries * keys

    def seen_by_all_until(last: int) -> int:
        return max(last, 0) * (max(last, 0) + 1) // 2

    pairs = seen_by_all_until(keys) - seen_by_all_until(keys - queries)
    if window:  # less what lies before each query's window
        pairs -= seen_by_all_until(keys - window) - seen_by_all_until(keys - queries - window)
    return pairs


def flops(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    *,
    causal: bool = False,
    window: int = 0,
    backward: bool = False,
) -> int:
    """FLOPs of the matrix products: 4·D a visible pair and query head, backward 10·D.

    Causal with S = T that is half of 4·B·H·S·T·D, and exactly (S + 1)/(2·S) of it.
    """
    pairs = visible_pairs(queries, keys, causal=causal, window=window)
    return (10 if backward else 4) * batch * heads * pairs * head_dim


def minimum_bytes(sizes: Sizes, *, backward: bool = False) -> int:
    """Bytes of every tensor once: q, k, v, o and the log-sum-exp; backward, these, dO and the gradients."""
    s = sizes
    of_q = s.batch * s.heads * s.queries * s.head_dim * s.itemsize
    of_k = s.batch * s.kv_heads * s.keys * s.head_dim * s.itemsize
    statistic = s.batch * s.heads * s.queries * STATISTIC
    return (4 * of_q + 4 * of_k if backward else 2 * of_q + 2 * of_k) + statistic


def bytes_moved(sizes: Sizes, plan: Plan, *, backward: bool = False) -> tuple[int, int]:
    """(loaded, stored) bytes that all programs of the launches ask for, exactly. For unpacked sequences."""
    if not backward:
        return forward_bytes(sizes, plan.forward)
    parts = (rows_bytes(sizes), dkdv_bytes(sizes, plan.dkdv), dq_bytes(sizes, plan.dq))
    return sum(loaded for loaded, _ in parts), sum(stored for _, stored in parts)


def forward_bytes(sizes: Sizes, tiles: Tiles) -> tuple[int, int]:
    """A block of queries is loaded once, and for it the keys and values that any of its queries sees."""
    s = sizes
    row = s.head_dim * s.itemsize
    keys = sum(keys_of_block(s, tiles, i) for i in range(ceil_div(s.queries, tiles.block_m)))
    programs_of_a_head = s.batch * s.heads
    return (
        programs_of_a_head * (s.queries + 2 * keys) * row,
        programs_of_a_head * s.queries * (row + STATISTIC),
    )


def rows_bytes(sizes: Sizes) -> tuple[int, int]:
    """o, dO and the log-sum-exp are read once; two numbers a query are written. (Without a dlse.)"""
    rows = sizes.batch * sizes.heads * sizes.queries
    return rows * (2 * sizes.head_dim * sizes.itemsize + STATISTIC), rows * 2 * STATISTIC


def dkdv_bytes(sizes: Sizes, tiles: Tiles) -> tuple[int, int]:
    """A block of keys and values is loaded once, and for it q, dO and two numbers of queries that see it."""
    s = sizes
    row = s.head_dim * s.itemsize
    group = s.heads // s.kv_heads if s.kv_heads else 0
    streamed = 0
    for block in range(ceil_div(s.keys, tiles.block_n)):
        low, high = queries_of_block(s, tiles, block)
        streamed += 2 * (min(s.queries, high) - low) * row + 2 * (high - low) * STATISTIC
    stays = 2 * s.keys * row
    return s.batch * s.kv_heads * (stays + group * streamed), s.batch * s.kv_heads * stays


def dq_bytes(sizes: Sizes, tiles: Tiles) -> tuple[int, int]:
    """A block of q, dO and two numbers a query is loaded once, and for it keys and values as forward."""
    s = sizes
    row = s.head_dim * s.itemsize
    blocks = ceil_div(s.queries, tiles.block_m)
    keys = sum(keys_of_block(s, tiles, i) for i in range(blocks))
    statistics = 2 * blocks * tiles.block_m * STATISTIC
    heads = s.batch * s.heads
    return heads * (2 * (s.queries + keys) * row + statistics), heads * s.queries * row


def keys_of_block(sizes: Sizes, tiles: Tiles, block: int) -> int:
    """Keys that a block of queries loads: whole blocks of them, up to the last key."""
    s, n = sizes, tiles.block_n
    first = s.keys - s.queries + block * tiles.block_m
    last = min(first + tiles.block_m, s.keys) - 1
    high = max(last + 1, 0) if s.causal else s.keys
    low = max(first - s.window + 1, 0) // n * n if s.window else 0
    return min(ceil_div(high, n) * n, s.keys) - low


def queries_of_block(sizes: Sizes, tiles: Tiles, block: int) -> tuple[int, int]:
    """(low, high) of the queries that a block of keys streams: whole blocks, high maybe beyond the last."""
    s, m = sizes, tiles.block_m
    offset = s.keys - s.queries
    first = block * tiles.block_n
    last = min(first + tiles.block_n, s.keys) - 1
    low = max(first - offset, 0) // m * m if s.causal else 0
    high = min(max(last + s.window - offset, 0), s.queries) if s.window else s.queries
    return low, max(low, ceil_div(high, m) * m)


def workspace_bytes(sizes: Sizes, plan: Plan) -> int:
    """Memory that backward takes beside its results: delta and the log-sum-exp in base 2."""
    rows = max(plan.dkdv.block_m, plan.dq.block_m)
    return 2 * sizes.batch * sizes.heads * ceil_div(sizes.queries, rows) * rows * STATISTIC
