"""What a teacher says at a temperature, what a label says, and how strongly a student is pulled."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor

from llmcourse.widgets.explorable import Explorable

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"
EXAMPLE = {
    " Paris": 9.0,
    " a": 6.4,
    " the": 6.1,
    " located": 5.2,
    " known": 4.6,
    " not": 3.5,
    " Lyon": 3.2,
    " blue": -1.0,
}
"""A teacher's logits after "The capital of France is", rounded, for where no model is loaded."""


def pull(teacher: Tensor, student: Tensor, temperature: float, *, squared: bool) -> Tensor:
    """−∂ loss / ∂ student's logits, [V], of KL(p_T ‖ q_T), with the factor T² or without."""
    p, q = ((z / temperature).softmax(-1) for z in (teacher, student))
    return (p - q) / temperature * (temperature**2 if squared else 1)


def temperature_explorer(
    logits: Sequence[float] | Tensor | None = None, names: Sequence[str] = (), *, temperature: float = 1.0
) -> Explorable:
    """Bars: the teacher's probabilities at a temperature, and the pull on a student that knows nothing yet.

    logits, names   of the tokens that are shown (None: an example with eight)
    """
    if logits is None:
        logits, names = list(EXAMPLE.values()), list(EXAMPLE)
    teacher = torch.as_tensor(logits).double()
    labels = [f"{name!r}" for name in (names or range(len(teacher)))]
    student = torch.zeros_like(teacher)

    def draw(temperature: float, factor: str) -> Figure:
        p = (teacher / temperature).softmax(-1)
        force = pull(teacher, student, temperature, squared=factor == "T²")
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        rows = range(len(teacher))
        left.barh(rows, p.tolist(), color=BLUE)
        left.set_yticks(rows, labels, family="DejaVu Sans Mono")
        left.invert_yaxis()
        left.set(xlim=(0, 1), xlabel=f"teacher's probability at T = {temperature:.1f}")
        right.barh(rows, force.tolist(), color=[BLUE if f > 0 else ORANGE for f in force])
        right.axvline(0, color="#888888", linewidth=0.8)
        right.set(xlim=(-2.2, 2.2), xlabel=f"pull on the student's logit, {factor} in the loss")
        entropy = float(-(p * p.clamp(min=1e-300).log()).sum())
        left.set_title(f"entropy {entropy:.2f} nats", fontsize=10)
        right.set_title(f"length {float(force.norm()):.2f}", fontsize=10)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    wide, style = W.Layout(width="420px"), {"description_width": "90px"}
    return Explorable(
        draw,
        "Raise T: unlikely tokens are heard, and the pull on the student stays; without T² it fades.",
        temperature=W.FloatSlider(
            temperature, min=0.5, max=10.0, step=0.5, description="T", layout=wide, style=style
        ),
        factor=W.SelectionSlider(
            options=["T²", "no factor"], value="T²", description="in the loss", layout=wide, style=style
        ),
    )
