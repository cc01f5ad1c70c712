"""Exercise `merged`: an adapter becomes part of the weight, and is taken out again."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

merged = Exercise(
    "merged",
    title="Merge and unmerge",
    arguments=("weight", "a", "b", "alpha", "sign"),
    shapes=(
        "weight   tensor [M, K], float32 or bfloat16;  a float32 [r, K], b float32 [M, r];  alpha  float",
        "sign     +1: merge, −1: take the adapter out again",
        "returns  a new tensor [M, K] in weight's format. The sum is made in float32 and rounded once",
    ),
    formula="W' = W + sign · (alpha / r) · B·A",
    difficulty=1,
    importance=4,
    minutes=10,
    points=3,
    hints=(
        "Which of the three tensors has the fewest digits, and at which moment should digits be thrown away?",
        "weight.float(), then the product of b and a in float32 with its factor, then one .to(weight.dtype).",
        "return (weight.float() + sign * alpha / a.shape[0] * (b @ a)).to(weight.dtype).",
    ),
)


def expected(weight: Any, a: Any, b: Any, alpha: float, sign: int) -> np.ndarray:
    w, a, b = (t.double().numpy() for t in (weight, a, b))
    return w + sign * alpha / len(a) * (b @ a)


def _draw(t: Trial, m: int, k: int, r: int, dtype: str = "float32", order: str = "C") -> tuple[Any, Any, Any]:
    weight = tensor(t, m, k, dtype=dtype, scale=0.3, order=order)
    return weight, tensor(t, r, k), tensor(t, m, r, order=order)


def _in_format(t: Trial, value: Any, weight: Any) -> None:
    dtype = getattr(value, "dtype", None)
    t.holds(
        dtype == weight.dtype,
        f"the result is {dtype}, the weight {weight.dtype}",
        ".to(weight.dtype) at the end.",
    )


@merged.check("the correction is added, and taken out with sign −1")
def values(t: Trial) -> None:
    for sign in (1, -1):
        weight, a, b = _draw(t, t.odd(5, 9), t.odd(11, 15), t.size(2, 4))
        t.close(t.call(weight, a, b, 8.0, sign), expected(weight, a, b, 8.0, sign), rtol=1e-5)
    weight, a, b = _draw(t, 4, 4, 3)
    t.close(t.call(weight, a, b, 0.5, 1), expected(weight, a, b, 0.5, 1), rtol=1e-5)


@merged.check("merged and taken out, a float32 weight is what it was")
def round_trip(t: Trial) -> None:
    weight, a, b = _draw(t, 7, 9, 2, order="T")
    inside = t.call(weight, a, b, 4.0, 1)
    t.close(inside, expected(weight, a, b, 4.0, 1), rtol=1e-5)
    again = torch.as_tensor(inside)
    t.close(t.call(again, a, b, 4.0, -1), weight.double().numpy(), rtol=1e-4)


@merged.check("a bfloat16 weight is rounded once, and stays bfloat16")
def rounding(t: Trial) -> None:
    weight, a, b = _draw(t, 33, 65, 4, "bfloat16")
    value = t.call(weight, a, b, 4.0, 1)
    _in_format(t, value, weight)
    want = torch.from_numpy(expected(weight, a, b, 4.0, 1))
    got = torch.as_tensor(value).double()
    t.close(got, want.numpy(), "the weight", rtol=0.02, atol=0.02)
    unit = 2.0 ** (want.abs().clamp(min=2.0**-20).log2().floor() - 7)  # one unit in the last place
    worst = ((got - want).abs() / unit).max().item()
    t.holds(
        worst < 0.51,
        f"an element is off by {worst:.2f} units in its last place; rounded once, it is half a unit at most",
        "weight.float() + the correction in float32, and one .to(weight.dtype).",
    )


@merged.check("the weight that came is left as it was")
def unchanged(t: Trial) -> None:
    t.call(*_draw(t, 5, 6, 2), 2.0, 1)
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _sum(weight: Any, a: Any, b: Any, factor: Any) -> Any:
    return (weight.float() + factor * (b @ a)).to(weight.dtype)


@merged.mistake(says="alpha is not divided by r", tries="alpha / a.shape[0].", caught_by="values")
def not_divided(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return _sum(weight, a, b, sign * alpha)


@merged.mistake(
    says="alpha and r are left out", tries="(alpha / a.shape[0]) times the product.", caught_by="values"
)
def no_scale(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return _sum(weight, a, b, sign)


@merged.mistake(
    says="the sign is not used: unmerging merges a second time", tries="sign · alpha / r.", caught_by="values"
)
def no_sign(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return _sum(weight, a, b, alpha / len(a))


@merged.mistake(says="the factor is inverted: r / alpha", tries="alpha / a.shape[0].", caught_by="values")
def inverted(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return _sum(weight, a, b, sign * len(a) / alpha)


@merged.mistake(
    says="the factor is applied to both a and b, so that it counts squared",
    tries="it once, to the product.",
    caught_by="values",
)
def squared(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return _sum(weight, a, b, sign * (alpha / len(a)) ** 2)


@merged.mistake(
    says="the product is computed in bfloat16: its factors, it and the sum are each rounded",
    tries="weight.float(), and one .to(weight.dtype) at the end.",
    caught_by="rounding",
)
def in_short(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return weight + sign * alpha / len(a) * (b.to(weight.dtype) @ a.to(weight.dtype))


@merged.mistake(
    says="the correction is rounded to the weight's format before it is added: two roundings",
    tries="weight.float() + the correction, and one .to(weight.dtype) at the end.",
    caught_by="rounding",
)
def rounded_twice(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return weight + (sign * alpha / len(a) * (b @ a)).to(weight.dtype)


@merged.mistake(
    says="the result stays in float32: the merged model is twice as large as the one that came",
    tries=".to(weight.dtype) at the end.",
    caught_by="rounding",
)
def wide(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return weight.float() + sign * alpha / len(a) * (b @ a)


@merged.mistake(
    says="the correction is written into the weight that came",
    tries="a new tensor: weight + …, not weight += ….",
    caught_by="unchanged",
)
def in_place(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return weight.copy_(_sum(weight, a, b, sign * alpha / len(a)))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@merged.alternative("addmm in float32")
def by_addmm(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    return torch.addmm(weight.float(), b, a, alpha=sign * alpha / a.shape[0]).to(weight.dtype)


@merged.alternative("rank by rank")
def by_ranks(weight: Any, a: Any, b: Any, alpha: Any, sign: Any) -> Any:
    out = weight.float().clone()
    for column, row in zip(b.T, a, strict=True):
        out += sign * alpha / len(a) * torch.outer(column, row)
    return out.to(weight.dtype)
