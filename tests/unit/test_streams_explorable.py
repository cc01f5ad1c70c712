"""The timeline explorer follows its controls and shows what the simulator says."""

from __future__ import annotations

from llmcourse.streams.programs import program
from llmcourse.widgets.stream_timeline import CHUNKS, cut, stream_timeline


def test_its_first_picture_is_the_recorded_program_of_four_streams():
    assert cut(8, 4, 64, 1200, True).makespan_us == program("four streams").simulate().makespan_us


def test_moving_any_control_redraws_the_picture():
    explorer = stream_timeline(device="model")
    seen = {explorer.image.value}
    for name, value in (
        ("chunks", 2),
        ("streams", 1),
        ("megabytes", 8),
        ("kernel_us", 100),
        ("pinned", False),
    ):
        explorer.controls[name].value = value
        seen.add(explorer.image.value)
    assert len(seen) == 6
    assert explorer._repr_mimebundle_()["image/png"]


def test_neither_one_chunk_nor_the_most_is_best():
    times = [cut(n, 4, 64, 1200, True).makespan_us for n in CHUNKS]
    best = times.index(min(times))
    assert 0 < best < len(CHUNKS) - 1
