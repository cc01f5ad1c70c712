"""The viewer of pipeline schedules follows its controls, draws every bubble, and says what is simulated."""

from __future__ import annotations

import pytest

from llmcourse.train.parallel.schedule import SCHEDULES, Timeline, gpipe, ideal_bubble, one_f_one_b, simulate
from llmcourse.widgets.pipeline_schedule import COLOURS, MICROS, draw, draw_on, pipeline_schedule, run


def areas(timeline: Timeline, until: float | None = None) -> dict[str, float]:
    """How much time the drawing shows in each colour."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    draw_on(ax, timeline, until)
    names = {colour.lower(): name for name, colour in COLOURS.items()}
    drawn = dict.fromkeys(COLOURS, 0.0)
    for bars in ax.collections:
        name = names[to_hex(bars.get_facecolor()[0])]
        drawn[name] += sum(path.get_extents().width for path in bars.get_paths())
        assert bool(bars.get_hatch()) == (name == "idle")
    return drawn


@pytest.mark.parametrize("order", [gpipe(4, 6), one_f_one_b(4, 6), gpipe(1, 3), one_f_one_b(3, 1)])
def test_the_bars_are_the_work_and_the_bubble(order) -> None:
    timeline = simulate(order, backward=1.5, send=0.25)
    drawn, whole = areas(timeline), timeline.stages * timeline.makespan
    assert drawn["idle"] == pytest.approx(timeline.bubble * whole, abs=1e-9)
    assert sum(drawn.values()) == pytest.approx(whole)
    assert drawn["B"] == pytest.approx(1.5 * drawn["F"])


def test_a_measured_timeline_is_drawn_from_its_own_start() -> None:
    simulated = simulate(gpipe(2, 3))
    later = tuple(s._replace(start=s.start + 100, end=s.end + 100) for s in simulated.spans)
    assert areas(Timeline(2, later)) == areas(simulated)


def test_timelines_to_compare_share_one_axis_of_time() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, {"few": simulate(gpipe(3, 2)), "many": simulate(one_f_one_b(3, 8))}, unit="forwards")
    limits = {ax.get_xlim() for ax in figure.axes}
    assert limits == {(0, 10 * 3)}
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["few: idle 50.0%, keeps at most 2", "many: idle 20.0%, keeps at most 3"]


def test_moving_any_control_redraws_the_picture() -> None:
    explorer = pipeline_schedule()
    seen = {explorer.image.value}
    moves = {"schedule": "GPipe", "stages": 3, "micros": 4, "backward": 1.0, "send": 0.5}
    for name, value in moves.items():
        explorer.controls[name].value = value
        seen.add(explorer.image.value)
    assert len(seen) == 6
    assert explorer._repr_mimebundle_()["image/png"]


def test_it_shows_what_the_caption_claims() -> None:
    for name in SCHEDULES:
        idle = [run(name, 4, m, 2.0, 0.0).bubble for m in MICROS]
        assert idle == pytest.approx([ideal_bubble(4, m) for m in MICROS])
        assert idle == sorted(idle, reverse=True)
    kept = {name: [run(name, 4, m, 2.0, 0.0).peak(0) for m in MICROS] for name in SCHEDULES}
    assert kept == {"GPipe": list(MICROS), "1F1B": [min(4, m) for m in MICROS]}
    slow = {name: run(name, 4, 16, 2.0, 0.5).bubble for name in SCHEDULES}
    assert slow["1F1B"] > slow["GPipe"] > ideal_bubble(4, 16)
