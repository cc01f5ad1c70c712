"""Attention as it is defined, by torch: every score in memory. What the kernels are compared with.

    o[i] = Σⱼ p[i, j]·v[j],   p[i, :] = softmax over the visible j of scale·(q[i]·k[j])

Keys are at positions 0 … T − 1. The S queries are the *last* S positions: query i is at T − S + i, as when a
cache holds the first T − S tokens and S new ones arrive. Which keys a query at position p sees:

    causal                 j ≤ p
    causal and window W    p − W < j ≤ p     the last W keys, its own among them
    neither                all

With S > T the first S − T queries are before the first key and see none if causal. The sum over nothing is
zero: their output is 0 and their log-sum-exp −∞, which is what merging partial results needs.

Grouped queries (GQA): query heads h·G … h·G + G − 1 share key/value head h.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def visible(
    queries: int, keys: int, *, causal: bool, window: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """[S, T], true where a query sees a key."""
    p = torch.arange(queries, device=device)[:, None] + keys - queries
    j = torch.arange(keys, device=device)[None, :]
    seen = j <= p if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen & (j > p - window) if window else seen


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, window: int = 0
) -> tuple[Tensor, Tensor]:
    """(o [B, Hq, S, D] in q's format, log-sum-exp [B, Hq, S] in float32), computed in float32.

    q [B, Hq, S, D], k and v [B, Hkv, T, D]. float64 tensors are computed in float64: the judge of all others.
    Stores  scores and weights, 2·B·Hq·S·T numbers.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    kv_heads = k.shape[1]
    grouped = q.to(exact).reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    keys, values = k.to(exact).unsqueeze(2), v.to(exact).unsqueeze(2)
    scores = grouped @ keys.transpose(-1, -2) * scale
    if causal:
        seen = visible(queries, k.shape[2], causal=True, window=window, device=q.device)
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    # A row without a visible key: −∞ − (−∞) would be NaN, −∞ − 0 gives the weight 0.
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    return (weights @ values).reshape(q.shape).to(q.dtype), lse.reshape(batch, heads, queries)


def reference_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """The same for packed sequences, one after another: q [ΣS, Hq, D], k and v [ΣT, Hkv, D].

    Returns (o [ΣS, Hq, D], log-sum-exp [Hq, ΣS]).
    """
    outs, lses = [q[:0]], [q[:0, :, 0].T.to(torch.float64 if q.dtype == torch.float64 else torch.float32)]
    sequences = zip(*(itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    for (q0, q1), (k0, k1) in sequences:
        one = (q[q0:q1], k[k0:k1], v[k0:k1])
        o, lse = reference(
            *(x.transpose(0, 1).unsqueeze(0) for x in one), causal=causal, scale=scale, window=window
        )
        outs.append(o[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)
