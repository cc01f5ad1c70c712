"""A pipeline's timeline: a lane for each stage, forwards, backwards, and the bubbles between, drawn as such.

`draw_on` takes any `Timeline`, simulated or measured in real processes. The explorable simulates: change the
schedule, the number of stages and micro-batches, how long a backward and a hand-over take, and watch the
bubble; below are the bubble for every number of micro-batches and what each stage must keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from llmcourse.train.parallel.schedule import SCHEDULES, Timeline, ideal_bubble, simulate
from llmcourse.widgets.explorable import Explorable, choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"F": "#8EC6EA", "B": "#F0B76B", "idle": "#E4E4E4"}
LINES = {"GPipe": "#7B3294", "1F1B": "#117733"}
MICROS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CAPTION = (
    "Choose a schedule and move the sliders with the arrow keys: hatched is idle. More micro-batches shrink "
    "the bubble under both schedules; what a stage keeps grows with them under GPipe only. A hand-over that "
    "takes time costs 1F1B more: after each forward it waits for an answer."
)


def run(schedule: str, stages: int, micros: int, backward: float, send: float) -> Timeline:
    """A schedule by its name, simulated; times in units of one forward of a micro-batch."""
    return simulate(SCHEDULES[schedule](stages, micros), backward=backward, send=send)


def draw_on(ax: Axes, timeline: Timeline, until: float | None = None) -> None:
    """Draw a lane for each stage: forwards, backwards with the number of their micro-batch, hatched bubbles.

    until   end of the axis, counted from the timeline's start; its makespan unless given
    """
    begin, until = timeline.start, timeline.makespan if until is None else until
    for stage in range(timeline.stages):
        lane, line = (stage - 0.43, 0.86), timeline.of(stage)
        idle = [(start - begin, end - start) for start, end in timeline.idle(stage)]
        look: dict[str, Any] = {"hatch": "////", "edgecolor": "#BBBBBB", "linewidth": 0}
        ax.broken_barh(idle, lane, facecolor=COLOURS["idle"], **look)
        for kind in ("F", "B"):  # all bars of a lane and colour as one: there may be hundreds
            bars = [(s.start - begin, s.end - s.start) for s in line if s.kind == kind]
            ax.broken_barh(bars, lane, facecolor=COLOURS[kind], edgecolor="white", linewidth=0.5)
        for s in line:
            if s.end - s.start > until / 45:  # room for a number
                middle = (s.start + s.end) / 2 - begin
                ax.text(middle, stage, str(s.micro), ha="center", va="center", fontsize=7)
    ax.set_yticks(range(timeline.stages), [f"stage {s}" for s in range(timeline.stages)], fontsize=8)
    ax.set(xlim=(0, until or 1), ylim=(timeline.stages - 0.5, -0.5))
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def draw(figure: Figure, timelines: Mapping[str, Timeline], unit: str = "") -> None:
    """Draw timelines one above the other on one axis of time, each titled with its name and its bubble.

    unit   of their times, for the axis, e.g. "ms"
    """
    longest = max(t.makespan for t in timelines.values())
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, timeline) in zip(axes, timelines.items(), strict=True):
        draw_on(ax, timeline, longest)
        keeps = max(timeline.peak(s) for s in range(timeline.stages))
        ax.set_title(f"{name}: idle {timeline.bubble:.1%}, keeps at most {keeps}", fontsize=9, loc="left")
    axes[-1].set_xlabel(unit, fontsize=8)
    legend(figure)


def legend(figure: Figure) -> None:
    """The three kinds of bars, below everything."""
    from matplotlib.patches import Patch

    bars = [
        Patch(color=COLOURS["F"], label="forward"),
        Patch(color=COLOURS["B"], label="backward"),
        Patch(facecolor=COLOURS["idle"], hatch="////", edgecolor="#BBBBBB", linewidth=0, label="idle"),
    ]
    figure.legend(handles=bars, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def pipeline_schedule(*, schedule: str = "1F1B", stages: int = 4, micros: int = 8) -> Explorable:
    """An explorable of simulated pipelines; `micros` is one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32."""

    def picture(schedule: str, stages: int, micros: int, backward: float, send: float) -> Figure:
        from matplotlib.figure import Figure

        timeline = run(schedule, stages, micros, backward, send)
        figure = Figure(figsize=(8.6, 2.9 + 0.32 * stages), layout="constrained")
        rows = (0.6 + 0.3 * stages, 2.0)
        ax = figure.subplot_mosaic([["time", "time"], ["bubble", "memory"]], height_ratios=rows)
        draw_on(ax["time"], timeline)
        ax["time"].set_xlabel("time, in forwards of one micro-batch", fontsize=8)
        ax["time"].set_title(
            f"{schedule}, {stages} stages, {micros} micro-batches: {timeline.makespan:g}; idle "
            f"{timeline.bubble:.1%} (ideal (p−1)/(m+p−1) = {ideal_bubble(stages, micros):.1%})",
            fontsize=9,
            loc="left",
        )
        _bubbles(ax["bubble"], schedule, stages, micros, backward, send)
        _memory(ax["memory"], stages, micros, backward, send)
        legend(figure)
        return figure

    wide = {"style": {"description_width": "110px"}}
    return Explorable(
        picture,
        CAPTION,
        schedule=choice(tuple(SCHEDULES), schedule, "schedule", **wide),
        stages=W.IntSlider(value=stages, min=1, max=8, description="stages", **wide),
        micros=choice(MICROS, micros, "micro-batches", **wide),
        backward=W.FloatSlider(value=2.0, min=0.5, max=4.0, step=0.5, description="backward takes", **wide),
        send=W.FloatSlider(value=0.0, min=0.0, max=2.0, step=0.25, description="hand-over takes", **wide),
    )


def _bubbles(ax: Axes, schedule: str, stages: int, micros: int, backward: float, send: float) -> None:
    """The idle share for every number of micro-batches, and where the picture stands."""
    widths = {"GPipe": 5.0, "1F1B": 2.2}  # without hand-over times the lines lie on each other
    for name, colour in LINES.items():
        idle = [run(name, stages, m, backward, send).bubble for m in MICROS]
        ax.plot(MICROS, idle, "-", color=colour, linewidth=widths[name], label=name)
        if name == schedule:
            ax.plot(micros, idle[MICROS.index(micros)], "o", color=colour, markersize=9)
    ax.plot(MICROS, [ideal_bubble(stages, m) for m in MICROS], ":", color="black", linewidth=1, label="ideal")
    ax.set(xscale="log", ylim=(0, 1))
    ax.set_xticks((1, 2, 4, 8, 16, 32), ("1", "2", "4", "8", "16", "32"), fontsize=8)
    ax.minorticks_off()
    ax.set_xlabel("micro-batches", fontsize=8)
    ax.set_title("idle share", fontsize=8, loc="left")
    ax.tick_params(axis="y", labelsize=8)
    ax.legend(fontsize=7, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def _memory(ax: Axes, stages: int, micros: int, backward: float, send: float) -> None:
    """The most micro-batches that each stage keeps, under each schedule."""
    for i, (name, colour) in enumerate(LINES.items()):
        timeline = run(name, stages, micros, backward, send)
        at = [s + 0.4 * i - 0.2 for s in range(stages)]
        bars = ax.bar(
            at, [timeline.peak(s) for s in range(stages)], 0.36, color=colour, alpha=0.8, label=name
        )
        ax.bar_label(bars, fontsize=7)
    ax.set_xticks(range(stages), [str(s) for s in range(stages)], fontsize=8)
    ax.set_xlabel("stage", fontsize=8)
    ax.set_ylim(0, micros * 1.4)  # room for the legend
    ax.set_title("micro-batches kept at most", fontsize=8, loc="left")
    ax.tick_params(axis="y", labelsize=8)
    ax.legend(fontsize=7, frameon=False, loc="upper right", ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
