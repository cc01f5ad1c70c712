"""What limits a kernel: the roofline of a GPU, and the resources of its multiprocessors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from llmcourse.hardware import CAPABILITIES, GPUS, Capability, Occupancy, Roofline, gpu, occupancy, roofline
from llmcourse.widgets.explorable import Explorable, choice

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
TINTS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7")
"""Neighbouring blocks of an SM in colours that can be told apart."""
LAYOUT, STYLE = W.Layout(width="460px"), {"description_width": "150px"}
SMALLEST = 1e-2
"""FLOPs a byte at the left edge; a kernel below it is drawn there."""


# --------------------------------------------------------------------------------------------- roofline


def roofline_explorer(
    kernels: Mapping[str, tuple[float, float]] | Sequence[tuple[str, float, float]],
    *,
    name: str = "H100 SXM",
    dtype: str = "fp32",
) -> Explorable:
    """Kernels on the roofline of a GPU.

    kernels   name → (FLOPs, bytes moved), or (name, FLOPs, bytes) triples: counts, as the machine gives them
    """
    items = [(n, *v) for n, v in kernels.items()] if isinstance(kernels, Mapping) else list(kernels)
    formats = sorted(set.intersection(*(set(g.peak) for g in GPUS.values())))

    def draw(name: str, dtype: str) -> Figure:
        roof = roofline(gpu(name), dtype)
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes, legend = figure.subplots(1, 2, width_ratios=[1.9, 1])
        _draw_roof(axes, roof)
        lines = []
        for number, (label, flops, nbytes) in enumerate(items, 1):
            intensity = flops / nbytes
            bound, speed = roof.bound(intensity), roof.attainable(intensity)
            colour = ORANGE if bound == "memory" else GREEN
            x = max(intensity, SMALLEST)
            axes.plot([x], [roof.attainable(x)], "o", color=colour, markersize=12, markeredgecolor="white")
            axes.annotate(
                str(number), (x, roof.attainable(x)), color="white", fontsize=7.5, ha="center", va="center"
            )
            lines.append(
                (f"{number}  {label}", f"    {intensity:,.3g} FLOPs a byte, {bound}: {_rate(speed)}", colour)
            )
        _write(legend, lines)
        axes.set_title(
            f"{name}, {dtype}: {_rate(roof.peak)} over {roof.bandwidth / 1e9:,.0f} GB/s, "
            f"ridge at {roof.ridge:,.1f} FLOPs a byte",
            fontsize=10,
        )
        return figure

    return Explorable(
        draw,
        "Pick another GPU or number format: the ridge moves, and with it which kernels the memory limits "
        "(orange) and which the arithmetic (green). The speeds are upper bounds.",
        name=choice(list(GPUS), gpu(name).name, "GPU", layout=LAYOUT, style=STYLE),
        dtype=choice(formats, dtype, "number format", layout=LAYOUT, style=STYLE),
    )


def _draw_roof(axes: Axes, roof: Roofline) -> None:
    x = np.logspace(np.log10(SMALLEST), 4, 200)
    axes.loglog(x, [roof.attainable(i) for i in x], color="black", lw=1.5)
    axes.axvline(roof.ridge, color=GREY, lw=1, ls=":")
    axes.text(roof.ridge, roof.attainable(SMALLEST), " ridge", color="#555555", fontsize=8, va="bottom")
    axes.set_xlabel("arithmetic intensity: FLOPs for each byte moved")
    axes.set_ylabel("FLOP/s at best")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _write(axes: Axes, lines: Sequence[tuple[str, str, str]]) -> None:
    """A legend of two lines for each kernel; a dot on the roof has room for its number only."""
    axes.axis("off")
    step = 1 / max(len(lines), 7)
    for n, (first, second, colour) in enumerate(lines):
        y = 1 - n * step
        axes.text(0, y, first, fontsize=8.5, color=colour, weight="bold", va="top")
        axes.text(0, y - 0.055, second, fontsize=7.5, color="#333333", va="top")
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _rate(flops: float) -> str:
    return f"{flops / 1e12:,.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.3g} GFLOP/s"


# -------------------------------------------------------------------------------------------- occupancy


def occupancy_explorer(
    capability: str = "9.0", *, threads: int = 256, registers: int = 32, shared: int = 0
) -> Explorable:
    """The occupancy calculator: what each resource of an SM allows, and which runs out first.

    threads a block, registers a thread, shared KiB a block
    """

    def draw(capability: str, threads: int, registers: int, shared: int) -> Figure:
        c = CAPABILITIES[capability]
        found = occupancy(c, threads, registers, shared << 10)
        figure = Figure(figsize=(9, 5), layout="constrained")
        grid = figure.add_gridspec(2, 6, height_ratios=[1.2, 1])
        _draw_limits(figure.add_subplot(grid[0, :3]), found, c)
        _draw_slots(figure.add_subplot(grid[0, 3:]), found, c, threads)
        curves = {
            "registers a thread": (range(16, 256), registers, lambda v: (threads, v, shared << 10)),
            "threads a block": (range(32, 1025, 32), threads, lambda v: (v, registers, shared << 10)),
            "shared KiB a block": (range(0, 228), shared, lambda v: (threads, registers, v << 10)),
        }
        for n, (label, (values, here, launch)) in enumerate(curves.items()):
            axes = figure.add_subplot(grid[1, 2 * n : 2 * n + 2])
            axes.step(values, [occupancy(c, *launch(v)).fraction for v in values], color=BLUE, where="mid")
            axes.plot([here], [found.fraction], "o", color=ORANGE)
            axes.set(xlabel=label, ylim=(-0.03, 1.05))
            axes.spines[["top", "right"]].set_visible(False)
            if n == 0:
                axes.set_ylabel("occupancy")
            else:
                axes.tick_params(labelleft=False)
        blocks = f"{found.blocks} block{'' if found.blocks == 1 else 's'}"
        figure.suptitle(
            f"compute capability {capability}: {blocks} of {-(-threads // 32)} warps on an SM, "
            f"{found.warps} of {c.max_warps} warps ({found.fraction:.0%}), "
            f"limited by {' and '.join(found.limited_by)}",
            fontsize=10,
        )
        return figure

    return Explorable(
        draw,
        "Raise registers or shared memory until another resource turns orange: occupancy falls in steps.",
        capability=choice(list(CAPABILITIES), capability, "compute capability", layout=LAYOUT, style=STYLE),
        threads=W.IntSlider(threads, 32, 1024, 32, description="threads a block", layout=LAYOUT, style=STYLE),
        registers=W.IntSlider(
            registers, 16, 255, 1, description="registers a thread", layout=LAYOUT, style=STYLE
        ),
        shared=W.IntSlider(shared, 0, 227, 1, description="shared KiB a block", layout=LAYOUT, style=STYLE),
    )


def _draw_limits(axes: Axes, found: Occupancy, c: Capability) -> None:
    """Blocks that each resource allows; what is beyond the SM's block slots is cut."""
    names = list(found.limits)
    values = list(found.limits.values())
    room = c.max_blocks * 1.25
    colours = [ORANGE if n in found.limited_by else GREY for n in names]
    axes.barh(names, np.minimum(values, room), color=colours)
    for row, value in enumerate(values):
        axes.text(min(value, room), row, f" {value}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("blocks that fit on an SM")
    axes.set_xlim(0, room * 1.15)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_slots(axes: Axes, found: Occupancy, c: Capability, threads: int) -> None:
    """The SM's warp slots, filled block after block; each row is one of the SM's four partitions."""
    per_block = -(-threads // 32)
    for slot in range(c.max_warps):
        taken = slot < found.warps
        colour = TINTS[slot // per_block % len(TINTS)] if taken else "white"
        axes.add_patch(
            Rectangle((slot // c.partitions, slot % c.partitions), 0.9, 0.9, facecolor=colour, edgecolor=GREY)
        )
    axes.set_xlim(-0.2, c.max_warps // c.partitions)
    axes.set_ylim(c.partitions, -0.1)
    axes.set_yticks(np.arange(c.partitions) + 0.45, [str(p) for p in range(c.partitions)])
    axes.set_ylabel("partition")
    axes.set_xticks([])
    axes.set_xlabel("warp slots of the SM; a colour is a block")
    axes.spines[:].set_visible(False)
