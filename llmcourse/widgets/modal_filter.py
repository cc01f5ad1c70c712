"""One mode of a long filter: where its pole lies in the unit circle, and the filter that this makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import ipywidgets as W
import numpy as np

from llmcourse.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"
TAPS = 96
CAPTION = (
    "Move the pole: its distance from the circle is how long the filter remembers, its angle how fast it "
    "swings. At an angle of 0 the pole is real and the filter a plain decay."
)


def impulse(radius: float, turns: float, taps: int = TAPS) -> np.ndarray:
    """Re λᵗ for t = 0 … taps − 1, by the recurrence x_t = λ·x_{t−1} of one complex number."""
    pole, x, out = radius * np.exp(2j * math.pi * turns), 1.0 + 0j, []
    for _ in range(taps):
        out.append(x.real)
        x *= pole
    return np.array(out)


def half_life(radius: float) -> float:
    """Tokens in which the filter's envelope halves."""
    return math.log(0.5) / math.log(radius)


def pole_explorer(*, radius: float = 0.96, turns: float = 0.05) -> Explorable:
    """An explorable of one conjugate pair: radius |λ|, and `turns` of the circle a token."""

    def picture(radius: float, turns: float) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.1), layout="constrained")
        plane, taps = figure.subplots(1, 2, width_ratios=[1, 2.2])
        angle = np.linspace(0, 2 * math.pi, 200)
        plane.plot(np.cos(angle), np.sin(angle), color=GREY)
        x, y = radius * math.cos(2 * math.pi * turns), radius * math.sin(2 * math.pi * turns)
        plane.plot([x, x], [y, -y], "x", color=ORANGE, markersize=10, markeredgewidth=2.5)
        plane.axhline(0, color=GREY, linewidth=0.6)
        plane.axvline(0, color=GREY, linewidth=0.6)
        plane.set(aspect="equal", xlabel="Re λ", ylabel="Im λ", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        t = np.arange(TAPS)
        taps.plot(t, radius**t, color=GREY, linestyle="--", label="|λ|ᵗ")
        taps.plot(t, -(radius**t), color=GREY, linestyle="--")
        taps.vlines(t, 0, impulse(radius, turns), color=BLUE)
        taps.plot(t, impulse(radius, turns), ".", color=BLUE, label="h_t = Re λᵗ")
        taps.set(xlabel="t, tokens ago", ylabel="weight", ylim=(-1.1, 1.1))
        taps.set_title(
            f"|λ| = {radius:.3f}: half as much every {half_life(radius):.1f} tokens"
            + (f", a turn every {1 / turns:.1f}" if turns else ", no swing"),
            fontsize=10,
        )
        taps.legend(fontsize=8, frameon=False, loc="upper right")
        taps.spines[["top", "right"]].set_visible(False)
        return figure

    wide = {"layout": W.Layout(width="460px"), "style": {"description_width": "110px"}}
    return Explorable(
        picture,
        CAPTION,
        radius=W.FloatSlider(
            radius, min=0.5, max=0.995, step=0.005, description="|λ|", readout_format=".3f", **wide
        ),
        turns=W.FloatSlider(turns, min=0, max=0.5, step=0.01, description="turns a token", **wide),
    )
