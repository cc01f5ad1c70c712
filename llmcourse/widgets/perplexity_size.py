"""Perplexity against size: where each way to store a model's weights stands, and what a budget buys.

A point is one stored model. The *frontier* joins those that no other point beats in both size and perplexity;
whoever has a budget in bytes takes the last point of the frontier that fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import ipywidgets as W

from llmcourse.errors import ShapeError
from llmcourse.widgets.explorable import Explorable, choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
CAPTION = (
    "Move the budget: filled points fit into it, and the ringed one is the best of them. The line is the "
    "frontier: nothing is both smaller and better than a point on it."
)


CEILINGS = (1.1, 1.5, 2.0)
"""Perplexities that the picture reaches to, in those of the best point."""


@dataclass(frozen=True)
class Stored:
    """A model as it is stored: a name, the method that chose its codes, its bytes and its perplexity."""

    name: str
    method: str
    nbytes: float
    perplexity: float


def frontier(points: Sequence[Stored]) -> list[Stored]:
    """The points that no other equals or beats in both, from the smallest to the largest."""
    found: list[Stored] = []
    for p in sorted(points, key=lambda p: (p.nbytes, p.perplexity)):
        if not found or p.perplexity < found[-1].perplexity:
            found.append(p)
    return found


def best_within(points: Sequence[Stored], budget: float) -> Stored | None:
    """The point of lowest perplexity among those of at most `budget` bytes; None where nothing fits."""
    fitting = [p for p in points if p.nbytes <= budget]
    return min(fitting, key=lambda p: (p.perplexity, p.nbytes), default=None)


def explore(points: Sequence[Stored], *, budget: float | None = None) -> Explorable:
    """An explorable of these points; `budget` in bytes, where it begins (the middle of the sizes).

    Raises ShapeError for fewer than two points.
    """
    if len(points) < 2:
        raise ShapeError(
            f"{len(points)} stored models are no choice.",
            "The picture compares sizes.",
            "two points or more.",
        )
    sizes = sorted(p.nbytes for p in points)
    steps = sorted({*sizes, sizes[0] * 0.95, *((a + b) / 2 for a, b in pairwise(sizes) if a < b)})
    wanted = (sizes[0] + sizes[-1]) / 2 if budget is None else budget
    first = min(steps, key=lambda s: abs(s - wanted))
    look = {"layout": W.Layout(width="480px"), "style": {"description_width": "110px"}}

    def show(budget: float, most: float) -> Figure:
        return draw(points, budget, most=most)

    return Explorable(
        show,
        CAPTION,
        budget=choice([(f"{s / 1e6:,.1f} MB", s) for s in steps], first, "budget", **look),
        most=choice(
            [*((f"to {m:g} × the best", m) for m in CEILINGS), ("all, log", math.inf)], 1.5, "shown", **look
        ),
    )


def draw(points: Sequence[Stored], budget: float, *, most: float = 1.5) -> Figure:
    """The points, the frontier and the budget. What lies above `most` times the best is at the upper edge;
    without an end (inf) the scale is logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    ax = figure.subplots()
    methods = list(dict.fromkeys(p.method for p in points))
    best = best_within(points, budget)
    top = most * min(p.perplexity for p in points)
    for p in points:
        shade = SHADES[methods.index(p.method) % len(SHADES)]
        y, fits = min(p.perplexity, top), p.nbytes <= budget
        ax.plot(
            p.nbytes / 1e6,
            y,
            "^" if p.perplexity > top else "o",
            color=shade,
            fillstyle="full" if fits else "none",
            markersize=8,
        )
        label = p.name if p.perplexity <= top else f"{p.name}: {p.perplexity:,.4g}"
        ax.annotate(label, (p.nbytes / 1e6, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    edge = [p for p in frontier(points) if p.perplexity <= top]
    ax.plot([p.nbytes / 1e6 for p in edge], [p.perplexity for p in edge], color="#BBBBBB", zorder=0)
    if best is not None:
        ax.plot(
            best.nbytes / 1e6, min(best.perplexity, top), "o", color="black", fillstyle="none", markersize=15
        )
    ax.axvline(budget / 1e6, color="black", linestyle="--", linewidth=1)
    found = (
        f"{best.name}, {best.nbytes / 1e6:,.1f} MB, perplexity {best.perplexity:,.4g}"
        if best
        else "nothing fits"
    )
    ax.set_title(f"within {budget / 1e6:,.1f} MB: {found}", fontsize=10)
    ax.set(xlabel="size of the stored model, MB", ylabel="perplexity")
    if math.isinf(most):
        ax.set_yscale("log")
    for method in methods:
        ax.plot([], [], "o", color=SHADES[methods.index(method) % len(SHADES)], label=method)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return figure
