"""Benchmark `kernels`: the memory-bound kernels beside torch, torch.compile and a copy of the same bytes.

    llmcourse bench kernels --device cuda --out llmcourse/bench/records
    python -m llmcourse.bench.kernels --only softmax          # some of them, printed only

Every function is compared with float64 before it is timed. Times follow `bench.timing`: peers take turns, L2
swept, CUDA graphs on all sides; a backward pass runs under autograd, which cannot be captured, and is queued
behind enough work that the host stays ahead. GB/s are the bytes that the kernel *must* move over its time;
`of_copy` is that over the bandwidth of a large copy measured in the same run, `of_same_copy` over that of a
copy that moves as many bytes as the kernel, measured in turn with it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcourse.bench.ceilings import copy_bandwidth
from llmcourse.bench.kernel_cases import Case, Function, cases
from llmcourse.bench.timing import measure
from llmcourse.errors import DeviceError

AHEAD = 10  # sweeps before a call that cannot be captured: about 0.8 ms for the host
GOOD_ENOUGH = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def worst_error(result: Any, exact: tuple[Tensor, ...]) -> float:
    """Largest ‖out − ref‖ / ‖ref‖ over the tensors, NaN if any is."""
    outs = result if isinstance(result, tuple) else (result,)
    errors = [
        float((out.detach().double() - ref.detach()).norm() / ref.detach().norm())
        for out, ref in zip(outs, exact, strict=False)
    ]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def errors_of(case: Case) -> dict[str, float]:
    """The error of every function that returns something; ours must be small."""
    exact = case.exact()
    errors = {}
    for name, function in case.functions.items():
        result = function()
        if result is not None:
            errors[name] = worst_error(result, exact)
        del result
    if not errors["ours"] <= GOOD_ENOUGH[case.dtype]:
        raise DeviceError(
            f"{case.kernel} {case.direction} {case.shape} is off by {errors['ours']:.3g} from float64.",
            "A kernel that computes something else must not be timed.",
            "tests/gpu/test_kernels_cuda.py, which finds the smallest shape that fails.",
        )
    return errors


def peak_bytes(function: Function) -> int:
    """Memory that a call holds at its worst, beyond what was there before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_case(case: Case, ceiling: float) -> list[dict[str, Any]]:
    """A row for each function, the copy of the same bytes among them."""
    errors = errors_of(case)
    source = torch.empty(case.bytes // 2, dtype=torch.int8, device="cuda").random_(-9, 9)
    target = torch.empty_like(source)
    functions = {**case.functions, "copy of as many bytes": lambda: target.copy_(source)}
    samples = measure(functions, device="cuda", graph=case.graph, sweeps=1 if case.graph else AHEAD, warmup=2)
    copied = samples["copy of as many bytes"].median
    flops = case.notes.get("flops")
    rows = []
    for name, sample in samples.items():
        row = {
            "name": f"{case.kernel} {case.direction}",
            "who": name,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "bytes": case.bytes,
            "us": round(sample.median * 1e6, 2),
            "us_p10": round(sample.low * 1e6, 2),
            "us_p90": round(sample.high * 1e6, 2),
            "gb_per_s": round(sample.rate(case.bytes) / 1e9, 1),
            "of_copy": round(sample.rate(case.bytes) / ceiling, 4),
            "of_same_copy": round(copied / sample.median, 4),
            "times_ours": round(sample.median / samples["ours"].median, 3),
            "error": errors.get(name),
            "graph": sample.graph,
        }
        if flops:
            row["tflop_per_s"] = round(sample.rate(flops) / 1e12, 1)
        if case.notes.get("memory") and name in case.functions:
            row["peak_bytes"] = peak_bytes(case.functions[name])
        if "rung" in case.notes and name == "ours":
            row["rung"] = case.notes["rung"]
        rows.append(row)
    return rows


def run(device: str, *, only: str = "", seconds: float = math.inf) -> tuple[list[dict[str, Any]], list[str]]:
    """Benchmark `kernels` on a GPU; on a CPU, what the kernels move, counted.

    only      cases whose name contains this
    seconds   begin no further case after this long
    """
    if device != "cuda":
        from llmcourse.bench.kernel_traffic import rows

        return rows(), ["bytes counted in Triton's interpreter on small shapes; no times without a GPU"]
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.monotonic()
    ceiling = copy_bandwidth("cuda")
    found: list[dict[str, Any]] = [{"name": "ceiling: copy", "who": "torch", "gb_per_s": ceiling / 1e9}]
    for case in cases(only):
        found += measure_case(case, ceiling)
        print(f"{time.monotonic() - started:4.0f} s  {case.kernel} {case.direction} {case.shape}", flush=True)
        del case
        torch.compiler.reset()
        torch.cuda.empty_cache()
        if time.monotonic() - started > seconds:
            break
    found.append(
        {"name": "ceiling: copy, at the end", "who": "torch", "gb_per_s": copy_bandwidth("cuda") / 1e9}
    )
    return found, [
        "random data; bytes are those that must be moved, each tensor once",
        "forward passes in CUDA graphs, backward passes and steps under autograd with the host ahead",
        "of_copy: of a large copy in the same run; of_same_copy: of a copy of as many bytes, in turn",
        "error: ‖out − ref‖ / ‖ref‖ against float64, the worst output",
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmcourse.bench.kernels")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--sweep", action="store_true", help="try launch plans instead of peers")
    parser.add_argument("--prepare", action="store_true", help="with --sweep: compile only")
    parser.add_argument("--out", type=Path, help="folder for the record, or for kernel_sweep.json")
    args = parser.parse_args(arguments)
    from llmcourse.bench import new_record, save, text_of

    if args.sweep:
        from llmcourse.bench.kernel_sweep import compile_only, sweep

        if args.prepare:
            compile_only(args.only)
            return
        sweep(only=args.only, seconds=args.seconds, file=args.out / "kernel_sweep.json" if args.out else None)
        return
    rows, notes = run("cuda", only=args.only, seconds=args.seconds)
    shown = (
        "name",
        "who",
        "shape",
        "dtype",
        "us",
        "gb_per_s",
        "of_copy",
        "of_same_copy",
        "error",
        "peak_bytes",
    )
    print(text_of([{key: row.get(key) for key in shown} for row in rows]))
    if args.out:
        print("written:", save(new_record("kernels", "cuda", rows, notes), args.out))


if __name__ == "__main__":
    main(sys.argv[1:])
