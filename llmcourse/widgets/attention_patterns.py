"""Attention of a real model, a head at a time: which token looks at which, and what kind of head that is.

On the left the weights of one head on your prompt, a row for each token that looks, a column for each that is
looked at. On the right all heads of the model, coloured by what they do on random tokens that come twice
(`llmcourse.models.inspect_attention`); the head on the left is framed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import ipywidgets as W

from llmcourse.models.inspect_attention import Head, attention_maps, heads
from llmcourse.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from llmcourse.models import Transformer
    from llmcourse.text.tokenizer import Tokenizer

LONGEST = 28  # tokens whose labels can still be read
COLORS = {
    "previous": "#0072B2",
    "first": "#CCCCCC",
    "local": "#009E73",
    "induction": "#D55E00",
    "mixed": "#FFFFFF",
}
CAPTION = (
    "Move layer and head with the arrow keys, or write another prompt and press Enter. Each row is a token "
    "that looks, each column a token that it looks at; rows sum to 1. The grid on the right shows where the "
    "head stands among all others, and what kind they are."
)


def attention_patterns(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, layer: int = 0, head: int = 0
) -> Explorable:
    """An explorable of `model`'s attention on a prompt of up to 28 tokens (what follows is left out)."""
    import torch

    table = heads(model, vocab_size=model.config.vocab_size)
    n_layers, n_heads = model.config.n_layers, model.config.n_heads

    @lru_cache(maxsize=8)
    def look(text: str) -> tuple[list[str], Tensor]:
        ids = tokenizer.encode(text or " ")[:LONGEST]
        return [label(tokenizer.decode([i])) for i in ids], attention_maps(
            model, torch.tensor([ids], device=model.device)
        )

    def picture(prompt: str, layer: int, head: int) -> Figure:
        from matplotlib.figure import Figure

        labels, maps = look(prompt)
        this = table[layer * n_heads + head]
        figure = Figure(figsize=(8.6, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 0.32])
        heat_map(left, maps[layer, head], labels)
        scores = ", ".join(f"{name} {value:.2f}" for name, value in this.scores.items())
        left.set_title(
            f"layer {layer}, head {head}: {this.kind}\nits habits on random tokens: {scores}",
            fontsize=9,
            loc="left",
        )
        head_grid(right, table, n_layers, n_heads, here=this)
        return figure

    wide = {"style": {"description_width": "60px"}, "layout": W.Layout(width="480px")}
    return Explorable(
        picture,
        CAPTION,
        prompt=W.Text(value=prompt, description="prompt", continuous_update=False, **wide),
        layer=W.IntSlider(value=layer, min=0, max=n_layers - 1, description="layer", **wide),
        head=W.IntSlider(value=head, min=0, max=n_heads - 1, description="head", **wide),
    )


def label(text: str) -> str:
    """A token as an axis label: its blanks and line ends made visible."""
    return text.replace("\n", "↵").replace(" ", "·").replace("$", r"\$") or "∅"


def heat_map(ax: Axes, weights: Tensor, labels: list[str], *, columns: list[str] | None = None) -> None:
    """Weights [S, T], white for 0, dark for 1; tokens on both axes (`columns` where they differ)."""
    ax.imshow(weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    columns = labels if columns is None else columns
    size = 8 if max(len(labels), len(columns)) <= 20 else 6.5
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    ax.set_xlabel("looked at", fontsize=8)
    ax.set_ylabel("looking", fontsize=8)
    ax.tick_params(length=0)


def head_grid(ax: Axes, table: list[Head], n_layers: int, n_heads: int, *, here: Head | None = None) -> None:
    """All heads as squares, a row a layer, coloured by kind; `here` is framed."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch, Rectangle

    squares = [[to_rgb(COLORS[h.kind]) for h in table if h.layer == layer] for layer in range(n_layers)]
    ax.imshow(squares, aspect="auto")
    ax.set_xticks(range(n_heads), [str(i) for i in range(n_heads)], fontsize=7)
    ax.set_yticks(range(0, n_layers, 5), [str(i) for i in range(0, n_layers, 5)], fontsize=7)
    ax.set_xlabel("head", fontsize=8)
    ax.set_ylabel("layer", fontsize=8)
    if here is not None:
        ax.add_patch(Rectangle((here.head - 0.5, here.layer - 0.5), 1, 1, fill=False, linewidth=2.2))
    counts = {kind: sum(h.kind == kind for h in table) for kind in COLORS}
    shown = [
        Patch(facecolor=COLORS[kind], edgecolor="#888888", label=f"{kind}: {n}") for kind, n in counts.items()
    ]
    ax.legend(handles=shown, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False)
