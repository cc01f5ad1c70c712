"""The rules of streams, each in a program whose timeline can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from free_device import FREE, MEGABYTE

from llmcourse.streams.costs import Costs
from llmcourse.streams.program import Program
from llmcourse.streams.programs import pipeline
from llmcourse.streams.timeline import Timeline


def ends(timeline: Timeline) -> dict[str, float]:
    return {s.name: round(s.end, 6) for s in timeline.spans if s.lane != "host"}


def starts(timeline: Timeline) -> dict[str, float]:
    return {s.name: round(s.start, 6) for s in timeline.spans if s.lane != "host"}


def returned(timeline: Timeline) -> dict[str, float]:
    return {s.name: round(s.end, 6) for s in timeline.spans if s.lane == "host"}


# ── order ────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_does_its_work_in_order():
    p = Program()
    s = p.stream()
    p.copy("in", MEGABYTE, "h2d", stream=s)
    p.kernel("work", 50, stream=s)
    p.copy("out", MEGABYTE, "d2h", stream=s)
    timeline = p.simulate(FREE)
    assert ends(timeline) == {"in": 100, "work": 150, "out": 250}
    assert timeline.makespan_us == 250


def test_two_streams_overlap_copies_and_kernels():
    chunk = {"nbytes": MEGABYTE, "us": 100.0}
    assert pipeline("", chunks=4, streams=1, **chunk).simulate(FREE).makespan_us == pytest.approx(4 * 300)
    # Four streams: the copy engine is never idle, and the last chunk's other two stages follow.
    assert pipeline("", chunks=4, streams=4, **chunk).simulate(FREE).makespan_us == pytest.approx(
        4 * 100 + 200
    )


def test_the_host_goes_on_while_the_device_works():
    p = Program()
    p.kernel("long", 500, stream=p.stream())
    p.host("meanwhile", 30)
    assert returned(p.simulate(FREE))["meanwhile"] == 30


def test_an_event_orders_two_streams_and_lets_the_host_go_on():
    p = Program()
    a, b = p.stream(), p.stream()
    p.kernel("first", 70, stream=a, share=0.1)
    p.wait(p.record(a), b)
    p.kernel("second", 20, stream=b, share=0.1)
    p.kernel("unasked", 20, stream=a, share=0.1)
    timeline = p.simulate(FREE)
    assert starts(timeline) == {"first": 0, "second": 70, "unasked": 70}
    assert returned(timeline)["second"] == 0


def test_a_wait_sees_the_latest_record_made_before_it():
    p = Program()
    a, b = p.stream(), p.stream()
    event = p.record(a)
    p.kernel("after the record", 70, stream=a, share=0.1)
    p.wait(event, b)
    p.kernel("free", 20, stream=b, share=0.1)
    assert starts(p.simulate(FREE))["free"] == 0


@pytest.mark.parametrize(("kind", "second"), [("blocking", 110), ("non-blocking", 0)])
def test_the_default_stream_stands_between_blocking_streams_only(kind, second):
    p = Program()
    a, b = p.stream(kind=kind), p.stream(kind=kind)
    p.kernel("first", 100, stream=a, share=0.1)
    p.kernel("stray", 10, share=0.1)
    p.kernel("second", 100, stream=b, share=0.1)
    assert starts(p.simulate(FREE)) == {"first": 0, "stray": 100 if second else 0, "second": second}


def test_synchronisation_waits_for_what_it_names_and_nothing_else():
    def host_at(target: str) -> float:
        p = Program()
        a, b = p.stream(), p.stream()
        p.kernel("short", 30, stream=a, share=0.1)
        event = p.record(a)
        p.kernel("longer", 40, stream=a, share=0.1)
        p.kernel("longest", 200, stream=b, share=0.1)
        p.synchronize({"event": event, "stream": a, "device": None}[target])
        p.host("then", 0)
        return returned(p.simulate(FREE))["then"]

    assert [host_at(t) for t in ("event", "stream", "device")] == [30, 70, 200]


# ── engines ──────────────────────────────────────────────────────────────────────────────────────


def test_each_direction_has_one_engine():
    def both(first: str, second: str) -> float:
        p = Program()
        p.copy("a", MEGABYTE, first, stream=p.stream())
        p.copy("b", MEGABYTE, second, stream=p.stream())
        return p.simulate(FREE).makespan_us

    assert both("h2d", "d2h") == pytest.approx(100)
    assert both("h2d", "h2d") == pytest.approx(200)
    assert both("d2h", "d2h") == pytest.approx(200)


def test_directions_that_share_the_link_slow_each_other_while_both_run():
    p = Program()
    p.copy("in", 3 * MEGABYTE, "h2d", stream=p.stream())
    p.copy("out", MEGABYTE, "d2h", stream=p.stream())
    # At half speed "out" takes 200 µs; "in" has moved 1 MB by then and has 2 left, at full speed.
    assert ends(p.simulate(replace(FREE, duplex=0.5))) == {"out": 200, "in": 400}


def test_a_copy_engine_stays_with_a_stream_that_has_more_to_copy():
    p = Program()
    a, b = p.stream(), p.stream()
    for i in range(2):
        p.copy(f"a{i}", MEGABYTE, "h2d", stream=a)
        p.copy(f"b{i}", MEGABYTE, "h2d", stream=b)
    assert ends(p.simulate(FREE)) == {"a0": 100, "a1": 200, "b0": 300, "b1": 400}


@pytest.mark.parametrize(
    ("share", "makespan"),
    [(0.25, 100), (0.5, 200), (1.0, 400), (0.6, 300)],
)
def test_kernels_run_side_by_side_as_far_as_their_blocks_fit(share, makespan):
    # Four kernels of 0.6: 2.4 GPUs of blocks, in three waves because a wave's blocks all take 100 µs.
    p = Program()
    for i in range(4):
        p.kernel(f"k{i}", 100, stream=p.stream(), share=share)
    assert p.simulate(FREE).makespan_us == pytest.approx(makespan)


def test_a_kernel_larger_than_the_gpu_runs_in_waves():
    p = Program()
    p.kernel("big", 100, stream=p.stream(), share=2.5)
    assert p.simulate(FREE).makespan_us == pytest.approx(300)


def test_a_kernel_that_fits_in_part_starts_in_part_and_holds_those_behind_it():
    p = Program()
    for name, share in (("a", 0.6), ("b", 0.6), ("c", 0.1)):
        p.kernel(name, 100, stream=p.stream(), share=share)
    # b starts 0.4 at once and 0.2 when a ends; c would fit nowhere before that.
    assert starts(p.simulate(FREE)) == {"a": 0, "b": 0, "c": 100}
    assert ends(p.simulate(FREE)) == {"a": 100, "b": 200, "c": 200}


def test_more_streams_than_hardware_queues_wait_for_strangers():
    def makespan(connections: int) -> float:
        p = Program()
        for s in [p.stream() for _ in range(4)]:
            for i in range(3):
                p.kernel(f"{s.name} {i}", 10, stream=s, share=0.01)
        return p.simulate(replace(FREE, connections=connections)).makespan_us

    assert makespan(4) == pytest.approx(30)
    # Two streams a queue: the second's first kernel runs beside the first's last, 3 + 2 kernels in a row.
    assert makespan(2) == pytest.approx(50)
    assert makespan(1) == pytest.approx(90)


# ── memory of the host ───────────────────────────────────────────────────────────────────────────


def test_a_pageable_copy_is_slower_and_holds_the_host():
    def made(pinned: bool) -> Timeline:
        p = Program()
        p.copy("in", MEGABYTE, "h2d", stream=p.stream(), pinned=pinned)
        return p.simulate(FREE)

    pinned, pageable = made(True), made(False)
    assert (pinned.makespan_us, pageable.makespan_us) == (pytest.approx(100), pytest.approx(500))
    assert (returned(pinned)["in"], returned(pageable)["in"]) == (0, 500)


def test_a_pageable_copy_waits_for_its_stream_before_it_reads():
    p = Program()
    a, b = p.stream(), p.stream()
    p.kernel("before", 300, stream=a, share=0.1)
    p.copy("in", MEGABYTE, "h2d", stream=a, pinned=False)
    p.kernel("elsewhere", 10, stream=b, share=0.1)
    timeline = p.simulate(FREE)
    assert ends(timeline)["in"] == 800
    assert starts(timeline)["elsewhere"] == 800  # launched only when the copy's call had returned


def test_a_small_pageable_copy_to_the_device_is_staged_and_waits_for_nothing():
    p = Program()
    s = p.stream()
    p.kernel("before", 300, stream=s)
    p.copy("in", 50_000, "h2d", stream=s, pinned=False)
    timeline = p.simulate(FREE)
    assert returned(timeline)["in"] == 25  # 50 kB at the host's 2 GB/s
    assert (starts(timeline)["in"], ends(timeline)["in"]) == (300, 305)  # by the engine at 10 GB/s


def test_a_pageable_copy_to_the_host_returns_when_it_has_ended_however_small():
    p = Program()
    s = p.stream()
    p.kernel("before", 300, stream=s)
    p.copy("out", 50_000, "d2h", stream=s, pinned=False)
    assert returned(p.simulate(FREE))["out"] == 325


def test_a_copy_that_waits_holds_the_host_from_pinned_memory_too():
    p = Program()
    p.copy("in", MEGABYTE, "h2d", stream=p.stream(), wait=True)
    assert returned(p.simulate(FREE))["in"] == 100


# ── the host's calls, queues, graphs ─────────────────────────────────────────────────────────────


def test_short_kernels_are_bound_by_their_launches_and_long_ones_are_not():
    costs = replace(FREE, call=FREE.call | {"kernel": 5.0})
    made = {}
    for us in (2, 8):
        p = Program()
        s = p.stream()
        for i in range(100):
            p.kernel(f"k{i}", us, stream=s)
        made[us] = p.simulate(costs).makespan_us
    assert made[2] == pytest.approx(100 * 5 + 2)  # the last launch, and the last kernel after it
    assert made[8] == pytest.approx(5 + 100 * 8)  # the first launch, and then one kernel after the other


def test_a_graph_pays_for_one_launch():
    costs = replace(FREE, call=FREE.call | {"kernel": 5.0}, graph=((1, 10.0), (101, 30.0)), node_gap=0.5)
    p = Program()
    s = p.stream()
    with p.capture("step", stream=s) as step:
        for i in range(100):
            p.kernel(f"k{i}", 2, stream=s)
    assert step.nodes == 100
    p.launch(step, stream=s)
    launch = 10 + 20 * 99 / 100
    assert p.simulate(costs).makespan_us == pytest.approx(launch + 100 * 2 + 99 * 0.5)


def test_a_graphs_branches_overlap_and_its_launches_do_not():
    p = Program()
    a, b = p.stream(), p.stream()
    with p.capture("fork", stream=a) as graph:
        p.wait(p.record(a), b)
        p.kernel("left", 40, stream=a, share=0.3)
        p.kernel("right", 60, stream=b, share=0.3)
        p.wait(p.record(b), a)
    for _ in range(3):
        p.launch(graph, stream=a)
    assert p.simulate(FREE).makespan_us == pytest.approx(3 * 60)


def test_a_graph_comes_after_its_stream_and_before_what_follows_there():
    p = Program()
    s, elsewhere = p.stream(), p.stream()
    with p.capture("graph", stream=elsewhere) as graph:
        p.kernel("node", 50, stream=elsewhere, share=0.1)
    p.kernel("before", 100, stream=s, share=0.1)
    p.launch(graph, stream=s)
    p.kernel("after", 10, stream=s, share=0.1)
    assert starts(p.simulate(FREE)) == {"before": 0, "node": 100, "after": 150}


def test_a_full_launch_queue_holds_the_host():
    p = Program()
    s = p.stream()
    p.kernel("long", 1000, stream=s, share=0.01)
    for i in range(6):
        p.kernel(f"k{i}", 1, stream=s, share=0.01)
    p.host("then", 0)
    assert returned(p.simulate(replace(FREE, queue=8)))["then"] == 0
    assert returned(p.simulate(replace(FREE, queue=4)))["then"] == 1000 + 2  # room for k3, k4, k5 again


def test_every_constant_is_paid_where_it_belongs():
    costs = Costs()  # round numbers: calls 5, launch 5, sync 5, switch 1, event 2
    p = Program()
    a, b = p.stream(), p.stream()
    p.copy("in", 2_000_000, "h2d", stream=a)  # 5 + 100
    p.kernel("work", 50, stream=a)
    p.wait(p.record(a), b)
    p.kernel("other", 50, stream=b)
    timeline = p.simulate(costs)
    assert starts(timeline)["in"] == 10  # its call, then the way to the device
    assert starts(timeline)["work"] == pytest.approx(115 + 1)
    assert starts(timeline)["other"] == pytest.approx(166 + 2)
    assert timeline.makespan_us == pytest.approx(218 + 5)


def test_the_critical_path_names_what_decides():
    p = Program()
    a, b = p.stream(), p.stream()
    p.copy("long copy", 3 * MEGABYTE, "h2d", stream=a)
    p.kernel("side", 100, stream=b, share=0.1)
    p.wait(p.record(b), a)
    p.kernel("last", 10, stream=a)
    assert p.simulate(FREE).critical_names == ["host: long copy", "long copy", "last"]


def test_a_wave_of_waiting_kernels_is_blamed_on_the_kernel_that_freed_the_room():
    p = Program()
    for i in range(3):
        p.kernel(f"k{i}", 100, stream=p.stream())
    assert p.simulate(FREE).critical_names == ["host: k0", "k0", "k1", "k2"]
