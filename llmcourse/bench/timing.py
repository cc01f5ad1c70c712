"""The timing protocol: the same for our code and for the code it is compared with.

1. Warm up, so that compilation, handle creation and lazy loading stay out of the numbers.
2. Peers take turns (A B A B …), so that a change of clock speed meets all of them.
3. On a GPU: device events around each call, and the L2 cache swept before it, since in a real step the
   inputs come from memory. Swept by reading: after writing, the cache is full of lines that have to go to
   memory before the call's own can come in (bf16 weights of 117 MB: 55 µs instead of 44 on an H100).
   Where a call takes under 50 µs, launching it takes as long as running it: every peer is then captured in
   a CUDA graph and the replay is timed, for all or for none. A graph of one call still begins and ends with
   some µs in which nothing runs. Where that counts, give a list of calls on copies of the inputs, larger
   together than twice the cache: they make one graph, in which each finds the others' bytes in the cache.
4. Report the median of at least 20 and the spread from the 10th to the 90th percentile. A difference
   smaller than the spread is noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from llmcourse.errors import ShapeError

SHORT = 50e-6
SWEEP_BYTES = 256 << 20  # an H200's L2 is 60 MB, an H100's 50 MB

Function = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Seconds of repeated calls of one function: median, 10th and 90th percentile, how many."""

    median: float
    low: float
    high: float
    count: int
    graph: bool = False

    @classmethod
    def of(cls, seconds: list[float], *, graph: bool = False) -> Sample:
        ordered = sorted(seconds)
        n = len(ordered)
        return cls(statistics.median(ordered), ordered[n // 10], ordered[n - 1 - n // 10], n, graph)

    def rate(self, amount: float) -> float:
        """`amount` (bytes, FLOPs, tokens) per second at the median."""
        return amount / self.median

    def __str__(self) -> str:
        unit, scale = ("s", 1.0) if self.median >= 1 else ("ms", 1e3) if self.median >= 1e-3 else ("µs", 1e6)
        median, low, high = (f"{x * scale:.3g}" for x in (self.median, self.low, self.high))
        return f"{median} {unit} ({low}–{high}, n={self.count})"


def measure(
    functions: Mapping[str, Function | Sequence[Function]],
    *,
    device: str | torch.device = "cpu",
    repeats: int = 20,
    warmup: int = 3,
    graph: bool | None = None,
    sweeps: int = 1,
) -> dict[str, Sample]:
    """Time functions without arguments against each other; seconds of one call, by name.

    functions a function, or several that do the same with other inputs: called one after another, and the
              time divided by how many they are
    repeats   calls timed for each, at least 20 (a record with fewer is refused)
    graph     capture in CUDA graphs: None decides by the 50 µs rule, for all functions together
    sweeps    times the L2 cache is swept before each call, 0.1 ms each, in which the host can get ahead:
              for functions that cannot be captured (backward passes) and take longer than that to launch
    """
    if repeats < 20:
        raise ShapeError(
            f"{repeats} repeats were asked for.",
            "A median of fewer than 20 calls moves with every hiccup of the machine.",
            "repeats=20 or more.",
        )
    counts = {name: len(f) if isinstance(f, Sequence) else 1 for name, f in functions.items()}
    calls = {name: partial(_each, f) if isinstance(f, Sequence) else f for name, f in functions.items()}
    for function in calls.values():
        for _ in range(warmup):
            function()
    if torch.device(device).type != "cuda":
        return _shared(_on_host(calls, repeats), counts)
    torch.cuda.synchronize()
    if not graph:
        samples = _shared(_on_device(calls, repeats, sweeps, graph=False), counts)
        if graph is False or min(s.median for s in samples.values()) >= SHORT:
            return samples
    captured = {name: _captured(f) for name, f in calls.items()}
    return _shared(_on_device(captured, repeats, sweeps, graph=True), counts)


def _each(functions: Sequence[Function]) -> None:
    for function in functions:
        function()


def _shared(samples: dict[str, Sample], counts: Mapping[str, int]) -> dict[str, Sample]:
    """Of each sample, one call's part."""
    return {
        name: replace(s, **{key: getattr(s, key) / counts[name] for key in ("median", "low", "high")})
        for name, s in samples.items()
    }


def _on_host(functions: Mapping[str, Function], repeats: int) -> dict[str, Sample]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: Sample.of(s) for name, s in seconds.items()}


def _on_device(
    functions: Mapping[str, Function], repeats: int, sweeps: int, *, graph: bool
) -> dict[str, Sample]:
    sweep = torch.zeros(SWEEP_BYTES // 4, dtype=torch.float32, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(sweeps):
                sweep.amax()
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: Sample.of([a.elapsed_time(b) / 1e3 for a, b in pairs], graph=graph)
        for name, pairs in events.items()
    }


def _captured(function: Function) -> Function:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
