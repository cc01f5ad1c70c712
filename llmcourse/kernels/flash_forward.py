"""FlashAttention, forward: attention without its matrix of scores (Dao et al. 2022, arXiv:2205.14135).

The S × T scores are never in memory. A program keeps BLOCK_M queries and, for each, three things: the largest
score so far m, the total of 2^(score − m), and the sum acc of 2^(score − m)·v. It walks along the keys. A
new block may raise m; then what was summed under the old m is too large by 2^(m_new − m_old), and shrinks by
that factor before the new block is added:

    m_new = max(m, max s)      shrink = 2^(m − m_new)
    total = total·shrink + Σ 2^(s − m_new)
    acc   = acc·shrink + 2^(s − m_new)·V                 at the end: o = acc / total,  lse = m + log total

Base 2, because the GPU's exponential is one of base 2: with c = scale·log₂e, exp(scale·s) = 2^(c·s), and
c·s − c·m is one multiply-add.

Three loops in place of one: under a causal mask only the blocks at the diagonal (and at the far end of a
window) need the mask; those between are whole, and the blocks beyond are skipped. Where `flash_tiles.py` says
which program takes which block, `flash_plan.py` says how large the blocks are.

Order of work (Dao 2023, arXiv:2307.08691): a program for each block of *queries*, so that o is written once
and no program waits for another; in a program the keys one after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.kernels.flash_plan import Tiles
from llmcourse.kernels.flash_tiles import at_head, bounds, key_range, load_tile, place, seen, store_tile
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import ceil_div, launch, power_of_two

LOG2_E = 1.4426950408889634


@triton.jit
def attend(
    acc, m, total, q, k, v, batch, kv_head, low, high, first, keys, window, k_token, v_token, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """(acc, m, total) after the blocks of keys from low to high."""
    for n in range(low, high, BLOCK_N):
        k_tile = load_tile(k, batch, kv_head, n, keys, k_token, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTOR)
        s = tl.dot(q, k_tile.T, input_precision="ieee")
        if MASKED:
            position = first + tl.arange(0, BLOCK_M)[:, None]
            key = n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(seen(position, key, keys, window, CAUSAL, WINDOW), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = m_new * scale_log2
        if MASKED:  # a row that has seen no key yet: −∞ − (−∞) would be NaN
            base = tl.where(m_new == float("-inf"), 0.0, base)
        p = tl.exp2(s * scale_log2 - base[:, None])
        shrink = tl.exp2(m * scale_log2 - base)
        total = total * shrink + tl.sum(p, 1)
        v_tile = load_tile(v, batch, kv_head, n, keys, v_token, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTOR)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        m = m_new
    return acc, m, total


@triton.jit
def forward_kernel(
    q, k, v, o, lse, cu_q, cu_k, scale_log2, queries, keys, window, blocks, heads, batches,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    o_batch, o_head, o_token, lse_batch, lse_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head a program: o and log-sum-exp."""
    block, head, batch = place(tl.program_id(0), blocks, heads, batches, HEADS, CAUSAL)
    kv_head = head // GROUP
    q_start, queries = bounds(cu_q, batch, queries)
    k_start, keys = bounds(cu_k, batch, keys)
    row = block * BLOCK_M
    if row >= queries:
        return
    if not DESCRIPTOR:
        q = at_head(q, batch, head, q_start, q_batch, q_head, q_token)
        k = at_head(k, batch, kv_head, k_start, k_batch, k_head, k_token)
        v = at_head(v, batch, kv_head, k_start, v_batch, v_head, v_token)
    q_tile = load_tile(q, batch, head, row, queries, q_token, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
    first = keys - queries + row
    last = keys - queries + tl.minimum(row + BLOCK_M, queries) - 1
    low, full_low, full_high, high = key_range(first, last, keys, window, BLOCK_N, CAUSAL, WINDOW)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if WINDOW:
        acc, m, total = attend(
            acc, m, total, q_tile, k, v, batch, kv_head, low, full_low, first, keys, window, k_token, v_token,
            scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, DESCRIPTOR,
        )  # fmt: skip
    acc, m, total = attend(
        acc, m, total, q_tile, k, v, batch, kv_head, full_low, full_high, first, keys, window,
        k_token, v_token, scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_D, False, CAUSAL, WINDOW, DESCRIPTOR,
    )  # fmt: skip
    acc, m, total = attend(
        acc, m, total, q_tile, k, v, batch, kv_head, full_high, high, first, keys, window, k_token, v_token,
        scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_D, True, CAUSAL, False, DESCRIPTOR,
    )  # fmt: skip
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    log_sum = tl.where(nothing, float("-inf"), (m * scale_log2 + tl.log2(total)) * 0.6931471805599453)
    rows = row + tl.arange(0, BLOCK_M)
    lse = at_head(lse, batch, head, q_start, lse_batch, lse_head, 1)
    tl.store(lse + rows, log_sum, mask=rows < queries)
    o = at_head(o, batch, head, q_start, o_batch, o_head, o_token)
    store_tile(o, acc, row, queries, o_token, D, BLOCK_M, BLOCK_D)


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, head, token) strides of x [B, H, S, D], or of packed sequences x [ΣS, H, D] (batch: 0)."""
    return (x.stride(0), x.stride(1), x.stride(2)) if x.dim() == 4 else (0, x.stride(1), x.stride(0))


def described(x: Tensor, rows: int) -> Any:
    """A tensor descriptor of x [B, H, S, D] with blocks of `rows` rows of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns(x.shape[-1])])


def columns(head_dim: int) -> int:
    """Columns of a tile: a power of two, and at least the 16 that a tensor core multiplies at a time."""
    return max(16, power_of_two(head_dim))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int,
    tiles: Tiles,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """The launch, without checks: (o, log-sum-exp) of q [B, Hq, S, D], k and v [B, Hkv, T, D].

    With cu_q and cu_k [N + 1]: of packed q [ΣS, Hq, D], k and v [ΣT, Hkv, D], the longest of max_q queries;
    the log-sum-exp is [Hq, ΣS] then.
    """
    o = torch.empty_like(q)
    if cu_q is None:
        (batches, heads, queries, head_dim), keys = q.shape, k.shape[2]
        lse = torch.empty(batches, heads, queries, dtype=torch.float32, device=q.device)
        lse_strides = (lse.stride(0), lse.stride(1))
    else:
        (total, heads, head_dim), keys = q.shape, 0  # each sequence has its own lengths
        batches, queries = len(cu_q) - 1, max_q
        lse = torch.empty(heads, total, dtype=torch.float32, device=q.device)
        lse_strides = (0, lse.stride(0))
    blocks = ceil_div(queries, tiles.block_m)
    descriptor = tiles.rung == "descriptor"
    rows = (tiles.block_m, tiles.block_n, tiles.block_n)
    sources = [described(x, n) if descriptor else x for x, n in zip((q, k, v), rows, strict=True)]
    launch(
        forward_kernel, blocks * heads * batches,
        *sources, o, lse, cu_q, cu_k, scale * LOG2_E, queries, keys, window, blocks, heads, batches,
        *strides(q), *strides(k), *strides(v), *strides(o), *lse_strides,
        GROUP=heads // k.shape[-2 if cu_q is not None else 1], D=head_dim,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=columns(head_dim),
        CAUSAL=causal, WINDOW=window > 0, HEADS=tiles.heads, DESCRIPTOR=descriptor,
        num_warps=tiles.warps, num_stages=tiles.stages, interpret=interpret,
    )  # fmt: skip
    return o, lse
