"""What layers of several kinds cost, against the length of the sequence: a panel for each measure of cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "attention": "#0072B2",
    "linear": "#009E73",
    "ssm": "#56B4E9",
    "hyena": "#CC79A7",
    "modal": "#E69F00",
}


def draw(figure: Figure, panels: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Draw a panel for each label of an axis: the column that it shows, and rows as of `time_layers`."""
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (label, (column, rows)) in zip(axes, panels.items(), strict=True):
        for kind, color in COLORS.items():
            points = [(row["tokens"], row[column]) for row in rows if row["name"] == kind]
            ax.loglog(*zip(*points, strict=True), "o-", markersize=3, color=color, label=kind)
        lengths = sorted({row["tokens"] for row in rows})
        ax.set_xticks(lengths[:: -(-len(lengths) // 5)], minor=False)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.minorticks_off()
        ax.set(xlabel="tokens", ylabel=label)
        ax.grid(True, alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
