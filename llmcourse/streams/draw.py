"""Timelines as pictures: a row for the host and one for every stream, a bar for everything that ran.

Colour says which engine was busy, so that work which overlaps in time is seen at a glance: bars of two
colours, one above the other. What the host spends waiting is pale; the critical path of a simulated
timeline has a black edge.
"""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import TYPE_CHECKING, Any

from llmcourse.streams.timeline import HOST, Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLORS = {"host": "#999999", "h2d": "#0072B2", "sm": "#E69F00", "d2h": "#009E73", "d2d": "#CC79A7"}
ENGINES = {
    "host": "host's call",
    "h2d": "copy to the device",
    "sm": "kernel",
    "d2h": "copy to the host",
    "d2d": "copy on the device",
}
ROW, BAR = 0.34, 0.72  # inches a row; a bar's share of its row


def draw(*timelines: Timeline, title: str = "", names: bool = True, until: float | None = None) -> Figure:
    """Timelines under one another, on one scale of microseconds.

    names   write a span's name into its bar where there is room
    until   the right end of the axis, µs (None: the longest makespan)
    """
    from matplotlib.figure import Figure

    end = until or max((_end(t) for t in timelines), default=1.0) or 1.0
    rows = [len(t.lanes) for t in timelines]
    height = sum(ROW * n + 0.42 for n in rows) + 0.75
    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.subplots(
        len(timelines), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [n + 0.4 for n in rows]}
    )[:, 0]
    for ax, timeline in zip(axes, timelines, strict=True):
        draw_on(ax, timeline, end, names=names)
    axes[-1].set_xlabel("µs")
    legend(figure, *timelines)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


class Picture:
    """Timelines that a notebook shows as a figure, and as characters where there are no pictures."""

    def __init__(self, *timelines: Timeline, **options: Any) -> None:
        self.timelines, self.options = timelines, options

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.timelines))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        buffer = BytesIO()
        figure = draw(*self.timelines, **self.options)
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
        return {"image/png": b64encode(buffer.getvalue()).decode(), "text/plain": repr(self)}


def draw_on(ax: Axes, timeline: Timeline, end: float, *, names: bool = True) -> None:
    """One timeline on axes of its own, up to `end` µs."""
    lanes = timeline.lanes
    critical = set(timeline.critical)
    for span in timeline.spans:
        y = lanes.index(span.lane)
        busy = span.us - span.waits
        decides = (span.call, HOST if span.lane == HOST else "device") in critical and busy > 0
        edge, width = ("black", 1.1) if decides else ("white", 0.4)
        if span.us < 0.008 * end:
            width = 0.0  # an edge would hide the bar
        tall = BAR * (1.0 if span.engine != "sm" else 0.35 + 0.65 * span.share)
        ax.barh(y, busy, tall, left=span.start, color=COLORS[span.engine], edgecolor=edge, linewidth=width)
        if span.waits:
            ax.barh(y, span.waits, tall, left=span.start + busy, color="#E8E8E8", edgecolor="white")
        if names and _fits(span, end):
            ink = "black" if span.engine in ("sm", "d2d") else "white"
            ax.text(
                (span.start + span.end) / 2, y, span.name, ha="center", va="center", fontsize=7, color=ink
            )
    ax.axvline(timeline.makespan_us, color="black", linewidth=0.8, linestyle=":")
    ax.set(xlim=(0, end * 1.01), ylim=(len(lanes) - 0.5, -0.5))
    ax.set_yticks(range(len(lanes)), lanes, fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(
        f"{timeline.name}: {timeline.makespan_us:,.0f} µs, {timeline.source.partition(',')[0]}",
        fontsize=9,
        loc="left",
    )


def _fits(span: Span, end: float) -> bool:
    return span.lane != HOST and span.us / end > 0.011 * len(span.name)


def _end(timeline: Timeline) -> float:
    return max([timeline.makespan_us, *(s.end for s in timeline.spans)])


def legend(figure: Figure, *timelines: Timeline) -> None:
    """What the colours mean, below the figure: of the engines that are there."""
    from matplotlib.patches import Patch

    seen = {s.engine for t in timelines for s in t.spans}
    patches = [Patch(color=COLORS[e], label=label) for e, label in ENGINES.items() if e in seen]
    if any(s.waits for t in timelines for s in t.spans):
        patches.insert(1, Patch(facecolor="#E8E8E8", label="host waits"))
    if any(t.critical for t in timelines):
        patches.append(Patch(facecolor="white", edgecolor="black", label="critical path"))
    if patches:
        figure.legend(
            handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False
        )
