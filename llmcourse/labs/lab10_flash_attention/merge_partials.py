"""Exercise `merge_partials`: attention over two parts of the keys, put together afterwards."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs.lab10_flash_attention.reference import attention, visible

merge_partials = Exercise(
    "merge_partials",
    title="Two parts of the keys, one result",
    arguments=("out1", "lse1", "out2", "lse2"),
    shapes=(
        "out1, out2   float32 tensors [..., D]: attention of the same queries over two different parts of",
        "             the keys, each a weighted mean by itself",
        "lse1, lse2   float32 tensors [...]: log Σ_j exp s[j] over each part; −inf for a part that a query",
        "             sees nothing of, whose out is 0",
        "returns      (out [..., D], lse [...]) over both parts; 0 and −inf where neither is seen",
    ),
    formula="lse = log(exp lse1 + exp lse2)     out = exp(lse1 − lse)·out1 + exp(lse2 − lse)·out2",
    difficulty=2,
    importance=4,
    minutes=15,
    points=3,
    hints=(
        "exp(lse1) is the sum of the weights that part 1 was divided by. If it is three times exp(lse2), "
        "with which weights do the two means make the mean of all?",
        "exp(lse1) overflows from 89 on: take the larger of the two off both first, as in every softmax. "
        "Where both are −inf, that is −inf − (−inf) again.",
        "m = maximum(lse1, lse2), safe = where(m == -inf, 0, m), w1 = exp(lse1 - safe), w2 = exp(lse2 - "
        "safe), total = w1 + w2; out = (w1[..., None]·out1 + w2[..., None]·out2) / where(total == 0, 1, "
        "total)[..., None]; lse = safe + log(total). (torch.logaddexp does the first half.)",
    ),
)


def parts(t: Trial, S: int, sizes: tuple[int, ...], D: int = 8, scale: float = 1.0) -> Any:
    """Attention over each of the parts, as float32 tensors, and over all of them in float64."""
    import torch

    T = sum(sizes)
    q, k, v = t.normal(S, D, scale=scale), t.normal(T, D, scale=scale), t.normal(T, D)
    ends = np.cumsum((0, *sizes))
    found = []
    for a, b in pairwise(ends):
        out, lse = attention(q, k[a:b], v[a:b], visible(S, b - a, causal=False))
        found.append((torch.from_numpy(out).float(), torch.from_numpy(lse).float()))
    return found, attention(q, k, v, visible(S, T, causal=False))


def _compare(t: Trial, got: Any, want: Any, what: str = "") -> None:
    out, lse = t.pair(got, 2, "(out, lse)")
    t.close(out, want[0], f"out{what}", rtol=1e-3, atol=1e-4)
    t.close(lse, want[1], f"lse{what}", rtol=1e-5, atol=1e-4)


def _agree(t: Trial, S: int, sizes: tuple[int, int], scale: float = 1.0) -> None:
    (first, second), want = parts(t, S, sizes, scale=scale)
    _compare(t, t.call(*first, *second), want)


@merge_partials.check("two parts of the keys give the attention over all of them")
def halves(t: Trial) -> None:
    _agree(t, t.odd(3, 9), (t.odd(3, 9), t.odd(13, 19)))
    _agree(t, t.odd(3, 9), (t.odd(41, 59), 1))
    _agree(t, 1, (1, 1))


@merge_partials.check("sums of weights that no float32 can hold")
def large(t: Trial) -> None:
    for shift in (300.0, -300.0):
        (one, two), want = parts(t, t.odd(3, 9), (t.odd(5, 9), t.odd(5, 9)))
        got = t.call(one[0], one[1] + shift, two[0], two[1] + shift)
        _compare(t, got, (want[0], want[1] + shift))
    (one, two), _ = parts(t, 4, (5, 7))
    got = t.call(one[0], one[1] + 500, two[0], two[1] - 500)  # the second part weighs nothing
    _compare(t, got, (one[0].double().numpy(), one[1].double().numpy() + 500))


@merge_partials.check("parts of which a query sees nothing: one, or both")
def nothing(t: Trial) -> None:
    (one, two), want = parts(t, 6, (t.odd(3, 9), t.odd(3, 9)))
    out, lse = want[0].copy(), want[1].copy()
    for o, part in ((two, slice(0, 2)), (one, slice(2, 4))):
        other = one if o is two else two
        o[0][part], o[1][part] = 0.0, -math.inf
        out[part], lse[part] = other[0][part].numpy(), other[1][part].numpy()
    for o in (one, two):
        o[0][4], o[1][4] = 0.0, -math.inf
    out[4], lse[4] = 0.0, -math.inf
    _compare(t, t.call(*one, *two), (out, lse))


@merge_partials.check("three parts, merged in any order")
def chained(t: Trial) -> None:
    found, want = parts(t, t.odd(3, 9), (t.odd(3, 9), t.odd(13, 19), t.odd(5, 9)), scale=1.5)
    for a, b, c in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        merged = t.pair(t.call(*found[a], *found[b]), 2, "(out, lse)")
        _compare(t, t.call(*merged, *found[c]), want, f", parts {a + 1} and {b + 1}, then {c + 1}")


@merge_partials.check("any axes in front: batch, heads, queries")
def axes(t: Trial) -> None:
    (one, two), want = parts(t, 12, (7, 5))
    got = t.call(*(x.reshape(2, 3, 2, *x.shape[1:]) for x in (*one, *two)))
    _compare(t, got, (want[0].reshape(2, 3, 2, 8), want[1].reshape(2, 3, 2)))


@merge_partials.mistake(
    says="the two results are averaged, whatever their weights",
    tries="weights in the ratio exp(lse1) : exp(lse2).",
    caught_by="halves",
)
def averaged(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    return (out1 + out2) / 2, lse1.logaddexp(lse2)


@merge_partials.mistake(
    says="the weights are lse1 and lse2 themselves, which are logarithms",
    tries="exp(lse1 − lse) and exp(lse2 − lse).",
    caught_by="halves",
)
def weighted_by_logarithms(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    w1 = (lse1 / (lse1 + lse2))[..., None]
    return w1 * out1 + (1 - w1) * out2, lse1.logaddexp(lse2)


@merge_partials.mistake(
    says="the weights are exp(lse − m), not divided by their sum",
    tries="a division by w1 + w2, or exp(lse1 − lse) with the merged lse.",
    caught_by="halves",
)
def not_normalised(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    m = lse1.maximum(lse2)
    return (lse1 - m).exp()[..., None] * out1 + (lse2 - m).exp()[..., None] * out2, lse1.logaddexp(lse2)


@merge_partials.mistake(
    says="the weights have changed places",
    tries="out1 with exp(lse1 − lse).",
    caught_by="halves",
)
def changed_places(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    lse = lse1.logaddexp(lse2)
    return (lse2 - lse).exp()[..., None] * out1 + (lse1 - lse).exp()[..., None] * out2, lse


@merge_partials.mistake(
    says="the merged lse is the larger of the two",
    tries="torch.logaddexp(lse1, lse2): two equal parts have twice the sum.",
    caught_by="halves",
)
def larger_lse(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    return _right(out1, lse1, out2, lse2)[0], lse1.maximum(lse2)


@merge_partials.mistake(
    says="the merged lse is the sum of both: that multiplies the sums of weights",
    tries="torch.logaddexp(lse1, lse2).",
    caught_by="halves",
)
def summed_lse(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    return _right(out1, lse1, out2, lse2)[0], lse1 + lse2


@merge_partials.mistake(
    says="exp(lse) is taken as it is: it overflows at 89 and vanishes at −104",
    tries="exp(lse1 − m), with m the larger of the two.",
    caught_by="large",
)
def overflowing(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    w1, w2 = lse1.exp(), lse2.exp()
    total = w1 + w2
    out = (w1[..., None] * out1 + w2[..., None] * out2) / total.where(total > 0, total + 1)[..., None]
    return out, total.log()


@merge_partials.mistake(
    says="−inf − (−inf) is computed, which is NaN, where neither part is seen",
    tries="0 in the place of m where it is −inf.",
    caught_by="nothing",
)
def nan_where_nothing(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    lse = lse1.logaddexp(lse2)
    return (lse1 - lse).exp()[..., None] * out1 + (lse2 - lse).exp()[..., None] * out2, lse


@merge_partials.mistake(
    says="the weights are powers of two",
    tries="torch.exp: lse is a natural logarithm.",
    caught_by="halves",
)
def base_two(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    lse = lse1.logaddexp2(lse2)
    safe = lse.nan_to_num(neginf=0.0)
    return (lse1 - safe).exp2()[..., None] * out1 + (lse2 - safe).exp2()[..., None] * out2, lse


@merge_partials.mistake(
    says="only queries lie in front of D: with batch and heads the weights spread along the wrong axis",
    tries="lse[..., None], which adds an axis at the end.",
    caught_by="axes",
)
def wrong_axis(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    lse = lse1.logaddexp(lse2)
    safe = lse.nan_to_num(neginf=0.0)
    return (lse1 - safe).exp()[:, None] * out1 + (lse2 - safe).exp()[:, None] * out2, lse


def _right(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    lse = lse1.logaddexp(lse2)
    safe = lse.nan_to_num(neginf=0.0)
    return (lse1 - safe).exp()[..., None] * out1 + (lse2 - safe).exp()[..., None] * out2, lse


@merge_partials.alternative("logaddexp, and 0 for −inf where it is subtracted")
def logaddexp(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    return _right(out1, lse1, out2, lse2)


@merge_partials.alternative("a softmax over two numbers, which is a sigmoid of their difference")
def sigmoid(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    w1 = (lse1 - lse2).nan_to_num(0.0, posinf=1e4, neginf=-1e4).sigmoid()[..., None]
    return out2 + w1 * (out1 - out2), lse1.logaddexp(lse2)


@merge_partials.alternative("the larger taken off, sums, and a division")
def by_sums(out1: Any, lse1: Any, out2: Any, lse2: Any) -> Any:
    import torch

    lse = torch.stack((lse1, lse2))
    top = lse.amax(0)
    top = torch.where(torch.isfinite(top), top, 0.0)
    w = (lse - top).exp()
    total = w.sum(0)
    out = (w[..., None] * torch.stack((out1, out2))).sum(0) / total.clamp(min=1e-30)[..., None]
    return out, top + total.log()
