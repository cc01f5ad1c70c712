"""Cut a transfer into chunks, deal them to streams, and see what overlaps.

A fixed amount of data goes to the device, is worked on, and comes back. The timeline is simulated with the
constants of a recorded GPU. Few chunks leave the engines idle, many pay a launch for each: the curve below
the timeline has its valley between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as W

from llmcourse.streams.calls import MB
from llmcourse.streams.costs import Costs
from llmcourse.streams.draw import COLORS, draw_on, legend
from llmcourse.streams.programs import pipeline
from llmcourse.streams.timeline import Timeline
from llmcourse.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CAPTION = (
    "Move chunks, streams, size and kernel time with the arrow keys, take the pin away with the space bar, "
    "and watch which engine is busy all the time. The lower curve is the makespan for every number of chunks."
)


def cut(
    chunks: int, streams: int, megabytes: int, kernel_us: int, pinned: bool, costs: Costs | str = "H100"
) -> Timeline:
    """`megabytes` (2²⁰ bytes) in, `kernel_us` µs of work in all, as much out: cut into equal chunks."""
    p = pipeline(
        f"{chunks} chunks in {streams} streams",
        chunks=chunks,
        streams=min(streams, chunks),
        nbytes=max(1, megabytes * MB // chunks),
        us=kernel_us / chunks,
        pinned=pinned,
    )
    return p.simulate(costs)


def stream_timeline(
    *, chunks: int = 8, streams: int = 4, megabytes: int = 64, kernel_us: int = 1200, device: str = "H100"
) -> Explorable:
    """An explorable of a chunked pipeline, simulated with the constants recorded on `device`."""
    costs = Costs.of(device)

    def picture(chunks: int, streams: int, megabytes: int, kernel_us: int, pinned: bool) -> Figure:
        from matplotlib.figure import Figure

        timeline = cut(chunks, streams, megabytes, kernel_us, pinned, costs)
        figure = Figure(figsize=(8.6, 4.9), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[1.5, 1])
        draw_on(above, timeline, timeline.makespan_us, names=chunks <= 8)
        above.set_xlabel("µs", fontsize=8)
        busy = ", ".join(f"{e} {timeline.utilisation(e):.0%}" for e in timeline.engines)
        above.set_title(
            f"{timeline.name}: {timeline.makespan_us:,.0f} µs; busy: {busy}; overlap {timeline.overlap:.0%}",
            fontsize=9,
            loc="left",
        )
        times = [cut(n, streams, megabytes, kernel_us, pinned, costs).makespan_us for n in CHUNKS]
        _curve(below, times, CHUNKS.index(chunks))
        below.set_title(f"simulated; constants {costs.source}", fontsize=8, loc="left")
        legend(figure, timeline)
        return figure

    wide = {"style": {"description_width": "90px"}}
    return Explorable(
        picture,
        CAPTION,
        chunks=W.SelectionSlider(options=CHUNKS, value=chunks, description="chunks", **wide),
        streams=W.IntSlider(value=streams, min=1, max=8, description="streams", **wide),
        megabytes=W.IntSlider(value=megabytes, min=4, max=256, step=4, description="MB each way", **wide),
        kernel_us=W.IntSlider(value=kernel_us, min=0, max=8000, step=100, description="kernel µs", **wide),
        pinned=W.Checkbox(value=True, description="pinned memory"),
    )


def _curve(ax: Axes, times: list[float], here: int) -> None:
    best = min(range(len(times)), key=times.__getitem__)
    x = range(len(CHUNKS))
    ax.plot(x, times, "o-", color=COLORS["h2d"], markersize=4)
    ax.plot(here, times[here], "o", color=COLORS["sm"], markersize=10, label="here", zorder=0)
    ax.annotate(
        f"{times[best]:,.0f} µs",
        (best, times[best]),
        textcoords="offset points",
        xytext=(0, 7),
        ha="center",
        fontsize=8,
    )
    ax.set_xticks(x, map(str, CHUNKS), fontsize=8)
    ax.set(ylim=(0, max(times) * 1.12), xlabel="chunks", ylabel="makespan, µs")
    ax.tick_params(axis="y", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
