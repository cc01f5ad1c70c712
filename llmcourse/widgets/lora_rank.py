"""Rank and alpha: what an adapter of a rank holds in memory, and how far its first step goes.

On the left, bytes that are there all the time: weights, and gradient, moments and master of what is trained.
On the right, the first step of Adam from B = 0. Every entry of B moves by the learning rate, whatever its
gradient; so the correction that the step makes is s·lr·Σ_j |A·x|_j, a sum of r terms. With s = alpha/r it is
the same at every rank; with alpha/√r it grows as √r.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import ipywidgets as W
import numpy as np

from llmcourse.finetune.bill import bills
from llmcourse.finetune.lora import PLACES, LoRA
from llmcourse.widgets.explorable import Explorable, choice
from llmcourse.widgets.training_ledger import MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
TARGETS = {"q, v": ("q", "v"), "attention": ("q", "k", "v", "o"), "everywhere": tuple(PLACES)}
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = {"weights": BLUE, "gradients": ORANGE, "moments": "#56B4E9", "masters": "#999999"}
CAPTION = (
    "Move the rank: the adapter stays a sliver beside the frozen weights. Move alpha: the first step grows "
    "with it, and with alpha/r it does not depend on the rank."
)


def first_step(r: int, scale: float, *, lr: float = 1e-3, features: int = 576, draws: int = 200) -> float:
    """The mean change of an output by Adam's first step, for x of unit-variance features.

    A [r, K] is uniform on ±1/√K, as it is initialised.
    """
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (r, features)) / features**0.5
    x = rng.normal(size=(draws, features))
    return float(scale * lr * np.abs(x @ a.T).sum(1).mean())


def draw(model: str, targets: str, r: int, alpha: float) -> Figure:
    """Memory of three ways to fine-tune, and the first step against the rank."""
    from matplotlib.figure import Figure

    lora = LoRA(r, alpha, TARGETS[targets])
    found = bills(MODELS[model], lora)
    figure = Figure(figsize=(9.4, 3), layout="constrained")
    memory, step = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for y, bill in enumerate(found):
        left = 0.0
        for part, color in COLORS.items():
            nbytes = getattr(bill, part) / 1e9
            memory.barh(y, nbytes, left=left, color=color, edgecolor="white", label=part if y == 0 else None)
            left += nbytes
        memory.text(left, y, f" {left:,.2f} GB, {bill.trained / 1e6:,.2f} M trained", va="center", fontsize=8)
    memory.set_yticks(range(len(found)), [bill.name for bill in found])
    memory.invert_yaxis()
    memory.set(xlabel="GB, without activations", xlim=(0, 1.45 * found[0].total / 1e9))
    memory.legend(fontsize=8, frameon=False, loc="lower right")
    for stable, color, label in ((False, BLUE, "s = alpha / r"), (True, ORANGE, "s = alpha / √r")):
        scales = [replace(lora, r=n, rank_scaled=stable).scale for n in RANKS]
        step.plot(
            RANKS,
            [first_step(n, s) for n, s in zip(RANKS, scales, strict=True)],
            "o-",
            color=color,
            label=label,
        )
    step.axvline(r, color="#999999", linestyle="--", linewidth=1)
    step.set_xscale("log", base=2)
    step.set_yscale("log")
    step.set(xlabel="rank", ylabel="change of an output", ylim=(1e-4, 3), xticks=RANKS)
    step.set_xticklabels([str(n) for n in RANKS])
    step.set_title("Adam's first step, learning rate 0.001", fontsize=9)
    step.legend(fontsize=8, frameon=False, loc="upper left")
    for ax in (memory, step):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def explore(model: str = "SmolLM2-135M") -> Explorable:
    """Choose model, projections, rank and alpha."""
    look = {"style": {"description_width": "110px"}, "layout": W.Layout(width="480px")}
    return Explorable(
        draw,
        CAPTION,
        model=choice(list(MODELS), model, "model", **look),
        targets=choice(list(TARGETS), "everywhere", "projections", **look),
        r=choice(RANKS, 8, "rank r", **look),
        alpha=choice([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], 16.0, "alpha", **look),
    )
