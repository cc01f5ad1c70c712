"""Predictions beside the record: every recorded program, simulated with constants that it did not supply.

Three comparisons, each leaving less to the host, whose speed is not the device's affair:

- `predictions`: the makespan from the record's constants, all measured by programs of their own;
- the same on a host as slow as it was in that very run: one number for each program, the median of how much
  longer its launches took than the constants say (a virtual machine's core may run at half its speed);
- `replay`: the spans that CUPTI traced, beside a simulation in which the host's calls take as long as they
  took in the trace. What is left is the device: order, engines, room.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmcourse.streams.calls import Copy, Kernel, Launch
from llmcourse.streams.costs import Costs
from llmcourse.streams.program import Program
from llmcourse.streams.programs import PROGRAMS
from llmcourse.streams.simulate import simulate, waits
from llmcourse.streams.timeline import HOST, Span, Timeline

if TYPE_CHECKING:
    from llmcourse.bench.records import Record

Row = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """One program. Times are microseconds; errors are relative to what was recorded.

    slower      how much longer the host's launches took in this run than the constants say
    at_speed    the prediction with the host that much slower
    low, high   recorded: 10th and 90th percentile of the repeats
    """

    name: str
    predicted: float
    recorded: float
    low: float
    high: float
    slower: float
    at_speed: float

    @property
    def error(self) -> float:
        return self.predicted / self.recorded - 1

    @property
    def error_at_speed(self) -> float:
        return self.at_speed / self.recorded - 1


def predictions(record: Record | None = None) -> list[Prediction]:
    """Every program of the record (None: the newest of an H100) that is built today as it was recorded."""
    record = record or _record()
    costs = Costs.from_record(record)
    return [_predict(row, costs) for row in record.results if row["kind"] == "program" and unchanged(row)]


def unchanged(row: Row) -> bool:
    """Whether the program of this name still makes the calls that were recorded."""
    return row["name"] in PROGRAMS and PROGRAMS[row["name"]]().text() == row["program"]


def _predict(row: Row, costs: Costs) -> Prediction:
    program, timed = PROGRAMS[row["name"]](), Timeline.from_json(row["timeline"])
    slower = host_slower(program, timed, costs)
    return Prediction(
        row["name"],
        simulate(program, costs).makespan_us,
        timed.makespan_us,
        timed.low_us,
        timed.high_us,
        slower,
        simulate(program, costs.on_host(slower)).makespan_us,
    )


def host_slower(program: Program, timed: Timeline, costs: Costs) -> float:
    """The median, over the calls that launch work and wait for none, of their time over what `costs` says."""
    ratios = [
        us / costs.call_us(call)
        for call, us in zip(program.ended(), timed.host_us, strict=True)
        if isinstance(call, Kernel | Copy | Launch) and not waits(call)
    ]
    return statistics.median(ratios) if ratios else 1.0


def measured(name: str, device: str = "cpu") -> Timeline:
    """This program's times: run here on a GPU (`device` "cuda"), elsewhere as recorded on an H100.

    Makespan and host times are of runs without a profiler, spans of one more run with it, from the first
    piece of device work on.
    """
    if device == "cuda":
        return _cut(PROGRAMS[name]().run())
    return _cut(Timeline.from_json(_record().row(name=name, kind="program")["timeline"]))


# ── the traced spans ─────────────────────────────────────────────────────────────────────────────


def traced(name: str, record: Record | None = None) -> Timeline:
    """What CUPTI saw of this program, from its first piece of device work on.

    The profiler makes each of the host's calls several times as long, and the first takes most of a
    millisecond: the trace shows order and overlap, its makespan is not the program's.
    """
    record = record or _record()
    timeline = _cut(Timeline.from_json(record.row(name=name, kind="program")["timeline"]))
    end = max(s.end for s in timeline.spans)
    return replace(timeline, makespan_us=end, source=timeline.source.replace("measured", "traced"))


def replay(name: str, record: Record | None = None) -> Timeline:
    """The simulation of `traced(name)`: the host's calls take what they took in the trace."""
    record = record or _record()
    program, costs = PROGRAMS[name](), Costs.from_record(record)
    calls = program.ended()
    spans = Timeline.from_json(record.row(name=name, kind="program")["timeline"]).spans
    host = {s.call: s for s in spans if s.lane == HOST}
    host_us = [
        host[i + 1].start - host[i].start if i + 1 in host else costs.call_us(call)
        for i, call in enumerate(calls)
    ]
    timeline = _cut(simulate(program, costs, host_us=host_us))
    return replace(
        timeline,
        makespan_us=max(s.end for s in timeline.spans),
        source=f"simulated, host's calls as in the trace, {record.caption}",
    )


def span_errors(name: str, record: Record | None = None) -> list[float]:
    """For each piece of device work, how much later it ends in `replay` than in `traced`, µs.

    The two begin within the host's first call, at points that the trace does not tell: their median
    difference is taken off.
    """
    sides = []
    for timeline in (traced(name, record), replay(name, record)):
        by_call: dict[int, list[Span]] = {}
        for span in sorted((s for s in timeline.spans if s.lane != HOST), key=lambda s: (s.start, s.end)):
            by_call.setdefault(span.call, []).append(span)
        sides.append(by_call)
    seen, simulated = sides
    later = [
        b.end - a.end
        for call, spans in seen.items()
        for a, b in zip(spans, simulated[call], strict=False)  # a record keeps the first 200 spans
    ]
    middle = statistics.median(later)
    return [us - middle for us in later]


def _cut(timeline: Timeline) -> Timeline:
    """The timeline from its first device work on: what stands before is the host's, or a profiler's."""
    first = min(s.start for s in timeline.spans if s.lane != HOST)
    spans = [
        replace(s, start=max(0.0, s.start - first), end=s.end - first)
        for s in timeline.spans
        if s.end > first
    ]
    return replace(timeline, spans=spans)


def _record() -> Record:
    from llmcourse.bench.records import recorded

    return recorded("streams", device="H100")
