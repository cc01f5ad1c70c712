"""Programs refuse what CUDA refuses, races are found, and timelines can be looked at."""

from __future__ import annotations

import pytest

from llmcourse.errors import CourseError, UnknownNameError
from llmcourse.streams.calls import KB, MB
from llmcourse.streams.draw import draw
from llmcourse.streams.faults import ProgramError
from llmcourse.streams.order import races
from llmcourse.streams.program import Program
from llmcourse.streams.programs import PROGRAMS, loader, pipeline, program


def refused(word: str) -> object:
    return pytest.raises(ProgramError, match=word)


def test_what_cuda_refuses_is_refused_with_a_reason():
    p = Program()
    s = p.stream("s")
    with refused("there is a stream 's' already"):
        p.stream("s")
    with refused("copies 0 bytes"):
        p.copy("c", 0, "h2d")
    with refused("'up'"):
        p.copy("c", 1, "up")  # type: ignore[arg-type]
    with refused("no negative time"):
        p.kernel("k", -1)
    with refused("made by another program"):
        Program().kernel("k", 1, stream=s)
    with refused("default stream cannot be captured"), p.capture():
        pass


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("synchronize was called during a capture", lambda p, s: p.synchronize()),
        ("makes the host wait", lambda p, s: p.copy("c", KB, "h2d", stream=s, pinned=False)),
        ("makes the host wait", lambda p, s: p.copy("c", KB, "h2d", stream=s, wait=True)),
        ("host work 'h' stands in a capture", lambda p, s: p.host("h", 1)),
        ("no part of the graph", lambda p, s: p.kernel("k", 1, stream=p.streams[2])),
        ("stands in the capture of 'graph', and the event outside it", lambda p, s: p.wait(p.outside, s)),
    ],
)
def test_a_capture_takes_nothing_that_a_replay_could_not_repeat(what, call):
    p = Program()
    s, other = p.stream(), p.stream()
    p.outside = p.record(other)  # type: ignore[attr-defined]
    with refused(what), p.capture(stream=s):
        p.kernel("first", 1, stream=s)
        call(p, s)
    p.kernel("after", 1, stream=s)  # the program can go on
    assert [c.name for c in p.calls] == ["record event 0", "after"]


def test_a_forked_stream_must_be_joined_before_the_capture_ends():
    p = Program()
    a, b = p.stream(), p.stream()
    with refused("ends with 'lost' that nothing waits for"), p.capture(stream=a):
        p.wait(p.record(a), b)
        p.kernel("lost", 1, stream=b)


def test_an_unknown_program_or_device_is_refused_by_name():
    with pytest.raises(UnknownNameError, match="four streams"):
        program("fuor streams")
    with pytest.raises(UnknownNameError, match="no record"):
        Program().simulate("H9000")


# ── races ────────────────────────────────────────────────────────────────────────────────────────


def made(p: Program) -> list[str]:
    return [str(r).splitlines()[0] for r in races(p)]


def test_a_buffer_written_in_one_stream_and_read_in_another_is_a_race():
    p = Program()
    a, b = p.stream("a"), p.stream("b")
    p.copy("in", MB, "h2d", stream=a, writes="x")
    p.kernel("work", 10, stream=b, reads="x")
    assert len(races(p)) == 1
    assert "'in' (a) writes 'x', and 'work' (b) reads it" in made(p)[0]


@pytest.mark.parametrize("how", ["same stream", "event", "synchronize", "legacy"])
def test_a_stream_an_event_or_a_synchronisation_removes_the_race(how):
    p = Program()
    a = p.stream(kind="blocking")
    b = a if how == "same stream" else p.default if how == "legacy" else p.stream()
    p.copy("in", MB, "h2d", stream=a, writes="x")
    if how == "event":
        p.wait(p.record(a), b)
    elif how == "synchronize":
        p.synchronize(a)
    p.kernel("work", 10, stream=b, reads="x")
    assert races(p) == []


def test_the_host_may_reuse_pageable_memory_at_once_and_pinned_memory_only_when_it_has_been_read():
    def refill(pinned: bool) -> Program:
        p = Program()
        p.host("fill", 5, writes="batch")
        p.copy("in", 8 * MB, "h2d", stream=p.stream(), pinned=pinned, reads="batch")
        p.host("fill again", 5, writes="batch")
        return p

    assert races(refill(pinned=False)) == []
    assert "'in' (stream 1) reads 'batch', and 'fill again' (host) writes it" in made(refill(pinned=True))[0]


def test_a_pageable_copy_that_has_returned_need_not_have_arrived():
    p = Program()
    p.copy("in", 8 * MB, "h2d", stream=p.stream("a"), pinned=False, writes="x")
    p.kernel("work", 10, stream=p.stream("b"), reads="x")
    assert len(races(p)) == 1


def test_two_reads_are_no_race_and_neither_is_work_in_a_graph_that_its_events_order():
    p = Program()
    a, b = p.stream("a"), p.stream("b")
    p.kernel("left", 1, stream=a, reads="x")
    p.kernel("right", 1, stream=b, reads="x")
    with p.capture(stream=a) as graph:
        p.kernel("first", 1, stream=a, writes="y")
        p.wait(p.record(a), b)
        p.kernel("second", 1, stream=b, reads="y")
        p.wait(p.record(b), a)
    p.launch(graph, stream=a)
    assert races(p) == []


def test_the_chapters_programs_have_no_races():
    for build in PROGRAMS.values():
        assert races(build()) == []


def test_the_prefetching_loader_without_its_used_events_races():
    p = loader("", prefetch=True)
    p.calls = [c for c in p.calls if not c.name.startswith("wait used")]
    assert any("'step 0' (compute) reads 'x0', and 'in 2' (copies) writes it" in text for text in made(p))


# ── looking ──────────────────────────────────────────────────────────────────────────────────────


def test_a_timeline_counts_what_overlaps():
    timeline = pipeline("", chunks=4, streams=4).simulate("model")
    alone = pipeline("", chunks=4, streams=1).simulate("model")
    assert alone.overlap == 0 < timeline.overlap < 1
    assert timeline.busy_us("h2d") == pytest.approx(alone.busy_us("h2d"))
    assert timeline.utilisation("h2d") > alone.utilisation("h2d")
    assert timeline.together("sm") == 1
    assert timeline.lanes == ["host", "stream 1", "stream 2", "stream 3", "stream 4"]


def test_a_timeline_is_drawn_with_a_row_for_every_lane_and_a_bar_for_every_span():
    timeline = program("diamond").simulate()
    figure = draw(timeline, timeline, title="twice")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["host", "left", "right"]
    waiting = sum(bool(s.waits) for s in timeline.spans)
    assert len(figure.axes[0].patches) == len(timeline.spans) + waiting
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert timeline.draw(names=False).axes[0].texts[:] == []


def test_a_timeline_prints_itself_in_characters():
    text = repr(program("diamond").simulate())
    assert text.startswith("diamond (simulated: NVIDIA H100")
    assert sum(line.count("#") > 5 for line in text.splitlines()) == 2


def test_a_programs_text_names_every_call():
    text = program("graph with a fork").text()
    assert "launch step: 4 nodes [a]" in text
    assert text.count("kernel left") == 1  # a graph's calls are listed where it is launched first
    assert "copy in 0: 8388608 B h2d pageable [stream 1]" in program("one stream, pageable").text()


def test_running_without_a_gpu_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(CourseError, match=r"CUDA|GPU"):
        program("diamond").run()
