"""What limits a kernel: the roofline of a GPU, and the resources of its multiprocessors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets as W
import numpy as np
from matplotlib.figure import Figure

from llmcourse.hardware import CAPABILITIES, GPUS, gpu, occupancy, roofline
from llmcourse.widgets.explorable import Explorable

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
LAYOUT, STYLE = W.Layout(width="460px"), {"description_width": "150px"}


def roofline_explorer(
    kernels: Mapping[str, tuple[float, float]] | Sequence[tuple[str, float, float]],
    *,
    name: str = "H100 SXM",
    dtype: str = "fp32",
) -> Explorable:
    """Kernels on the roofline of a GPU.

    kernels   name → (FLOPs, bytes moved), or such triples: counts, as the machine or Triton's counters give them
    """
    items = [(n, *v) for n, v in kernels.items()] if isinstance(kernels, Mapping) else list(kernels)
    gpus = list(GPUS)
    formats = sorted(set.intersection(*(set(g.peak) for g in GPUS.values())))

    def draw(name: str, dtype: str) -> Figure:
        roof = roofline(gpu(name), dtype)
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        x = np.logspace(-2, 4, 200)
        axes.loglog(x, [roof.attainable(i) for i in x], color="black", lw=1.5)
        axes.axvline(roof.ridge, color=GREY, lw=1, ls=":")
        for n, (label, flops, nbytes) in enumerate(items):
            intensity = max(flops / nbytes, 1.2e-2)
            bound = roof.bound(intensity)
            y = roof.attainable(intensity)
            axes.plot([intensity], [y], "o", color=ORANGE if bound == "memory" else GREEN)
            axes.annotate(
                f"{label} ({flops / nbytes:.2g})",
                (intensity, y),
                textcoords="offset points",
                xytext=(6, -12 - 11 * (n % 3)),
                fontsize=8,
            )
        axes.set_xlabel("arithmetic intensity: FLOPs a byte of DRAM traffic")
        axes.set_ylabel("FLOP/s at best")
        axes.set_title(
            f"{name}, {dtype}: {roof.peak / 1e12:,.0f} TFLOP/s over {roof.bandwidth / 1e9:,.0f} GB/s, "
            f"ridge at {roof.ridge:.0f} FLOPs a byte",
            fontsize=10,
        )
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    return Explorable(
        draw,
        "Pick another GPU or number format: the ridge moves, and with it which kernels the memory limits (orange).",
        name=W.Dropdown(options=gpus, value=gpu(name).name, description="GPU", layout=LAYOUT, style=STYLE),
        dtype=W.Dropdown(
            options=formats, value=dtype, description="number format", layout=LAYOUT, style=STYLE
        ),
    )


def occupancy_explorer(
    capability: str = "9.0", *, threads: int = 256, registers: int = 32, shared: int = 0
) -> Explorable:
    """The occupancy calculator: what each resource of an SM allows, and which runs out first."""

    def draw(capability: str, threads: int, registers: int, shared: int) -> Figure:
        found = occupancy(CAPABILITIES[capability], threads, registers, shared << 10)
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = list(found.limits)
        values = [found.limits[n] for n in names]
        colours = [ORANGE if n in found.limited_by else GREY for n in names]
        left.barh(names, values, color=colours)
        for row, value in enumerate(values):
            left.text(value, row, f" {value}", va="center", fontsize=9)
        left.invert_yaxis()
        left.set_xlabel("blocks that fit on an SM")
        left.set_xlim(0, max(values) * 1.2 + 1)
        counts = range(1, 256)
        warps = [occupancy(CAPABILITIES[capability], threads, r, shared << 10).fraction for r in counts]
        right.step(counts, warps, color=BLUE, where="mid")
        right.plot([registers], [found.fraction], "o", color=ORANGE)
        right.set_xlabel("registers a thread")
        right.set_ylabel("occupancy")
        right.set_ylim(0, 1.05)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"compute capability {capability}: {found.blocks} blocks, {found.warps} warps, "
            f"{found.fraction:.0%} occupancy, limited by {' and '.join(found.limited_by)}",
            fontsize=10,
        )
        return figure

    return Explorable(
        draw,
        "Raise registers or shared memory until another resource turns orange: occupancy falls in steps.",
        capability=W.Dropdown(
            options=list(CAPABILITIES),
            value=capability,
            description="compute capability",
            layout=LAYOUT,
            style=STYLE,
        ),
        threads=W.IntSlider(threads, 32, 1024, 32, description="threads a block", layout=LAYOUT, style=STYLE),
        registers=W.IntSlider(
            registers, 16, 255, 1, description="registers a thread", layout=LAYOUT, style=STYLE
        ),
        shared=W.IntSlider(shared, 0, 227, 1, description="shared KiB a block", layout=LAYOUT, style=STYLE),
    )
