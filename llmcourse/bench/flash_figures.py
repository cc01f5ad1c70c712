"""FlashAttention's rates for chapter 10: measured on this GPU, or from the record of one.

    figures = flash_figures.of("cpu")       the newest record of an H100; UnknownNameError while there is none
    figures.table("forward", 128), figures.draw(plt.figure()), figures.best("forward", 128, 8192)

Causal, no window, a row for everybody who computed the right thing. Beside the rates stand two ceilings of
`attention_ceiling`: products and exponentials one after the other, and side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.bench.records import describe_device, recorded, versions
from llmcourse.errors import UnknownNameError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcourse.notebook import Table

HERE = (2048, 8192)
"""Lengths measured in a notebook; the record has more."""

WHO = {
    "ours: hopper": "#0072B2",
    "ours: descriptor": "#4FA3D6",
    "ours: pointer": "#A9D1EC",
    "cuDNN": "#D55E00",
    "FlashAttention-2": "#E69F00",
    "flex_attention": "#999999",
    "memory-efficient": "#CCCCCC",
}


@dataclass(frozen=True)
class Figures:
    """Rows as `llmcourse bench flash` writes them (`us`, `tflops`, `error`, ceilings), and their caption."""

    rows: tuple[dict[str, Any], ...]
    caption: str

    def select(self, direction: str, head_dim: int) -> list[dict[str, Any]]:
        """Rows with a time, of one direction and head dim."""
        wanted = (direction, head_dim)
        return [r for r in self.rows if (r["direction"], r["head_dim"]) == wanted and "tflops" in r]

    def rate(self, direction: str, head_dim: int, length: int, who: str) -> float:
        """TFLOP/s of one row. Raises UnknownNameError."""
        for row in self.select(direction, head_dim):
            if (row["length"], row["who"]) == (length, who):
                return float(row["tflops"])
        raise UnknownNameError(
            f"nobody called {who!r} was timed {direction} at D = {head_dim}, S = {length}.",
            "What a machine cannot run, or computes wrongly, has no time.",
            f"one of {', '.join(sorted({r['who'] for r in self.select(direction, head_dim)})) or 'none'}.",
        )

    def best(self, direction: str, head_dim: int, length: int) -> tuple[str, float]:
        """(who, TFLOP/s) of the fastest."""
        rows = [r for r in self.select(direction, head_dim) if r["length"] == length]
        if not rows:
            self.rate(direction, head_dim, length, "")
        fastest = max(rows, key=lambda r: r["tflops"])
        return fastest["who"], float(fastest["tflops"])

    def table(self, direction: str, head_dim: int) -> Table:
        """TFLOP/s: a line for everybody, a column for each length, and the ceilings below."""
        from llmcourse.notebook import Table

        rows = self.select(direction, head_dim)
        lengths = sorted({r["length"] for r in rows})
        lines = []
        for who in sorted({r["who"] for r in rows}, key=_place):
            found = {r["length"]: f"{r['tflops']:.0f}" for r in rows if r["who"] == who}
            lines.append([who, *(found.get(n, "–") for n in lengths)])
        for key, says in (
            ("no_overlap_tflops", "ceiling, in turn"),
            ("ceiling_tflops", "ceiling, side by side"),
        ):
            tops = {r["length"]: f"{r[key]:.0f}" for r in rows if key in r}
            if tops:
                lines.append([says, *(tops.get(n, "–") for n in lengths)])
        heads = [f"{direction}, D = {head_dim}, causal: TFLOP/s", *(f"S = {n:,}" for n in lengths)]
        return Table(heads, lines, self.caption)

    def draw(self, figure: Figure) -> None:
        """Draw TFLOP/s against the length: forward above, backward below, a panel for each head dim."""
        directions = [d for d in ("forward", "backward") if any(r["direction"] == d for r in self.rows)]
        dims = sorted({r["head_dim"] for r in self.rows})
        axes = figure.subplots(len(directions), len(dims), squeeze=False, sharey="row")
        for line, direction in zip(axes, directions, strict=True):
            for ax, head_dim in zip(line, dims, strict=True):
                _panel(ax, self.select(direction, head_dim))
                ax.set_title(f"{direction}, D = {head_dim}", fontsize=9, loc="left")
            line[0].set_ylabel("TFLOP/s", fontsize=9)
        found = {
            label: handle
            for ax in axes.flat
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(found.values(), found.keys(), loc="outside right upper", fontsize=8, frameon=False)
        figure.suptitle(self.caption, fontsize=9)


def of(device: str, *, folder: Path | None = None) -> Figures:
    """Causal forward and backward of equal heads.

    device   "cuda" measures here, `HERE` lengths, about a minute; anything else reads the newest H100 record
    Raises   UnknownNameError where there is no record.
    """
    if device == "cuda":
        name, torch_s = describe_device("cuda")["name"], versions()["torch"]
        return Figures(tuple(_measured()), f"measured here on {name}, torch {torch_s}")
    record = recorded("flash", device="H100", folder=folder)
    rows = [r for r in record.results if r["group"] in ("forward", "backward") and r.get("causal")]
    return Figures(tuple(rows), record.caption)


WAYS = {
    (False, False): "neither",
    (True, False): "in turn",
    (False, True): "a block ahead",
    (True, True): "both",
}
"""By `Schedule`'s (ordered, overlap)."""


def ways(*, folder: Path | None = None) -> tuple[Table, list[float]]:
    """The hand-written kernel with tiles of several sizes, launched in four ways, from a sweep's record.

    Returns a table of TFLOP/s (8,192 tokens, no mask), and for each of its lines the rate of both ways
    together over that of neither. Raises UnknownNameError where there is no record.
    """
    from llmcourse.notebook import Table

    record = recorded("flash_sweep", device="H100", folder=folder)
    found: dict[tuple[int, int, int], dict[tuple[bool, bool], float]] = {}
    for row in record.results:
        kernel, head_dim, *mask = row["group"].split()
        if kernel == "hopper" and not mask and row["stage"] == "tiles" and not row["choice"]["persistent"]:
            c = row["choice"]
            rates = found.setdefault((int(head_dim[1:]), c["groups"], c["block_n"]), {})
            rates[c["ordered"], c["overlap"]] = row["tflops"]
    sizes = sorted(found)
    lines = [
        (f"D {d}: {groups} × 64 queries, {keys} keys", *(f"{found[d, groups, keys][w]:.0f}" for w in WAYS))
        for d, groups, keys in sizes
    ]
    gains = [found[size][True, True] / found[size][False, False] for size in sizes]
    return Table(["TFLOP/s at S = 8,192, no mask", *WAYS.values()], lines, record.caption), gains


def _measured() -> Iterator[dict[str, Any]]:
    import torch

    from llmcourse.bench.flash import measure_case, measured_rates
    from llmcourse.bench.flash_cases import cases

    r = measured_rates("cuda")
    for case in cases(lengths=HERE):
        if case.group in ("forward", "backward") and case.causal:
            yield from measure_case(case, "cuda", r, flex=False)
            torch.cuda.empty_cache()


def _panel(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for who in sorted({r["who"] for r in rows}, key=_place):
        points = sorted((r["length"], r["tflops"]) for r in rows if r["who"] == who)
        style = "o-" if who.startswith("ours") else "s-"
        ax.plot(*zip(*points, strict=True), style, color=WHO.get(who, "#444444"), markersize=4, label=who)
    for key, says, style in (
        ("no_overlap_tflops", "ceiling: in turn", ":"),
        ("ceiling_tflops", "ceiling: side by side", "--"),
    ):
        tops = sorted({(r["length"], r[key]) for r in rows if key in r})
        if tops:
            ax.plot(*zip(*tops, strict=True), style, color="black", linewidth=1, label=says)
    lengths = sorted({r["length"] for r in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths], fontsize=8)
    ax.set_ylim(bottom=0)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _place(who: str) -> int:
    return list(WHO).index(who) if who in WHO else len(WHO)
