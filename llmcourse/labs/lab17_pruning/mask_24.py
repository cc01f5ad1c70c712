"""Exercise `mask_24`: two of every four, by what a weight does to the output."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

mask_24 = Exercise(
    "mask_24",
    title="Two of every four, by Wanda's score",
    arguments=("weight", "x"),
    shapes=(
        "weight   tensor [N, K], K a multiple of 4: y = x @ weight.T",
        "x        tensor [S, K]: inputs of the layer, S tokens of a text",
        "returns  bool tensor [N, K]: True where a weight stays. Of columns 4g … 4g+3 of each row exactly",
        "         the two with the highest scores stay; of equal scores any",
    ),
    formula="score[n, k] = |weight[n, k]| · √(Σ_s x[s, k]²)",
    difficulty=2,
    importance=5,
    minutes=15,
    points=4,
    hints=(
        "How much does y change if a single weight becomes zero? Why is its size alone not the answer?",
        "The change of y[:, n] is weight[n, k] · x[:, k], and its norm is the score: a product of [N, K] "
        "with [K]. Then weights compete with their three neighbours of the same row: view the scores as "
        "[N, K / 4, 4] and take the two largest along the last dimension.",
        "scores = weight.abs() * x.norm(dim=0); groups = scores.view(N, -1, 4); "
        "best = groups.topk(2, dim=-1).indices; torch.zeros_like(groups, dtype=torch.bool)"
        ".scatter_(-1, best, True).view(N, K).",
    ),
)


def expected(weight: Any, x: Any) -> np.ndarray:
    """By sorting each group, in float64."""
    w = weight.double().numpy()
    scores = np.abs(w) * np.sqrt((x.double().numpy() ** 2).sum(0))
    groups = scores.reshape(len(w), -1, 4)
    ranks = groups.argsort(-1, kind="stable").argsort(-1, kind="stable")
    return (ranks >= 2).reshape(w.shape)


def _agree(t: Trial, weight: Any, x: Any, what: str = "the mask") -> None:
    got = t.call(weight, x)
    told = str(getattr(got, "dtype", "none")).removeprefix("torch.")
    t.equal(told, "bool", "number format of the mask")
    t.equal(got, torch.from_numpy(expected(weight, x)), what)
    t.unchanged()


def _inputs(t: Trial, tokens: int, columns: int) -> Any:
    """Features of very different size, as a model's are."""
    return tensor(t, tokens, columns) * torch.from_numpy(np.exp(t.normal(columns, scale=1.5))).float()


@mask_24.check("a row of four weights, all inputs alike")
def one_group(t: Trial) -> None:
    weight = torch.from_numpy(t.rng.permutation([0.5, -3.0, 1.0, -0.25]).astype(np.float32))[None]
    _agree(t, weight, torch.ones(2, 4), "the mask of four weights, where the larger magnitudes stay")


@mask_24.check("many rows and groups, all inputs alike")
def by_magnitude(t: Trial) -> None:
    rows, columns = t.odd(3, 9), 4 * t.odd(3, 9)
    _agree(t, tensor(t, rows, columns), torch.ones(3, columns))


@mask_24.check("a feature that is large once, and one that is there all the time")
def squares(t: Trial) -> None:
    # Norms 10, 4·√5 ≈ 8.9, 1, 1: sums of magnitudes 10, 20, 1 and 1 and maxima 10, 4, 1, 1 order otherwise.
    x = torch.zeros(5, 4)
    x[0, 0], x[:, 1], x[0, 2:] = 10.0, 4.0, 1.0
    weight = torch.tensor([[1.0, 1.0, 9.5, 0.5], [1.0, 1.0, 0.5, 9.5], [0.75, 1.0, 8.5, 0.5]])
    _agree(t, weight, x)


@mask_24.check("inputs of different sizes")
def by_inputs(t: Trial) -> None:
    rows, columns = t.odd(3, 9), 4 * t.odd(3, 9)
    _agree(t, tensor(t, rows, columns), _inputs(t, t.odd(5, 9), columns))


@mask_24.check("two of every four stay, also where weights are equal")
def ties(t: Trial) -> None:
    weight = tensor(t, 3, 16)
    weight[0, 4:8], weight[1, :4], weight[2, 8:] = 0.0, 0.5, 0.0
    got = t.call(weight, _inputs(t, 4, 16))
    shape = tuple(getattr(got, "shape", ()))
    t.equal(shape, (3, 16), "shape of the mask")
    counts = np.asarray(got).reshape(3, 4, 4).sum(-1)
    t.equal(counts, np.full((3, 4), 2), "weights that stay in each group")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _scores(weight: Any, x: Any) -> Any:
    return weight.abs() * x.norm(dim=0)


def _two_of_four(scores: Any, largest: bool = True) -> Any:
    groups = scores.view(scores.shape[0], -1, 4)
    best = groups.topk(2, dim=-1, largest=largest).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(scores.shape)


@mask_24.mistake(
    says="the two smallest stay",
    tries="largest=True, or the mask turned around.",
    caught_by="one_group",
)
def smallest(weight: Any, x: Any) -> Any:
    return _two_of_four(_scores(weight, x), largest=False)


@mask_24.mistake(
    says="signs count: large negative weights go",
    tries="weight.abs().",
    caught_by="one_group",
)
def signed(weight: Any, x: Any) -> Any:
    return _two_of_four(weight * x.norm(dim=0))


@mask_24.mistake(
    says="weights are judged by their magnitude alone, whatever they multiply",
    tries="weight.abs() * x.norm(dim=0).",
    caught_by="squares",
)
def magnitude(weight: Any, x: Any) -> Any:
    return _two_of_four(weight.abs())


@mask_24.mistake(
    says="inputs are judged by the sum of their magnitudes, not by their norm",
    tries="x.norm(dim=0): squares, summed over tokens, and the root.",
    caught_by="squares",
)
def sum_of_magnitudes(weight: Any, x: Any) -> Any:
    return _two_of_four(weight.abs() * x.abs().sum(0))


@mask_24.mistake(
    says="inputs are judged by their largest magnitude, not by their norm",
    tries="x.norm(dim=0).",
    caught_by="squares",
)
def largest_input(weight: Any, x: Any) -> Any:
    return _two_of_four(weight.abs() * x.abs().amax(0))


@mask_24.mistake(
    says="the square of the inputs' norm meets the weight itself, not its square",
    tries="the root: weight.abs() * x.norm(dim=0).",
    caught_by="squares",
)
def squared_norm(weight: Any, x: Any) -> Any:
    return _two_of_four(weight.abs() * (x**2).sum(0))


@mask_24.mistake(
    says="half of each row stays, but not two of every four",
    tries="scores.view(N, -1, 4): neighbours compete with each other only.",
    caught_by="by_magnitude",
)
def half_of_row(weight: Any, x: Any) -> Any:
    scores = _scores(weight, x)
    best = scores.topk(scores.shape[1] // 2, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


@mask_24.mistake(
    says="the groups lie along columns: four outputs compete, not four inputs",
    tries="groups of neighbours within a row: view(N, K // 4, 4).",
    caught_by="one_group",
)
def down_columns(weight: Any, x: Any) -> Any:
    scores = _scores(weight, x)
    rows = scores.shape[0]
    padded = torch.nn.functional.pad(scores.T, (0, -rows % 4), value=-1.0).contiguous()
    return _two_of_four(padded)[:, :rows].T.contiguous()


@mask_24.mistake(
    says="a group is every K/4-th column, not four neighbours",
    tries="view(N, K // 4, 4), and not view(N, 4, K // 4).",
    caught_by="by_magnitude",
)
def strided_groups(weight: Any, x: Any) -> Any:
    scores = _scores(weight, x)
    rows, columns = scores.shape
    groups = scores.view(rows, 4, -1).transpose(1, 2).reshape(rows, columns)
    return _two_of_four(groups).view(rows, -1, 4).transpose(1, 2).reshape(rows, columns)


@mask_24.mistake(
    says="a threshold decides: where scores are equal, more than two stay",
    tries="indices, as topk or argsort give them, not `scores >= the second largest`.",
    caught_by="ties",
)
def threshold(weight: Any, x: Any) -> Any:
    groups = _scores(weight, x).view(weight.shape[0], -1, 4)
    second = groups.topk(2, dim=-1).values[..., 1:]
    return (groups >= second).view(weight.shape)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@mask_24.alternative("by the root of the Gram matrix's diagonal, and a sort")
def by_sorting(weight: Any, x: Any) -> Any:
    rows, columns = weight.shape
    scores = weight.double().abs() * (x.double().T @ x.double()).diagonal().sqrt()
    order = scores.view(rows, -1, 4).argsort(dim=-1, descending=True)
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool)
    return mask.scatter(-1, order[..., :2], torch.tensor(True).expand(rows, columns // 4, 2)).view(
        rows, columns
    )


@mask_24.alternative("squares of both, which order alike, group by group")
def one_by_one(weight: Any, x: Any) -> Any:
    scores = weight.double() ** 2 * (x.double() ** 2).sum(0)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for start in range(0, weight.shape[1], 4):
        part = scores[:, start : start + 4]
        for row, places in enumerate(part.topk(2, dim=1).indices.tolist()):
            for place in places:
                mask[row, start + place] = True
    return mask


@mask_24.alternative("a weight stays if fewer than two neighbours beat it")
def by_counting(weight: Any, x: Any) -> Any:
    groups = _scores(weight, x).view(weight.shape[0], -1, 4)
    place = torch.arange(4)
    a, b = groups[..., :, None], groups[..., None, :]
    beaten = (b > a) | ((b == a) & (place[None, :] < place[:, None]))
    return (beaten.sum(-1) < 2).view(weight.shape)
