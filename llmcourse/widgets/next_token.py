"""What the model would say next, and how temperature reshapes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as W
import torch
from matplotlib.figure import Figure

from llmcourse.engine.sampler import SamplingParams, probabilities
from llmcourse.widgets.explorable import Explorable

if TYPE_CHECKING:
    from llmcourse.engine import LLM

SHOWN = 12
BLUE, GREY = "#0072B2", "#BBBBBB"


def next_token_explorer(llm: LLM, prompt: str, *, temperature: float = 1.0) -> Explorable:
    """Bars of the likeliest next tokens after `prompt`, with sliders for temperature and top-p.

    Bars in colour can be drawn; grey ones were cut by top-p. The logits are computed once.
    """
    ids = torch.tensor([llm.encode(prompt)], device=llm.model.device)
    with torch.inference_mode():
        logits = llm.model(ids, last_only=True)[0, -1].float().cpu()
    top = logits.topk(SHOWN).indices
    names = [llm.tokenizer.token(int(i)).replace("\n", "⏎") for i in top]

    def draw(temperature: float, top_p: float) -> Figure:
        free = probabilities(logits, SamplingParams(temperature=temperature))[top]
        cut = probabilities(logits, SamplingParams(temperature=temperature, top_p=top_p))[top]
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        rows = range(SHOWN)
        axes.barh(rows, free, color=GREY)
        axes.barh(rows, cut, color=BLUE)
        axes.set_yticks(rows, [f"{name!r}" for name in names], family="DejaVu Sans Mono")
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("probability of being drawn")
        axes.set_title(f"after {prompt!r} · temperature {temperature:.2f}, top-p {top_p:.2f}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    wide = W.Layout(width="420px")
    style = {"description_width": "90px"}
    return Explorable(
        draw,
        "Move temperature down: one token takes all. Move it up: the rest catch up. Top-p cuts the tail.",
        temperature=W.FloatSlider(
            temperature, min=0.1, max=3.0, step=0.1, description="temperature", layout=wide, style=style
        ),
        top_p=W.FloatSlider(1.0, min=0.1, max=1.0, step=0.05, description="top-p", layout=wide, style=style),
    )
