"""The small helpers that notebooks import, and the learner's progress."""

from __future__ import annotations

import json

import pytest

from llmcourse import course
from llmcourse.errors import UnknownNameError
from llmcourse.notebook import Table, judge, show_source


@pytest.mark.parametrize(
    ("predicted", "measured", "says"),
    [
        (10, 24.1, "2.4× more"),
        (24.1, 10, "2.4× less"),
        (10, 11, "close"),
        (10, 8, "close"),
        (0, 3, "off by +3"),
        (5, 0, "off by -5"),
    ],
)
def test_a_prediction_is_judged_by_its_ratio_to_the_measurement(predicted, measured, says):
    assert judge(predicted, measured, "ms").startswith(
        f"you said {predicted:,.4g} ms, measured {measured:,.4g} ms"
    )
    assert says in judge(predicted, measured, "ms")


def test_large_numbers_are_written_out():
    assert judge(65_000, 131_072, "bytes").startswith("you said 65,000 bytes, measured 131,072 bytes")
    assert judge(1.5e9, 2_000_000_000).startswith("you said 1,500,000,000, measured 2,000,000,000")


def test_shown_source_is_the_source_that_runs():
    namespace: dict = {}
    exec("import math\n" + show_source(judge).text, {"math": None}, namespace)
    assert namespace["judge"](10, 24.1, "ms") == judge(10, 24.1, "ms")
    assert "<span" in show_source(judge)._repr_html_()


def test_a_table_aligns_numbers_right_and_words_left():
    text = repr(Table(["name", "tokens/s"], [["naive", 8.25], ["all", 1234], ["none", None]]))
    assert text.splitlines() == [
        "name   tokens/s",
        "─────  ────────",
        "naive      8.25",
        "all       1,234",
        "none          –",
    ]


def test_a_table_escapes_what_it_shows():
    html = Table(["<b>"], [["<script>alert(1)</script>"]], note="a < b")._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a &lt; b" in html


def test_chapters_are_found_by_number_slug_and_name():
    for name in ("1", "01", "backprop", "01_backprop", "01_backprop.ipynb"):
        assert course.chapter(name).name == "01_backprop"
    with pytest.raises(UnknownNameError, match="backprob"):
        course.chapter("backprob")


def test_chapters_are_numbered_in_order_and_belong_to_a_part():
    assert [c.number for c in course.CHAPTERS] == [f"{i:02d}" for i in range(25)]
    assert {c.part for c in course.CHAPTERS} == set(range(len(course.PARTS)))


def test_progress_is_kept_and_survives_a_broken_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "progress.json"
    monkeypatch.setenv("LLMCOURSE_PROGRESS", str(path))
    assert course.progress() == {}
    assert course.mark_read("00_start_here") == "Read: 00_start_here. Next: 01_backprop."
    first = dict(course.progress())
    course.mark_read("01_backprop")
    course.mark_read("00")
    assert set(course.progress()) == {"00_start_here", "01_backprop"}
    assert course.progress()["00_start_here"] == first["00_start_here"]
    path.write_text("{broken")
    assert course.progress() == {}
    course.mark_read("00")
    assert set(json.loads(path.read_text())) == {"00_start_here"}
    assert [p.name for p in path.parent.iterdir()] == ["progress.json"]


def test_an_explorable_redraws_when_a_control_moves_and_shows_a_picture_without_a_kernel():
    import ipywidgets as W
    from matplotlib.figure import Figure

    from llmcourse.widgets import Explorable

    def draw(k: int) -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot(range(k))
        return figure

    thing = Explorable(draw, "move k", k=W.IntSlider(2, min=1, max=9))
    before = bytes(thing.image.value)
    assert before.startswith(b"\x89PNG")
    thing.controls["k"].value = 7
    after = bytes(thing.image.value)
    assert after != before
    thing.controls["k"].value = 2
    assert thing.image.value == before  # the same picture, to the byte
    bundle = thing._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == "[explorable: move k]"
    assert bundle["image/png"]


def test_the_next_token_explorer_follows_temperature_and_top_p(tiny):
    from llmcourse.engine import LLM
    from llmcourse.widgets.next_token import next_token_explorer

    thing = next_token_explorer(LLM(tiny), "Hello")
    pictures = {bytes(thing.image.value)}
    thing.controls["temperature"].value = 0.2
    pictures.add(bytes(thing.image.value))
    thing.controls["top_p"].value = 0.1
    pictures.add(bytes(thing.image.value))
    assert len(pictures) == 3
