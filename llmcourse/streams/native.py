"""Programs on a real GPU: the same calls through torch.cuda, timed, and their spans from CUPTI.

Two kinds of run. `Native.times` runs the program many times with nothing in its way and reads the host's
clock before and after every call: the makespan and the calls' costs come from there. `Native.trace` runs it
once more under torch.profiler, which asks CUPTI when each copy and kernel started and ended; this slows
the host down, so its spans are for pictures, and its makespan is given beside.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import tempfile
import time
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmcourse.errors import CourseError
from llmcourse.streams.calls import (
    Copy,
    Event,
    Graph,
    Host,
    Kernel,
    Launch,
    Record,
    Stream,
    Synchronize,
    Wait,
)
from llmcourse.streams.program import Program
from llmcourse.streams.spin import Spin, blocking_stream
from llmcourse.streams.timeline import HOST, Span, Timeline


class TraceError(CourseError, RuntimeError):
    """A profile without the device's side."""


_spin: list[Spin] = []


def spin() -> Spin:
    """The compiled spin kernel, made once a process."""
    if not _spin:
        _spin.append(Spin.compile())
    return _spin[0]


class Native:
    """A program prepared for this GPU: buffers allocated, graphs captured, one function a call."""

    def __init__(self, program: Program) -> None:
        self.program, self.spin = program, spin()
        self.streams = {s: self._stream(s) for s in program.streams}
        self.events: dict[Event, torch.cuda.Event] = {}
        self.buffers: dict[tuple[int, str, bool], list[torch.Tensor]] = {}
        self.graphs: dict[Graph, torch.cuda.CUDAGraph] = {}
        self.calls = program.ended()
        self.functions = [self._function(call) for call in self.calls]

    def run(self) -> None:
        for function in self.functions:
            function()

    def times(self, repeats: int = 20, warmup: int = 3) -> Timeline:
        """Makespan (median, 10th and 90th percentile) and each call's time on the host. No spans."""
        for _ in range(warmup):
            self.run()
            torch.cuda.synchronize()
        clock, functions = time.perf_counter_ns, self.functions
        stamps: list[list[int]] = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(repeats):
                torch.cuda.synchronize()
                row = [clock()]
                for function in functions:
                    function()
                    row.append(clock())
                stamps.append(row)
        finally:
            gc.enable()
        spans = sorted((row[-1] - row[0]) / 1e3 for row in stamps)
        host = [
            statistics.median((row[i + 1] - row[i]) / 1e3 for row in stamps) for i in range(len(functions))
        ]
        return Timeline(
            self.program.name,
            [],
            statistics.median(spans),
            source=f"measured on {torch.cuda.get_device_name()}",
            host_us=host,
            low_us=spans[repeats // 10],
            high_us=spans[repeats - 1 - repeats // 10],
            repeats=repeats,
        )

    def trace(self) -> Timeline:
        """One run under the profiler: spans of the host's calls and of the device's work."""
        from torch.profiler import record_function

        def labelled() -> None:
            for i, function in enumerate(self.functions):
                with record_function(f"call {i}"):
                    function()

        spans = self._spans(chrome_trace(labelled))
        first = min(s.start for s in spans)
        spans = [_shifted(s, -first) for s in spans]
        return Timeline(
            self.program.name,
            sorted(spans, key=lambda s: (s.call, s.start)),
            max(s.end for s in spans),
            source=f"traced on {torch.cuda.get_device_name()}",
        )

    def _spans(self, events: list[dict[str, Any]]) -> list[Span]:
        """Spans from a Chrome trace: device work belongs to the call during which it was submitted."""
        complete = [e for e in events if e.get("ph") == "X"]
        hosts = sorted(
            (float(e["ts"]), float(e["ts"]) + float(e["dur"]), int(e["name"].removeprefix("call ")))
            for e in complete
            if e.get("cat") == "user_annotation" and str(e["name"]).startswith("call ")
        )
        submitted: dict[object, int] = {}
        for e in complete:
            if e.get("cat") in ("cuda_runtime", "cuda_driver"):
                at = float(e["ts"])
                start, end, number = hosts[max(0, bisect_right(hosts, (at, math.inf, 0)) - 1)]
                if start <= at <= end and isinstance(self.calls[number], Copy | Kernel | Launch):
                    submitted[e.get("args", {}).get("correlation")] = number
        spans = [
            Span(self.calls[n].name, HOST, "host", a, b, n, 1.0, b - a if self._waits(n) else 0.0)
            for a, b, n in hosts
        ]
        work: dict[int, list[tuple[float, float, str]]] = {}
        for e in complete:
            by = submitted.get(e.get("args", {}).get("correlation"))
            if e.get("cat") in ("kernel", "gpu_memcpy") and by is not None:
                start = float(e["ts"])
                work.setdefault(by, []).append((start, start + float(e["dur"]), e["cat"]))
        for owner, pieces in work.items():
            spans += self._device_spans(owner, sorted(pieces))
        devices = [n for n, c in enumerate(self.calls) if isinstance(c, Copy | Kernel | Launch)]
        if missing := [n for n in devices if n not in work]:
            kinds = Counter(str(e.get("cat")) for e in complete)
            raise TraceError(
                f"the profiler saw no device work for {len(missing)} of {len(devices)} calls, such as "
                f"{self.calls[missing[0]].name!r}; its events: {dict(kinds)}.",
                "CUPTI may be held by another profiler, or refused to this user.",
                "`Native.times`, which needs no profiler.",
            )
        return spans

    def _waits(self, number: int) -> bool:
        return isinstance(self.calls[number], Synchronize)

    def _device_spans(self, number: int, pieces: list[tuple[float, float, str]]) -> list[Span]:
        call = self.calls[number]
        if not isinstance(call, Launch):
            assert isinstance(call, Copy | Kernel)
            start, end = pieces[0][0], max(p[1] for p in pieces)
            return [_span(call, call.stream.name, start, end, number)]
        # A graph's kernels come sorted by their start, not by node: each keeps the graph's name.
        return [
            Span(call.name, call.stream.name, "sm" if kind == "kernel" else "h2d", start, end, number)
            for start, end, kind in pieces
        ]

    # ------------------------------------------------------------ from calls to functions

    def _stream(self, stream: Stream) -> Any:
        if stream.kind == "legacy":
            return torch.cuda.default_stream()
        return blocking_stream() if stream.kind == "blocking" else torch.cuda.Stream()

    def _event(self, event: Event) -> torch.cuda.Event:
        if event not in self.events:
            self.events[event] = torch.cuda.Event()
        return self.events[event]

    def _function(self, call: Any) -> Callable[[], object]:
        match call:
            case Host():
                return partial(_busy, call.us)
            case Kernel():
                return self.spin.launcher(call.us, call.share, self.streams[call.stream].cuda_stream)
            case Copy():
                return self._copy(call)
            case Record():
                return partial(self._event(call.event).record, self.streams[call.stream])
            case Wait():
                return partial(self.streams[call.stream].wait_event, self._event(call.event))
            case Synchronize(target=Stream() as target):
                return self.streams[target].synchronize
            case Synchronize(target=Event() as target):
                return self._event(target).synchronize
            case Synchronize():
                return torch.cuda.synchronize
            case Launch():
                graph, stream = self._graph(call.graph), self.streams[call.stream]

                def launch() -> None:
                    with torch.cuda.stream(stream):
                        graph.replay()

                return launch
        raise TypeError(type(call))

    def _copy(self, call: Copy) -> Callable[[], object]:
        host = self._buffer(call.nbytes, call.name, on_host=call.direction != "d2d", pinned=call.pinned)
        device = self._buffer(call.nbytes, call.name, on_host=False, pinned=False)
        source, target = (device, host) if call.direction == "d2h" else (host, device)
        stream = self.streams[call.stream]

        def copy() -> None:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=not call.wait)

        return copy

    def _buffer(self, nbytes: int, name: str, *, on_host: bool, pinned: bool) -> torch.Tensor:
        """A buffer for this copy; copies of one size take turns with four, so that a program stays small."""
        kind = (nbytes, "host" if on_host else "device", pinned)
        pool = self.buffers.setdefault(kind, [])
        if len(pool) < 4:
            where: dict[str, Any] = {"pin_memory": pinned} if on_host else {"device": "cuda"}
            pool.append(torch.ones(nbytes, dtype=torch.uint8, **where))
            return pool[-1]
        pool.append(pool.pop(0))
        return pool[-1]

    def _graph(self, graph: Graph) -> torch.cuda.CUDAGraph:
        if graph not in self.graphs:
            functions = [self._function(c) for c in graph.calls]
            captured = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(captured, stream=self.streams[graph.origin]):
                for function in functions:
                    function()
            self.graphs[graph] = captured
        return self.graphs[graph]


def run(program: Program, *, repeats: int = 20) -> Timeline:
    """Time the program, then trace it: spans from the trace, makespan and host times from the timing."""
    native = Native(program)
    timed, traced = native.times(repeats), native.trace()
    timed.spans = traced.spans
    return timed


def chrome_trace(work: Callable[[], object]) -> list[dict[str, Any]]:
    """The profiler's events of one run of `work`: host calls, copies and kernels, times in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # the first profiled run of a process loads CUPTI
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Profiler clears events", category=UserWarning)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                work()
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return list(json.loads(path.read_text())["traceEvents"])


def _span(call: Copy | Kernel, lane: str, start: float, end: float, number: int) -> Span:
    engine = call.direction if isinstance(call, Copy) else "sm"
    share = min(1.0, call.share) if isinstance(call, Kernel) else 1.0
    return Span(call.name, lane, engine, start, end, number, share)


def _shifted(span: Span, by: float) -> Span:
    return replace(span, start=span.start + by, end=span.end + by)


def _busy(us: float) -> None:
    end = time.perf_counter_ns() + us * 1e3
    while time.perf_counter_ns() < end:
        pass
