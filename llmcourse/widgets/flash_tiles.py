"""Walk over the tiles of an attention, and see which blocks are loaded, which are masked, which are skipped.

A program keeps a tile of queries and walks along the keys. Under a causal mask, or a sliding window, it needs
not walk far: a block of which no pair is visible is not loaded at all, and only a block that the edge of the
mask crosses must compare positions. What the walk has asked of memory so far stands beside it, next to what
attention asks for that keeps its S × S scores there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ipywidgets as W

from llmcourse.widgets.explorable import Explorable, choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, SKY, ORANGE, GREY, DARK = "#0072B2", "#8EC6EA", "#E69F00", "#EEEEEE", "#555555"
MASKS = ("all keys", "causal", "causal, window")
LENGTH, HEAD_DIM, ITEMSIZE = 512, 64, 2
CAPTION = (
    "Move the steps of the walk with the arrow keys, change the mask and the sizes of tile and block, and "
    "compare the bars: white blocks are never loaded, orange ones are loaded and compared with the mask."
)


@dataclass(frozen=True)
class Block:
    """One step of the walk.

    queries, keys   the half-open ranges of the block
    edge            some of its pairs are hidden, so that the kernel must compare positions
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    edge: bool

    @property
    def rows(self) -> int:
        return self.keys[1] - self.keys[0]


def walk(
    queries: int, keys: int, block_m: int, block_n: int, *, causal: bool = True, window: int = 0
) -> list[Block]:
    """The blocks that are loaded, tile after tile; the queries are the last of the positions.

    window   with causal: how many keys up to its own a query sees; 0 for no limit
    """
    steps, offset = [], keys - queries
    for a in range(0, queries, block_m):
        b = min(a + block_m, queries)
        first, last = a + offset, b - 1 + offset  # positions of the tile's first and last query
        low = max(first - window + 1, 0) // block_n * block_n if window else 0
        high = last + 1 if causal else keys
        for c in range(low, high, block_n):
            d = min(c + block_n, keys)
            hidden = (causal and d - 1 > first) or (window > 0 and c <= last - window)
            steps.append(Block((a, b), (c, d), hidden))
    return steps


def moved(steps: list[Block], head_dim: int, itemsize: int) -> int:
    """Bytes that the walk asks for: q and out of each tile, K and V of each block, 4 for each query's lse."""
    rows = {step.queries for step in steps}
    own = sum(b - a for a, b in rows)
    return (2 * own + 2 * sum(step.rows for step in steps)) * head_dim * itemsize + 4 * own


def naive(queries: int, keys: int, head_dim: int, itemsize: int) -> int:
    """Bytes of three kernels of perfect tiles: q, k, v and out once, and S × T numbers four times."""
    return (2 * (queries + keys) * head_dim + 4 * queries * keys) * itemsize


def flash_tiles(
    *,
    step: int = 12,
    mask: str = "causal",
    block_m: int = 64,
    block_n: int = 64,
    window: int = 128,
    length: int = LENGTH,
) -> Explorable:
    """An explorable of the walk over `length` queries and keys of one head in 16 bits."""

    def walk_of(mask: str, block_m: int, block_n: int, window: int) -> list[Block]:
        window = window if mask == MASKS[2] else 0
        return walk(length, length, block_m, block_n, causal=mask != MASKS[0], window=window)

    def picture(step: int, mask: str, block_m: int, block_n: int, window: int) -> Figure:
        from matplotlib.figure import Figure

        steps = walk_of(mask, block_m, block_n, window)
        done = steps[: min(step, len(steps))]
        figure = Figure(figsize=(8.8, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 0.9))
        _squares(left, steps, done, length)
        _bars(right, steps, done, length, block_m, block_n)
        edges = sum(s.edge for s in steps)
        every = -(-length // block_m) * -(-length // block_n)
        counts = f"{every - len(steps)} of {every} blocks skipped, {edges} masked"
        left.set_title(f"step {len(done)} of {len(steps)}: {counts}", fontsize=9, loc="left")
        return figure

    sizes = (16, 32, 64, 128, 256)
    wide = {"layout": W.Layout(width="460px"), "style": {"description_width": "110px"}}
    others = {
        "mask": choice(MASKS, mask, "mask", **wide),
        "block_m": choice(sizes, block_m, "queries a tile", **wide),
        "block_n": choice(sizes, block_n, "keys a block", **wide),
        "window": W.IntSlider(value=window, min=16, max=length, step=16, description="window", **wide),
    }
    walked = W.IntSlider(value=step, min=0, max=max(step, 1), description="steps", **wide)

    def follow(change: object = None) -> None:
        """No control without effect: the walk's slider ends where the walk does."""
        walked.max = len(walk_of(**{name: control.value for name, control in others.items()}))
        others["window"].disabled = others["mask"].value != MASKS[2]

    follow()
    for control in others.values():
        control.observe(follow, "value")  # before the picture's own observer
    return Explorable(picture, CAPTION, step=walked, **others)


def _squares(ax: Axes, steps: list[Block], done: list[Block], length: int) -> None:
    from matplotlib.patches import Rectangle

    for i, s in enumerate(steps):
        colour = (ORANGE if s.edge else BLUE) if i < len(done) else ("#F5D9A0" if s.edge else SKY)
        corner, size = (s.keys[0], s.queries[0]), (s.rows, s.queries[1] - s.queries[0])
        ax.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="white", linewidth=0.6))
    if done:
        s = done[-1]
        corner, size = (s.keys[0], s.queries[0]), (s.rows, s.queries[1] - s.queries[0])
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=2, zorder=3))
    ax.set(xlim=(0, length), ylim=(length, 0), xlabel="key", ylabel="query", aspect="equal")
    ax.tick_params(labelsize=8)


def _bars(ax: Axes, steps: list[Block], done: list[Block], length: int, block_m: int, block_n: int) -> None:
    every = walk(length, length, block_m, block_n, causal=False)
    rows = [
        ("scores in memory", naive(length, length, HEAD_DIM, ITEMSIZE), GREY),
        ("tiles, all keys", moved(every, HEAD_DIM, ITEMSIZE), SKY),
        ("tiles, this mask", moved(steps, HEAD_DIM, ITEMSIZE), SKY),
        ("walked so far", moved(done, HEAD_DIM, ITEMSIZE), BLUE),
    ]
    names, values, colours = zip(*rows, strict=True)
    bars = ax.barh(names, [v / 1024 for v in values], color=colours, edgecolor=DARK, linewidth=0.5)
    ax.bar_label(bars, [f"{v / 1024:,.0f} KiB" for v in values], padding=3, fontsize=8)
    held = (block_m * (2 * HEAD_DIM + block_n) + 2 * block_n * HEAD_DIM) * ITEMSIZE
    asked = f"asked of memory by one head, D = {HEAD_DIM}, 16 bits"
    ax.set_title(f"{asked}\non chip at a time: about {held / 1024:,.0f} KiB", fontsize=9, loc="left")
    ax.invert_yaxis()
    ax.set(xlim=(0, max(values) / 1024 * 1.3), xlabel="KiB")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
