"""What stays of a weight matrix: pattern, share and score chosen, zeros and the output's error seen."""

from __future__ import annotations

from functools import cache

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor

from llmcourse.compress.calibrate import Inputs
from llmcourse.compress.masks import Pattern
from llmcourse.compress.prune import METHODS, pruned_weight
from llmcourse.errors import UnknownNameError
from llmcourse.widgets.explorable import Explorable, choice

PATTERNS = ("anywhere", "in each row", "2:4", "4:8", "whole columns")
NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "wanda+move": "Wanda, moved", "sparsegpt": "SparseGPT"}
COLORS = ("#999999", "#0072B2", "#56B4E9", "#009E73")


@cache
def layer(rows: int = 24, columns: int = 48) -> tuple[Tensor, Inputs]:
    """A small made-up layer: features of unequal size that depend on each other, as a model's do."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.eye(columns) + 0.35 * torch.randn(columns, columns, generator=generator)
    size = torch.exp(0.8 * torch.randn(columns, generator=generator))
    x = (torch.randn(2000, columns, generator=generator) @ mix) * size
    return torch.randn(rows, columns, generator=generator) / columns**0.5, Inputs.of(x)


def pruned(weight: Tensor, inputs: Inputs, method: str, where: str, share: float) -> Tensor:
    """The weight with zeros; whole columns go by the sum of their scores, and nothing moves for them."""
    if where not in PATTERNS:
        raise UnknownNameError(
            f"there is no pattern {where!r}.", f"Patterns: {', '.join(PATTERNS)}.", "one of them."
        )
    if where == "whole columns":
        scores = (weight**2).sum(0) * (inputs.norm**2 if method != "magnitude" else 1)
        going = scores.argsort()[: int(share * len(scores))]
        return weight.clone().index_fill_(1, going, 0.0)
    if ":" in where:
        n, m = (int(part) for part in where.split(":"))
        pattern = Pattern(n=n, m=m)
    else:
        pattern = Pattern(share, per="row" if where == "in each row" else "layer")
    return pruned_weight(weight, inputs, method, pattern)


def error(weight: Tensor, inputs: Inputs, other: Tensor) -> float:
    """How far the output is off, as a share of it (root of summed squares)."""
    return (inputs.error(other - weight) / inputs.error(weight)) ** 0.5


def draw(
    method: str, where: str, share: float, inputs: Inputs | None = None, weight: Tensor | None = None
) -> Figure:
    """The matrix with its zeros, and beside it the error of all methods in this pattern."""
    if weight is None or inputs is None:
        weight, inputs = layer()
    results = {name: pruned(weight, inputs, name, where, share) for name in METHODS}
    figure = Figure(figsize=(9.4, 3.2), layout="constrained")
    ax, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    shown = results[method]
    top = float(weight.abs().max())
    masked = torch.where(shown == 0, torch.nan, shown).numpy()
    ax.set_facecolor("#e8e8e8")
    ax.imshow(masked, cmap="PuOr", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    ax.set_title(
        f"{NAMES[method]}, {where}: {(shown == 0).float().mean():.0%} of the weights are zero", fontsize=10
    )
    ax.set_xlabel("input")
    ax.set_ylabel("output")
    errors = [error(weight, inputs, results[name]) for name in METHODS]
    labels = [NAMES[name] for name in METHODS]
    drawn = bars.barh(labels, [100 * e for e in errors], color=COLORS)
    drawn[METHODS.index(method)].set_edgecolor("black")
    for y, e in enumerate(errors):
        bars.text(100 * e, y, f" {e:.0%}", va="center", fontsize=9)
    bars.set_xlim(0, 125 * max(*errors, 0.01))
    bars.invert_yaxis()
    bars.set_xlabel("error of the output, %")
    bars.spines[["top", "right"]].set_visible(False)
    return figure


def explore() -> Explorable:
    """Choose how many weights go, where they may, and by which score."""
    look = {"style": {"description_width": "110px"}, "layout": W.Layout(width="460px")}
    return Explorable(
        draw,
        "Grey is zero. Tighten the pattern from anywhere to whole columns and compare the bars: what costs "
        "more, "
        "the pattern or the score? (2:4 and 4:8 are always one half.)",
        method=choice([(NAMES[m], m) for m in METHODS], "sparsegpt", "method", **look),
        where=choice(list(PATTERNS), "2:4", "zeros", **look),
        share=choice([(f"{s:.0%}", s) for s in (0.25, 0.5, 0.625, 0.75, 0.875)], 0.5, "share", **look),
    )
