"""What a device and its host take for each thing they do: the numbers under a simulation.

`Costs.of("H100")` reads them from the record of a real one. `Costs()` are round numbers, for pictures in
which the sums can be done in the head; `Costs.of("model")` is the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmcourse.streams.calls import MB, Call, Copy, Host, Kernel, Launch, Record, Synchronize, Wait
from llmcourse.streams.order import STAGED_AT_ONCE

Points = tuple[tuple[float, float], ...]
BEHIND_US = 5000.0  # of the kernel behind which `measure.blocking_calls` makes its calls


def _line(gigabytes_per_s: float, base_us: float) -> Points:
    """Two points of a copy that takes `base_us` and then moves bytes at a fixed rate."""
    return tuple((n, base_us + n / gigabytes_per_s / 1e3) for n in (1.0, 1024.0 * MB))


@dataclass(frozen=True)
class Costs:
    """Times in µs.

    call        host time of each kind of call when nothing makes it wait
    launch      from the end of a call to the start of its work on an idle device
    sync        from the end of the device's work to the return of the call that waited for it
    floor       what a kernel lasts beyond the time of its blocks
    gap         between a kernel and the next in its stream; `node_gap` in a graph
    switch      between a kernel and a copy, either way, in one stream
    event       between an event and the work of another stream that waited for it
    graph       points (nodes, host µs of a launch)
    copies      for "h2d pinned", "h2d pageable", …: points (bytes, µs), between which lines are drawn
    duplex      speed of each direction while the other one runs too, relative to alone
    engines     copy engines for each direction
    queue       launches that wait in a stream before the host has to
    connections hardware queues that the streams' kernels share, dealt to the streams in turn
    staged      pageable bytes to the device that the driver takes over at once, in the call
    """

    name: str = "model"
    source: str = "round numbers"
    call: Mapping[str, float] = field(
        default_factory=lambda: {"kernel": 5.0, "copy": 5.0, "record": 1.0, "wait": 1.0, "synchronize": 5.0}
    )
    launch: float = 5.0
    sync: float = 5.0
    floor: float = 0.0
    gap: float = 1.0
    node_gap: float = 1.0
    switch: float = 1.0
    event: float = 2.0
    graph: Points = ((1, 10.0), (1001, 110.0))
    copies: Mapping[str, Points] = field(
        default_factory=lambda: {
            "h2d pinned": _line(20, 5),
            "d2h pinned": _line(20, 5),
            "h2d pageable": _line(5, 10),
            "d2h pageable": _line(5, 10),
            "d2d": _line(1000, 2),
        }
    )
    duplex: float = 1.0
    engines: Mapping[str, int] = field(default_factory=lambda: {"h2d": 1, "d2h": 1, "d2d": 1})
    queue: int = 1024
    connections: int = 8
    staged: int = STAGED_AT_ONCE

    @classmethod
    def ideal(cls, gigabytes_per_s: float = 10) -> Costs:
        """A device on which calls cost nothing, and copies their bytes: 10 GB/s is 100 µs for 10⁶ bytes.

        Pageable copies run at a fifth of that rate.
        """
        rates = {"pinned": gigabytes_per_s, "pageable": gigabytes_per_s / 5}
        copies = {f"{way} {kind}": _line(r, 0) for way in ("h2d", "d2h") for kind, r in rates.items()}
        return cls(
            "ideal",
            "calls cost nothing",
            call=dict.fromkeys(("kernel", "copy", "record", "wait", "synchronize"), 0.0),
            launch=0.0,
            sync=0.0,
            gap=0.0,
            node_gap=0.0,
            switch=0.0,
            event=0.0,
            graph=((1, 0.0), (2, 0.0)),
            copies=copies | {"d2d": _line(1000, 0)},
            connections=1 << 20,
        )

    @classmethod
    def of(cls, device: str = "H100") -> Costs:
        """The constants recorded on a device whose name contains `device`; "model": round numbers.

        Raises UnknownNameError where there is no such record.
        """
        if device == "model":
            return cls()
        from llmcourse.bench.records import recorded

        return cls.from_record(recorded("streams", device=device))

    @classmethod
    def from_record(cls, record: Any) -> Costs:
        """The constants of a record made by `streams.record`."""
        us = {row["name"]: row["us"] for row in record.results if row["kind"] == "constant" and "us" in row}
        value = {row["name"]: row["value"] for row in record.results if "value" in row}
        sync = us["host: synchronize idle device"]
        floor = us["device: span of a kernel of 0 µs"]
        after = us["device: kernel of 0 µs after kernel"]
        copies: dict[str, list[tuple[float, float]]] = {}
        for row in record.results:
            if row["kind"] == "copy":
                memory = "" if row["direction"] == "d2d" else " pinned" if row["pinned"] else " pageable"
                copies.setdefault(row["direction"] + memory, []).append((row["nbytes"], row["us"]))
        graphs = [row for row in record.results if row["kind"] == "graph"]
        many, few = graphs[-1], graphs[-2]
        node = (many["device_us"] - few["device_us"]) / (many["nodes"] - few["nodes"])
        alone = {row["name"]: row["us"] for row in record.results if row["kind"] == "duplex"}
        small_copy = copies["h2d pinned"][0][1]
        return cls(
            name=record.device["name"],
            source=record.caption,
            call={name.removeprefix("host: "): t for name, t in us.items() if name.startswith("host: ")}
            | {"synchronize": sync},
            launch=max(0.0, us["one kernel of 0 µs, and synchronize"] - us["host: kernel"] - floor - sync),
            sync=sync,
            floor=floor,
            gap=max(0.0, after - floor),
            node_gap=max(0.0, node - floor),
            switch=max(0.0, (us["device: copy of 4 KB, kernel"] - floor - small_copy) / 2),
            event=max(0.0, us["device: kernel, event, kernel in another stream"] - floor),
            graph=tuple((row["nodes"], row["host_us"]) for row in graphs),
            copies={kind: tuple(points) for kind, points in copies.items()},
            duplex=min(
                1.0, max(alone["4 × 32 MB h2d"], alone["4 × 32 MB d2h"]) / alone["4 × 32 MB h2d and d2h"]
            ),
            queue=value["launches before the host waits"] or 1024,
            staged=max(
                (
                    row["nbytes"]
                    for row in record.results
                    if row["kind"] == "call"
                    and (row["direction"], row["pinned"]) == ("h2d", False)
                    and row["behind_own_us"] < BEHIND_US / 2
                ),
                default=STAGED_AT_ONCE,
            ),
        )

    def on_host(self, slower: float) -> Costs:
        """The same device behind a host whose calls take `slower` times as long."""
        return replace(
            self,
            source=f"{self.source}, host calls × {slower:.2f}",
            call={kind: us * slower for kind, us in self.call.items()},
            sync=self.sync * slower,
            graph=tuple((nodes, us * slower) for nodes, us in self.graph),
        )

    def copy_us(self, copy: Copy) -> float:
        """Device time of a copy that has the engine for itself."""
        if copy.direction == "d2d":
            return _at(self.copies["d2d"], copy.nbytes)
        if copy.pinned or copy.nbytes <= self.staged:
            return _at(self.copies[f"{copy.direction} pinned"], copy.nbytes)
        whole = _at(self.copies[f"{copy.direction} pageable"], copy.nbytes)
        return max(0.0, whole - self.call_us(copy) - self.launch - self.sync)

    def host_copy_us(self, copy: Copy) -> float:
        """Host time of moving the bytes of a small pageable copy from or to the staging buffer.

        A large one goes through the buffer in pieces, host and engine side by side: `copy_us` is both.
        """
        if copy.pinned or copy.direction == "d2d" or copy.nbytes > self.staged:
            return 0.0
        whole = _at(self.copies[f"{copy.direction} pageable"], copy.nbytes)
        waited = self.launch + self.copy_us(copy) + self.sync if copy.direction == "d2h" else 0.0
        return max(0.0, whole - self.call_us(copy) - waited)

    def call_us(self, call: Call) -> float:
        """Host time of a call that nothing makes wait."""
        match call:
            case Host():
                return call.us
            case Launch():
                return _at(self.graph, call.graph.nodes)
            case Copy():
                return self.call.get(f"copy {call.direction}", self.call.get("copy", 0.0))
            case Kernel():
                return self.call["kernel"]
            case Record():
                return self.call["record"]
            case Wait():
                return self.call["wait"]
            case Synchronize():
                return self.call["synchronize"]


def _at(points: Points, x: float) -> float:
    """The broken line through `points`, continued by its last piece; below the first point it is flat."""
    if x <= points[0][0]:
        return points[0][1]
    i = min(bisect_left([p[0] for p in points], x), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
