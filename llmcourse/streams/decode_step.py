"""A decode step of a 135M-parameter model, launched kernel by kernel and as one CUDA graph.

The model has SmolLM2-135M's sizes and random weights: its tokens mean nothing, its kernels and their times
are those of the real one. "engine, eager" is what the engine does without graphs; "same step, eager" is
exactly the work that the graph holds, launched from Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from llmcourse.engine.cuda_graph import GraphDecoder, bucket
from llmcourse.models import KVCache, ModelConfig, Transformer, random_model

SMOL = ModelConfig(
    vocab_size=49152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    max_len=8192,
    rope_theta=100_000.0,
    name="SmolLM2-135M sizes, random weights",
)


def decode_steps(
    config: ModelConfig = SMOL, *, batches: tuple[int, ...] = (1, 8, 64), held: int = 200, room: int = 256
) -> list[dict[str, Any]]:
    """Rows of times: each batch size × each way to launch. `held` tokens are in the cache before the step.

    step_us    from the call until the host has the result's end
    launch_us  until the host has made all its calls, the device perhaps still working
    kernels    on the device per step, kernel_us their times added up
    """
    model = random_model(config, device="cuda", dtype="bfloat16")
    return [row for batch in batches for row in _steps(model, batch, held, room)]


@torch.inference_mode()
def _steps(model: Transformer, batch: int, held: int, room: int) -> list[dict[str, Any]]:
    cache = KVCache(model.config, batch, room, dtype=model.dtype, device="cuda")
    decoder = GraphDecoder(model, cache)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")

    def fresh(step: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            cache.lengths = [held] * batch
            step()

        return call

    started = time.perf_counter()
    fresh(lambda: decoder(tokens))()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    decoder.positions.fill_(held)
    span = bucket(held + 1, room)
    ways = {
        "engine, eager": fresh(lambda: model(tokens, cache)),
        "same step, eager": fresh(lambda: decoder.step(span)),
        "graph": fresh(lambda: decoder(tokens)),
    }
    rows = []
    for name, way in ways.items():
        row = {"name": f"decode step, batch {batch}: {name}", "kind": "decode", "batch": batch, "way": name}
        rows.append(
            row | _times(way) | _kernels(way) | ({"capture_us": first * 1e6} if name == "graph" else {})
        )
    return rows


def _times(step: Callable[[], None], repeats: int = 50) -> dict[str, float]:
    for _ in range(5):
        step()
    whole, launch = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
        launch.append(launched - start)
    whole.sort()
    return {
        "step_us": statistics.median(whole) * 1e6,
        "low_us": whole[repeats // 10] * 1e6,
        "high_us": whole[repeats - 1 - repeats // 10] * 1e6,
        "launch_us": statistics.median(launch) * 1e6,
        "repeats": repeats,
    }


def _kernels(step: Callable[[], None]) -> dict[str, Any]:
    """Device work and the host's launching calls of one step, from the profiler."""
    from llmcourse.streams.native import chrome_trace

    events = chrome_trace(step)
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    calls = [
        e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver")
        and any(word in e["name"] for word in ("Launch", "Memcpy", "Memset"))
    ]
    starts = [float(e["ts"]) for e in work]
    ends = [float(e["ts"]) + float(e["dur"]) for e in work]
    return {
        "kernels": len(work),
        "launch_calls": len(calls),
        "kernel_us": sum(b - a for a, b in zip(starts, ends, strict=True)),
        "device_us": max(ends) - min(starts),
    }


@torch.inference_mode()
def loaders(*, batches: int = 16, side: int = 4096) -> list[dict[str, Any]]:
    """Real batches for real matrix products: blocking pageable copies, pinned ones, and a prefetching loop.

    A batch is side² bfloat16 numbers; the step multiplies it three times by a weight of the same size.
    """
    weight = torch.randn(side, side, device="cuda", dtype=torch.bfloat16) / side**0.5
    pageable = [torch.randn(side, side).to(torch.bfloat16) for _ in range(4)]
    pinned = [x.pin_memory() for x in pageable]
    side_stream = torch.cuda.Stream()
    results: list[torch.Tensor] = []

    def work(x: torch.Tensor) -> None:
        results[:] = [x @ weight @ weight @ weight]

    def plain(source: list[torch.Tensor], non_blocking: bool) -> None:
        for i in range(batches):
            work(source[i % 4].to("cuda", non_blocking=non_blocking))

    def prefetching() -> None:
        main = torch.cuda.current_stream()
        following = arrived = None
        for i in range(batches + 1):
            ready, event = following, arrived
            if i < batches:
                with torch.cuda.stream(side_stream):
                    following = pinned[i % 4].to("cuda", non_blocking=True)
                    arrived = side_stream.record_event()
            if ready is not None and event is not None:
                main.wait_event(event)
                ready.record_stream(main)  # its memory must not be given away while main reads it
                work(ready)

    def resident() -> None:
        for i in range(batches):
            work(on_gpu[i % 4])

    on_gpu = [x.cuda() for x in pinned]
    ways: dict[str, Callable[[], None]] = {
        "pageable": lambda: plain(pageable, False),
        "pinned": lambda: plain(pinned, True),
        "pinned, prefetching": prefetching,
        "no copies": resident,
    }
    rows = []
    for name, way in ways.items():
        for _ in range(3):
            way()
        seconds = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        us = statistics.median(seconds) * 1e6 / batches
        rows.append(
            {"name": f"loader: {name}", "kind": "loader", "way": name, "batch_us": us, "nbytes": 2 * side**2}
        )
    return rows
