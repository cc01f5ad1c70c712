"""Exercise `absorbed_attention`: multi-head latent attention that never leaves the latent space."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

absorbed_attention = Exercise(
    "absorbed_attention",
    title="Multi-head latent attention, absorbed",
    arguments=("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv"),
    shapes=(
        "B sequences, H heads, S queries of the last S of T tokens, R numbers of the latent vector",
        "q_nope   tensor [B, H, S, Dn]: the part of the queries that knows no positions",
        "q_rope   tensor [B, H, S, Dr]: the part that RoPE has turned",
        "latent   tensor [B, T, R]: what is cached of each token, for all heads",
        "k_rope   tensor [B, T, Dr]: its rotary key, turned already, one for all heads",
        "w_uk     tensor [H, Dn, R]: head h's keys are latent @ w_uk[h].T, [T, Dn]",
        "w_uv     tensor [H, Dv, R]: head h's values are latent @ w_uv[h].T, [T, Dv]",
        "returns  tensor [B, H, S, Dv], causal: query i sees tokens 0 … T − S + i",
        "cost     keys and values of the heads are never made: no intermediate larger than the scores",
        "         [B, H, S, T] or the queries in latent space [B, H, S, R]",
    ),
    formula="y = Σ_j p_j · w_uv·latent_j,  p = softmax((q_nope · w_uk·latent + q_rope · k_rope) / √(Dn+Dr))",
    difficulty=4,
    importance=4,
    minutes=35,
    points=6,
    hints=(
        "q · (W c) is a product of three. In which other order can it be computed, and what is its size "
        "then? On the other side of the softmax: Σ_j p_j (W c_j) is a sum; what may be moved out of it?",
        "q · (w_uk c) = (w_ukᵀ q) · c: turn each query into R numbers once, and compare it with the cached "
        "latent vectors themselves. Σ p_j (w_uv c_j) = w_uv (Σ p_j c_j): average latent vectors, then go "
        "up. RoPE turns by the position between query and key, so its part cannot pass through w_uk and "
        "adds its own scores. All heads share one latent: make heads and queries rows of one product, "
        "since matmul broadcasts by copying.",
        "low = torch.einsum('bhsd,hdr->bhsr', q_nope, w_uk); s = low.flatten(1, 2) @ latent.mT + "
        "q_rope.flatten(1, 2) @ k_rope.mT; s = s.view(B, H, S, T) * (Dn + Dr) ** -0.5; mask, softmax; mean "
        "= (p.flatten(1, 2) @ latent).view(B, H, S, R); torch.einsum('bhsr,hdr->bhsd', mean, w_uv).",
    ),
)


def expanded(*given: Any) -> np.ndarray:
    """Keys and values of every head made from the latent vectors, then attention, in float64."""
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = (x.double().numpy() for x in given)
    (batch, heads, s, dim), n = q_nope.shape, latent.shape[1]
    y = np.zeros((batch, heads, s, w_uv.shape[1]))
    for b, h, i in np.ndindex(batch, heads, s):
        c = latent[b, : n - s + i + 1]
        keys, values = c @ w_uk[h].T, c @ w_uv[h].T
        scores = keys @ q_nope[b, h, i] + k_rope[b, : len(c)] @ q_rope[b, h, i]
        scores /= math.sqrt(dim + q_rope.shape[-1])
        p = np.exp(scores - scores.max())
        y[b, h, i] = p @ values / p.sum()
    return y


def _draw(t: Trial, batch: int, heads: int, s: int, n: int, dims: tuple[int, int, int, int]) -> list[Any]:
    """dims are Dn, Dr, Dv and R."""
    nope, rope, v, rank = dims
    return [
        tensor(t, batch, heads, s, nope),
        tensor(t, batch, heads, s, rope),
        tensor(t, batch, n, rank, scale=0.5),
        tensor(t, batch, n, rope),
        tensor(t, heads, nope, rank, scale=0.5),
        tensor(t, heads, v, rank, scale=0.5),
    ]


def _agree(t: Trial, *sizes: Any) -> None:
    given = _draw(t, *sizes)
    t.close(t.call(*given), expanded(*given), rtol=5e-5)


@absorbed_attention.check("it equals attention with keys and values made for every head")
def whole(t: Trial) -> None:
    n = t.odd(5, 9)
    _agree(t, 1, 2, n, n, (8, 4, 6, 12))
    _agree(t, 2, 3, n, n, (t.odd(5, 9), 2, t.odd(3, 5), 11))


@absorbed_attention.check("any sizes: a latent vector smaller than a head, heads of one kind of width")
def sizes(t: Trial) -> None:
    _agree(t, 2, 4, 3, 3, (16, 2, 12, 5))
    _agree(t, 2, 2, 4, 4, (6, 6, 6, 6))
    _agree(t, 1, 1, 3, 3, (4, 8, 1, 7))


@absorbed_attention.check("the queries are those of the last tokens")
def continued(t: Trial) -> None:
    _agree(t, 2, 3, 1, t.odd(5, 9), (8, 4, 6, 12))
    _agree(t, 2, 3, 3, t.odd(5, 9), (8, 4, 6, 12))
    _agree(t, 1, 2, 1, 1, (8, 4, 6, 12))


@absorbed_attention.check("no keys or values of the heads are made, and no latent vector is copied")
def cost(t: Trial) -> None:
    for batch, heads, s, n in ((1, 4, 1, 70), (3, 4, 2, 60)):
        given = _draw(t, batch, heads, s, n, (16, 8, 16, 24))
        call = t.perform(*given, watch=("largest_intermediate",))
        t.close(call.value, expanded(*given), rtol=5e-5)
        t.at_most(
            call.costs["largest_intermediate"],
            4 * batch * heads * s * max(n, 24),
            f"bytes of the largest intermediate, with latent vectors of {given[2].nbytes:,} bytes "
            f"and keys of {4 * batch * heads * n * 16:,}",
            "the latent vectors as they are, on both sides: w_uk goes to the queries, w_uv to the averages.",
        )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def seen_by(s: int, n: int) -> Any:
    return torch.ones(s, n, dtype=torch.bool).tril(n - s)


def absorbed(
    q_nope: Any,
    q_rope: Any,
    latent: Any,
    k_rope: Any,
    w_uk: Any,
    w_uv: Any,
    *,
    scale: float | None = None,
    seen: Any = None,
    rope: float = 1.0,
    apart: bool = False,
    late: bool = False,
) -> Any:
    """The right solution. `rope` weighs the rotary scores, `apart` gives them a softmax of their own,
    `late` adds them unscaled."""
    (batch, heads, s, nope), n = q_nope.shape, latent.shape[1]
    low = torch.einsum("bhsd,hdr->bhsr", q_nope, w_uk).flatten(1, 2)
    scale = (nope + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    hidden = ~(seen_by(s, n) if seen is None else seen)
    first = (low @ latent.mT).view(batch, heads, s, n) * scale
    second = (q_rope.flatten(1, 2) @ k_rope.mT).view(batch, heads, s, n) * (rope if late else rope * scale)
    if apart:
        p = sum(x.masked_fill(hidden, -math.inf).softmax(-1) for x in (first, second)) / 2
    else:
        p = (first + second).masked_fill(hidden, -math.inf).softmax(-1)
    mean = (p.flatten(1, 2) @ latent).view(batch, heads, s, -1)
    return torch.einsum("bhsr,hdr->bhsd", mean, w_uv)


@absorbed_attention.mistake(
    says="the scale is taken from Dn alone; a query has Dn + Dr numbers",
    tries="(Dn + Dr) ** -0.5.",
    caught_by="whole",
)
def scale_of_nope(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, scale=q_nope.shape[-1] ** -0.5)


@absorbed_attention.mistake(
    says="the scale is taken from the latent vector's size, because that is what is multiplied now",
    tries="(Dn + Dr) ** -0.5: absorbing changes how scores are computed, not what they are.",
    caught_by="whole",
)
def scale_of_rank(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    size = latent.shape[-1] + q_rope.shape[-1]
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, scale=size**-0.5)


@absorbed_attention.mistake(
    says="the rotary part is left out, and the scores know no positions",
    tries="+ q_rope · k_rope.",
    caught_by="whole",
)
def no_rope(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, rope=0.0)


@absorbed_attention.mistake(
    says="the rotary scores are added after the scaling, unscaled",
    tries="(… + …) * scale.",
    caught_by="whole",
)
def rope_unscaled(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, late=True)


@absorbed_attention.mistake(
    says="the two kinds of scores each have a softmax; they are two parts of one score",
    tries="their sum, then one softmax.",
    caught_by="whole",
)
def two_softmaxes(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, apart=True)


@absorbed_attention.mistake(
    says="head 0's w_uk and w_uv serve all heads",
    tries="'bhsd,hdr->bhsr': each head has matrices of its own.",
    caught_by="whole",
)
def one_head_for_all(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk[:1].expand_as(w_uk), w_uv[:1].expand_as(w_uv))


@absorbed_attention.mistake(
    says="the averages of the latent vectors are taken up by w_uk, the keys' matrix",
    tries="w_uv behind the softmax.",
    caught_by="whole",
)
def keys_as_values(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uk)


@absorbed_attention.mistake(
    says="the averages stay in latent space: w_uv is left out",
    tries="torch.einsum('bhsr,hdr->bhsd', mean, w_uv).",
    caught_by="whole",
)
def not_taken_up(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    heads, rank = w_uv.shape[0], w_uv.shape[2]
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, torch.eye(rank).expand(heads, rank, rank))


@absorbed_attention.mistake(
    says="nothing is masked: queries see tokens that come after them",
    tries="scores.masked_fill(~seen, -inf) before the softmax.",
    caught_by="whole",
)
def not_causal(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    everything = torch.ones(1, 1, dtype=torch.bool)
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, seen=everything)


@absorbed_attention.mistake(
    says="the mask is aligned at the first token: with a cache, query 0 is not token 0",
    tries=".tril(T - S): the last query sees every token.",
    caught_by="continued",
)
def aligned_at_first(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    seen = torch.ones(q_nope.shape[2], latent.shape[1], dtype=torch.bool).tril()
    return absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, seen=seen)


@absorbed_attention.mistake(
    says="keys and values of all heads are made from the latent vectors: right, and what MLA wants to avoid",
    tries="w_uk on the side of the queries, w_uv on the side of the averages.",
    caught_by="cost",
)
def expanded_heads(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    keys = torch.einsum("btr,hdr->bhtd", latent, w_uk)
    values = torch.einsum("btr,hdr->bhtd", latent, w_uv)
    scores = q_nope @ keys.mT + q_rope @ k_rope[:, None].mT
    scores = scores * (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    return scores.masked_fill(~seen_by(*scores.shape[-2:]), -math.inf).softmax(-1) @ values


@absorbed_attention.mistake(
    says="the keys are absorbed and the values are not: they are made for all heads",
    tries="p @ latent first, then w_uv on its result.",
    caught_by="cost",
)
def values_expanded(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    (batch, heads, s, _), n = q_nope.shape, latent.shape[1]
    low = torch.einsum("bhsd,hdr->bhsr", q_nope, w_uk).flatten(1, 2)
    scores = (low @ latent.mT + q_rope.flatten(1, 2) @ k_rope.mT).view(batch, heads, s, n)
    scores = scores * (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    p = scores.masked_fill(~seen_by(s, n), -math.inf).softmax(-1)
    return p @ torch.einsum("btr,hdr->bhtd", latent, w_uv)


@absorbed_attention.mistake(
    says="matmul broadcasts the latent vectors over the heads, which copies them once a head",
    tries="low.flatten(1, 2) @ latent.mT: heads and queries as rows of one product.",
    caught_by="cost",
)
def broadcast(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    scores = q_nope @ w_uk @ latent[:, None].mT + q_rope @ k_rope[:, None].mT
    scores = scores * (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    p = scores.masked_fill(~seen_by(*scores.shape[-2:]), -math.inf).softmax(-1)
    return p @ latent[:, None] @ w_uv.mT


@absorbed_attention.mistake(
    says="matmul broadcasts w_uk and w_uv over the batch, a copy for every sequence",
    tries="torch.einsum('bhsd,hdr->bhsr', q_nope, w_uk), and alike behind the softmax.",
    caught_by="cost",
)
def weights_copied(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    (batch, heads, s, nope), n = q_nope.shape, latent.shape[1]
    low = (q_nope @ w_uk).flatten(1, 2)
    scores = (low @ latent.mT + q_rope.flatten(1, 2) @ k_rope.mT).view(batch, heads, s, n)
    scores = scores * (nope + q_rope.shape[-1]) ** -0.5
    p = scores.masked_fill(~seen_by(s, n), -math.inf).softmax(-1)
    return (p.flatten(1, 2) @ latent).view(batch, heads, s, -1) @ w_uv.mT


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@absorbed_attention.alternative("einsum throughout")
def by_einsum(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    low = torch.einsum("bhsd,hdr->bhsr", q_nope, w_uk)
    scores = torch.einsum("bhsr,btr->bhst", low, latent) + torch.einsum("bhsr,btr->bhst", q_rope, k_rope)
    scores = scores / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    p = scores.masked_fill(~seen_by(*scores.shape[-2:]), -math.inf).softmax(-1)
    return torch.einsum("bhsr,hdr->bhsd", torch.einsum("bhst,btr->bhsr", p, latent), w_uv)


@absorbed_attention.alternative("sequence by sequence, head by head")
def head_by_head(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any) -> Any:
    y = torch.empty(*q_nope.shape[:3], w_uv.shape[1], dtype=q_nope.dtype)
    for b in range(len(latent)):
        for h in range(len(w_uk)):
            scores = (q_nope[b, h] @ w_uk[h]) @ latent[b].T + q_rope[b, h] @ k_rope[b].T
            scores /= math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
            p = scores.masked_fill(~seen_by(*scores.shape), -math.inf).softmax(-1)
            y[b, h] = p @ latent[b] @ w_uv[h].T
    return y
