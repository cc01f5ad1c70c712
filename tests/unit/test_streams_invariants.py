"""What holds for every stream program, whatever its calls."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import pytest
from free_device import FREE, programs
from hypothesis import given, settings

from llmcourse.streams.calls import Copy, Host, Kernel, Synchronize
from llmcourse.streams.costs import Costs
from llmcourse.streams.order import ancestors, lower
from llmcourse.streams.program import Program
from llmcourse.streams.simulate import simulate
from llmcourse.streams.timeline import HOST, Span

EVERY = [FREE, Costs(), replace(FREE, duplex=0.7, connections=1, queue=2, staged=1)]
SLACK = 1e-6


def spans_of(program: Program, costs: Costs) -> tuple[list[Span], float]:
    timeline = simulate(program, costs)
    return [s for s in timeline.spans if s.lane != HOST], timeline.makespan_us


@settings(max_examples=60, deadline=None)
@given(programs())
def test_all_work_is_done_once_and_in_its_own_stream(program):
    for costs in EVERY:
        spans, makespan = spans_of(program, costs)
        work = [c for c in program.ended() if isinstance(c, Copy | Kernel)]
        assert sorted(s.name for s in spans) == sorted(c.name for c in work)
        assert {s.name: s.lane for s in spans} == {c.name: c.stream.name for c in work}
        assert all(0 <= s.start <= s.end <= makespan + SLACK for s in spans)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_nothing_starts_before_what_the_rules_put_before_it_has_ended(program):
    for costs in EVERY:
        tasks = lower(program, costs.staged)
        known = ancestors(tasks)
        when = {s.name: s for s in spans_of(program, costs)[0]}
        timed = [t for t in tasks if isinstance(t.call, Copy | Kernel)]
        for task in timed:
            for before in timed:
                if known[task.index] >> before.index & 1:
                    assert when[before.call.name].end <= when[task.call.name].start + SLACK


@settings(max_examples=60, deadline=None)
@given(programs())
def test_no_engine_is_ever_overbooked(program):
    for costs in EVERY:
        spans, _ = spans_of(program, costs)
        for engine in ("h2d", "d2h", "d2d"):
            mine = sorted((s.start, s.end) for s in spans if s.engine == engine)
            assert all(a[1] <= b[0] + SLACK for a, b in itertools.pairwise(mine))
        # A kernel holds its share for as long as its blocks run, and blocks × time never exceed the GPU's.
        blocks = {c.name: c.us * c.share for c in program.ended() if isinstance(c, Kernel)}
        kernels = [s for s in spans if s.engine == "sm"]
        if kernels and not costs.floor:
            room = max(s.end for s in kernels) - min(s.start for s in kernels)
            assert sum(blocks.values()) <= room + SLACK


@settings(max_examples=60, deadline=None)
@given(programs())
def test_the_makespan_is_at_least_every_lower_bound(program):
    for costs in EVERY:
        _spans, makespan = spans_of(program, costs)
        calls = program.ended()
        per_engine: defaultdict[str, float] = defaultdict(float)
        per_stream: defaultdict[str, float] = defaultdict(float)
        for call in calls:
            if isinstance(call, Copy):
                per_engine[call.direction] += costs.copy_us(call)
                per_stream[call.stream.name] += costs.copy_us(call)
            elif isinstance(call, Kernel):
                per_engine["sm"] += call.us * call.share
                per_stream[call.stream.name] += call.us * math.ceil(call.share)
        host = sum(costs.call_us(c) for c in calls)
        for bound in (host, *per_engine.values(), *per_stream.values()):
            assert bound <= makespan + SLACK


@settings(max_examples=50, deadline=None)
@given(programs())
def test_the_critical_path_accounts_for_the_whole_makespan(program):
    # Every call on the path, one after the other: with a device that adds nothing, they fill the makespan.
    costs = replace(FREE, connections=64)
    timeline = simulate(program, costs)
    spans = {(s.call, HOST if s.lane == HOST else "device"): s for s in timeline.spans}
    on_path = [spans[step] for step in timeline.critical]
    # A small pageable copy to the host is handed over by the host after it has waited for the device.
    handed = {i for i, c in enumerate(program.ended()) if isinstance(c, Copy) and c.direction == "d2h"}
    covered = sorted((s.start, s.end if s.call in handed else s.end - s.waits) for s in on_path)
    reached = 0.0
    for start, end in covered:
        assert start <= reached + SLACK, "a hole in the path"
        reached = max(reached, end)
    assert reached == pytest.approx(timeline.makespan_us, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(programs())
def test_a_timeline_survives_being_written_and_read(program):
    timeline = simulate(program, FREE)
    again = type(timeline).from_json(timeline.to_json())
    assert [s.name for s in again.spans] == [s.name for s in timeline.spans]
    assert again.makespan_us == pytest.approx(timeline.makespan_us, abs=0.01)
    assert again.critical == timeline.critical
    assert again.text()
    assert again.text().count("\n") == len(again.lanes)


@settings(max_examples=50, deadline=None)
@given(programs())
def test_a_host_that_is_slower_never_ends_before_the_sum_of_its_calls(program):
    slow = Costs().on_host(3.0)
    calls = program.ended()
    own = sum(c.us if isinstance(c, Host) else 3.0 * Costs().call_us(c) for c in calls)
    assert simulate(program, slow).makespan_us >= own - SLACK


def test_waiting_for_less_can_take_longer():
    """Graham's anomaly (1969): who takes what is ready first may do worse with fewer orders to keep."""

    def makespan(*, ordered: bool) -> float:
        p = Program()
        a, b, c = (p.stream() for _ in range(3))
        p.kernel("short", 10, stream=a, share=0.5)
        if ordered:
            p.wait(p.record(a), b)
        p.kernel("short too", 10, stream=b, share=0.5)
        p.kernel("long", 20, stream=c, share=0.5)
        return p.simulate(FREE).makespan_us

    assert makespan(ordered=False) == 30  # both short ones first, and the long one alone after them
    assert makespan(ordered=True) == 20  # the long one beside both


def test_synchronising_twice_changes_nothing():
    p = Program()
    p.kernel("k", 10, stream=p.stream())
    once = p.simulate(FREE).makespan_us
    p.synchronize()
    p.synchronize()
    assert p.simulate(FREE).makespan_us == once
    assert sum(isinstance(c, Synchronize) for c in p.ended()) == 2
