"""Exercise `mean_pool_heads`: a projection of many heads becomes one of few, each the mean of a group."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

mean_pool_heads = Exercise(
    "mean_pool_heads",
    title="From many key/value heads to few",
    arguments=("weight", "n_heads", "n_kv_heads"),
    shapes=(
        "weight      tensor [H·D, E]: a key or value projection, y = x @ weight.T, head by head:",
        "            rows h·D … h·D + D − 1 make head h. Or its bias, [H·D]",
        "n_heads     H;  n_kv_heads  G divides H",
        "returns     tensor [G·D, E] (or [G·D]): head g is the mean of heads g·H/G … (g + 1)·H/G − 1,",
        "            those whose query heads will share it",
    ),
    formula="new[g, d, e] = G/H · Σ_{h in group g} weight[h, d, e]",
    difficulty=1,
    importance=3,
    minutes=10,
    points=2,
    hints=(
        "The first axis holds two things: which head, and which feature of it. How do you take it apart, "
        "and into how many axes, so that a mean over one of them is the one you want?",
        "Heads of a group are consecutive: [G, H/G, D, E] with the group first. Mean over the second axis, "
        "then put group and feature together again.",
        "weight.reshape(n_kv_heads, n_heads // n_kv_heads, -1, *weight.shape[1:]).mean(dim=1).flatten(0, 1).",
    ),
)


def expected(weight: Any, n_heads: int, n_kv_heads: int) -> np.ndarray:
    w = weight.double().numpy()
    dim, shared = len(w) // n_heads, n_heads // n_kv_heads
    new = np.zeros((n_kv_heads * dim, *w.shape[1:]))
    for h in range(n_heads):
        g = h // shared
        new[g * dim : (g + 1) * dim] += w[h * dim : (h + 1) * dim] / shared
    return new


def _agree(t: Trial, heads: int, kv_heads: int, dim: int, *width: int, order: str = "C") -> None:
    weight = tensor(t, heads * dim, *width, order=order)
    t.close(t.call(weight, heads, kv_heads), expected(weight, heads, kv_heads))


@mean_pool_heads.check("a new head is the mean of the heads of its group")
def groups(t: Trial) -> None:
    _agree(t, 6, 3, t.odd(3, 7), t.odd(9, 15))
    _agree(t, 8, 2, t.odd(3, 7), t.odd(9, 15))
    _agree(t, 12, 4, 2 * t.size(1, 4), t.odd(9, 15))


@mean_pool_heads.check("as many heads as before, and one for all")
def ends(t: Trial) -> None:
    heads, dim = t.size(3, 6), t.odd(3, 7)
    _agree(t, heads, heads, dim, 5)
    _agree(t, heads, 1, dim, 5)
    _agree(t, 1, 1, dim, 5)


@mean_pool_heads.check("a bias is pooled alike, and a weight as it lies in memory")
def shapes(t: Trial) -> None:
    _agree(t, 6, 2, t.odd(3, 7))
    _agree(t, 6, 3, t.odd(3, 7), 8, order="T")


@mean_pool_heads.check("weight is left as it was")
def unchanged(t: Trial) -> None:
    t.call(tensor(t, 12, 5), 4, 2)
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _split(weight: Any, kv_heads: Any, heads: Any) -> Any:
    """[G, H/G, D, …]."""
    dim = weight.shape[0] // heads
    return weight.reshape(kv_heads, heads // kv_heads, dim, *weight.shape[1:])


@mean_pool_heads.mistake(
    says="the heads of a group are added up, not averaged: keys grow by H/G, and so do the scores",
    tries=".mean(dim=1).",
    caught_by="groups",
)
def summed(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    return _split(weight, n_kv_heads, n_heads).sum(dim=1).flatten(0, 1)


@mean_pool_heads.mistake(
    says="each group keeps its first head and drops the others",
    tries=".mean(dim=1) in place of [:, 0].",
    caught_by="groups",
)
def first_of_each(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    return _split(weight, n_kv_heads, n_heads)[:, 0].flatten(0, 1)


@mean_pool_heads.mistake(
    says="heads that are G apart are pooled; a group's query heads are neighbours",
    tries="the group as the first axis: [G, H/G, D, E], mean over the second.",
    caught_by="groups",
)
def strided_groups(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    return weight.reshape(n_heads // n_kv_heads, -1, *weight.shape[1:]).mean(dim=0)


@mean_pool_heads.mistake(
    says="neighbouring features of one head are averaged, not the same feature of neighbouring heads",
    tries="an axis of D features behind the axis of heads.",
    caught_by="groups",
)
def features_pooled(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    rows = weight.shape[0] // n_heads * n_kv_heads
    return weight.reshape(rows, -1, *weight.shape[1:]).mean(dim=1)


@mean_pool_heads.mistake(
    says="one mean over all heads is taken, and repeated",
    tries="a mean in each group.",
    caught_by="groups",
)
def one_for_all(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    one = _split(weight, 1, n_heads).mean(dim=1)[0]
    return torch.cat([one] * n_kv_heads)


@mean_pool_heads.mistake(
    says="the heads stay an axis of their own: [G, D, E]",
    tries=".flatten(0, 1), or a reshape at the end: the projection's weight has two axes.",
    caught_by="groups",
)
def not_flattened(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    return _split(weight, n_kv_heads, n_heads).mean(dim=1)


@mean_pool_heads.mistake(
    says="n_kv_heads is taken for the number of heads in a group",
    tries="n_heads // n_kv_heads heads in each of n_kv_heads groups.",
    caught_by="groups",
)
def sizes_exchanged(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    return _split(weight, n_heads // n_kv_heads, n_heads).mean(dim=1).flatten(0, 1)


@mean_pool_heads.mistake(
    says="the means are written into weight itself",
    tries="a new tensor: the original model still has its heads.",
    caught_by="unchanged",
)
def in_place(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    new = _split(weight, n_kv_heads, n_heads).mean(dim=1).flatten(0, 1)
    weight[: new.shape[0]] = new
    return new


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@mean_pool_heads.alternative("head by head")
def head_by_head(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    heads, shared = weight.chunk(n_heads), n_heads // n_kv_heads
    return torch.cat([sum(heads[g * shared : (g + 1) * shared]) / shared for g in range(n_kv_heads)])


@mean_pool_heads.alternative("as a product with a matrix that averages")
def by_matrix(weight: Any, n_heads: Any, n_kv_heads: Any) -> Any:
    shared = n_heads // n_kv_heads
    groups = torch.arange(n_heads) // shared == torch.arange(n_kv_heads)[:, None]
    flat = weight.reshape(n_heads, -1)
    new = groups.to(weight.dtype) @ flat / shared
    return new.reshape(-1, *weight.shape[1:])
