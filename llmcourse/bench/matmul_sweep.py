"""Which tiles are fastest: the sweep behind the tables of `llmcourse.kernels.matmul_plan`.

python -m llmcourse.bench.matmul_sweep --out FOLDER [--seconds 170] [--only persistent,fp8]

Candidates that need more shared memory than there is are left out. The rest are compiled by a pool of
processes on small matrices, which fills Triton's cache and sorts out what does not run. Then they are timed
in turns, cuBLAS among them: all on the largest square, the best few with other group sizes, and the best of
each tile shape on the smaller squares. No group is begun after the time box; results are written after each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcourse.bench.matmul import DECODE, K_DECODE, N_DECODE, SQUARES, operands, worst_error
from llmcourse.bench.records import new_record
from llmcourse.bench.timing import measure
from llmcourse.files import write_whole
from llmcourse.kernels.matmul import flops
from llmcourse.kernels.matmul_fp8 import quantize
from llmcourse.kernels.matmul_launch import Operands, launch
from llmcourse.kernels.matmul_plan import SHARED_BYTES, Config, skinny

SWITCHES = {  # subtiles, flatten
    "grouped": [(1, True)],
    "descriptor": [(1, True), (2, True)],
    "persistent": list(product((1, 2), (True, False))),
}


@dataclass(frozen=True)
class Group:
    """Candidates that compete: one rung, one number format."""

    rung: str
    dtype: str  # bf16, fp8, fp8 precise
    candidates: tuple[Config, ...]
    shapes: tuple[tuple[int, int, int], ...]
    layout: str = "NT"

    @property
    def name(self) -> str:
        return f"{self.rung} {self.dtype} {self.layout}"


def fits(config: Config, itemsize: int, *, tile_out: bool) -> bool:
    """Whether the pipeline, and the tile on its way out, fit into Hopper's shared memory."""
    out = config.block_m * config.block_n * 2 // config.subtiles if tile_out else 0
    return config.loop_bytes(itemsize) + out + 1024 <= SHARED_BYTES[90]


def tile_candidates(itemsize: int, rung: str, *, most_accumulators: int = 32768) -> Iterator[Config]:
    shapes = [
        (128, 256, 8),
        (256, 128, 8),
        (128, 128, 8),
        (128, 128, 4),
        (64, 256, 4),
        (128, 64, 4),
        (64, 128, 4),
    ]
    shapes += [(64, 64, 4), (256, 64, 8), (256, 64, 4)]
    deep = 64 * 2 // itemsize
    for (m, n, warps), k, stages in product(shapes, (deep, 2 * deep), (3, 4, 5, 6)):
        if m * n > most_accumulators:
            continue
        for subtiles, flatten in SWITCHES[rung]:
            config = Config(m, n, k, warps, stages, subtiles=subtiles, flatten=flatten)
            if fits(config, itemsize, tile_out=rung == "persistent"):
                yield config


def thinned(configs: Iterator[Config], itemsize: int) -> tuple[Config, ...]:
    """For each tile and switch the two deepest pipelines that fit: shallower ones have never won."""
    groups: dict[Any, list[Config]] = {}
    for c in configs:
        groups.setdefault((replace(c, stages=0)), []).append(c)
    return tuple(c for held in groups.values() for c in sorted(held, key=lambda c: -c.stages)[:2])


def skinny_candidates(m: int) -> tuple[Config, ...]:
    base = skinny(m, N_DECODE, K_DECODE, 2, 132)
    return tuple(
        replace(base, block_n=n, block_k=k, stages=stages, splits=splits, warps=warps)
        for n, k, stages, splits, warps in product(
            (32, 64, 128), (64, 128, 256), (3, 5), (1, 2, 4, 8), (4, 8)
        )
        if replace(base, block_n=n, block_k=k, stages=stages).loop_bytes(2) <= 110_000
    )


def groups() -> list[Group]:
    squares = tuple((n, n, n) for n in SQUARES)
    found = [
        Group("persistent", "bf16", thinned(tile_candidates(2, "persistent"), 2), squares),
        Group("persistent", "fp8", thinned(tile_candidates(1, "persistent"), 1), squares),
        Group(
            "persistent",
            "fp8 precise",
            thinned(tile_candidates(1, "persistent", most_accumulators=16384), 1),
            squares,
        ),
        Group("persistent", "bf16", thinned(tile_candidates(2, "persistent"), 2), squares[:1], "NN"),
        Group("descriptor", "bf16", thinned(tile_candidates(2, "descriptor"), 2), squares),
        Group("grouped", "bf16", thinned(tile_candidates(2, "grouped"), 2), squares[:2]),
    ]
    for m in DECODE:
        shapes = ((m, N_DECODE, K_DECODE), (m, K_DECODE, N_DECODE))
        found.append(Group("split_k", "bf16", skinny_candidates(m), shapes))
    return found


def make(group: Group, shape: tuple[int, int, int]) -> tuple[Callable[[], object], Operands]:
    """The peer, and operands for the candidates."""
    m, n, k = shape
    if group.dtype == "bf16":
        a, b = operands(m, n, k, torch.bfloat16, group.layout)
        return (lambda: torch.matmul(a, b)), Operands(a, b, torch.empty(m, n, device="cuda", dtype=a.dtype))
    fast = group.dtype == "fp8"
    a, sa = quantize(torch.randn(m, k, device="cuda"))
    bt, sb = quantize(torch.randn(n, k, device="cuda"))
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)

    def peer() -> Tensor:
        return torch._scaled_mm(
            a, bt.T, scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return peer, Operands(a, bt.T, out, scale_a=sa, scale_b=sb, fast_accum=fast)


def small(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """A shape that compiles to the same kernel: as divisible by 16, as equal to 1."""
    m, n, k = shape
    return min(m, 512), min(n, 512), min(k, 1024)


def compile_one(task: tuple[Group, Config]) -> str:
    """Run a candidate on a small shape; empty if right, else what went wrong."""
    group, config = task
    try:
        _, x = make(group, small(group.shapes[0]))
        launch(group.rung, x, config)
        scale = float(x.scale_a * x.scale_b) if x.scale_a is not None and x.scale_b is not None else 1.0
        error = worst_error(x.out, x.a, x.b, scale)
        return "" if error < 0.05 else f"wrong: off by {error:.3g} of the root mean square"
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:160]}"


def time_all(
    group: Group, shape: tuple[int, int, int], configs: list[Config]
) -> tuple[float, list[tuple[float, Config]]]:
    """Seconds of the peer, and of each configuration, the fastest first."""
    peer, x = make(group, shape)
    functions: dict[str, Callable[[], object]] = {"peer": peer}
    functions |= {str(i): (lambda c=c: launch(group.rung, x, c)) for i, c in enumerate(configs)}  # type: ignore[misc]
    samples = measure(functions, device="cuda", warmup=2)
    timed = [(samples[str(i)].median, c) for i, c in enumerate(configs)]
    return samples["peer"].median, sorted(timed, key=lambda t: t[0])


def sweep_group(group: Group, configs: list[Config]) -> list[dict[str, Any]]:
    """Rows of shape, configuration, microseconds, TFLOP/s and the peer's time over it."""
    rows = []

    def report(
        shape: tuple[int, int, int], stage: str, configs: list[Config], keep: int
    ) -> list[tuple[float, Config]]:
        peer, timed = time_all(group, shape, configs)
        for seconds, config in timed[:keep]:
            rows.append(
                {
                    "group": group.name,
                    "stage": stage,
                    "shape": shape,
                    "us": round(seconds * 1e6, 2),
                    "tflops": round(flops(*shape) / seconds / 1e12, 1),
                    "peer_tflops": round(flops(*shape) / peer / 1e12, 1),
                    "ratio_to_peer": round(peer / seconds, 4),
                    **asdict(config),
                }
            )
        best = rows[-min(keep, len(timed))]
        print(f"{group.name} {shape} {stage}: {best['us']} µs, {best['tflops']} TFLOP/s,", end=" ")
        print(f"{best['ratio_to_peer']} of the peer's rate, {timed[0][1]}", flush=True)
        return timed

    timed = report(group.shapes[0], "tiles", configs, len(configs))
    if group.rung == "split_k":
        for shape in group.shapes[1:]:
            report(shape, "tiles", configs, 12)
        return rows
    wider = [replace(c, group_m=g) for _, c in timed[:3] for g in (4, 8, 16, 32)]
    timed = report(group.shapes[0], "groups", wider, len(wider)) + timed
    best: dict[tuple[int, int], Config] = {}
    for _, c in timed:
        best.setdefault((c.block_m, c.block_n), c)
    for shape in group.shapes[1:]:
        report(shape, "best of each tile", list(best.values()), len(best))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="sweep tile sizes of the matmul ladder on this GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--only", default="", help="words, one of which the group's name must hold")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 1)))
    options = parser.parse_args()
    started = time.monotonic()
    wanted = [w for w in options.only.split(",") if w]
    chosen = [g for g in groups() if not wanted or any(w in g.name for w in wanted)]
    tasks = [(g, c) for g in chosen for c in g.candidates]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        faults = pool.map(compile_one, tasks, chunksize=1)
    good: dict[str, list[Config]] = {}
    failed = []
    for (g, c), fault in zip(tasks, faults, strict=True):
        if fault:
            failed.append({"group": g.name, "fault": fault, **asdict(c)})
        else:
            good.setdefault(f"{g.name} {g.shapes[0]}", []).append(c)
    print(
        f"{len(tasks)} candidates, {len(failed)} do not run; {time.monotonic() - started:.0f} s", flush=True
    )
    rows: list[dict[str, Any]] = []
    for group in chosen:
        configs = good.get(f"{group.name} {group.shapes[0]}", [])
        if not configs or time.monotonic() - started > options.seconds:
            print(f"{group.name}: not measured ({len(configs)} candidates run)", flush=True)
            continue
        rows += sweep_group(group, configs)
        torch.cuda.empty_cache()
        record = new_record("matmul_sweep", "cuda", rows, [json.dumps(f) for f in failed])
        write_whole(options.out / "matmul_sweep.json", json.dumps(asdict(record), indent=1) + "\n")
    print(f"done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
