"""Latency and bandwidth of each level of a GPU's memory, measured; and how much must be under way.

    latency      one thread follows a random chain of links: each load waits for the one before. Chains that
                 fit L1, that fit L2 and that fit neither; and one in shared memory
    bandwidth    the whole GPU reads arrays that fit L1 (each SM its own), L2 and neither; and shared memory
    in flight    a copy with 1 to 64 resident warps on each SM and one load of 4 or 16 bytes a thread under
                 way: bandwidth against the bytes that Little's law speaks of

`latencies()` gives what was recorded, for cells that need one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmcourse.bench.records import Record, all_records
from llmcourse.errors import UnknownNameError
from llmcourse.hardware import gpu

SOURCE = Path(__file__).with_suffix(".cu")
LINE = 128
"""Bytes between links: each lies in a cache line of its own."""
STEPS = 1 << 14
SIZES = {"shared memory": 4 << 10, "L1": 32 << 10, "L2": 2 << 20, "memory": 256 << 20}
"""Bytes of the chains: the third fits no L1, and the last no L2."""
ASSUMED_CYCLES = {"shared memory": 30, "L1": 40, "L2": 260, "memory": 500}
"""Round figures for a GPU on which nobody measured: the programming guide speaks of hundreds of cycles."""


def links(nbytes: int, *, line: int = LINE, seed: int = 0) -> np.ndarray:
    """A cycle through all lines of an array of `nbytes`, in random order, as uint32 indices of words.

    Following `at = next[at]` from 0 visits every line once before it comes back to 0.
    """
    words = line // 4
    order = np.random.default_rng(seed).permutation(np.arange(1, nbytes // line, dtype=np.int64))
    path = np.concatenate([[0], order])
    found = np.zeros(nbytes // 4, np.uint32)
    found[path * words] = np.roll(path, -1) * words
    return found


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Benchmark `memory_levels`. Rows: latency_s and cycles by level; bytes_per_s by level; copies by warps.

    Raises   UnknownNameError on a CPU: its levels are not a GPU's.
    """
    if device != "cuda":
        raise UnknownNameError(
            "memory_levels measures a GPU.",
            "Its kernels read a GPU's clock, caches and shared memory.",
            "--device cuda, on a machine that has one.",
        )
    rows = [*_latencies(), *_bandwidths(), *_in_flight()]
    notes = [
        f"latency: {STEPS} dependent loads by one thread, median of 20; the links had been followed before, "
        "except in memory, where each load goes to a new line and the caches were swept",
        "bandwidth: float4 loads by the whole GPU, read and not written",
        "in flight: copies of 1 GiB, bytes read and written; one load a thread under way at a time",
    ]
    return rows, notes


def _module() -> Any:
    from llmcourse.vgpu import cuda

    names = ["copy_one_by_one<float>", "copy_one_by_one<float4>"]
    return cuda.compile(SOURCE.read_text(encoding="utf-8"), names=names, name=SOURCE.name)


def _latencies() -> list[dict[str, Any]]:
    import torch

    from llmcourse.bench.timing import SWEEP_BYTES

    module = _module()
    sweep = torch.empty(SWEEP_BYTES, dtype=torch.int8, device="cuda")
    taken = torch.zeros(2, dtype=torch.int64, device="cuda")
    end = torch.zeros(1, dtype=torch.int32, device="cuda")
    rows = []
    for level, nbytes in SIZES.items():
        kernel = module.chase_shared if level == "shared memory" else module.chase
        line = 4 if level == "shared memory" else LINE
        chain = torch.from_numpy(links(nbytes, line=line).view(np.int32)).cuda()
        samples = []
        for _ in range(20):
            sweep.zero_()
            kernel[1, 1](chain, STEPS, taken, end)
            samples.append(taken.tolist())
        cycles, nanoseconds = np.median(samples, axis=0) / STEPS
        row = {"name": f"latency {level}", "cycles": round(float(cycles), 1), "bytes": nbytes}
        rows.append(row | {"latency_s": float(nanoseconds) * 1e-9})
    return rows


def _bandwidths() -> list[dict[str, Any]]:
    import torch

    from llmcourse.bench.timing import measure

    module = _module()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.zeros(1, device="cuda")
    rows = []

    def add(level: str, moved: int, call: Any) -> None:
        sample = measure({level: call}, device="cuda", graph=False)[level]
        rows.append({"name": f"bandwidth {level}", "bytes_per_s": sample.rate(moved), "bytes": moved})

    rounds = 2000
    add("shared memory", sms * 4 * (16 << 10) * rounds, lambda: module.read_shared[sms * 4, 512](out, rounds))
    own = torch.zeros(sms * 4 * (16 << 8), device="cuda")  # 16 KiB for each of four blocks of an SM
    add("L1", own.nbytes * rounds, lambda: module.read_own[sms * 4, 512](own, out, 1024, rounds))
    grid, block = sms * 4, 512
    unit = grid * block * 4 * 16  # bytes that the grid reads in one step of its loop
    for level, wanted, times in (("L2", 12 << 20, 200), ("memory", 8 << 30, 1)):
        nbytes = max(1, wanted // unit) * unit
        array = torch.zeros(nbytes // 4, device="cuda")
        count = nbytes // 16
        add(
            level,
            nbytes * times,
            lambda a=array, c=count, t=times: module.read_all[grid, block](a, out, c, t),
        )
        del array
    return rows


def _in_flight() -> list[dict[str, Any]]:
    import torch

    from llmcourse.bench.timing import measure

    module = _module()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    rows = []
    for name, width in (("float", 4), ("float4", 16)):
        kernel = module[f"copy_one_by_one<{name}>"]
        count = source.nbytes // width
        for warps in (1, 2, 4, 8, 16, 32, 64):
            blocks, threads = sms * -(-warps // 32), min(warps, 32) * 32
            call = lambda k=kernel, b=blocks, t=threads, c=count: k[b, t](source, target, c)  # noqa: E731
            sample = measure({"copy": call}, device="cuda", graph=False)["copy"]
            rate = sample.rate(2 * source.nbytes)
            row = {"name": f"in flight {name}", "warps_per_sm": warps, "bytes_per_load": width}
            rows.append(row | {"bytes_per_s": rate, "loads_in_flight_bytes": sms * warps * 32 * width})
    return rows


def _newest() -> Record | None:
    records = [r for r in all_records() if r.name == "memory_levels"]
    return max(records, key=lambda r: r.date, default=None)


def latencies() -> tuple[dict[str, float], str]:
    """Seconds by level ("shared memory", "L1", "L2", "memory"), and where they are from.

    What was recorded on the newest device; where nothing was, round figures at an H100's clock.
    """
    record = _newest()
    if record is None:
        clock = gpu("H100 SXM").clock
        found = {level: cycles / clock for level, cycles in ASSUMED_CYCLES.items()}
        return found, "a round figure, not measured"
    rows = {row["name"]: row for row in record.results}
    return {level: rows[f"latency {level}"]["latency_s"] for level in SIZES}, record.caption


def bandwidths() -> dict[str, float]:
    """Bytes a second by level as recorded; nothing where there is no record."""
    record = _newest()
    rows = {row["name"]: row for row in record.results} if record else {}
    return {
        level: rows[f"bandwidth {level}"]["bytes_per_s"] for level in SIZES if f"bandwidth {level}" in rows
    }


def recorded_copies() -> dict[int, list[tuple[float, float]]]:
    """(bytes that loads in flight ask for, bytes a second read) of each recorded copy, by bytes a load."""
    record = _newest()
    found: dict[int, list[tuple[float, float]]] = {}
    for row in record.results if record else []:
        if row["name"].startswith("in flight"):
            point = row["loads_in_flight_bytes"], row["bytes_per_s"] / 2
            found.setdefault(row["bytes_per_load"], []).append(point)
    return found
