"""Attention in three kernels, as its formula reads: scores, softmax, values; with the matrix in memory.

    kernel           reads                              writes
    scores_kernel    q once for each block of keys,     S × T scores
                     k once for each block of queries
    softmax_kernel   S × T scores                       S × T weights, over them
    values_kernel    S × T weights, v once for each     o
                     block of queries

The matrix crosses the memory four times. At S = T = 4096 and D = 64 in 16 bits it has 32 MiB a head, q, k, v
and o together 2 MiB. The matrix products are the same as FlashAttention's, so that what differs is memory:
its size, and the bytes moved. The scores are kept in q's format, as eager PyTorch keeps them; a causal mask
is put on each of them, and none is skipped.

For reading and counting: no backward, no window, and k and v with as many heads as q share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import GraphError
from llmcourse.kernels.attention_reference import reference
from llmcourse.kernels.checks import choose
from llmcourse.kernels.flash_checks import check
from llmcourse.kernels.flash_forward import columns
from llmcourse.kernels.flash_tiles import at_head, load_tile, store_tile
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import ceil_div, launch, power_of_two

BLOCK = 64


@triton.jit
def scores_kernel(
    q, k, scores, scale, queries, keys, heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token, s_batch, s_head, s_token,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """scale·q·kᵀ, −∞ where a query does not see a key: a tile [BLOCK_M, BLOCK_N] of one head a program."""
    tiles_n = tl.cdiv(keys, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    n = tl.program_id(0) % tiles_n * BLOCK_N
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    q = at_head(q, batch, head, 0, q_batch, q_head, q_token)
    k = at_head(k, batch, head // GROUP, 0, k_batch, k_head, k_token)
    q_tile = load_tile(q, batch, head, row, queries, q_token, D, BLOCK_M, BLOCK_D, True, False)
    k_tile = load_tile(k, batch, head, n, keys, k_token, D, BLOCK_N, BLOCK_D, True, False)
    s = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    key = n + tl.arange(0, BLOCK_N)[None, :]
    if CAUSAL:
        s = tl.where(key <= rows + keys - queries, s, float("-inf"))
    scores = at_head(scores, batch, head, row, s_batch, s_head, s_token)
    at = scores + tl.arange(0, BLOCK_M)[:, None] * s_token + key
    tl.store(at, s.to(scores.dtype.element_ty), mask=(rows < queries) & (key < keys))


@triton.jit
def softmax_kernel(scores, keys, BLOCK_N: tl.constexpr):
    """One row a program, over itself. A row of −∞ becomes zeros."""
    j = tl.arange(0, BLOCK_N)
    at = scores + tl.program_id(0).to(tl.int64) * keys + j
    s = tl.load(at, mask=j < keys, other=float("-inf")).to(tl.float32)
    m = tl.max(s, 0)
    p = tl.exp(s - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(p, 0)
    p = p / tl.where(total == 0.0, 1.0, total)
    tl.store(at, p.to(scores.dtype.element_ty), mask=j < keys)


@triton.jit
def values_kernel(
    weights, v, o, queries, keys, heads,
    s_batch, s_head, s_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """weights·v: BLOCK_M queries of one head a program."""
    row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    weights = at_head(weights, batch, head, row, s_batch, s_head, s_token)
    v = at_head(v, batch, head // GROUP, 0, v_batch, v_head, v_token)
    o = at_head(o, batch, head, 0, o_batch, o_head, o_token)
    i = tl.arange(0, BLOCK_M)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(0, keys, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)[None, :]
        p = tl.load(weights + i * s_token + j, mask=(row + i < queries) & (j < keys), other=0.0)
        v_tile = load_tile(v, batch, head, n, keys, v_token, D, BLOCK_N, BLOCK_D, True, False)
        acc = tl.dot(p, v_tile, acc, input_precision="ieee")
    store_tile(o, acc, row, queries, o_token, D, BLOCK_M, BLOCK_D)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    interpret: bool = False,
) -> Tensor:
    """softmax(scale·q·kᵀ)·v in three launches, with the matrix of scores in memory.

    Shapes   q [B, Hq, S, D], k and v [B, Hkv, T, D], Hq a multiple of Hkv. Returns q's shape.
    Stores   B·Hq·S·T numbers of q's format.
    Moves    `naive_bytes`.
    Raises   as `flash_attention.attention`, and GraphError when a gradient is wanted of the kernels.
    """
    check(q, k, v, causal=causal, scale=scale, window=0)
    backend = choose("interpret" if interpret else "auto", q)
    if backend == "reference":
        return reference(q, k, v, causal=causal, scale=scale)[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise GraphError(
            "a gradient is wanted of the naive kernels.",
            "They are for reading and counting, and have no backward pass.",
            "torch.no_grad(), or flash_attention.attention.",
        )
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = torch.empty(batch, heads, queries, keys, dtype=q.dtype, device=q.device)
    o = torch.empty_like(q)
    rows = ceil_div(queries, BLOCK)
    tile: dict[str, Any] = {"GROUP": heads // k.shape[1], "D": head_dim, "BLOCK_D": columns(head_dim)}
    tile |= {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "num_warps": 4, "interpret": backend == "interpret"}
    launch(
        scores_kernel, (rows * ceil_div(keys, BLOCK), batch * heads),
        q, k, scores, scale, queries, keys, heads,
        *q.stride()[:3], *k.stride()[:3], *scores.stride()[:3], CAUSAL=causal, **tile,
    )  # fmt: skip
    launch(
        softmax_kernel, batch * heads * queries if keys else 0, scores, keys,
        BLOCK_N=power_of_two(keys), num_warps=min(16, max(4, keys // 1024)), interpret=tile["interpret"],
    )  # fmt: skip
    launch(
        values_kernel, (rows, batch * heads), scores, v, o, queries, keys, heads,
        *scores.stride()[:3], *v.stride()[:3], *o.stride()[:3], **tile,
    )  # fmt: skip
    return o


def naive_bytes(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, itemsize: int
) -> tuple[int, int]:
    """(loaded, stored) bytes of the three launches; the same with a causal mask as without."""
    matrix = queries * keys
    blocks_m, blocks_n = ceil_div(queries, BLOCK), ceil_div(keys, BLOCK)
    loaded = (queries * blocks_n + keys * blocks_m) * head_dim  # q and k, tile by tile
    loaded += matrix + matrix + blocks_m * keys * head_dim  # scores; weights and v
    stored = matrix + matrix + queries * head_dim
    return batch * heads * loaded * itemsize, batch * heads * stored * itemsize
