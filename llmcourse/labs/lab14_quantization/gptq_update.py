"""Exercise `gptq_update`: round a column, let the columns behind it make up for the error."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs import late_torch as torch

LOW, HIGH = -8, 7

gptq_update = Exercise(
    "gptq_update",
    title="Round one column, correct the rest: GPTQ",
    arguments=("weight", "gram", "scale"),
    shapes=(
        "weight   float64 tensor [N, K]",
        "gram     float64 tensor [K, K], positive definite: the sum of x·xᵀ over the inputs x, damped",
        "scale    float64 tensor [N, K], positive: the step of each weight's grid",
        "returns  codes [N, K], whole numbers −8 … 7: the weights are codes · scale, and the layer's outputs",
        "         are as near to weight @ x as this order of rounding, column 0 first, gets them",
    ),
    formula="gram⁻¹ = UᵀU, U upper triangular;   for j = 0 … K−1: q = clamp(round(w_j / s_j), −8, 7), "
    "e = (w_j − q·s_j) / U_jj, w_k ← w_k − e·U_jk for k > j",
    difficulty=4,
    importance=5,
    minutes=40,
    points=7,
    hints=(
        "Two inputs that are always equal: x₀ = x₁. The first weight is rounded up by 0.2. What should be "
        "done to the second one, and which number of gram says so? What if the inputs have nothing in "
        "common?",
        "The columns that are rounded are done with; the others may still move, and the best move is a "
        "row of the inverse of what is left of gram. Those inverses need not be taken again at every "
        "column: the row for column j, divided as it must be, is row j of the upper Cholesky factor of "
        "the inverse of the whole gram. Compute the error from the column as it is *now*, and with the "
        "clamp included.",
        "U = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True); w = weight.clone(); for j in "
        "range(K): codes[:, j] = torch.round(w[:, j] / scale[:, j]).clamp(-8, 7); e = (w[:, j] - codes[:, "
        "j] * scale[:, j]) / U[j, j]; w[:, j + 1:] -= torch.outer(e, U[j, j + 1:]).",
    ),
)


def expected(weight: Any, gram: Any, scale: Any) -> np.ndarray:
    """The codes in float64, by the definition: the inverse of what is left of gram, taken at every column."""
    w, h, s = (np.asarray(p).copy() for p in (weight, gram, scale))
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(h[j:, j:])
        codes[:, j] = np.clip(np.rint(w[:, j] / s[:, j]), LOW, HIGH)
        error = (w[:, j] - codes[:, j] * s[:, j]) / inverse[0, 0]
        w[:, j:] -= np.outer(error, inverse[0])
    return codes


def output_error(weight: Any, gram: Any, scale: Any, codes: Any) -> float:
    """The sum of (w·x − q·x)² over all inputs and outputs: tr((W − Q)·gram·(W − Q)ᵀ)."""
    w, h, s = (np.asarray(p) for p in (weight, gram, scale))
    d = w - np.asarray(codes) * s
    return float(np.einsum("nk,kl,nl->", d, h, d))


def _gram(t: Trial, columns: int, together: float = 0.8) -> Any:
    """Gram matrix of inputs that have a part in common (`together`, 0 to 1), damped."""
    x = (1 - together) * t.normal(columns, 4 * columns) + together * t.normal(1, 4 * columns)
    x *= t.rng.uniform(0.5, 2.0, (columns, 1))
    gram = x @ x.T
    return torch.from_numpy(gram + 0.01 * np.mean(np.diag(gram)) * np.eye(columns))


def _draw(t: Trial, rows: int, columns: int, *, groups: int = 1, far: float = 1.0) -> tuple[Any, Any, Any]:
    """Weights of a few steps each; `far` times that for some, which then lie beyond the grid."""
    steps = t.rng.uniform(0.05, 0.5, (rows, groups))
    scale = np.repeat(steps, -(-columns // groups), axis=1)[:, :columns]
    points = t.rng.uniform(-5.0, 4.5, (rows, columns))
    points = np.where(t.rng.random(points.shape) < 0.15, far * points, points)
    return torch.from_numpy(points * scale), _gram(t, columns), torch.from_numpy(scale)


def _agree(t: Trial, weight: Any, gram: Any, scale: Any) -> Any:
    codes = t.call(weight, gram, scale)
    want = expected(weight, gram, scale)
    t.close(codes, want, "codes", atol=1e-6)
    return codes


@gptq_update.check("a matrix of one column: the nearest code from −8 to 7")
def one_column(t: Trial) -> None:
    scale = torch.from_numpy(t.rng.uniform(0.1, 0.4, (20, 1)))
    points = np.concatenate((np.arange(LOW, HIGH + 1), t.rng.uniform(-7, 7, 4)))[:, None]
    _agree(t, torch.from_numpy(points + 0.01) * scale, _gram(t, 1), scale)


@gptq_update.check("inputs that have nothing in common: nothing to make up for")
def diagonal(t: Trial) -> None:
    weight, _, scale = _draw(t, t.odd(3, 7), t.size(3, 6))
    gram = torch.diag(torch.from_numpy(t.rng.uniform(0.5, 3.0, weight.shape[1])))
    _agree(t, weight, gram, scale)


@gptq_update.check("two columns: the second makes up for the first")
def pair(t: Trial) -> None:
    weight, gram, scale = _draw(t, 63, 2)
    first = torch.linalg.inv(gram)[0, 0]
    _agree(t, weight, gram * (first / 4**2), scale)  # U[0, 0] = 4: not dividing by it is seen


@gptq_update.check("many columns: each makes up for all before it")
def many(t: Trial) -> None:
    for rows, columns in ((t.odd(5, 9), t.odd(5, 11)), (9, 24)):
        _agree(t, *_draw(t, rows, columns))


@gptq_update.check("each weight has its own step")
def grouped(t: Trial) -> None:
    _agree(t, *_draw(t, t.odd(5, 9), 12, groups=3))


@gptq_update.check("a weight beyond the grid: what the clamp takes is made up for, too")
def clamped(t: Trial) -> None:
    _agree(t, *_draw(t, 15, 9, far=3.0))


@gptq_update.check("the outputs come nearer than by rounding to the nearest, and nothing is written over")
def nearer(t: Trial) -> None:
    weight, gram, scale = _draw(t, 16, 32)
    codes = _agree(t, weight, gram, scale)
    t.unchanged()
    nearest = np.clip(np.rint(np.asarray(weight / scale)), LOW, HIGH)
    ours, theirs = (output_error(weight, gram, scale, c) for c in (np.asarray(codes, dtype=float), nearest))
    if ours > 0.8 * theirs:
        raise Mismatch(f"the error of the outputs is {ours:.4g}, and {theirs:.4g} by rounding to the nearest")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _factor(gram: Any) -> Any:
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)


def _nearest(column: Any, step: Any) -> Any:
    return torch.round(column / step).clamp(LOW, HIGH)


def _by(
    weight: Any, scale: Any, factor: Any, *, order: Any = None, divide: bool = True, sign: int = -1
) -> Any:
    """The loop, with what can be got wrong about it as arguments."""
    w, codes = weight.clone(), torch.zeros_like(weight)
    for j in order if order is not None else range(w.shape[1]):
        codes[:, j] = _nearest(w[:, j], scale[:, j])
        error = w[:, j] - codes[:, j] * scale[:, j]
        error = error / factor[j, j] if divide else error
        w[:, j + 1 :] += sign * torch.outer(error, factor[j, j + 1 :])
    return codes


@gptq_update.mistake(
    says="the codes go from 0 to 15, as if zero stood at 8",
    tries=".clamp(-8, 7).",
    caught_by="one_column",
)
def unsigned(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, _factor(gram)) + 8


@gptq_update.mistake(
    says="weights come back, not codes",
    tries="codes[:, j] as it is before it is multiplied by the scale.",
    caught_by="one_column",
)
def weights(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, _factor(gram)) * scale


@gptq_update.mistake(
    says="the grid ends at −7: four bits reach to −8",
    tries=".clamp(-8, 7).",
    caught_by="one_column",
)
def without_eight(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, _factor(gram)).clamp(min=-7)


@gptq_update.mistake(
    says="every weight is rounded to the nearest, and nothing is made up for",
    tries="w[:, j + 1:] -= torch.outer(e, U[j, j + 1:]) behind each rounding.",
    caught_by="pair",
)
def to_the_nearest(weight: Any, gram: Any, scale: Any) -> Any:
    return _nearest(weight, scale)


@gptq_update.mistake(
    says="the correction is added: the error of a column is doubled by those behind it",
    tries="w[:, j + 1:] −= …",
    caught_by="pair",
)
def added(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, _factor(gram), sign=1)


@gptq_update.mistake(
    says="the error is not divided by U_jj",
    tries="e = (w_j − q·s_j) / U[j, j].",
    caught_by="pair",
)
def not_divided(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, _factor(gram), divide=False)


@gptq_update.mistake(
    says="the factor is that of gram, not of its inverse",
    tries="torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).",
    caught_by="pair",
)
def of_gram(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, torch.linalg.cholesky(gram, upper=True))


@gptq_update.mistake(
    says="the rows of gram's inverse are used unchanged: what has been rounded still counts as free to move",
    tries="the Cholesky factor of the inverse, whose row j is that of what is left at column j.",
    caught_by="many",
)
def of_the_inverse(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, torch.linalg.inv(gram))


@gptq_update.mistake(
    says="the rows of gram itself are used: an error moves its neighbours in the same direction",
    tries="the factor of the inverse.",
    caught_by="pair",
)
def of_gram_itself(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale, gram)


@gptq_update.mistake(
    says="the error is taken from the weight as it was at first, without the corrections it has received",
    tries="w[:, j], the copy that is being changed, in the error.",
    caught_by="many",
)
def of_the_first_weight(weight: Any, gram: Any, scale: Any) -> Any:
    factor, w, codes = _factor(gram), weight.clone(), torch.zeros_like(weight)
    for j in range(w.shape[1]):
        codes[:, j] = _nearest(w[:, j], scale[:, j])
        error = (weight[:, j] - codes[:, j] * scale[:, j]) / factor[j, j]
        w[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return codes


@gptq_update.mistake(
    says="only the next column is corrected, not all behind it",
    tries="w[:, j + 1:].",
    caught_by="many",
)
def next_only(weight: Any, gram: Any, scale: Any) -> Any:
    factor = _factor(gram)
    return _by(weight, scale, torch.diag(factor.diag()) + torch.diag(factor.diag(1), 1))


@gptq_update.mistake(
    says="the columns are rounded from the last to the first, and find nobody behind them",
    tries="for j in range(K).",
    caught_by="pair",
)
def backwards(weight: Any, gram: Any, scale: Any) -> Any:
    flipped = _by(weight.flip(1), scale.flip(1), _factor(gram.flip(0, 1)))
    return flipped.flip(1)


@gptq_update.mistake(
    says="the step of column 0 is used for all columns",
    tries="scale[:, j].",
    caught_by="grouped",
)
def first_step(weight: Any, gram: Any, scale: Any) -> Any:
    return _by(weight, scale[:, :1].expand_as(scale), _factor(gram))


@gptq_update.mistake(
    says="the codes are clamped at the end: the error that is passed on leaves out what the clamp takes",
    tries=".clamp(-8, 7) before the error is computed.",
    caught_by="clamped",
)
def clamped_last(weight: Any, gram: Any, scale: Any) -> Any:
    factor, w, codes = _factor(gram), weight.clone(), torch.zeros_like(weight)
    for j in range(w.shape[1]):
        codes[:, j] = torch.round(w[:, j] / scale[:, j])
        error = (w[:, j] - codes[:, j] * scale[:, j]) / factor[j, j]
        w[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return codes.clamp(LOW, HIGH)


@gptq_update.mistake(
    says="the corrections are written into the caller's weight",
    tries="w = weight.clone().",
    caught_by="nearer",
)
def in_place(weight: Any, gram: Any, scale: Any) -> Any:
    factor, codes = _factor(gram), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = _nearest(weight[:, j], scale[:, j])
        error = (weight[:, j] - codes[:, j] * scale[:, j]) / factor[j, j]
        weight[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return codes


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@gptq_update.alternative("with the lower factor, and codes as int8")
def lower(weight: Any, gram: Any, scale: Any) -> Any:
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)))
    return _by(weight, scale, factor.T).to(torch.int8)


@gptq_update.alternative("the inverse of what is left, brought up to date by elimination")
def eliminated(weight: Any, gram: Any, scale: Any) -> Any:
    w, inverse, codes = weight.clone(), torch.linalg.inv(gram), []
    for j in range(w.shape[1]):
        codes.append(_nearest(w[:, j], scale[:, j]))
        error = (w[:, j] - codes[-1] * scale[:, j]) / inverse[j, j]
        w = w - error[:, None] * inverse[j] * (torch.arange(w.shape[1]) > j)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.stack(codes, dim=1)


@gptq_update.alternative("in blocks: columns of a block at once, the rest after it by one product")
def in_blocks(weight: Any, gram: Any, scale: Any) -> Any:
    w, factor, codes = weight.clone(), _factor(gram), torch.zeros_like(weight)
    for a in range(0, w.shape[1], 4):
        b = min(a + 4, w.shape[1])
        errors = torch.zeros(w.shape[0], b - a, dtype=w.dtype)
        for j in range(a, b):
            codes[:, j] = _nearest(w[:, j], scale[:, j])
            errors[:, j - a] = (w[:, j] - codes[:, j] * scale[:, j]) / factor[j, j]
            w[:, j + 1 : b] -= torch.outer(errors[:, j - a], factor[j, j + 1 : b])
        w[:, b:] -= errors @ factor[a:b, b:]
    return codes.int()
