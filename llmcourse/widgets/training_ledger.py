"""Where the memory of a training step goes: the ledger's three moments as bars, against a GPU's memory."""

from __future__ import annotations

from dataclasses import replace

import ipywidgets as W
from matplotlib.figure import Figure

from llmcourse.errors import UnknownNameError
from llmcourse.hardware import gpu
from llmcourse.models import ModelConfig
from llmcourse.train.ledger import Ledger, Setup, ledger
from llmcourse.widgets.explorable import Explorable, choice

MODELS = {
    "SmolLM2-135M": ModelConfig(49152, 576, 30, 9, 3, 64, 1536, name="SmolLM2-135M"),
    "0.8B": ModelConfig(32768, 2048, 16, 32, 8, 64, 5632, name="0.8B"),
    "Llama-3.2-3B": ModelConfig(128256, 3072, 28, 24, 8, 128, 8192, name="Llama-3.2-3B"),
    "Llama-3.1-8B": ModelConfig(
        128256, 4096, 32, 32, 8, 128, 14336, tie_embeddings=False, name="Llama-3.1-8B"
    ),
}
COLORS = {
    "weights": "#0072B2",
    "AdamW's moments": "#56B4E9",
    "float32 masters": "#999999",
    "gradients": "#D55E00",
    "kept by the blocks": "#009E73",
    "in passing": "#F0E442",
    "head and loss": "#CC79A7",
}
FORMATS = {"float32": (4, False), "bfloat16 with masters": (2, True), "bfloat16 alone": (2, False)}


def bill(model: str, tokens: int, precision: str, every: int, fused_loss: bool) -> Ledger:
    """The ledger of one of MODELS; `tokens` in sequences of 2048 or, where fewer, in one."""
    if model not in MODELS or precision not in FORMATS:
        raise UnknownNameError(
            f"{model!r} in {precision!r} is not known.",
            f"Models: {', '.join(MODELS)}; formats: {', '.join(FORMATS)}.",
            "one of each.",
        )
    itemsize, masters = FORMATS[precision]
    length = min(tokens, 2048)
    setup = Setup(MODELS[model], max(1, tokens // length), length, itemsize=itemsize, masters=masters)
    return ledger(replace(setup, every=every, fused_loss=fused_loss, chunk_bytes=1 << 28))


def draw(found: Ledger, *, limit: str = "H100 SXM") -> Figure:
    """Three stacked bars, one a moment; the line is the memory of the GPU called `limit`."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    ax = figure.subplots()
    names = list(found.moments)
    for y, name in enumerate(names):
        left = 0.0
        for part, nbytes in found.moments[name].items():
            label = part if part not in ax.get_legend_handles_labels()[1] else None
            ax.barh(y, nbytes / 1e9, left=left, color=COLORS[part], edgecolor="white", label=label)
            left += nbytes / 1e9
        ax.text(left, y, f" {left:,.1f} GB", va="center", fontsize=9)
    room = gpu(limit).memory / 1e9
    ax.axvline(room, color="black", linestyle="--", linewidth=1)
    ax.text(room, -0.72, f"{limit} ", ha="right", fontsize=9)
    ax.set_xlim(0, 1.15 * max(room, found.peak / 1e9))
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("GB")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def explore() -> Explorable:
    """Choose model, tokens a step, format and remedies; see which moment is the peak, and whether it fits."""
    look = {"style": {"description_width": "130px"}, "layout": W.Layout(width="520px")}

    def show(model: str, tokens: int, precision: str, every: int, loss: bool) -> Figure:
        return draw(bill(model, tokens, precision, every, loss))

    return Explorable(
        show,
        "Move a control: the longest of the three bars is the peak; past the dashed line the step does "
        "not fit.",
        model=choice(list(MODELS), "0.8B", "model", **look),
        tokens=choice([2048 << i for i in range(7)], 16384, "tokens a step", **look),
        precision=choice(list(FORMATS), "bfloat16 with masters", "format", **look),
        every=choice([("nothing", 0), ("every block", 1), ("pieces of 4", 4)], 0, "checkpointed", **look),
        loss=choice([("plain", False), ("fused", True)], False, "head and loss", **look),
    )
