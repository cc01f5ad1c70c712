"""Which lane of a warp touches which sector of global memory, and which bank of shared memory.

The counts in the titles come from the functions with which the PTX machine counts.
"""

from __future__ import annotations

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmcourse.vgpu import requests
from llmcourse.vgpu.isa import BANKS, SECTOR_BYTES, WARP_SIZE
from llmcourse.widgets.explorable import Explorable

BLUE, ORANGE, PALE = "#0072B2", "#D55E00", "#EEEEEE"
LAYOUT, STYLE = W.Layout(width="460px"), {"description_width": "150px"}


def coalescing(stride: int, offset: int, nbytes: int) -> tuple[np.ndarray, int]:
    """(address of each lane, sectors of the request) for lane i loading element offset + i·stride of nbytes."""
    address = (offset + np.arange(WARP_SIZE) * stride).astype(np.int64) * nbytes
    return address, requests.sectors(address[None])


def coalescing_explorer(stride: int = 1, offset: int = 0, nbytes: int = 4) -> Explorable:
    """A warp's 32 addresses over the sectors of memory; sliders for stride, offset and element size."""

    def draw(stride: int, offset: int, nbytes: int) -> Figure:
        address, sectors = coalescing(stride, offset, nbytes)
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        touched = np.unique(address // SECTOR_BYTES)
        for sector in touched:
            axes.add_patch(_box(sector * SECTOR_BYTES, SECTOR_BYTES, ORANGE, 0.25))
        for lane, start in enumerate(address):
            axes.add_patch(_box(start, nbytes, BLUE, 0.9))
            axes.plot(
                [start + nbytes / 2, _lane_x(lane, address, nbytes)], [1, 2.4], color=BLUE, lw=0.5, alpha=0.6
            )
            axes.text(
                _lane_x(lane, address, nbytes),
                2.5,
                str(lane),
                ha="center",
                fontsize=6.5,
                family="DejaVu Sans Mono",
            )
        low, high = int(touched[0]) * SECTOR_BYTES, int(touched[-1] + 1) * SECTOR_BYTES
        axes.set_xlim(low - (high - low) * 0.02, high + (high - low) * 0.02)
        axes.set_ylim(-0.2, 3)
        axes.set_yticks([0.5, 2.6], ["memory", "lane"])
        axes.set_xlabel(
            "byte address; orange: sectors of 32 bytes that move, blue: bytes that were asked for"
        )
        used = len(np.unique(address)) * nbytes
        moved = sectors * SECTOR_BYTES
        axes.set_title(
            f"stride {stride}, offset {offset}, {nbytes} bytes: {sectors} sectors in one request; "
            f"{used} of {moved} bytes moved are used ({used / moved:.0%})",
            fontsize=10,
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        return figure

    return Explorable(
        draw,
        "Raise the stride until every lane has a sector of its own; then shift the offset by one and count again.",
        stride=W.IntSlider(
            stride, min=0, max=32, description="stride (elements)", layout=LAYOUT, style=STYLE
        ),
        offset=W.IntSlider(
            offset, min=0, max=16, description="offset (elements)", layout=LAYOUT, style=STYLE
        ),
        nbytes=W.SelectionSlider(
            options=[1, 2, 4, 8, 16], value=nbytes, description="bytes an element", layout=LAYOUT, style=STYLE
        ),
    )


def bank_conflicts(width: int, step: int) -> tuple[np.ndarray, int]:
    """(word of each lane, wavefronts) when lane i reads word (i·step) of row i in rows of `width` words.

    step 0: a column of a tile; step 1: its diagonal.
    """
    lane = np.arange(WARP_SIZE)
    words = (lane * width + lane * step).astype(np.int64)
    passes, _ = requests.wavefronts(words[None] * 4, 4)
    return words, passes


def bank_conflict_explorer(width: int = 32, step: int = 0) -> Explorable:
    """A warp reads down the rows of a tile in shared memory; sliders for the row's width and the step."""

    def draw(width: int, step: int) -> Figure:
        words, passes = bank_conflicts(width, step)
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
        bank = words % BANKS
        _tile(left, width, words)
        counts = np.bincount(bank[np.unique(words, return_index=True)[1]], minlength=BANKS)
        right.bar(range(BANKS), counts, color=[ORANGE if c > 1 else BLUE for c in counts], width=0.8)
        right.set_xlabel("bank")
        right.set_ylabel("different words wanted")
        right.set_ylim(0, max(4, counts.max() + 1))
        right.set_xticks(range(0, BANKS, 4))
        right.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"rows of {width} words: {passes} wavefront{'s' if passes > 1 else ''}, {passes - 1} of them conflicts",
            fontsize=10,
        )
        return figure

    return Explorable(
        draw,
        "A column of a 32-word-wide tile lies in one bank. Widen the rows by one word of padding and look again.",
        width=W.IntSlider(width, min=24, max=40, description="row width (words)", layout=LAYOUT, style=STYLE),
        step=W.IntSlider(step, min=0, max=4, description="step along the row", layout=LAYOUT, style=STYLE),
    )


def _tile(axes: Axes, width: int, words: np.ndarray) -> None:
    """The first rows of the tile as a grid of banks, the wanted words marked."""
    rows = min(WARP_SIZE, 16)
    banks = (np.arange(rows)[:, None] * width + np.arange(width)) % BANKS
    axes.imshow(
        banks, cmap="twilight", vmin=0, vmax=BANKS, aspect="auto", interpolation="nearest", alpha=0.75
    )
    for row in range(rows):
        axes.add_patch(_cell(int(words[row]) - row * width, row))
    axes.set_xlabel("column (colour: bank)")
    axes.set_ylabel("row = lane")
    axes.set_xlim(-0.5, width - 0.5)


def _cell(column: int, row: int):  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.8)


def _box(start: float, width: float, colour: str, alpha: float):  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    return Rectangle((start, 0), width, 1, facecolor=colour, alpha=alpha, edgecolor="white", linewidth=0.4)


def _lane_x(lane: int, address: np.ndarray, nbytes: int) -> float:
    """Lane labels are spread evenly over the width of the picture."""
    low = address.min() // SECTOR_BYTES * SECTOR_BYTES
    high = ((address.max() + nbytes - 1) // SECTOR_BYTES + 1) * SECTOR_BYTES
    return float(low + (lane + 0.5) * (high - low) / WARP_SIZE)
