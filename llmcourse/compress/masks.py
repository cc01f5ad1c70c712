"""Which weights stay: a score for each of them, and a pattern that says how many of which may.

Every method of pruning by itself answers two questions. *How much does a weight matter?* is its score; *among
which weights does it compete?* is the pattern:

    Pattern(0.5)                      half of the weights go, the least of the whole layer
    Pattern(0.5, per="row")           half of each row: every output keeps as many inputs
    Pattern(n=2, m=4)                 2 of every 4 neighbours of a row stay, as sparse tensor cores want it

The tighter the pattern, the less choice a score has, and the worse the model; the looser, the harder the
zeros are to use. An unstructured half saves no time on a GPU at all: where the zeros are must be stored and
read too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmcourse.errors import ShapeError


@dataclass(frozen=True)
class Pattern:
    """How many weights stay, and among which ones they are chosen.

    sparsity   the share that goes, 0 ≤ sparsity < 1; of an n:m pattern 1 − n/m
    per        "layer": all weights of a matrix compete; "row": those of one output
    n, m       n of m neighbours in a row stay (0, 0: no such pattern)

    Raises   ShapeError for shares and patterns that leave nothing, or more than there is.
    """

    sparsity: float = 0.5
    per: Literal["layer", "row"] = "layer"
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if (self.n, self.m) != (0, 0):
            if not 0 < self.n <= self.m:
                raise ShapeError(
                    f"a pattern of {self.n}:{self.m}.",
                    "Of each m neighbours n stay, at least one and at most all.",
                    "n=2, m=4.",
                )
            object.__setattr__(self, "sparsity", 1 - self.n / self.m)
        if not 0 <= self.sparsity < 1:
            raise ShapeError(
                f"a sparsity of {self.sparsity:g}.",
                "It is the share of weights that become zero; a layer without weights computes nothing.",
                "a number from 0 to below 1, such as 0.5.",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{self.sparsity:.0%}"


def keep(scores: Tensor, pattern: Pattern) -> Tensor:
    """Which entries of scores [N, K] stay, bool [N, K]: the highest, of equal ones the first.

    With an n:m pattern the last group of a row whose length is not a multiple of m is shorter, and keeps n of
    what it has.

    Raises   ShapeError for scores that are no matrix.
    """
    require_matrix(scores)
    rows, columns = scores.shape
    if pattern.m:
        spare = -columns % pattern.m
        # What is not there loses against everything that is.
        padded = torch.nn.functional.pad(scores.double(), (0, spare), value=-torch.inf)
        groups = padded.view(rows, -1, pattern.m)
        return _largest(groups, pattern.n).view(rows, -1)[:, :columns]
    flat = scores if pattern.per == "row" else scores.reshape(1, -1)
    going = int(pattern.sparsity * flat.shape[1] + 1e-9)
    return _largest(flat, flat.shape[1] - going).view(rows, columns)


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest along the last dimension."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def magnitude_scores(weight: Tensor) -> Tensor:
    """|w|: a small weight changes the output little, if all inputs are alike."""
    return weight.abs()


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """|w|·‖x‖ of weight [N, K] with inputs of norms [K] (Sun et al. 2023, arXiv:2306.11695).

    It is exactly how much the output changes, in norm, when this weight alone goes: inputs are not alike.
    """
    require_matrix(weight)
    if norm.shape != weight.shape[1:]:
        raise ShapeError(
            f"norms of shape {list(norm.shape)} for a weight of shape {list(weight.shape)}.",
            "Column k of the weight multiplies feature k of the input.",
            f"one norm for each of {weight.shape[1]} columns, `inputs.norm`.",
        )
    return weight.abs() * norm


def require_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ShapeError(
            f"a weight of shape {list(weight.shape)}.",
            "Pruning chooses among the entries of a matrix, [outputs, inputs].",
            "`layer.weight` of a linear layer.",
        )
