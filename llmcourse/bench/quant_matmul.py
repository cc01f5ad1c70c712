"""Benchmark `quant_matmul`: products with 4- and 8-bit weights beside PyTorch's kernels and bfloat16.

Batch 1 to 64 are decoding steps, where the weights' bytes take the time; beyond, multiplying does, and at
some batch bfloat16 catches up: that *crossover* is a row of its own. Every result is compared with float64
before it is timed. Calls on several copies of the weights, larger together than twice the L2 cache, follow
one another in a CUDA graph, as the layers of a model do: what is reported is the time of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from llmcourse.bench.quant_cases import (
    GROUP,
    SHAPES,
    Function,
    Weights,
    copies_for,
    error_of,
    in_turn,
    ours,
    peers,
    weights,
)
from llmcourse.bench.timing import measure
from llmcourse.errors import DeviceError
from llmcourse.kernels.quant_matmul import chosen_for, quant_matmul

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FORMATS: tuple[tuple[int, int | None], ...] = ((4, GROUP), (4, 64), (8, None), (8, GROUP))
ALLOWED = {"exact": 6e-3, "int8": 2.5e-2, "fp8": 6e-2}
"""Relative errors: of rounding the result alone, and of rounding the activations to int8 or e4m3 too."""


def allowed(name: str) -> float:
    if "fp8" in name or "_scaled_mm" in name:
        return ALLOWED["fp8"]
    return ALLOWED["int8"] if "int8_matmul" in name or "_int_mm" in name else ALLOWED["exact"]


def compare(m: int, n: int, k: int, copies: Sequence[Weights]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each kernel of x [m, k] times copies of such weights, and the peers left out."""
    x, w = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), copies[0]
    found, missing = peers(x, w)
    sets: list[dict[str, Function]] = [{**peers(x, c)[0], **ours(x, c)} for c in copies]
    functions = in_turn(sets)
    errors = {name: error_of(calls[0](), x, w) for name, calls in functions.items()}
    for name, error in errors.items():
        if not error <= allowed(name):
            if name in found:  # somebody else's layout misunderstood, or their bug: not ours to time
                del functions[name]
                missing[name] = f"off by {error:.3g} of the norm"
                continue
            raise DeviceError(
                f"{name} is off by {error:.3g} of the norm ({w.name}, {m}×{n}×{k}).",
                "A product that is wrong must not be timed.",
                "`pytest tests/gpu/test_quant_matmul_cuda.py`, which finds the smallest shape that fails.",
            )
    samples = measure(functions, device="cuda", graph=True, warmup=1)
    bf16 = samples["bf16 torch.matmul"].median
    rung = chosen_for(x, n, w.bits, w.group or k).rung
    rows = []
    for name, sample in samples.items():
        moved = n * k * 2 if name.startswith("bf16") else w.moved
        rows.append(
            {
                "name": f"{w.name} {m}×{n}×{k}: {name}",
                "format": w.name,
                "m": m,
                "n": n,
                "k": k,
                "kernel": name,
                "rung": rung if name == "quant_matmul" else "",
                "us": sample.median * 1e6,
                "us_p10": sample.low * 1e6,
                "us_p90": sample.high * 1e6,
                "gbytes_per_s": (moved + 2 * m * (n + k)) / sample.median / 1e9,
                "ratio_to_bf16": bf16 / sample.median,
                "error": errors[name],
            }
        )
    return rows, missing


def crossover(rows: Sequence[dict[str, Any]], kernel: str = "quant_matmul") -> list[dict[str, Any]]:
    """For each format and shape: the largest batch at which the kernel was still faster than bfloat16."""
    found = []
    for format_, n, k in dict.fromkeys((r["format"], r["n"], r["k"]) for r in rows):
        own = [r for r in rows if (r["format"], r["n"], r["k"], r["kernel"]) == (format_, n, k, kernel)]
        slower = sorted(r["m"] for r in own if r["ratio_to_bf16"] < 1)
        until = [r["m"] for r in own if not slower or r["m"] < slower[0]]
        found.append(
            {
                "name": f"{format_} {n}×{k}: crossover",
                "format": format_,
                "n": n,
                "k": k,
                "kernel": kernel,
                "faster_to_batch": max(until, default=0),
                "slower_from_batch": slower[0] if slower else None,
            }
        )
    return found


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of every batch, format and shape; on a CPU of the reference alone."""
    if device != "cuda":
        return _on_cpu()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for n, k in SHAPES:
        for bits, group in FORMATS:
            copies = [weights(n, k, bits, group) for _ in range(copies_for(n, k, bits))]
            w = copies[0]
            for m in BATCHES:
                some, left_out = compare(m, n, k, copies)
                rows += some
                missing |= {f"{name} at {w.name}, batch {m}": why for name, why in left_out.items()}
            del w, copies
            torch.cuda.empty_cache()
    notes = [
        "bf16 activations, CUDA graphs of calls on copies of the weights (cold L2), peers take turns",
        "gbytes_per_s counts codes and scales (bf16: the weights) once, activations and results once",
        "ratio_to_bf16 is cuBLAS's time over this kernel's; error: ‖out − exact‖ / ‖exact‖ in float64",
        "'rows quantized first': the time of making int8 or fp8 of the activations is in it",
    ]
    notes += [f"left out: {name}: {why}" for name, why in missing.items()]
    return rows + crossover(rows), notes


def _on_cpu() -> tuple[list[dict[str, Any]], list[str]]:
    n, k = 1536, 576
    rows: list[dict[str, Any]] = []
    for bits, group in ((4, 64), (8, None)):
        w, x = weights(n, k, bits, group, "cpu"), torch.randn(1, k)
        call = partial(quant_matmul, x, w.packed, w.scale, None, w.bits, w.group)
        sample = measure({"reference": call})["reference"]
        rows.append({"name": f"{w.name} 1×{n}×{k}: reference", "us": sample.median * 1e6})
    return rows, ["a CPU runs the reference, which unpacks before it multiplies"]
