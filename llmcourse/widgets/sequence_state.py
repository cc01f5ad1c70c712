"""What a model must keep of a sequence, against its length: the picture behind "constant-size state".

Bytes come from `ModelConfig.cache_bytes`, the formulas that tests hold equal to what the caches allocate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import ipywidgets as W

from llmcourse.models import HyenaSizes, ModelConfig
from llmcourse.widgets.explorable import Explorable, choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = tuple(1 << i for i in range(8, 21))
COLORS = {
    "attention": "#0072B2",
    "hybrid": "#D55E00",
    "hyena, implicit": "#CC79A7",
    "linear": "#009E73",
    "ssm": "#56B4E9",
    "hyena, modal": "#E69F00",
}
CAPTION = (
    "Move the length, the batch, and how many layers share one attention layer in the hybrid (arrow keys). "
    "Lines that are flat are constant-size states; the hybrid rises with the slope of attention, lower."
)


def stacks(config: ModelConfig, every: int) -> dict[str, ModelConfig]:
    """`config` with all its mixers exchanged; in the hybrid each `every`-th layer stays attention."""

    def of(kind: str, hyena: str = "implicit") -> ModelConfig:
        return replace(config, layers=(kind,) * config.n_layers, hyena=_sizes(config, hyena))

    striped = ["attention" if i % every == every - 1 else "hyena" for i in range(config.n_layers)]
    return {
        "attention": of("attention"),
        "hybrid": replace(config, layers=tuple(striped), hyena=_sizes(config, "modal")),
        "hyena, implicit": of("hyena"),
        "linear": of("linear"),
        "ssm": of("ssm"),
        "hyena, modal": of("hyena", "modal"),
    }


def _sizes(config: ModelConfig, kind: str) -> HyenaSizes:
    return replace(config.hyena, kind="modal" if kind == "modal" else "implicit")


def human(nbytes: float) -> str:
    """1,234,567 → 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def state_explorer(config: ModelConfig, *, tokens: int = 4096, every: int = 8) -> Explorable:
    """An explorable of the bytes that six stacks of `config`'s size keep of a batch of sequences, in bf16."""

    def picture(tokens: int, every: int, batch: int) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        lines, bars = figure.subplots(1, 2, width_ratios=[1.35, 1])
        built: Mapping[str, ModelConfig] = stacks(config, every)
        for name, stack in built.items():
            sizes = [batch * stack.cache_bytes(n, 2) for n in LENGTHS]
            lines.loglog(LENGTHS, sizes, color=COLORS[name], label=name, base=2)
        lines.set_yscale("log", base=10)
        lines.axvline(tokens, color="#888888", linewidth=1, linestyle=":")
        lines.set(xlabel="tokens", ylabel="bytes of state")
        lines.set_xticks(LENGTHS[::3], [f"{n:,}" for n in LENGTHS[::3]], fontsize=8)
        lines.legend(fontsize=8, frameon=False)
        here = {name: batch * stack.cache_bytes(tokens, 2) for name, stack in built.items()}
        names = list(here)[::-1]
        drawn = bars.barh(names, [here[n] for n in names], color=[COLORS[n] for n in names])
        bars.bar_label(drawn, [human(here[n]) for n in names], fontsize=8, padding=3)
        bars.set_xscale("log")
        bars.set_xlim(min(here.values()) / 3, max(here.values()) * 12)
        bars.set_xlabel("bytes of state")
        bars.set_title(f"{batch} × {tokens:,} tokens, bf16", fontsize=10)
        for axes in (lines, bars):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
        return figure

    # Between divisors of the layers, most steps would change nothing.
    shares = sorted({n for n in range(1, config.n_layers + 1) if config.n_layers % n == 0} | {every})
    wide = {"layout": W.Layout(width="460px"), "style": {"description_width": "150px"}}
    return Explorable(
        picture,
        CAPTION,
        tokens=choice([(f"{n:,}", n) for n in LENGTHS], tokens, "tokens", **wide),
        every=choice(shares, every, "one attention in", **wide),
        batch=choice([1, 4, 16, 64, 256], 1, "sequences", **wide),
    )
