"""Stream programs on a real GPU: they do there what the rules say."""

from __future__ import annotations

import pytest

from llmcourse.labs.catalog import find_lab
from llmcourse.streams.at_work import at_work
from llmcourse.streams.native import Native
from llmcourse.streams.programs import program
from llmcourse.streams.simulate import simulate
from llmcourse.streams.timeline import HOST, Timeline


def makespan(name: str) -> float:
    return Native(program(name)).times().makespan_us


def device_spans(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {s.name: (s.start, s.end) for s in timeline.spans if s.lane != HOST}


@pytest.mark.parametrize("name", ["one stream", "four streams", "diamond", "loader, prefetching"])
def test_each_stream_does_its_work_in_the_order_of_the_simulation(name):
    seen = Native(program(name)).trace()
    expected = simulate(program(name))
    for lane in expected.lanes:
        if lane != HOST:
            orders = [
                [s.call for s in sorted(t.spans, key=lambda s: s.start) if s.lane == lane]
                for t in (seen, expected)
            ]
            assert orders[0] == orders[1], lane


def test_an_event_holds_the_other_stream():
    spans = device_spans(Native(program("diamond")).trace())
    assert spans["a"][1] <= spans["c"][0] + 1  # µs: CUPTI's clock
    assert max(spans["b"][1], spans["c"][1]) <= spans["d"][0] + 1
    assert spans["c"][0] < spans["b"][1]
    assert spans["b"][0] < spans["c"][1]


def test_streams_overlap_and_pageable_memory_prevents_it():
    assert makespan("four streams") < 0.7 * makespan("one stream")
    assert makespan("four streams, pageable") > 0.7 * makespan("one stream, pageable")


def test_a_stray_kernel_in_the_default_stream_holds_blocking_streams_only():
    assert makespan("default stream, blocking") > 1.3 * makespan("default stream, non-blocking")


def test_a_graph_is_launched_faster_than_its_kernels():
    one_by_one, graph = Native(program("200 kernels one by one")), Native(program("200 kernels in a graph"))
    launches = sum(one_by_one.times().host_us[:-1])
    assert graph.times().host_us[0] < launches / 2


def test_prefetching_hides_the_copies():
    assert makespan("loader, prefetching") < 0.75 * makespan("loader")


def test_the_labs_functions_run_on_the_gpu():
    program, table = at_work(*(e.alternatives[0].fn for e in find_lab("06").exercises), device="cuda")
    assert "measured on this GPU" in table.note
    assert len(table.rows) == 5
    assert program.run(repeats=3).makespan_us > 8 * 250  # eight steps of 250 µs, one after the other
