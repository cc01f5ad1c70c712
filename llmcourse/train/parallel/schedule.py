"""In which order each stage of a pipeline works, what that costs in idle time, and what must be kept.

A model cut into p stages is a factory line: stage s can work on a piece only after stage s−1 has handed it
over. With the batch as one piece a single stage works at a time. Cut into m micro-batches, the stages work on
different pieces at once, and what stays idle is the *bubble*: filling and draining the line.

    GPipe   all m forwards, then all m backwards (Huang et al. 2019, arXiv:1811.06965)
    1F1B    forwards until the first piece has come back, then one backward, one forward, in turn
            (Narayanan et al. 2019, PipeDream, doi:10.1145/3341301.3359646; flushed every step as in
            Narayanan et al. 2021, arXiv:2104.04473)

With equal stages both take (m + p − 1) times a forward and a backward, of which each stage works m times:

    bubble = (p − 1) / (m + p − 1)

They differ in memory. A stage keeps what the backward of a micro-batch needs from its forward on: under GPipe
for all m at once, under 1F1B for at most p − s of them, however large the batch.

Here are the orders and a simulation of them, without processes or tensors; `parallel.pipeline` runs the same
orders. An order is a list for each stage, of `("F", i)` and `("B", i)`: plain pairs will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llmcourse.errors import CourseError


class ScheduleError(CourseError, ValueError):
    """An order of work that leaves something out, comes too early, or waits for ever."""


class Work(NamedTuple):
    """One piece of work of a stage: the forward (F) or backward (B) of a micro-batch."""

    kind: Literal["F", "B"]
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro}"


Order = list[list[Work]]  # for each stage, what it does and in which order


class Span(NamedTuple):
    """A stage at work on a piece from `start` to `end`."""

    stage: int
    kind: str
    micro: int
    start: float
    end: float


def gpipe(stages: int, micros: int) -> Order:
    """All forwards, then all backwards; both from micro-batch 0 on."""
    _require_sizes(stages, micros)
    line = [Work("F", i) for i in range(micros)] + [Work("B", i) for i in range(micros)]
    return [list(line) for _ in range(stages)]


def one_f_one_b(stages: int, micros: int) -> Order:
    """As many forwards as there are stages behind this one, then a forward and a backward in turn."""
    _require_sizes(stages, micros)
    order: Order = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, micros)
        line = [Work("F", i) for i in range(ahead)]
        for i in range(micros - ahead):
            line += [Work("F", ahead + i), Work("B", i)]
        order.append(line + [Work("B", i) for i in range(micros - ahead, micros)])
    return order


SCHEDULES = {"GPipe": gpipe, "1F1B": one_f_one_b}


def ideal_bubble(stages: int, micros: int) -> float:
    """(p − 1) / (m + p − 1): the idle share of either schedule when all stages take equally long."""
    _require_sizes(stages, micros)
    return (stages - 1) / (micros + stages - 1)


def micros_for(stages: int, bubble: float) -> int:
    """The fewest micro-batches with which the ideal bubble is at most `bubble`, above 0 and below 1."""
    if not 0 < bubble < 1:
        raise ScheduleError(
            f"a bubble of {bubble:g} was asked for.",
            "Filling a line takes some time, so its idle share is never 0; and it is a share, below 1.",
            "a number between the two, e.g. 0.1.",
        )
    micros = max(1, int((stages - 1) * (1 - bubble) / bubble) - 1)  # at or below it; rounding is not trusted
    while ideal_bubble(stages, micros) > bubble:
        micros += 1
    return micros


@dataclass(frozen=True)
class Timeline:
    """What the stages did when, simulated or measured; times in one unit of the caller's.

    stages    how many there are;  spans    each piece of work, in the order in which they began
    """

    stages: int
    spans: tuple[Span, ...]

    @property
    def start(self) -> float:
        return min((s.start for s in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """From the beginning of the first piece of work to the end of the last."""
        return max((s.end for s in self.spans), default=0.0) - self.start

    @property
    def micros(self) -> int:
        return len({s.micro for s in self.spans})

    def of(self, stage: int) -> list[Span]:
        """What one stage did, in time."""
        return sorted((s for s in self.spans if s.stage == stage), key=lambda s: s.start)

    def busy(self, stage: int) -> float:
        return sum(s.end - s.start for s in self.of(stage))

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they do not work: 1 − Σ busy / (p · makespan)."""
        if not self.makespan:
            return 0.0
        return 1 - sum(self.busy(s) for s in range(self.stages)) / (self.stages * self.makespan)

    def idle(self, stage: int) -> list[tuple[float, float]]:
        """The stretches (from, to) in which a stage waits, from the start of the whole to its end."""
        at, gaps = self.start, []
        for span in self.of(stage):
            if span.start > at:
                gaps.append((at, span.start))
            at = max(at, span.end)
        return gaps + ([(at, self.start + self.makespan)] if at < self.start + self.makespan else [])

    def in_flight(self, stage: int) -> list[tuple[float, int]]:
        """(time, micro-batches whose activations the stage keeps from then on): from F's start to B's end."""
        changes = [(s.start, 1) if s.kind == "F" else (s.end, -1) for s in self.of(stage)]
        kept, steps = 0, []
        for time, change in sorted(changes):  # what ends at a moment makes room for what begins then
            kept += change
            steps.append((time, kept))
        return steps

    def peak(self, stage: int) -> int:
        """The most micro-batches whose activations a stage keeps at once."""
        return max((kept for _, kept in self.in_flight(stage)), default=0)


def simulate(
    order: Sequence[Sequence[tuple[str, int]]],
    *,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    send: float = 0.0,
) -> Timeline:
    """Run an order on stages that work as soon as they can, each on one thing at a time.

    order      for each stage, its pairs (kind, micro-batch); see `gpipe` and `one_f_one_b`
    forward    time of a forward, one number or one for each stage;  backward  likewise. A backward does two
               matrix products for each of the forward's: hence twice as long, unless told
    send       time until what a stage hands over is with its neighbour; the sender works on meanwhile

    Raises ScheduleError when work is missing, twice there or before its own forward, or when stages wait for
    each other in a circle (then it says who waits for what).
    """
    lines = check(order)
    stages = len(lines)
    cost = {"F": _each(forward, stages, "forward"), "B": _each(backward, stages, "backward")}
    done: dict[tuple[int, Work], float] = {}
    free, place, spans = [0.0] * stages, [0] * stages, []
    moved = True
    while moved:
        moved = False
        for s, line in enumerate(lines):
            while place[s] < len(line):
                work = line[place[s]]
                source = _needs(s, work, stages)
                if source is not None and source not in done:
                    break
                start = max(free[s], done[source] + send if source is not None else 0.0)
                free[s] = done[s, work] = start + cost[work.kind][s]
                spans.append(Span(s, work.kind, work.micro, start, free[s]))
                place[s] += 1
                moved = True
    if stuck := [s for s in range(stages) if place[s] < len(lines[s])]:
        waits = [(s, lines[s][place[s]], _needs(s, lines[s][place[s]], stages)) for s in stuck]
        raise ScheduleError(
            "the stages wait for each other and none goes on.",
            "; ".join(f"stage {s} at {w} waits for {n[1]} of stage {n[0]}" for s, w, n in waits if n) + ".",
            "an order in which the last stage runs the backward of a micro-batch early enough for the first.",
        )
    return Timeline(stages, tuple(sorted(spans, key=lambda s: (s.start, s.stage))))


def check(order: Sequence[Sequence[tuple[str, int]]]) -> Order:
    """The order as `Work`, after making sure that every stage does every F and B once, F before B.

    Raises ScheduleError otherwise.
    """
    lines: Order = [[Work(*pair) for pair in line] for line in order]  # type: ignore[arg-type]
    _require_sizes(len(lines), max((len(line) for line in lines), default=0))
    for s, line in enumerate(lines):
        if strange := [w for w in line if w.kind not in ("F", "B")]:
            raise ScheduleError(
                f"stage {s} is to do {strange[0]}.",
                "A stage does forwards and backwards.",
                'the kinds "F" and "B".',
            )
    expected = {work for line in lines for work in line}
    expected |= {Work(kind, micro) for kind in ("F", "B") for _, micro in expected}  # type: ignore[arg-type]
    for s, line in enumerate(lines):
        place = {work: i for i, work in enumerate(line)}
        if missing := sorted(expected - set(line)):
            raise ScheduleError(
                f"stage {s} never does {missing[0]}{_more(missing)}.",
                "Every micro-batch passes every stage, forward and backward: its gradient counts.",
                f"{len(expected)} pieces of work in every stage; stage {s} has {len(line)}.",
            )
        if len(place) < len(line):
            twice = next(w for i, w in enumerate(line) if place[w] != i)
            raise ScheduleError(
                f"stage {s} does {twice} twice.",
                "A gradient that is computed twice counts twice.",
                f"{len(expected)} pieces of work in every stage; stage {s} has {len(line)}.",
            )
        for work, i in place.items():
            if work.kind == "B" and i < place[Work("F", work.micro)]:
                raise ScheduleError(
                    f"stage {s} does {work} before F{work.micro}.",
                    "A backward needs the activations that its own forward kept.",
                    f"F{work.micro} first.",
                )
    return lines


def text(order: Sequence[Sequence[tuple[str, int]]]) -> str:
    """An order as lines to read: "stage 0  F0 F1 B0 B1"."""
    lines = (" ".join(f"{k}{i}" for k, i in line) for line in order)
    return "\n".join(f"stage {s}  {line}" for s, line in enumerate(lines))


def _needs(stage: int, work: Work, stages: int) -> tuple[int, Work] | None:
    """What another stage must have done before."""
    source = stage - 1 if work.kind == "F" else stage + 1
    return (source, work) if 0 <= source < stages else None


def _each(time: float | Sequence[float], stages: int, name: str) -> list[float]:
    times = [float(time)] * stages if isinstance(time, (int, float)) else [float(t) for t in time]
    if len(times) != stages or min(times) < 0:
        raise ScheduleError(
            f"{name} = {time} for {stages} stages.",
            "Each stage takes its own time, which is not negative.",
            f"one number, or {stages} of them.",
        )
    return times


def _require_sizes(stages: int, micros: int) -> None:
    if stages < 1 or micros < 1:
        raise ScheduleError(
            f"{stages} stages and {micros} micro-batches.",
            "A pipeline has at least one stage, and work for it.",
            "stages = 4 and micros = 8, for instance.",
        )


def _more(works: Sequence[Work]) -> str:
    return f" and {len(works) - 1} more" if len(works) > 1 else ""
