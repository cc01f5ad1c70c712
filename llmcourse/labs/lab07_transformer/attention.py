"""Exercise `attention`: scores, mask, softmax, weighted sum; heads that share keys; rows that see nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

attention = Exercise(
    "attention",
    title="Scaled dot-product attention",
    arguments=("q", "k", "v", "mask"),
    shapes=(
        "q        tensor [B, Hq, S, D];  k, v  tensors [B, Hkv, T, D] of the same format",
        "         query head h reads key and value head h // (Hq / Hkv)",
        "mask     bool tensor [B, 1, S, T]: True where a query may look",
        "returns  (y, weights): y [B, Hq, S, D] of q's format, weights [B, Hq, S, T] in float32",
        "",
        "Scores, softmax and weights are float32, also where q, k, v are 16-bit. A hidden key has weight 0.",
        "A query that may look nowhere (padding) gets weights and y of 0, and no NaN.",
    ),
    formula="weights = softmax_t(q·kᵀ / √D, hidden: −∞)     y = weights·v",
    difficulty=3,
    importance=5,
    minutes=30,
    points=6,
    hints=(
        "Four questions: along which axis of [B, Hq, S, T] do the weights sum to 1? What must a hidden score "
        "be, so that its exponential is 0? Which of the query heads 0 … 5 share a key head, if there are "
        "two? And what is the softmax of a row that is −∞ throughout?",
        "Give every query head its key head: each of k's heads Hq / Hkv times in a row. Scores are float32, "
        "times D^(−1/2); masked_fill with −∞ where mask is False; softmax over the keys. Rows that see "
        "nothing come out as NaN: set them to 0 afterwards. Weights go back to v's format for the product.",
        "k = k.repeat_interleave(Hq // Hkv, dim=1), v alike; s = q.float() @ k.float().mT * D**-0.5; "
        "s = s.masked_fill(~mask, -torch.inf); w = torch.softmax(s, dim=-1); "
        "w = w.masked_fill(~mask, 0.0) takes care of the empty rows too; y = w.to(v.dtype) @ v.",
    ),
)


def expected(q: Any, k: Any, v: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """A head and a query at a time, in float64: (y, weights)."""
    wide = [x.double().numpy() for x in (q, k, v)]
    batch, heads, length, dim = wide[0].shape
    shared = heads // wide[1].shape[1]
    y = np.zeros((batch, heads, length, wide[2].shape[-1]))
    weights = np.zeros((batch, heads, length, wide[1].shape[2]))
    for b, h, s in np.ndindex(batch, heads, length):
        seen = mask.numpy()[b, 0, s]
        if seen.any():
            keys, values = (x[b, h // shared][seen] for x in wide[1:])
            scores = keys @ wide[0][b, h, s] / np.sqrt(dim)
            w = np.exp(scores - scores.max())
            weights[b, h, s, seen] = w / w.sum()
            y[b, h, s] = weights[b, h, s, seen] @ values
    return y, weights


def inputs(
    t: Trial,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    *,
    batch: int = 1,
    dim: int = 8,
    scale: float = 1.0,
    dtype: str = "float32",
) -> tuple[Any, Any, Any]:
    """q, k, v for `heads` Hq, Hkv and `lengths` S, T."""
    q = tensor(t, batch, heads[0], lengths[0], dim, dtype=dtype, scale=scale)
    k, v = (tensor(t, batch, heads[1], lengths[1], dim, dtype=dtype, scale=s) for s in (scale, 1.0))
    return q, k, v


def visible(lengths: tuple[int, int], batch: int = 1) -> Any:
    """The causal mask of S tokens that are the last of T, [B, 1, S, T]."""
    new, keys = lengths
    return torch.ones(new, keys, dtype=torch.bool).tril(keys - new).expand(batch, 1, -1, -1)


def everything(lengths: tuple[int, int], batch: int = 1) -> Any:
    return torch.ones(batch, 1, *lengths, dtype=torch.bool)


def _agree(t: Trial, qkv: tuple[Any, Any, Any], mask: Any, rtol: float | None = None, what: str = "") -> Any:
    got = t.pair(t.call(*qkv, mask), 2, "(y, weights)")
    y, weights = expected(*qkv, mask)
    t.close(got[1], weights, f"weights{what}", rtol=rtol, atol=rtol)
    t.close(got[0], y, f"y{what}")
    return got


@attention.check("a query's weights are positive and sum to 1")
def sums(t: Trial) -> None:
    for lengths in ((1, 1), (3, 5), (4, t.odd(7, 11))):
        q, k, v = inputs(t, (2, 2), lengths)
        _, weights = t.pair(t.call(q, k, v, everything(lengths)), 2, "(y, weights)")
        shape = (1, 2, *lengths)
        t.equal(tuple(getattr(weights, "shape", ())), shape, "shape of weights")
        t.holds(bool((weights >= 0).all()), "a weight is negative, or no number")
        t.close(weights.sum(-1), np.ones(shape[:-1]), "sums of the weights over the keys", rtol=1e-4)


@attention.check("scores are divided by √D, and weigh the values")
def values(t: Trial) -> None:
    for dim in (4, 2 * t.odd(5, 15)):
        lengths = (3, 7)
        _agree(t, inputs(t, (2, 2), lengths, batch=2, dim=dim), everything(lengths, 2))


@attention.check("hidden keys weigh nothing, and the others sum to 1 without them")
def masked(t: Trial) -> None:
    lengths = (5, 5)
    _agree(t, inputs(t, (2, 2), lengths, batch=2), visible(lengths, 2))
    lengths = (2, t.odd(7, 11))
    _agree(t, inputs(t, (2, 2), lengths), visible(lengths))
    q, k, v = inputs(t, (1, 1), (1, 6))
    mask = everything((1, 6))
    mask[..., [1, 4]] = False
    k[:, :, [1, 4]], v[:, :, [1, 4]] = q * 1000 / (q * q).sum(), 1e4
    _agree(t, (q, k, v), mask, what=", where hidden keys would win by far")


@attention.check("large scores stay finite")
def large(t: Trial) -> None:
    lengths = (3, 6)
    _agree(t, inputs(t, (2, 2), lengths, scale=30.0), visible(lengths), rtol=1e-3)


@attention.check("query heads share key and value heads, in groups of neighbours")
def groups(t: Trial) -> None:
    for heads in ((6, 2), (4, 1), (6, 3)):
        lengths = (3, 5)
        _agree(t, inputs(t, heads, lengths, batch=2), visible(lengths, 2))


@attention.check("a query that may look nowhere gets zeros, and no other notices")
def nowhere(t: Trial) -> None:
    lengths = (4, 6)
    mask = visible(lengths, 2).clone()
    mask[1, :, :2] = False
    _agree(t, inputs(t, (4, 2), lengths, batch=2), mask)


@attention.check("16-bit formats come and go; scores and weights are float32")
def formats(t: Trial) -> None:
    for dtype in ("bfloat16", "float16"):
        lengths = (3, 9)
        qkv = inputs(t, (4, 2), lengths, dtype=dtype, dim=16, scale=2.0)
        y, weights = _agree(t, qkv, visible(lengths), rtol=1e-4, what=f", {dtype}")
        for name, value, want in (("y", y, dtype), ("weights", weights, "float32")):
            told = str(getattr(value, "dtype", "none")).removeprefix("torch.")
            t.equal(told, want, f"number format of {name}")
    qkv = inputs(t, (1, 1), (2, 4), dtype="float16", dim=64, scale=60.0)
    _agree(t, qkv, visible((2, 4)), rtol=1e-3, what=", where q·k is beyond float16's 65,504")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def scores_of(q: Any, k: Any) -> Any:
    """Scaled scores in float32; each key head stands for its group."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return q.float() @ k.float().mT * q.shape[-1] ** -0.5


def weights_of(scores: Any, mask: Any) -> Any:
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def mixed(weights: Any, v: Any) -> Any:
    """(y, weights)"""
    shared = v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
    return weights.to(v.dtype) @ shared, weights


@attention.mistake(
    says="the scores are not scaled: their variance grows with D, and the softmax is too sharp",
    tries="q @ k.mT * D**-0.5.",
    caught_by="values",
)
def not_scaled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(weights_of(scores_of(q, k) * q.shape[-1] ** 0.5, mask), v)


@attention.mistake(
    says="the scores are divided by D, not by its root",
    tries="D**-0.5: a sum of D products has a standard deviation of √D.",
    caught_by="values",
)
def scaled_by_d(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(weights_of(scores_of(q, k) * q.shape[-1] ** -0.5, mask), v)


@attention.mistake(
    says="the scores are divided by the root of the number of keys",
    tries="D = q.shape[-1].",
    caught_by="values",
)
def scaled_by_keys(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = scores_of(q, k) * (q.shape[-1] / k.shape[2]) ** 0.5
    return mixed(weights_of(scores, mask), v)


@attention.mistake(
    says="the softmax runs over the queries: each key's weights sum to 1",
    tries="softmax(dim=-1): the last axis of the scores holds the keys.",
    caught_by="sums",
)
def over_queries(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = scores_of(q, k).masked_fill(~mask, float("-inf"))
    return mixed(scores.softmax(-2).masked_fill(~mask, 0.0), v)


@attention.mistake(
    says="the softmax runs over the heads",
    tries="softmax(dim=-1): the last axis of the scores holds the keys.",
    caught_by="sums",
)
def over_heads(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = scores_of(q, k).masked_fill(~mask, float("-inf"))
    return mixed(scores.softmax(1).masked_fill(~mask, 0.0), v)


@attention.mistake(
    says="the exponentials are not divided by their sum",
    tries="softmax: exp(s) / Σ exp(s).",
    caught_by="sums",
)
def not_normalised(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = scores_of(q, k).masked_fill(~mask, float("-inf"))
    return mixed((scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0), v)


@attention.mistake(
    says="the mask is not used",
    tries="masked_fill(~mask, −∞) before the softmax.",
    caught_by="masked",
)
def not_masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(scores_of(q, k).softmax(-1), v)


@attention.mistake(
    says="the mask is read the wrong way round: what may be seen is hidden",
    tries="masked_fill(~mask, −∞).",
    caught_by="sums",
)
def inverted(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(weights_of(scores_of(q, k), ~mask), v)


@attention.mistake(
    says="the mask comes after the softmax: what is left sums to less than 1",
    tries="−∞ in the scores, before the softmax.",
    caught_by="masked",
)
def masked_late(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(scores_of(q, k).softmax(-1).masked_fill(~mask, 0.0), v)


@attention.mistake(
    says="hidden weights are dropped after the softmax and the rest is scaled up: where a hidden key wins by "
    "far, nothing is left to scale",
    tries="−∞ in the scores, before the softmax.",
    caught_by="masked",
)
def rescaled_late(q: Any, k: Any, v: Any, mask: Any) -> Any:
    kept = scores_of(q, k).softmax(-1).masked_fill(~mask, 0.0)
    return mixed((kept / kept.sum(-1, keepdim=True)).masked_fill(~mask, 0.0), v)


@attention.mistake(
    says="hidden scores are set to 0, whose exponential is 1",
    tries="−∞: its exponential is 0.",
    caught_by="masked",
)
def filled_with_zero(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed((scores_of(q, k) * mask).softmax(-1), v)


@attention.mistake(
    says="the exponential is taken of the score itself: above 88 it is infinite in float32",
    tries="torch.softmax, or exp(s − s.amax(dim=-1, keepdim=True)).",
    caught_by="large",
)
def no_maximum(q: Any, k: Any, v: Any, mask: Any) -> Any:
    e = scores_of(q, k).exp().masked_fill(~mask, 0.0)
    return mixed((e / e.sum(-1, keepdim=True)).masked_fill(~mask, 0.0), v)


@attention.mistake(
    says="key and value heads are repeated as a whole, 0 1 0 1: query head 1 then reads key head 1, not 0",
    tries="repeat_interleave(Hq // Hkv, dim=1): 0 0 1 1.",
    caught_by="groups",
)
def tiled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    shared = q.shape[1] // k.shape[1]
    weights = weights_of(scores_of(q, k.repeat(1, shared, 1, 1)), mask)
    return mixed(weights, v.repeat(1, shared, 1, 1))


@attention.mistake(
    says="the keys are repeated for their group, and the values are tiled",
    tries="repeat_interleave(Hq // Hkv, dim=1) for both.",
    caught_by="groups",
)
def values_tiled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(weights_of(scores_of(q, k), mask), v.repeat(1, q.shape[1] // v.shape[1], 1, 1))


@attention.mistake(
    says="all query heads read the first key and value head",
    tries="head h // (Hq / Hkv) for query head h.",
    caught_by="values",
)
def first_head(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(weights_of(scores_of(q, k[:, :1]), mask), v[:, :1])


@attention.mistake(
    says="key and value heads are not repeated, and meet the query heads only where their numbers are equal",
    tries="repeat_interleave(Hq // Hkv, dim=1) for k and v.",
    caught_by="groups",
)
def not_shared(q: Any, k: Any, v: Any, mask: Any) -> Any:
    weights = weights_of(q.float() @ k.float().mT * q.shape[-1] ** -0.5, mask)
    return weights.to(v.dtype) @ v, weights


@attention.mistake(
    says="a query that may look nowhere gets NaN: the softmax of −∞ throughout is 0 / 0",
    tries=".masked_fill(~mask, 0.0) on the weights.",
    caught_by="nowhere",
)
def empty_rows_nan(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(scores_of(q, k).masked_fill(~mask, float("-inf")).softmax(-1), v)


@attention.mistake(
    says="hidden scores are −10⁹ and not −∞: a query that may look nowhere looks everywhere, alike",
    tries="−∞, and zeros for the rows that come out as NaN.",
    caught_by="nowhere",
)
def large_and_finite(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(scores_of(q, k).masked_fill(~mask, -1e9).softmax(-1), v)


@attention.mistake(
    says="the softmax is computed in 16 bits: weights keep two or three digits",
    tries="float32 scores, softmax of those, and q's format again for y alone.",
    caught_by="formats",
)
def narrow_softmax(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(weights_of(scores_of(q, k).to(q.dtype), mask).float(), v)


@attention.mistake(
    says="the scores are computed in 16 bits: bfloat16 keeps two digits of them, float16 overflows at 65,504",
    tries="q.float() @ k.float().mT.",
    caught_by="formats",
)
def narrow_scores(q: Any, k: Any, v: Any, mask: Any) -> Any:
    k_all = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k_all.mT).float() * q.shape[-1] ** -0.5
    return mixed(weights_of(scores, mask), v)


@attention.mistake(
    says="y is float32, whatever came in",
    tries="weights.to(v.dtype) @ v.",
    caught_by="formats",
)
def widened(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return mixed(weights_of(scores_of(q, k), mask), v.float())


@attention.mistake(
    says="the weights are returned in 16 bits",
    tries="the float32 weights themselves as the second result.",
    caught_by="formats",
)
def narrow_weights(q: Any, k: Any, v: Any, mask: Any) -> Any:
    y, weights = mixed(weights_of(scores_of(q, k), mask), v)
    return y, weights.to(q.dtype)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@attention.alternative("query heads in their groups: keys and values are not repeated")
def grouped(q: Any, k: Any, v: Any, mask: Any) -> Any:
    split = q.float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrsd,bgtd->bgrst", split, k.float()) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    y = torch.einsum("bgrst,bgtd->bgrsd", weights, v.float())
    return y.flatten(1, 2).to(q.dtype), weights.flatten(1, 2)


@attention.alternative("an additive mask, and the softmax by hand")
def by_hand(q: Any, k: Any, v: Any, mask: Any) -> Any:
    shared = q.shape[1] // k.shape[1]
    k, v = (x.float()[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (k, v))
    scores = (q.float() / q.shape[-1] ** 0.5) @ k.transpose(2, 3) + torch.where(mask, 0.0, -torch.inf)
    e = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    weights = e / e.sum(-1, keepdim=True).clamp(min=1e-30)
    return (weights @ v).to(q.dtype), weights


@attention.alternative("a head at a time, normalised with logsumexp")
def head_by_head(q: Any, k: Any, v: Any, mask: Any) -> Any:
    shared, results = q.shape[1] // k.shape[1], []
    for h in range(q.shape[1]):
        scores = q[:, h].float() @ k[:, h // shared].float().mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask[:, 0], float("-inf"))
        weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
        weights = torch.where(mask[:, 0], weights, 0.0)
        results.append((weights.to(v.dtype) @ v[:, h // shared], weights))
    return tuple(torch.stack(part, dim=1) for part in zip(*results, strict=True))
