"""A timeline: what ran when, and the numbers read from it.

Simulated and measured programs give the same `Timeline`, so that one table or picture compares them.
Times are microseconds from the host's first call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOST = "host"


@dataclass(frozen=True)
class Span:
    """Something that took from `start` to `end`.

    lane     the row of the picture: "host", or a stream's name
    engine   what was busy: host, h2d, d2h, d2d, sm
    call     index of the program's call
    share    of the engine, so that kernels that run together add up to at most 1
    waits    of the host: the part of the span at its end in which it waited for the device
    """

    name: str
    lane: str
    engine: str
    start: float
    end: float
    call: int
    share: float = 1.0
    waits: float = 0.0

    @property
    def us(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """The spans of one run of a program.

    makespan_us   from the host's first call until the device has done everything and the host knows
    source        where it comes from: "simulated …" or "measured …"
    critical      simulated: the critical path (see `simulate`), first to last: a call's index, and whether
                  its time on the "host" or its work on the "device" is meant
    host_us       measured: what each call took on the host, median over the repeats
    low, high     measured: 10th and 90th percentile of the makespan
    """

    name: str
    spans: list[Span]
    makespan_us: float
    source: str = ""
    critical: list[tuple[int, str]] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    low_us: float = 0.0
    high_us: float = 0.0
    repeats: int = 0

    @property
    def lanes(self) -> list[str]:
        """The rows of the picture, the host first, streams in order of their first use."""
        return list(dict.fromkeys([HOST, *(s.lane for s in sorted(self.spans, key=lambda s: s.call))]))

    @property
    def engines(self) -> list[str]:
        return [e for e in ("h2d", "sm", "d2h", "d2d") if any(s.engine == e for s in self.spans)]

    def busy_us(self, engine: str) -> float:
        """Microseconds in which `engine` did something."""
        return _length(_union((s.start, s.end) for s in self.spans if s.engine == engine))

    def utilisation(self, engine: str) -> float:
        """Fraction of the makespan in which `engine` did something."""
        return self.busy_us(engine) / self.makespan_us if self.makespan_us else 0.0

    @property
    def overlap(self) -> float:
        """Of the time in which any engine of the device was busy, the fraction in which two or more were.

        0: one after the other.
        """
        per_engine = [
            _union((s.start, s.end) for s in self.spans if s.engine == engine) for engine in self.engines
        ]
        edges = sorted(edge for spans in per_engine for a, b in spans for edge in ((a, 1), (b, -1)))
        any_, several, depth, last = 0.0, 0.0, 0, 0.0
        for at, change in edges:
            any_ += (at - last) * (depth > 0)
            several += (at - last) * (depth > 1)
            depth, last = depth + change, at
        return several / any_ if any_ else 0.0

    def together(self, engine: str = "sm") -> int:
        """The most spans of one engine that ran at once."""
        edges = sorted(e for s in self.spans if s.engine == engine for e in ((s.start, 1), (s.end, -1)))
        depth = most = 0
        for _, change in edges:
            depth += change
            most = max(most, depth)
        return most

    @property
    def critical_names(self) -> list[str]:
        """The critical path by name: `copy 1`, or `host: copy 1` where the host's call is what took long."""
        names = {s.call: s.name for s in self.spans}
        return [names[call] if where != HOST else f"{HOST}: {names[call]}" for call, where in self.critical]

    def text(self, width: int = 72) -> str:
        """The timeline in characters: one row a lane, `=` busy, `.` idle, `w` the host waiting."""
        scale = width / self.makespan_us if self.makespan_us else 0.0
        lanes = self.lanes
        margin = max(map(len, lanes))
        rows = []
        for lane in lanes:
            row = ["."] * width
            for span in (s for s in self.spans if s.lane == lane):
                mark = {"h2d": ">", "d2h": "<", "d2d": "-", "sm": "#"}.get(span.engine, "=")
                first, last = int(span.start * scale), min(width - 1, int(span.end * scale))
                wait = int((span.end - span.waits) * scale)
                for i in range(first, max(last, first + 1)):
                    row[min(i, width - 1)] = "w" if span.waits and i >= wait else mark
            rows.append(f"{lane.rjust(margin)} |{''.join(row)}|")
        return "\n".join([*rows, f"{'':{margin}}  0 … {self.makespan_us:,.0f} µs   > in  # kernel  < out"])

    def draw(self, **options: Any) -> Figure:
        """The timeline as a figure: see `draw.draw`."""
        from llmcourse.streams.draw import draw

        return draw(self, **options)

    def __repr__(self) -> str:
        return f"{self.name} ({self.source})\n{self.text()}"

    def to_json(self) -> dict[str, Any]:
        """Plain data: a span is one line of text, its fields separated by tabs, times to 10 ns."""
        plain = asdict(self)
        plain["spans"] = ["\t".join(map(_short, astuple(s))) for s in self.spans]
        for name in ("host_us", "makespan_us", "low_us", "high_us"):
            value = plain[name]
            plain[name] = [round(us, 2) for us in value] if isinstance(value, list) else round(value, 2)
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Timeline:
        spans = []
        for line in plain["spans"]:
            name, lane, engine, start, end, call, share, waits = line.split("\t")
            numbers = float(start), float(end), int(call), float(share), float(waits)
            spans.append(Span(name, lane, engine, *numbers))
        return cls(**plain | {"spans": spans})


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Sequence[tuple[float, float]]) -> float:
    return sum(b - a for a, b in intervals)
