"""Exercise `sparsegpt_update`: those that stay make up for those that go."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

sparsegpt_update = Exercise(
    "sparsegpt_update",
    title="SparseGPT: column by column",
    arguments=("weight", "gram", "mask"),
    shapes=(
        "weight   float64 tensor [N, K]: y = x @ weight.T",
        "gram     float64 tensor [K, K]: G = Σ x xᵀ over the layer's inputs, positive definite",
        "mask     bool tensor [N, K]: True where a weight stays",
        "returns  float64 tensor [N, K]: zeros exactly where mask is False, the others moved. Columns are",
        "         removed from left to right, and only weights to the right of a column make up for it",
    ),
    formula="for j = 0 … K−1, in rows with mask[n, j] False:  w[j:] −= w_j / P_00 · P_0:,   "
    "P = (G[j:, j:])⁻¹",
    difficulty=4,
    importance=5,
    minutes=35,
    points=7,
    hints=(
        "A row's error is δ G δᵀ. If δ_0 must be −w_0 and the rest of δ is free, what is the best rest? In "
        "the formula, what does element 0 of the update do to w_j itself?",
        "The formula can be written as it stands: an inverse for each column, a rank-1 update for all rows "
        "at once, with an error of 0 in the rows that keep the weight. All inverses come from one factor, "
        "too: with G⁻¹ = UᵀU, U upper triangular, P_0: / P_00 = U[j, j:] / U[j, j].",
        "u = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True); w = weight.clone(); for j in "
        "range(K): error = torch.where(mask[:, j], 0.0, w[:, j]) / u[j, j]; w[:, j:] -= error[:, None] * "
        "u[j, j:]; w[~mask[:, j], j] = 0. Return w.",
    ),
)


def expected(weight: Any, gram: Any, mask: Any) -> np.ndarray:
    """By an inverse for each column, in float64."""
    w, g, m = weight.double().numpy().copy(), gram.double().numpy(), mask.numpy()
    for j in range(w.shape[1]):
        p = np.linalg.inv(g[j:, j:])
        w[:, j:] -= np.where(m[:, j], 0.0, w[:, j] / p[0, 0])[:, None] * p[0]
        w[~m[:, j], j] = 0.0
    return w


def draw(t: Trial, rows: int, columns: int) -> tuple[Any, Any, Any]:
    """A weight, the Gram matrix of features that depend on each other, and half of the weights."""
    x = t.normal(3 * columns, columns) @ (np.eye(columns) + 0.6 * t.normal(columns, columns))
    gram = torch.from_numpy(x.T @ x)
    mask = torch.from_numpy(t.rng.random((rows, columns)) < 0.5)
    return tensor(t, rows, columns, dtype="float64"), gram, mask


def _agree(t: Trial, weight: Any, gram: Any, mask: Any, what: str = "the weight") -> None:
    got = t.call(weight, gram, mask)
    t.close(got, expected(weight, gram, mask), what, rtol=1e-6)
    left = int((np.asarray(got)[~mask.numpy()] != 0).sum())
    t.holds(
        not left,
        f"{left} weights that go are not exactly zero",
        tries="writing 0 where mask is False, behind the update, which leaves a rounding error.",
    )


@sparsegpt_update.check("nothing goes: nothing moves")
def nothing(t: Trial) -> None:
    weight, gram, mask = draw(t, 3, t.odd(5, 9))
    _agree(t, weight, gram, mask | True)


@sparsegpt_update.check("two inputs that are the same: the second weight takes over the first")
def twins(t: Trial) -> None:
    gram = torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64) * t.size(2, 9)
    _agree(t, tensor(t, 4, 2, dtype="float64"), gram, torch.tensor([[False, True]]).expand(4, 2).clone())


@sparsegpt_update.check("the first column goes, from every row")
def first(t: Trial) -> None:
    weight, gram, mask = draw(t, t.odd(3, 5), t.odd(5, 9))
    mask[:] = True
    mask[:, 0] = False
    _agree(t, weight, gram, mask)


@sparsegpt_update.check("two columns go: the second is removed with the weights as they are by then")
def two(t: Trial) -> None:
    weight, gram, mask = draw(t, 3, t.odd(7, 11))
    mask[:] = True
    mask[:, 1] = mask[:, 4] = False
    _agree(t, weight, gram, mask)


@sparsegpt_update.check("another half of each row")
def halves(t: Trial) -> None:
    _agree(t, *draw(t, t.odd(5, 9), t.odd(9, 17)))
    t.unchanged()


@sparsegpt_update.check("the output's error is below that of zeros alone")
def better(t: Trial) -> None:
    weight, gram, mask = draw(t, 8, 24)
    mask[:] = True  # of each row one goes: what makes up for it does not go itself later
    mask[torch.arange(8), torch.from_numpy(t.integers(0, 12, 8))] = False
    got = np.asarray(t.call(weight, gram, mask), dtype=np.float64)
    w, g = weight.numpy(), gram.numpy()
    t.holds(got.shape == w.shape, f"the result has shape {got.shape}, expected {w.shape}")

    def error(change: np.ndarray) -> float:
        return float(((change @ g) * change).sum())

    plain, mine = error(w - w * mask.numpy()), error(w - got)
    t.at_most(mine / plain, 0.9, "error of the output, as a share of that of zeros alone")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _factor(gram: Any) -> Any:
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)


def _zeroed(w: Any, mask: Any) -> Any:
    return torch.where(mask, w, torch.zeros_like(w))


@sparsegpt_update.mistake(
    says="weights become zero, and the others stay as they were",
    tries="w[:, j:] -= error[:, None] * u[j, j:].",
    caught_by="twins",
)
def no_update(weight: Any, gram: Any, mask: Any) -> Any:
    return _zeroed(weight, mask)


@sparsegpt_update.mistake(
    says="the update has the wrong sign: the others move away",
    tries="w[:, j:] -= …, of which the first element takes w_j to zero.",
    caught_by="twins",
)
def wrong_sign(weight: Any, gram: Any, mask: Any) -> Any:
    w, u = weight.clone(), _factor(gram)
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j]) / u[j, j]
        w[:, j:] += error[:, None] * u[j, j:]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.mistake(
    says="the others move by the Gram matrix, where its inverse belongs",
    tries="(G[j:, j:])⁻¹, or the factor of the inverse.",
    caught_by="twins",
)
def gram_itself(weight: Any, gram: Any, mask: Any) -> Any:
    w = weight.clone()
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j]) / gram[j, j]
        w[:, j:] -= error[:, None] * gram[j, j:]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.mistake(
    says="the inverse of the whole Gram matrix serves all columns, as if those on the left could still move",
    tries="the inverse of G[j:, j:], anew for each column, or row j of the triangular factor.",
    caught_by="two",
)
def one_inverse(weight: Any, gram: Any, mask: Any) -> Any:
    w, p = weight.clone(), torch.linalg.inv(gram)
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j]) / p[j, j]
        w[:, j:] -= error[:, None] * p[j, j:]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.mistake(
    says="all weights move, those on the left too, and removed ones come back or are lost twice",
    tries="w[:, j:]: only what is to the right of a column moves.",
    caught_by="two",
)
def moves_left(weight: Any, gram: Any, mask: Any) -> Any:
    w, p = weight.clone(), torch.linalg.inv(gram)
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j]) / p[j, j]
        w -= error[:, None] * p[j]
        w[~mask[:, j], j] = 0
    return _zeroed(w, mask)


@sparsegpt_update.mistake(
    says="errors are taken from the weights as they were before anything moved",
    tries="w[:, j] when column j is reached, not weight[:, j].",
    caught_by="two",
)
def stale(weight: Any, gram: Any, mask: Any) -> Any:
    w, u = weight.clone(), _factor(gram)
    for j in range(w.shape[1]):
        error = _zeroed(weight[:, j], ~mask[:, j]) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.mistake(
    says="the error is not divided by the diagonal",
    tries="w[:, j] / u[j, j], so that the update's first element is w_j.",
    caught_by="twins",
)
def undivided(weight: Any, gram: Any, mask: Any) -> Any:
    w, u = weight.clone(), _factor(gram)
    for j in range(w.shape[1]):
        w[:, j:] -= _zeroed(w[:, j], ~mask[:, j])[:, None] * u[j, j:]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.mistake(
    says="the mask is read the other way round: what should stay goes",
    tries="True stays: torch.where(mask[:, j], 0, w[:, j]).",
    caught_by="nothing",
)
def inverted(weight: Any, gram: Any, mask: Any) -> Any:
    return right(weight, gram, ~mask)


@sparsegpt_update.mistake(
    says="rows that keep a weight move too, as if it went from every row",
    tries="an error of 0 in the rows where mask[:, j] is True.",
    caught_by="halves",
)
def all_rows(weight: Any, gram: Any, mask: Any) -> Any:
    w, u = weight.clone(), _factor(gram)
    for j in range(w.shape[1]):
        if mask[:, j].all():
            continue
        error = w[:, j] / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.mistake(
    says="the weight is overwritten, which is the caller's",
    tries="w = weight.clone().",
    caught_by="halves",
)
def in_place(weight: Any, gram: Any, mask: Any) -> Any:
    weight.copy_(right(weight, gram, mask))
    return weight


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@sparsegpt_update.alternative("one triangular factor of the inverse")
def right(weight: Any, gram: Any, mask: Any) -> Any:
    w, u = weight.clone(), _factor(gram)
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j]) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.alternative("the lower factor, whose columns are the upper one's rows")
def lower_factor(weight: Any, gram: Any, mask: Any) -> Any:
    w, low = weight.clone(), torch.linalg.cholesky(torch.linalg.inv(gram))
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j]) / low[j, j]
        w[:, j:] -= error[:, None] * low[j:, j]
        w[~mask[:, j], j] = 0
    return w


@sparsegpt_update.alternative("the formula as it stands: an inverse for each column")
def by_inverses(weight: Any, gram: Any, mask: Any) -> Any:
    w = weight.clone()
    for j in range(w.shape[1]):
        p = torch.linalg.inv(gram[j:, j:])
        w[:, j:] = w[:, j:] - torch.where(mask[:, j, None], 0.0, w[:, j, None] / p[0, 0] * p[0])
    return w * mask


@sparsegpt_update.alternative("least squares: the best change of the weights on the right, column by column")
def by_least_squares(weight: Any, gram: Any, mask: Any) -> Any:
    w = weight.clone()
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j])
        if j + 1 < w.shape[1]:
            w[:, j + 1 :] += error[:, None] * torch.linalg.solve(gram[j + 1 :, j + 1 :], gram[j + 1 :, j])
        w[:, j] -= error
    return w


@sparsegpt_update.alternative("the inverse, eliminated by one row and column at a time")
def eliminated(weight: Any, gram: Any, mask: Any) -> Any:
    w, p = weight.clone(), torch.linalg.inv(gram)
    for j in range(w.shape[1]):
        error = _zeroed(w[:, j], ~mask[:, j]) / p[0, 0]
        w[:, j:] -= error[:, None] * p[0]
        w[:, j] = _zeroed(w[:, j], mask[:, j])
        p = p[1:, 1:] - torch.outer(p[1:, 0], p[0, 1:]) / p[0, 0]
    return w
