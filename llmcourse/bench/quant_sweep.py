"""Which plans are fastest: the sweep behind the tables of `llmcourse.kernels.quant_plan` and `quant_int8`.

python -m llmcourse.bench.quant_sweep --out FOLDER [--seconds 230] [--only "INT4 1,INT8 16"]

One group for each format and batch. Its candidates are compiled by a pool of processes on a smaller matrix,
which fills Triton's cache and sorts out what does not run or is wrong, and timed in turns with bfloat16's
cuBLAS on two shapes: all of them with K in as many parts as `parts` says, then the best few with other
numbers of parts, which are no constants and need no compilation. Launches come from CUDA graphs of calls on
several copies of the weights, so that the L2 is cold. No group is begun after the time box; results are
written after each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcourse.bench.quant_cases import (
    GROUP,
    SHAPES,
    Function,
    Weights,
    copies_for,
    error_of,
    in_turn,
    weights,
)
from llmcourse.bench.records import new_record
from llmcourse.bench.timing import measure
from llmcourse.files import write_whole
from llmcourse.kernels.quant_int8 import Int8Plan, int8_matmul, quantize_rows
from llmcourse.kernels.quant_matmul import run as launch_plan
from llmcourse.kernels.quant_plan import QuantPlan, parts

Plan = QuantPlan | Int8Plan
BATCHES = (1, 16, 32, 64)
SHARED = 227 << 10
ROWS_OF_WARP = (16, 32, 64)  # of weights; a warp's product has 16 at the least
KEPT = 6  # for other numbers of parts, and the second shape


@dataclass(frozen=True)
class Group:
    """Candidates that compete: one format, one number of rows."""

    bits: int
    group: int | None
    m: int
    int8: bool = False  # activations in int8 too

    @property
    def name(self) -> str:
        return f"{'W8A8' if self.int8 else f'INT{self.bits}'} {self.m}"


def groups() -> list[Group]:
    """The targets of the project first, in case the time box closes."""
    found = [Group(4, GROUP, 1), Group(4, GROUP, 16), Group(8, None, 1)]
    found += [Group(4, GROUP, m) for m in BATCHES if m not in (1, 16)]
    found += [Group(8, None, m) for m in BATCHES if m != 1]
    return found + [Group(8, None, m, int8=True) for m in (16, 64, 512, 4096)]


def candidates(g: Group, n: int, k: int, multiprocessors: int) -> list[Plan]:
    found: list[Plan] = list(int8_candidates(g)) if g.int8 else list(dot_candidates(g, n, k, multiprocessors))
    if g.m == 1:
        found += [
            QuantPlan("gemv", 1, rows, 128 * chunks, warps, 1)
            for rows, chunks, warps in product((4, 8, 16), (8, 16, 32), (2, 4, 8))
            if 16 <= rows * chunks * 64 // (32 * warps) <= 256
        ]
    return list(dict.fromkeys(found))


def dot_candidates(g: Group, n: int, k: int, multiprocessors: int) -> Iterator[QuantPlan]:
    """Tiles whose pipelines leave room for two programs a multiprocessor or more."""
    heights = {1: (8,), 16: (16,), 32: (32, 16), 64: (64, 32)}[g.m]
    steps = ((128, 1), (128, 2), (128, 4)) if g.bits == 4 else ((128, 1), (128, 2), (256, 1))
    for height, rows, warps in product(heights, (16, 32, 64, 128, 256), (1, 2, 4, 8)):
        if rows // warps not in ROWS_OF_WARP or rows > 16 * height:
            continue
        if not 128 <= height * rows // warps <= 2048:
            continue
        for (block_k, substeps), stages in product(steps, (3, 4, 6)):
            plan = QuantPlan("dot", height, rows, block_k, warps, stages, 1, substeps)
            # Of a multiprocessor's 227 KB, as much as 16 warps' programs together leave for one another.
            if 2_500 * warps <= plan.loop_bytes(g.bits) <= min(110_000, 20_000 * warps):
                yield replace(plan, splits=parts(plan, g.m, n, k, multiprocessors))


def int8_candidates(g: Group) -> Iterator[Int8Plan]:
    heights = {16: (16,), 64: (64, 32), 512: (64, 128), 4096: (128, 256)}[g.m]
    for height, rows, block_k, warps, stages in product(
        heights, (64, 128, 256), (64, 128), (4, 8), (3, 4, 5)
    ):
        if (height + rows) * block_k * stages > SHARED - 4096 or height * rows // (32 * warps) > 128:
            continue
        yield Int8Plan(height, rows, block_k, warps, stages, 4 if g.m <= 64 else 1)


@cache
def operands(g: Group, n: int, k: int, copy: int = 0) -> tuple[Tensor, Weights, tuple[Tensor, ...]]:
    torch.manual_seed(copy)
    w, x = weights(n, k, g.bits, g.group), torch.randn(g.m, k, device="cuda", dtype=torch.bfloat16)
    return x, w, ((w.packed ^ 128).view(torch.int8), *quantize_rows(x)) if g.int8 else ()


def call(g: Group, plan: Plan, n: int, k: int, copy: int = 0) -> Callable[[], Tensor]:
    x, w, integers = operands(g, n, k, copy)
    if isinstance(plan, Int8Plan):
        codes, rows, scale = integers
        return lambda: int8_matmul(rows, codes, scale, w.scale, plan=plan)
    return lambda: launch_plan(x, w.packed, w.scale, None, w.bits, w.group or k, plan)


def compile_one(task: tuple[Group, Plan]) -> str:
    """Run a candidate on a smaller matrix; empty if right, else what went wrong."""
    g, plan = task
    try:
        n, k = 512, 4096
        x, w, _ = operands(g, n, k)
        error = error_of(call(g, plan, n, k)(), x, w)
        return "" if error < (2.5e-2 if g.int8 else 6e-3) else f"wrong: off by {error:.3g}"
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:160]}"


def time_all(g: Group, n: int, k: int, plans: list[Plan]) -> tuple[float, list[tuple[float, Plan]]]:
    """Seconds of bfloat16's cuBLAS, and of each plan, the fastest first."""
    count = copies_for(n, k, g.bits)
    sets: list[dict[str, Function]] = []
    for copy in range(count):
        x, w, _ = operands(g, n, k, copy)
        own = {str(i): call(g, plan, n, k, copy) for i, plan in enumerate(plans)}
        sets.append({"bf16": partial(torch.matmul, x, w.exact.bfloat16().T), **own})
    samples = measure(in_turn(sets), device="cuda", graph=True, warmup=1)
    timed = [(samples[str(i)].median, plan) for i, plan in enumerate(plans)]
    return samples["bf16"].median, sorted(timed, key=lambda t: t[0])


def other_parts(plans: list[Plan]) -> list[Plan]:
    """The same tiles with K in other numbers of parts; in one part, which is compiled anew, the best two."""
    tried = [replace(p, splits=1) for p in plans[:2]]
    tried += [replace(p, splits=s) for p in plans for s in (2, 3, 4, 6, 8, 12)]
    return [p for p in dict.fromkeys(tried) if p not in plans and getattr(p, "rung", "dot") == "dot"]


def sweep(g: Group, plans: list[Plan]) -> list[dict[str, Any]]:
    """Rows of shape, plan, microseconds, GB/s of codes and scales, and bfloat16's time over it."""
    rows: list[dict[str, Any]] = []

    def report(n: int, k: int, stage: str, plans: list[Plan], keep: int) -> list[Plan]:
        bf16, timed = time_all(g, n, k, plans)
        moved = operands(g, n, k)[1].moved
        for seconds, plan in timed[:keep]:
            head = {"group": g.name, "stage": stage, "m": g.m, "n": n, "k": k, "us": round(seconds * 1e6, 2)}
            rates = {"gbytes_per_s": round(moved / seconds / 1e9), "ratio_to_bf16": round(bf16 / seconds, 3)}
            rows.append(head | rates | asdict(plan))
        best = timed[0]
        print(
            f"{g.name} {n}×{k} {stage}: {best[0] * 1e6:.1f} µs, bf16 {bf16 * 1e6:.1f}, {best[1]}", flush=True
        )
        return [plan for _, plan in timed]

    (n, k), second = SHAPES
    order = report(n, k, "tiles", plans, len(plans))
    split = not (g.int8 and g.m > 64)
    if split:
        order = report(n, k, "parts", order[:KEPT] + other_parts(order[:KEPT]), 12)
    finalists = order[: 2 * KEPT]
    if split:
        finalists += other_parts(order[: KEPT // 2])
    report(*second, "second shape", list(dict.fromkeys(finalists)), 12)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="sweep the plans of quantized products on this GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--only", default="", help='groups by name, separated by commas: "INT4 1,W8A8 16"')
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 1)))
    options = parser.parse_args()
    started = time.monotonic()
    wanted = [w for w in options.only.split(",") if w]
    chosen = [g for g in groups() if not wanted or g.name in wanted]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    tasks = [(g, c) for g in chosen for c in candidates(g, *SHAPES[0], multiprocessors)]
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    good: dict[Group, list[Plan]] = {g: [] for g in chosen}
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for (g, plan), fault in zip(tasks, pool.imap(compile_one, tasks, chunksize=1), strict=True):
            if fault:
                failed.append({"group": g.name, "fault": fault, **asdict(plan)})
            else:
                good[g].append(plan)
    print(
        f"{len(tasks)} candidates, {len(failed)} do not run; {time.monotonic() - started:.0f} s", flush=True
    )
    for g, plans in good.items():
        if not plans or time.monotonic() - started > options.seconds:
            print(f"{g.name}: not measured ({len(plans)} candidates run)", flush=True)
            continue
        rows += sweep(g, plans)
        operands.cache_clear()
        torch.cuda.empty_cache()
        record = new_record("quant_sweep", "cuda", rows, [json.dumps(f) for f in failed])
        write_whole(options.out / "quant_sweep.json", json.dumps(asdict(record), indent=1) + "\n")
    print(f"done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
