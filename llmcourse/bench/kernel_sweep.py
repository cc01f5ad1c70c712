"""Launch plans against each other: which rung, rows a program, block, warps and stages are fastest here.

    python -m llmcourse.bench.kernels --sweep --out DIR

A plan changes a kernel's speed, never its result. Each list below is tried at the shapes that matter, all its
plans in turns, with a copy of as many bytes among them; the best few are printed with their share of the
bandwidth of a large copy and of that one, and all are written. The defaults in `llmcourse.kernels` come from
such runs.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llmcourse.bench.ceilings import copy_bandwidth
from llmcourse.bench.kernel_cases import Function, randn
from llmcourse.bench.timing import measure
from llmcourse.kernels import add_rms_norm as add_norm
from llmcourse.kernels import cross_entropy as ce
from llmcourse.kernels import layer_norm as ln
from llmcourse.kernels import rms_norm as rms
from llmcourse.kernels import rope as rope_file
from llmcourse.kernels import softmax as softmax_file
from llmcourse.kernels import swiglu as swiglu_file
from llmcourse.kernels import vector_add as add_file
from llmcourse.kernels.launch import Plan, multiprocessors, power_of_two


@dataclass
class Search:
    """Plans for one kernel at one shape: `launch(plan)` runs it once."""

    name: str
    bytes: int
    plans: list[Plan]
    launch: Callable[[Plan], Any]


def searches(only: str = "") -> Iterator[Search]:
    """The searches that are asked for, each with its tensors made when its turn comes."""
    for name, make in MAKERS.items():
        if is_wanted(name, only):
            yield make(name)


def is_wanted(name: str, only: str) -> bool:
    """Whether a name contains `only`, or one of several parts separated by commas."""
    return any(part in name for part in only.split(","))


def whole_rows(columns: int) -> list[Plan]:
    """Plans that hold a row: 8 to 32 elements a thread, 1 to 8 rows a program."""
    block = power_of_two(columns)
    return [
        Plan("row", rows, block, warps)
        for rows, warps in product((1, 2, 4, 8), (2, 4, 8, 16, 32))
        if 8 <= rows * block // (32 * warps) <= 32 and rows * block <= 16384 * (1 + (rows == 1))
    ]


def multiprocessor_count() -> int:
    return multiprocessors(torch.device("cuda", torch.cuda.current_device()))


def walking_backward(columns: int) -> list[Plan]:
    """Backward plans: programs a multiprocessor × warps × rows × stages."""
    sms = multiprocessor_count()
    if columns > 16384:
        sizes = ((8192, 16), (8192, 32), (16384, 32))
        return [Plan("looped", 1, b, w, programs=sms * n // 2) for (b, w), n in product(sizes, (1, 2))]
    block = power_of_two(columns)
    tiles = {  # rows, warps, programs a multiprocessor
        8192: ((1, 16, 1), (1, 16, 2), (1, 32, 1)),
        4096: ((2, 16, 2), (1, 8, 2), (1, 8, 3), (1, 8, 4), (1, 16, 2)),
        1024: ((8, 16, 2), (4, 8, 2), (4, 8, 3), (2, 4, 4), (2, 4, 6), (2, 8, 2), (8, 8, 2)),
    }[block]
    return [
        Plan("row", rows, block, warps, each * sms, stages)
        for (rows, warps, each), stages in product(tiles, (1, 3, 4))
    ]


def sized(name: str, sizes: tuple[tuple[int, int], ...]) -> list[Plan]:
    """Plans of one rung from (block, warps)."""
    return [Plan(name, block=block, warps=warps) for block, warps in sizes]


def blocks(lowest: int, highest: int) -> list[Plan]:
    """Plans for elementwise kernels: 4 to 32 elements a thread."""
    return [
        Plan("block", block=b, warps=w)
        for b, w in product((1024, 2048, 4096, 8192), (2, 4, 8, 16))
        if lowest <= b // (32 * w) <= highest
    ]


def shape_of(name: str) -> tuple[int, int]:
    """(16384, 8192) from "softmax 16384×8192"."""
    rows, columns = name.split()[-1].split("×")
    return int(rows), int(columns)


ONLINE = sized("online", ((4096, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32)))


def softmax(name: str) -> Search:
    rows, columns = shape_of(name)
    x = randn(rows, columns)
    plans = whole_rows(columns) if columns <= 32768 else []
    if columns > 16384:
        plans += ONLINE
    if columns > 32768:
        plans += sized("split", ((4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)))
    size = softmax_file.minimum_bytes(rows, columns, 2)
    return Search(name, size, plans, lambda p: softmax_file.softmax(x, plan=p))


def softmax_backward(name: str) -> Search:
    rows, columns = shape_of(name)
    y, dy = torch.softmax(randn(rows, columns), -1), randn(rows, columns)
    plans = whole_rows(columns) if columns <= 16384 else []
    if columns > 16384:
        plans = sized("online", ((4096, 8), (4096, 16), (4096, 32), (8192, 16), (8192, 32), (16384, 32)))
    return Search(name, 6 * rows * columns, plans, lambda p: softmax_file.backward(y, dy, plan=p))


LOOPED = ((4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32))


def norm(name: str) -> Search:
    rows, columns = shape_of(name)
    x, r, w, b = randn(rows, columns), randn(rows, columns), randn(columns), randn(columns)
    plans = whole_rows(columns) + (sized("looped", LOOPED) if columns > 16384 else [])
    if name.startswith("add"):
        size = add_norm.minimum_bytes(rows, columns, 2)
        return Search(name, size, plans, lambda p: add_norm.forward(x, r, w, 1e-6, p, False))
    if name.startswith("layer"):
        size = ln.minimum_bytes(rows, columns, 2)
        return Search(name, size, plans, lambda p: ln.forward(x, w, b, 1e-5, p, False))
    return Search(
        name, rms.minimum_bytes(rows, columns, 2), plans, lambda p: rms.forward(x, w, 1e-6, p, False)
    )


def norm_backward(name: str) -> Search:
    rows, columns = shape_of(name)
    x, dy, dh, w = randn(rows, columns), randn(rows, columns), randn(rows, columns), randn(columns)
    mean, s = torch.zeros(rows, device="cuda"), torch.ones(rows, device="cuda")
    plans = walking_backward(columns)
    if name.startswith("add"):
        size = add_norm.minimum_backward_bytes(rows, columns, 2)
        return Search(name, size, plans, lambda p: rms.backward(x, w, s, dy, dh, plan=p))
    if name.startswith("layer"):
        size = ln.minimum_backward_bytes(rows, columns, 2)
        return Search(name, size, plans, lambda p: ln.backward(x, w, mean, s, dy, plan=p))
    size = rms.minimum_backward_bytes(rows, columns, 2)
    return Search(name, size, plans, lambda p: rms.backward(x, w, s, dy, plan=p))


def vector_add(name: str) -> Search:
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    n = (1 << 28) // dtype.itemsize
    x, y = randn(n, dtype=dtype), randn(n, dtype=dtype)
    size = add_file.minimum_bytes(n, dtype.itemsize)
    return Search(name, size, blocks(4, 32), lambda p: add_file.vector_add(x, y, plan=p))


def swiglu(name: str) -> Search:
    rows, columns = shape_of(name)
    gate, up = randn(rows, 2 * columns).chunk(2, -1)
    if "backward" not in name:
        size = swiglu_file.minimum_bytes(rows, columns, 2)
        return Search(name, size, blocks(8, 32), lambda p: swiglu_file.forward(gate, up, p, False))
    dout, grad = randn(rows, columns), randn(rows, 2 * columns)
    dgate, dup = grad.chunk(2, -1)
    size = swiglu_file.minimum_backward_bytes(rows, columns, 2)
    return Search(
        name, size, blocks(8, 32), lambda p: swiglu_file.backward(gate, up, dout, dgate, dup, p, False)
    )


def rope(name: str) -> Search:
    cos, sin = (torch.rand(4096, 64, device="cuda") for _ in range(2))
    if "BHSD" in name:
        x = randn(8, 32, 4096, 128)
        tiles = [(1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (4, 4), (4, 8), (4, 16), (8, 4)]
    else:
        x = randn(8, 4096, 32, 128).transpose(1, 2)
        tiles = [(8, 1), (16, 1), (32, 1), (8, 2), (16, 2), (32, 2)]
    plans = [
        Plan("fused", heads, tokens, warps)
        for (heads, tokens), warps in product(tiles, (2, 4, 8))
        if 4 <= heads * tokens * 64 // (32 * warps) <= 16
    ]
    return Search(
        name, rope_file.minimum_bytes(x.numel(), 2), plans,
        lambda p: rope_file.turn(x, cos, sin, None, p, backward=False, interpret=False),
    )  # fmt: skip


def cross_entropy(name: str) -> Search:
    rows, columns = shape_of(name)
    logits, target = randn(rows, columns), torch.randint(0, columns, (rows,), device="cuda")
    walks = [
        Plan("online", block=block, warps=warps)
        for block, warps in product((1024, 2048, 4096, 8192), (4, 8, 16))
        if 8 <= block // (32 * warps) <= 16
    ]
    if "backward" in name:
        lse, factor = torch.full((rows,), 12.0, device="cuda"), torch.ones(rows, device="cuda")
        size = ce.minimum_backward_bytes(rows, columns, 2)
        return Search(
            name, size, blocks(8, 32),
            lambda p: ce.gradient(logits, target, lse, factor, logits, -100, plan=p),
        )  # fmt: skip
    if "gradient" in name:
        loss = torch.empty(rows, device="cuda")
        size = 2 * ce.minimum_bytes(rows, columns, 2)
        return Search(name, size, ONLINE, lambda p: ce.losses_and_gradient(logits, target, loss, -100, p))
    size = ce.minimum_bytes(rows, columns, 2)
    return Search(name, size, walks, lambda p: ce.losses(logits, target, -100, p))


SOFTMAX = ("16384×8192", "131072×1024", "4096×32768", "2048×65536", "1024×131072", "512×262144")
NORMS = ("16384×8192", "32768×4096", "131072×1024", "4096×32768")
MAKERS: dict[str, Callable[[str], Search]] = {
    **{f"softmax {shape}": softmax for shape in SOFTMAX},
    "softmax again 16384×8192": softmax,
    **{f"softmax backward {shape}": softmax_backward for shape in (SOFTMAX[0], SOFTMAX[3])},
    **{f"{kind}_norm {shape}": norm for kind in ("rms", "layer", "add_rms") for shape in NORMS},
    **{f"{kind}_norm backward {shape}": norm_backward for kind in ("rms", "layer") for shape in NORMS},
    "add_rms_norm backward 16384×8192": norm_backward,
    "vector_add bf16": vector_add,
    "vector_add fp32": vector_add,
    "swiglu 8192×14336": swiglu,
    "swiglu backward 8192×14336": swiglu,
    "rope BHSD": rope,
    "rope BSHD": rope,
    "cross_entropy 4096×128256": cross_entropy,
    "cross_entropy backward in place 4096×128256": cross_entropy,
    "cross_entropy loss and gradient 4096×128256": cross_entropy,
}


def prepare(only: str) -> None:
    """Compile all plans into Triton's cache on disk, in several processes; what fails, fails again later."""
    command = [sys.executable, "-m", "llmcourse.bench.kernels", "--sweep", "--prepare", "--only"]

    def compile_in_a_process(name: str) -> None:
        subprocess.run([*command, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        list(pool.map(compile_in_a_process, (name for name in MAKERS if is_wanted(name, only))))


def compile_only(only: str) -> None:
    """What one of those processes does."""
    for search in searches(only):
        for plan in search.plans:
            _problem(search, plan)


def sweep(
    *, only: str = "", seconds: float = math.inf, best: int = 4, file: Path | None = None
) -> list[dict[str, Any]]:
    """Run the searches, print the best plans of each, and return all results, written after each search.

    only      parts of the searches' names, separated by commas
    seconds   begin no further search after this long
    """
    started = time.monotonic()
    prepare(only)
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    ceiling = copy_bandwidth("cuda")
    print(f"{torch.cuda.get_device_name()}: copy {ceiling / 1e9:.0f} GB/s", flush=True)
    results: list[dict[str, Any]] = []
    for search in searches(only):
        if time.monotonic() - started > seconds:
            print(f"stopped before {search.name}: {seconds:.0f} s are over")
            break
        found = try_plans(search, ceiling)
        results += found
        print(f"\n{search.name} ({len(search.plans)} plans, {time.monotonic() - started:.0f} s)")
        for row in sorted(found, key=lambda row: row["us"])[: best + 1]:
            shares = f"{row['of_copy']:6.1%} {row['of_same_copy']:6.1%}"
            print(f"  {row['us']:9.1f} µs  {shares}  {row['plan']}", flush=True)
        if file:
            file.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()
    return results


def try_plans(search: Search, ceiling: float) -> list[dict[str, Any]]:
    """Time the plans of one search that compile, in turns."""
    functions: dict[str, Function] = {}
    for plan in search.plans:
        if problem := _problem(search, plan):
            print(f"  {search.name}: {tuple(plan)} left out: {problem}")
        else:
            functions[repr(tuple(plan))] = partial(search.launch, plan)
    source = torch.empty(search.bytes // 2, dtype=torch.int8, device="cuda").random_(-9, 9)
    target = torch.empty_like(source)
    functions["copy of as many bytes"] = lambda: target.copy_(source)
    samples = measure(functions, device="cuda", graph=True, warmup=1)
    copied = samples["copy of as many bytes"].median
    return [
        {
            "search": search.name,
            "plan": name,
            "us": round(sample.median * 1e6, 2),
            "of_copy": round(sample.rate(search.bytes) / ceiling, 4),
            "of_same_copy": round(copied / sample.median, 4),
        }
        for name, sample in samples.items()
    ]


def _problem(search: Search, plan: Plan) -> str:
    """Compile and run once; the first line of what went wrong, or nothing."""
    try:
        search.launch(plan)
        torch.cuda.synchronize()
    except Exception as error:  # whatever Triton says: this plan is not for this GPU
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""
