"""Which lane of a warp touches which sector of global memory, and which bank of shared memory.

The counts in the titles come from the functions with which the PTX machine counts.
"""

from __future__ import annotations

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from llmcourse.vgpu import requests
from llmcourse.vgpu.isa import BANKS, SECTOR_BYTES, WARP_SIZE
from llmcourse.widgets.explorable import Explorable

BLUE, ORANGE, SAND, PALE, GREY = "#0072B2", "#D55E00", "#F6D9A8", "#F0F0F0", "#BBBBBB"
LINE_BYTES = 128
"""A cache line: four sectors, found by one look-up."""
LAYOUT, STYLE = W.Layout(width="460px"), {"description_width": "150px"}


# ------------------------------------------------------------------------------------------- coalescing


def coalescing(stride: int, offset: int, nbytes: int) -> tuple[np.ndarray, int]:
    """(address of each lane, sectors of the request): lane i loads element offset + i·stride of `nbytes`."""
    address = (offset + np.arange(WARP_SIZE) * stride).astype(np.int64) * nbytes
    return address, requests.sectors(address[None])


def coalescing_explorer(stride: int = 1, offset: int = 0, nbytes: int = 4) -> Explorable:
    """A warp's 32 addresses over the sectors of memory; sliders for stride, offset and element size."""

    def draw(stride: int, offset: int, nbytes: int) -> Figure:
        address, sectors = coalescing(stride, offset, nbytes)
        figure = Figure(figsize=(8, 4.4), layout="constrained")
        axes = figure.subplots()
        lines = np.unique(address // LINE_BYTES)
        _draw_lines(axes, lines, np.unique(address // SECTOR_BYTES))
        _draw_lanes(axes, lines, address, nbytes)
        used = len(np.unique(address)) * nbytes
        moved = sectors * SECTOR_BYTES
        moves = f"{sectors} sector{'' if sectors == 1 else 's'} in one request"
        axes.set_title(
            f"lane i loads element {offset} + {stride}·i of {nbytes} byte{'' if nbytes == 1 else 's'}: "
            f"{moves}, {moved:,} bytes move, {used / moved:.1%} used",
            fontsize=10,
        )
        return figure

    return Explorable(
        draw,
        "Each row is a cache line of four sectors; numbers are lanes, sand-coloured sectors move. Raise the "
        "stride until every lane has a sector of its own; then go back to 1 and shift the offset by one.",
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


def _draw_lines(axes: Axes, lines: np.ndarray, touched: np.ndarray) -> None:
    """One row for each cache line that is touched, its touched sectors filled."""
    per_line = LINE_BYTES // SECTOR_BYTES
    for row, line in enumerate(lines):
        for sector in range(per_line):
            moves = line * per_line + sector in touched
            axes.add_patch(
                Rectangle(
                    (sector * SECTOR_BYTES, row),
                    SECTOR_BYTES,
                    0.86,
                    facecolor=SAND if moves else PALE,
                    edgecolor=GREY,
                    linewidth=0.8,
                )
            )
    axes.set_xlim(0, LINE_BYTES)
    axes.set_ylim(max(len(lines), 4), 0)
    every = -(-len(lines) // 8)  # labels that do not overlap
    axes.set_yticks(
        np.arange(0, len(lines), every) + 0.43, [f"{line * LINE_BYTES:,}" for line in lines[::every]]
    )
    axes.set_ylabel("address of the line")
    axes.set_xticks(range(0, LINE_BYTES + 1, SECTOR_BYTES))
    axes.set_xlabel("byte within the cache line")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)


def _draw_lanes(axes: Axes, lines: np.ndarray, address: np.ndarray, nbytes: int) -> None:
    """A blue box for each element that is asked for, with the lanes that ask."""
    height = 0.86
    for start in np.unique(address):
        row = int(np.searchsorted(lines, start // LINE_BYTES))
        lanes = np.flatnonzero(address == start)
        x = start % LINE_BYTES
        axes.add_patch(Rectangle((x, row), nbytes, height, facecolor=BLUE, edgecolor="white", linewidth=0.3))
        text = str(lanes[0]) if len(lanes) == 1 else "all"
        crowded = nbytes == 1 and lanes[0] % 4 and len(np.unique(address)) > WARP_SIZE // 4
        if not crowded:
            size = 6.5 if nbytes > 2 else 5
            axes.text(
                x + nbytes / 2, row + height / 2, text, color="white", fontsize=size, ha="center", va="center"
            )


# ---------------------------------------------------------------------------------------- bank conflicts


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
        figure = Figure(figsize=(8, 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=[3.6, 1], sharex=True)
        counts = np.bincount(words % BANKS, minlength=BANKS)
        _draw_banks(top, width, words, counts)
        bottom.bar(range(BANKS), counts, color=[ORANGE if c > 1 else BLUE for c in counts], width=0.8)
        bottom.set_ylabel("words wanted")
        bottom.set_ylim(0, max(4, counts.max() + 1))
        bottom.set_yticks([0, max(4, counts.max())])
        bottom.set_xticks(range(0, BANKS, 4))
        bottom.set_xlabel("bank")
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"rows of {width} words, lane i reads column {'0' if not step else f'{step}·i'}: "
            f"{passes} wavefront{'s' if passes > 1 else ''}, {passes - 1} of them conflicts",
            fontsize=10,
        )
        return figure

    return Explorable(
        draw,
        "Shared memory as it is, 32 banks wide; the tile's rows are shaded in turns, numbers are lanes. A "
        "column of a 32-word-wide tile lies in one bank: widen the rows by one word and look again.",
        width=W.IntSlider(width, min=24, max=40, description="row width (words)", layout=LAYOUT, style=STYLE),
        step=W.IntSlider(step, min=0, max=4, description="step along the row", layout=LAYOUT, style=STYLE),
    )


def _draw_banks(axes: Axes, width: int, words: np.ndarray, counts: np.ndarray) -> None:
    """Shared memory, BANKS words a line: the tile's rows in alternating greys, the wanted words by lane."""
    depth = int(words.max()) // BANKS + 1
    tile_row = np.arange(depth * BANKS).reshape(depth, BANKS) // width
    axes.imshow(
        np.where(tile_row % 2, 0.86, 0.95),
        cmap="gray",
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    for lane, word in enumerate(words):
        line, bank = divmod(int(word), BANKS)
        colour = ORANGE if counts[bank] > 1 else BLUE
        axes.add_patch(
            Rectangle((bank - 0.5, line - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4)
        )
        axes.text(bank, line, str(lane), color="white", fontsize=6, ha="center", va="center")
    axes.set_ylabel(f"line of {BANKS} words")
    axes.tick_params(labelbottom=False)
