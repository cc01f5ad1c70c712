"""FlashAttention, backward: the weights are computed again, not kept (Dao et al. 2022, arXiv:2205.14135).

Forward kept o and, for each query, one number: the log-sum-exp. From it a tile of weights is one matrix
product and one exponential away: p = exp(scale·q·kᵀ − lse). That costs FLOPs and saves the S × T matrix. With
dO from above, for each tile:

    dV += pᵀ·dO        dP = dO·vᵀ        dS = p·(dP − delta)        dQ += scale·dS·k        dK += scale·dSᵀ·q

where delta[i] = Σⱼ p[i, j]·dP[i, j], the softmax's own backward, is Σ dO[i]·o[i]: a sum along a row of D
numbers in place of T. (A gradient of the log-sum-exp itself, where it is used, is subtracted from delta.)

Three launches, none of which needs atomic additions, so that the result is the same every time:

    rows_kernel    a program a block of queries: delta, and lse in base 2
    dkdv_kernel    a program a block of keys: dK and dV stay in registers, the queries of all heads of its
                   group stream by, which is GQA's sum over heads
    dq_kernel      a program a block of queries: dQ stays, keys stream by

Tiles of p and dP are computed in both, 7 matrix products in place of 5. The alternative, one kernel that adds
to dQ in memory, pays in atomic float32 additions, 4·S·D·T/BLOCK_N bytes a head, and in a result that differs
from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.kernels.flash_forward import LOG2_E, columns, described, strides
from llmcourse.kernels.flash_plan import Plan, unusable
from llmcourse.kernels.flash_tiles import (
    at_head,
    bounds,
    key_range,
    load_tile,
    place,
    query_range,
    seen,
    store_tile,
)
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import ceil_div, launch

ROWS = 32


@triton.jit
def rows_kernel(
    o, do, lse, dlse, lse2, delta, cu_q, queries, blocks, heads,
    o_batch, o_head, o_token, do_batch, do_head, do_token, lse_batch, lse_head,
    dlse_batch, dlse_head, dlse_token, row_batch, row_head,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M queries of one head a program: delta = Σ dO·o − dlse, and lse in base 2."""
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    batch = tl.program_id(0) // blocks // heads
    start, queries = bounds(cu_q, batch, queries)
    row = block * BLOCK_M
    if row >= queries:
        return
    o = at_head(o, batch, head, start, o_batch, o_head, o_token)
    do = at_head(do, batch, head, start, do_batch, do_head, do_token)
    o_tile = load_tile(o, batch, head, row, queries, o_token, D, BLOCK_M, BLOCK_D, True, False)
    do_tile = load_tile(do, batch, head, row, queries, do_token, D, BLOCK_M, BLOCK_D, True, False)
    sums = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    if dlse is not None:
        dlse = at_head(dlse, batch, head, start, dlse_batch, dlse_head, dlse_token)
        sums -= tl.load(dlse + rows * dlse_token, mask=rows < queries, other=0.0)
    lse = at_head(lse, batch, head, start, lse_batch, lse_head, 1)
    log_sum = tl.load(lse + rows, mask=rows < queries, other=0.0)
    # Of a query that sees nothing: 2^(s − ∞) = 0, where −∞ would give ∞ and then NaN.
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)
    tl.store(at_head(lse2, batch, head, start, row_batch, row_head, 1) + rows, log_sum, mask=rows < queries)
    tl.store(at_head(delta, batch, head, start, row_batch, row_head, 1) + rows, sums, mask=rows < queries)


@triton.jit
def sum_over_queries(
    dk, dv, k, v, q, do, lse2, delta, batch, first_head, low, high, n, queries, keys, offset, window,
    q_head, q_token, do_head, do_token, row_head, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """(dk, dv) after the queries from low to high of GROUP heads. Tiles are transposed, [BLOCK_N, BLOCK_M].

    One loop over the blocks of all heads: a loop of heads around it would empty the pipeline of loads at the
    end of each, and keep more alive between.
    """
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
    for step in range(0, blocks * GROUP):
        if GROUP == 1:
            head = first_head
            i = low + step * BLOCK_M
        else:
            head = first_head + step // blocks
            i = low + step % blocks * BLOCK_M
        wide_head = tl.cast(head, tl.int64)
        q_at = q if DESCRIPTOR else q + wide_head * q_head
        do_at = do if DESCRIPTOR else do + wide_head * do_head
        rows = wide_head * row_head + i + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q_at, batch, head, i, queries, q_token, D, BLOCK_M, BLOCK_D, MASKED, DESCRIPTOR)
        s = tl.dot(k, q_tile.T, input_precision="ieee")
        p = tl.exp2(s * scale_log2 - tl.load(lse2 + rows)[None, :])
        if MASKED and (CAUSAL or WINDOW):
            position = offset + i + tl.arange(0, BLOCK_M)[None, :]
            key = n + tl.arange(0, BLOCK_N)[:, None]
            p = tl.where(seen(position, key, keys, window, CAUSAL, WINDOW), p, 0.0)
        do_tile = load_tile(do_at, batch, head, i, queries, do_token, D, BLOCK_M, BLOCK_D, MASKED, DESCRIPTOR)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dp = tl.dot(v, do_tile.T, input_precision="ieee")
        ds = p * (dp - tl.load(delta + rows)[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    q, k, v, do, lse2, delta, dk, dv, cu_q, cu_k, scale, scale_log2, queries, keys, window,
    blocks, heads, batches,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    do_batch, do_head, do_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    row_batch, row_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key/value head a program. The first keys have the most queries."""
    block, kv_head, batch = place(tl.program_id(0), blocks, heads, batches, HEADS, False)
    q_start, queries = bounds(cu_q, batch, queries)
    k_start, keys = bounds(cu_k, batch, keys)
    n = block * BLOCK_N
    if n >= keys:
        return
    if not DESCRIPTOR:
        k = at_head(k, batch, kv_head, k_start, k_batch, k_head, k_token)
        v = at_head(v, batch, kv_head, k_start, v_batch, v_head, v_token)
    k_tile = load_tile(k, batch, kv_head, n, keys, k_token, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
    v_tile = load_tile(v, batch, kv_head, n, keys, v_token, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
    offset = keys - queries
    last = tl.minimum(n + BLOCK_N, keys) - 1
    low, full_low, full_high, high = query_range(n, last, queries, offset, window, BLOCK_M, CAUSAL, WINDOW)
    if DESCRIPTOR and not WINDOW:
        full_high = high  # a descriptor fills what is beyond the last query with zeros, which add nothing
    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    head = kv_head * GROUP
    if not DESCRIPTOR:
        q = at_head(q, batch, 0, q_start, q_batch, q_head, q_token)
        do = at_head(do, batch, 0, q_start, do_batch, do_head, do_token)
    lse2 = at_head(lse2, batch, 0, q_start, row_batch, row_head, 1)
    delta = at_head(delta, batch, 0, q_start, row_batch, row_head, 1)
    if CAUSAL:
        dk_sum, dv_sum = sum_over_queries(
            dk_sum, dv_sum, k_tile, v_tile, q, do, lse2, delta, batch, head, low, full_low, n, queries,
            keys, offset, window, q_head, q_token, do_head, do_token, row_head, scale_log2,
            GROUP, D, BLOCK_M, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, DESCRIPTOR,
        )  # fmt: skip
    dk_sum, dv_sum = sum_over_queries(
        dk_sum, dv_sum, k_tile, v_tile, q, do, lse2, delta, batch, head, full_low, full_high, n,
        queries, keys, offset, window, q_head, q_token, do_head, do_token, row_head, scale_log2,
        GROUP, D, BLOCK_M, BLOCK_N, BLOCK_D, False, CAUSAL, WINDOW, DESCRIPTOR,
    )  # fmt: skip
    if WINDOW or not DESCRIPTOR:
        dk_sum, dv_sum = sum_over_queries(
            dk_sum, dv_sum, k_tile, v_tile, q, do, lse2, delta, batch, head, full_high, high, n, queries,
            keys, offset, window, q_head, q_token, do_head, do_token, row_head, scale_log2,
            GROUP, D, BLOCK_M, BLOCK_N, BLOCK_D, True, False, WINDOW, DESCRIPTOR,
        )  # fmt: skip
    dk = at_head(dk, batch, kv_head, k_start, dk_batch, dk_head, dk_token)
    dv = at_head(dv, batch, kv_head, k_start, dv_batch, dv_head, dv_token)
    store_tile(dk, dk_sum * scale, n, keys, dk_token, D, BLOCK_N, BLOCK_D)
    store_tile(dv, dv_sum, n, keys, dv_token, D, BLOCK_N, BLOCK_D)


@triton.jit
def sum_over_keys(
    dq, q, do, k, v, log_sum, row_delta, batch, kv_head, low, high, first, keys, window,
    k_token, v_token, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """dq after the keys from low to high."""
    for n in range(low, high, BLOCK_N):
        k_tile = load_tile(k, batch, kv_head, n, keys, k_token, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTOR)
        v_tile = load_tile(v, batch, kv_head, n, keys, v_token, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTOR)
        s = tl.dot(q, k_tile.T, input_precision="ieee")
        p = tl.exp2(s * scale_log2 - log_sum[:, None])
        if MASKED:
            position = first + tl.arange(0, BLOCK_M)[:, None]
            key = n + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(seen(position, key, keys, window, CAUSAL, WINDOW), p, 0.0)
        dp = tl.dot(do, v_tile.T, input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(
    q, k, v, do, lse2, delta, dq, cu_q, cu_k, scale, scale_log2, queries, keys, window,
    blocks, heads, batches,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    do_batch, do_head, do_token, dq_batch, dq_head, dq_token, row_batch, row_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head a program."""
    block, head, batch = place(tl.program_id(0), blocks, heads, batches, HEADS, CAUSAL)
    kv_head = head // GROUP
    q_start, queries = bounds(cu_q, batch, queries)
    k_start, keys = bounds(cu_k, batch, keys)
    row = block * BLOCK_M
    if row >= queries:
        return
    if not DESCRIPTOR:
        q = at_head(q, batch, head, q_start, q_batch, q_head, q_token)
        do = at_head(do, batch, head, q_start, do_batch, do_head, do_token)
        k = at_head(k, batch, kv_head, k_start, k_batch, k_head, k_token)
        v = at_head(v, batch, kv_head, k_start, v_batch, v_head, v_token)
    q_tile = load_tile(q, batch, head, row, queries, q_token, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
    do_tile = load_tile(do, batch, head, row, queries, do_token, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
    rows = row + tl.arange(0, BLOCK_M)
    log_sum = tl.load(at_head(lse2, batch, head, q_start, row_batch, row_head, 1) + rows)
    row_delta = tl.load(at_head(delta, batch, head, q_start, row_batch, row_head, 1) + rows)
    first = keys - queries + row
    last = keys - queries + tl.minimum(row + BLOCK_M, queries) - 1
    low, full_low, full_high, high = key_range(first, last, keys, window, BLOCK_N, CAUSAL, WINDOW)
    dq_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW:
        dq_sum = sum_over_keys(
            dq_sum, q_tile, do_tile, k, v, log_sum, row_delta, batch, kv_head, low, full_low, first, keys,
            window, k_token, v_token, scale_log2,
            D, BLOCK_M, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, DESCRIPTOR,
        )  # fmt: skip
    dq_sum = sum_over_keys(
        dq_sum, q_tile, do_tile, k, v, log_sum, row_delta, batch, kv_head, full_low, full_high, first, keys,
        window, k_token, v_token, scale_log2,
        D, BLOCK_M, BLOCK_N, BLOCK_D, False, CAUSAL, WINDOW, DESCRIPTOR,
    )  # fmt: skip
    dq_sum = sum_over_keys(
        dq_sum, q_tile, do_tile, k, v, log_sum, row_delta, batch, kv_head, full_high, high, first, keys,
        window, k_token, v_token, scale_log2,
        D, BLOCK_M, BLOCK_N, BLOCK_D, True, CAUSAL, False, DESCRIPTOR,
    )  # fmt: skip
    dq = at_head(dq, batch, head, q_start, dq_batch, dq_head, dq_token)
    store_tile(dq, dq_sum * scale, row, queries, dq_token, D, BLOCK_M, BLOCK_D)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *,
    causal: bool,
    scale: float,
    window: int,
    plan: Plan,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    interpret: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three launches, without checks: (dq, dk, dv), shaped and laid out as q, k and v.

    o, lse   what `flash_forward.forward` returned; do, dlse their gradients, of any strides
    """
    # sum().backward() sends one number with all strides 0.
    if do.stride(-1) != 1 or ("descriptor" in (plan.dkdv.rung, plan.dq.rung) and unusable(do)):
        do = do.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if cu_q is None:
        (batches, heads, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
        lse_strides = (lse.stride(0), lse.stride(1))
        dlse_strides = (0, 0, 0) if dlse is None else dlse.stride()
    else:
        (_, heads, head_dim), kv_heads = q.shape, k.shape[1]
        batches, queries, keys = len(cu_q) - 1, max_q, max_k
        lse_strides = (0, lse.stride(0))
        dlse_strides = (0, 0, 0) if dlse is None else (0, *dlse.stride())
    # A number for each query and, behind the last one of each sequence, zeros up to the end of its last tile:
    # there q and dO are zero, and zero times what is read here must be zero.
    tile = max(plan.dkdv.block_m, plan.dq.block_m)
    rows = ceil_div(queries, tile) * tile if cu_q is None else lse.shape[-1] + batches * tile
    lse2, delta = torch.zeros(2, *lse.shape[:-1], rows, dtype=torch.float32, device=q.device)
    row_strides = (lse2.stride(0), lse2.stride(1)) if cu_q is None else (tile, lse2.stride(0))
    blocks = ceil_div(queries, ROWS)
    launch(
        rows_kernel, blocks * heads * batches,
        o, do, lse, dlse, lse2, delta, cu_q, queries, blocks, heads,
        *strides(o), *strides(do), *lse_strides, *dlse_strides, *row_strides,
        D=head_dim, BLOCK_M=ROWS, BLOCK_D=columns(head_dim), num_warps=4, interpret=interpret,
    )  # fmt: skip
    common: dict[str, Any] = {"CAUSAL": causal, "WINDOW": window > 0, "GROUP": heads // kv_heads}
    common |= {"D": head_dim, "BLOCK_D": columns(head_dim), "interpret": interpret}

    tiles = plan.dkdv
    descriptor = tiles.rung == "descriptor"
    blocks_of = (tiles.block_m, tiles.block_n, tiles.block_n, tiles.block_m)
    sources = [described(x, n) if descriptor else x for x, n in zip((q, k, v, do), blocks_of, strict=True)]
    blocks = ceil_div(keys, tiles.block_n)
    launch(
        dkdv_kernel, blocks * kv_heads * batches,
        *sources, lse2, delta, dk, dv, cu_q, cu_k, scale, scale * LOG2_E, queries, keys, window,
        blocks, kv_heads, batches,
        *strides(q), *strides(k), *strides(v), *strides(do), *strides(dk), *strides(dv), *row_strides,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, HEADS=tiles.heads, DESCRIPTOR=descriptor,
        num_warps=tiles.warps, num_stages=tiles.stages, **common,
    )  # fmt: skip

    tiles = plan.dq
    descriptor = tiles.rung == "descriptor"
    blocks_of = (tiles.block_m, tiles.block_n, tiles.block_n, tiles.block_m)
    sources = [described(x, n) if descriptor else x for x, n in zip((q, k, v, do), blocks_of, strict=True)]
    blocks = ceil_div(queries, tiles.block_m)
    launch(
        dq_kernel, blocks * heads * batches,
        *sources, lse2, delta, dq, cu_q, cu_k, scale, scale * LOG2_E, queries, keys, window,
        blocks, heads, batches,
        *strides(q), *strides(k), *strides(v), *strides(do), *strides(dq), *row_strides,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, HEADS=tiles.heads, DESCRIPTOR=descriptor,
        num_warps=tiles.warps, num_stages=tiles.stages, **common,
    )  # fmt: skip
    return dq, dk, dv
