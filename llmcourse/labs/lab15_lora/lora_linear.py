"""Exercise `lora_linear`: a frozen layer with a trained correction of low rank beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

lora_linear = Exercise(
    "lora_linear",
    title="A layer with a correction of low rank",
    arguments=("x", "weight", "a", "b", "alpha"),
    shapes=(
        "x        float32 tensor [N, K];  weight  [M, K]: the frozen layer is x @ weight.T",
        "a        [r, K] and b [M, r]: the correction's factors;  alpha  float: its weight",
        "returns  tensor [N, M], differentiable in x, a and b",
        "cost     no [M, K] matrix besides the weight: no intermediate larger than x or the result",
    ),
    formula="y = W·x + (alpha / r) · B·(A·x)   for every row x",
    difficulty=2,
    importance=5,
    minutes=15,
    points=4,
    hints=(
        "B·A is as large as the weight that you wanted to leave alone. A product of three can be computed in "
        "two orders; which of them has only thin intermediates?",
        "First down: x @ a.T gives r numbers a row. Then up: @ b.T gives M. r is the number of a's rows, and "
        "alpha / r multiplies the correction alone.",
        "return x @ weight.T + (alpha / a.shape[0]) * (x @ a.T) @ b.T. In this order Python multiplies the "
        "thin tensor first.",
    ),
)


def expected(x: Any, weight: Any, a: Any, b: Any, alpha: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output, and the gradients of its sum with respect to x, a and b, in float64."""
    x, w, a, b = (t.detach().double().numpy() for t in (x, weight, a, b))
    s, ones = alpha / len(a), np.ones((len(x), len(w)))
    full = w + s * b @ a
    return x @ full.T, [ones @ full, s * (ones @ b).T @ x, s * ones.T @ (x @ a.T)]


def _agree(t: Trial, n: int, k: int, m: int, r: int, alpha: float, order: str = "C") -> None:
    x, weight = tensor(t, n, k, order=order), tensor(t, m, k, scale=k**-0.5)
    a, b = tensor(t, r, k, scale=k**-0.5), tensor(t, m, r, order=order)
    call = t.perform(x, weight, a, b, alpha, grads=True)
    y, gradients = expected(x, weight, a, b, alpha)
    t.close(call.value, y, "the output", rtol=1e-4)
    grads = call.grads or (None,) * 4
    for name, got, want in zip(("x", "a", "b"), (grads[0], grads[2], grads[3]), gradients, strict=True):
        t.holds(got is not None, f"no gradient reached {name}")
        t.close(got, want, f"the gradient of {name}", rtol=2e-4)


@lora_linear.check("output and gradients, for any sizes and any alpha")
def values(t: Trial) -> None:
    _agree(t, t.odd(3, 9), t.odd(5, 15), t.odd(7, 17), t.size(2, 4), 8.0)
    _agree(t, 1, 6, 4, 3, 1.5)
    _agree(t, 4, 9, 9, 1, 0.5)


@lora_linear.check("rows as they lie in memory")
def layouts(t: Trial) -> None:
    _agree(t, t.odd(3, 9), 8, 6, 2, 4.0, order="T")


@lora_linear.check("with b = 0 the layer is the frozen one")
def begins(t: Trial) -> None:
    x, weight, a = tensor(t, 5, 7), tensor(t, 6, 7), tensor(t, 2, 7)
    b = torch.zeros(6, 2)
    t.close(t.call(x, weight, a, b, 16.0), expected(x, weight, a, b, 16.0)[0], "the output", rtol=1e-4)
    t.unchanged()


@lora_linear.check("B·A is never made")
def cost(t: Trial) -> None:
    n, k, m, r = 6, 96, 64, 4
    x, weight, a, b = tensor(t, n, k), tensor(t, m, k), tensor(t, r, k), tensor(t, m, r)
    call = t.perform(x, weight, a, b, 8.0, watch=("largest_intermediate",))
    t.close(call.value, expected(x, weight, a, b, 8.0)[0], "the output", rtol=1e-3)
    t.at_most(
        call.costs["largest_intermediate"],
        4 * n * max(k, m),
        f"bytes of the largest intermediate (x has {x.nbytes:,}, the weight {weight.nbytes:,})",
        "(x @ a.T) @ b.T: down to r numbers a row, then up.",
    )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _layer(x: Any, weight: Any, a: Any, b: Any, scale: Any) -> Any:
    return x @ weight.T + scale * (x @ a.T) @ b.T


@lora_linear.mistake(
    says="B·A is made and added to the weight: a matrix as large as the one that is frozen, at every call",
    tries="(x @ a.T) @ b.T: down to r numbers a row, then up.",
    caught_by="cost",
)
def whole_matrix(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return x @ (weight + alpha / len(a) * b @ a).T


@lora_linear.mistake(
    says="the correction is multiplied by alpha, not by alpha / r",
    tries="alpha / a.shape[0].",
    caught_by="values",
)
def not_divided(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return _layer(x, weight, a, b, alpha)


@lora_linear.mistake(
    says="alpha and r are left out", tries="(alpha / a.shape[0]) times the correction.", caught_by="values"
)
def no_scale(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return _layer(x, weight, a, b, 1.0)


@lora_linear.mistake(
    says="the frozen product is multiplied by alpha / r too",
    tries="the factor on the correction alone.",
    caught_by="values",
)
def scaled_base(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return alpha / len(a) * _layer(x, weight, a, b, 1.0)


@lora_linear.mistake(
    says="alpha is divided by the features K, not by the rank",
    tries="a.shape[0]: a is [r, K].",
    caught_by="values",
)
def by_features(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return _layer(x, weight, a, b, alpha / a.shape[1])


@lora_linear.mistake(
    says="alpha is divided by √r: that is rank-stabilised LoRA, and this one divides by r",
    tries="alpha / a.shape[0].",
    caught_by="values",
)
def by_root(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return _layer(x, weight, a, b, alpha / len(a) ** 0.5)


@lora_linear.mistake(
    says="the frozen product is missing: the correction stands alone",
    tries="x @ weight.T + the correction.",
    caught_by="values",
)
def alone(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return alpha / len(a) * (x @ a.T) @ b.T


@lora_linear.mistake(
    says="a nonlinearity stands between A and B: such an adapter cannot be merged into the weight",
    tries="(x @ a.T) @ b.T, with nothing between them.",
    caught_by="values",
)
def nonlinear(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return x @ weight.T + alpha / len(a) * torch.relu(x @ a.T) @ b.T


@lora_linear.mistake(
    says="the thin product is cut out of the graph, so that a never learns",
    tries="no detach and no torch.no_grad: the weight alone is frozen.",
    caught_by="values",
)
def detached(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return x @ weight.T + alpha / len(a) * (x @ a.T).detach() @ b.T


@lora_linear.mistake(
    says="the frozen product is cut out of the graph: earlier layers get a part of their gradient",
    tries="a weight without gradient still passes one on to x; nothing needs to be detached.",
    caught_by="values",
)
def base_detached(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return (x @ weight.T).detach() + alpha / len(a) * (x @ a.T) @ b.T


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@lora_linear.alternative("by F.linear, the factor on the result")
def by_linear(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    f = torch.nn.functional.linear
    return f(x, weight) + f(f(x, a), b) * (alpha / a.shape[0])


@lora_linear.alternative("einsum")
def by_einsum(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    down = torch.einsum("nk,rk->nr", x, a)
    return torch.einsum("nk,mk->nm", x, weight) + torch.einsum("nr,mr->nm", down, b * (alpha / len(a)))


@lora_linear.alternative("addmm onto the frozen product")
def by_addmm(x: Any, weight: Any, a: Any, b: Any, alpha: Any) -> Any:
    return torch.addmm(x @ weight.T, x @ a.T, b.T, alpha=alpha / a.shape[0])
