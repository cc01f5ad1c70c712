"""Which tiles of a matrix product run at the same time, and which parts of A and B they need for it.

The tiles are numbered by `matmul_plan.tile_order`, and the GPU is taken to start them in that order, one
for each multiprocessor, and all of a wave to end together.
"""

from __future__ import annotations

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmcourse.kernels.matmul_plan import HOPPER_16, Config, wave_bytes, wave_tiles
from llmcourse.widgets.explorable import Explorable

BLUE, SKY, PALE = "#0072B2", "#9CCBE8", "#F2F2F2"
LAYOUT, STYLE = W.Layout(width="460px"), {"description_width": "150px"}
GROUPS = (1, 2, 4, 8, 16, 32, 64)


def tile_order_explorer(
    n: int = 8192, *, config: Config = HOPPER_16[0][0], programs: int = 132, itemsize: int = 2, group: int = 1
) -> Explorable:
    """C [n, n] in tiles of `config`, the wave at work in blue; sliders for the band's height and the wave."""
    tiles = -(-n // config.block_m) * -(-n // config.block_n)

    def draw(group: int, wave: int) -> Figure:
        at_work = wave_tiles(n, n, config, programs=programs, group_m=group, wave=wave)
        needed = wave_bytes(n, n, n, config, programs=programs, itemsize=itemsize, group_m=group, wave=wave)
        rows, columns = {i for i, _ in at_work}, {j for _, j in at_work}
        figure = Figure(figsize=(5.6, 5.5), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[1, 13], height_ratios=[1, 13])
        shape = -(-n // config.block_m), -(-n // config.block_n)
        a, b, c = (figure.add_subplot(grid[place]) for place in ((1, 0), (0, 1), (1, 1)))
        _cells(a, (shape[0], 1), {(i, 0) for i in rows}, SKY)
        _cells(b, (1, shape[1]), {(0, j) for j in columns}, SKY)
        _cells(c, shape, set(at_work), BLUE)
        a.set_ylabel("rows of A", fontsize=9)
        b.set_title("columns of B", fontsize=9, loc="left")
        c.set_xlabel(f"C, {shape[0]} × {shape[1]} tiles of {config.block_m} × {config.block_n}", fontsize=9)
        figure.suptitle(
            f"bands of {group}, wave {wave}: {len(at_work)} tiles need {len(rows)} strips of A and "
            f"{len(columns)} of B, {needed / 1e6:,.0f} MB",
            fontsize=10,
        )
        return figure

    return Explorable(
        draw,
        "Blue tiles run together and read the shaded strips of A and B. Raise the height of the bands until "
        "the wave is about square: fewer strips serve as many tiles.",
        group=W.SelectionSlider(
            options=GROUPS, value=group, description="height of a band", layout=LAYOUT, style=STYLE
        ),
        wave=W.IntSlider(
            0, min=0, max=-(-tiles // programs) - 1, description="wave", layout=LAYOUT, style=STYLE
        ),
    )


def _cells(axes: Axes, shape: tuple[int, int], marked: set[tuple[int, int]], colour: str) -> None:
    """A grid of cells, the marked ones filled."""
    picture = np.zeros((*shape, 3))
    picture[:] = [int(PALE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for place in marked:
        picture[place] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    for edge in range(shape[0] + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=0.4)
    for edge in range(shape[1] + 1):
        axes.axvline(edge - 0.5, color="white", linewidth=0.4)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
