"""Benchmark `sparse24`: 2:4 weights against dense ones, from one row of x to a long prompt.

    llmcourse bench sparse24 --device cuda --out llmcourse/bench/records
    python -m llmcourse.bench.sparse24 --sweep --out FOLDER         # the best plans first, then all

cublas        the dense weight in 16 bits, `torch.nn.functional.linear`
cusparselt    `torch.sparse.to_sparse_semi_structured` by NVIDIA's library; ours is compared with it too
cutlass       the same by CUTLASS's kernels, where PyTorch has them
select, expand    `kernels.sparse24`

Every result is compared with float64 first; who is wrong is not timed. Times by `bench.timing`: CUDA graphs
on all sides where a call takes under 50 µs, peers in turns. Calls go to several layers one after another, as
in a model, packed larger together than twice the L2 cache. GB/s are the bytes that this peer must move;
of_copy is their share of a large copy's bandwidth in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcourse.bench.quant_cases import in_turn
from llmcourse.bench.timing import measure
from llmcourse.kernels.launch import ceil_div
from llmcourse.kernels.sparse24 import Sparse24, SparsePlan, mask24, minimum_bytes, pack24, sparse24_linear
from llmcourse.kernels.sparse24_plan import candidates

Row = dict[str, Any]
Plans = dict[tuple[int, int, int], SparsePlan]
SHAPES = ((14336, 4096), (4096, 4096), (4096, 14336))  # W [N, K] of an 8B model's layers
DECODE, PREFILL = (1, 2, 4, 8, 16, 32, 64), (512, 2048, 8192)
GOOD_ENOUGH = 0.01
NOTES = [
    "bfloat16, random weights pruned 2:4 by magnitude; error is ‖y − exact‖ / ‖exact‖ against float64",
    "us: median of a call, which found nothing of its layer in the L2 cache; CUDA graphs for all peers of a "
    "case, or for none",
    "bytes: those that this peer must move; times_dense: dense time over this time, above 1 is faster",
]


def weights(n: int, k: int, device: str) -> tuple[Tensor, Sparse24]:
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    w = w * mask24(w)
    return w, pack24(w)


def libraries(w: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """NVIDIA's and CUTLASS's 2:4 products as functions of x, as far as this PyTorch has them."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, kind in {
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": SparseSemiStructuredTensorCUTLASS,
    }.items():
        try:
            sparse = kind.from_dense(w)
        except Exception as error:
            print(f"        {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        found[name] = partial(_times, sparse)
    return found


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def error_of(y: Tensor, x: Tensor, w: Tensor) -> float:
    """Against float64, on 256 of the outputs and 64 of the rows."""
    some = torch.randperm(w.shape[0], device=w.device)[:256]
    exact = x[:64].double() @ w[some].double().T
    return float((y[:64, some].double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Layer:
    """A weight [N, K], packed by this package, and as the libraries take it."""

    w: Tensor
    packed: Sparse24
    others: dict[str, Callable[[Tensor], Tensor]]

    @classmethod
    def of(cls, n: int, k: int) -> Layer:
        w, packed = weights(n, k, "cuda")
        return cls(w, packed, libraries(w))

    def products(self, x: Tensor, plan: SparsePlan | None) -> dict[str, Callable[[], Tensor]]:
        """Everybody's way to x times this weight."""
        found: dict[str, Callable[[], Tensor]] = {
            "cublas": partial(torch.nn.functional.linear, x, self.w),
            **{name: partial(f, x) for name, f in self.others.items()},
        }
        if x.shape[0] <= 64:
            found["ours"] = partial(sparse24_linear, x, self.packed, plan=plan)
        return found


def case_rows(m: int, layers: Sequence[Layer], ceiling: float, plans: Plans) -> list[Row]:
    """A row for each peer at M rows of x, which go through the layers in turn."""
    w = layers[0].w
    (n, k), x = w.shape, torch.randn(m, w.shape[1], device=w.device, dtype=w.dtype)
    everybody = in_turn([layer.products(x, plans.get((m, n, k))) for layer in layers], 8)
    dense_bytes = (n * k + m * (n + k)) * x.itemsize
    kept, rows = {}, []
    for name, calls in everybody.items():
        try:
            error = error_of(calls[0](), x, w)
            torch.cuda.synchronize()
        except Exception as e:
            rows.append(
                {"n": n, "k": k, "m": m, "who": name, "unavailable": f"{type(e).__name__}: {e}"[:200]}
            )
            continue
        if error < GOOD_ENOUGH:
            kept[name] = calls, error
        else:
            rows.append({"n": n, "k": k, "m": m, "who": name, "unavailable": f"off by {error:.3g}"})
    samples = _measured({name: f for name, (f, _) in kept.items()}, rows, (m, n, k))
    for name, sample in samples.items():
        moved = dense_bytes if name == "cublas" else minimum_bytes(m, n, k, x.itemsize)
        row: Row = {
            "n": n,
            "k": k,
            "m": m,
            "who": name,
            "us": sample.median * 1e6,
            "us_p10": sample.low * 1e6,
            "us_p90": sample.high * 1e6,
            "graph": sample.graph,
            "bytes": moved,
            "gb_per_s": sample.rate(moved) / 1e9,
            "of_copy": sample.rate(moved) / ceiling,
            "tflops_dense": sample.rate(2 * m * n * k) / 1e12,
            "times_dense": samples["cublas"].median / sample.median,
            "error": kept[name][1],
        }
        if name == "ours":
            from llmcourse.kernels.sparse24 import _plan

            row["plan"] = str(plans.get((m, n, k)) or _plan(m, n, k, x, "triton"))
        rows.append(row)
    return rows


def _measured(
    functions: Mapping[str, Sequence[Callable[[], Tensor]]], rows: list[Row], case: tuple[int, int, int]
) -> Any:
    """Samples by name; a library whose call cannot be captured is left out, and said to be."""
    m, n, k = case
    try:
        return measure(functions, device="cuda", repeats=30)
    except Exception as error:
        print(f"        no graph of all peers: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()
    fine = {}
    for name, function in functions.items():
        try:
            measure({name: function}, device="cuda", graph=True)
            fine[name] = function
        except Exception as error:
            rows.append({"n": n, "k": k, "m": m, "who": name, "unavailable": f"no graph: {error}"[:200]})
            torch.cuda.synchronize()
    return measure(fine, device="cuda", repeats=30)


SWEPT = (1, 2, 4, 16, 64)


def prepare(workers: int = 14) -> None:
    """Compile what the sweep tries, in parallel processes: Triton's cache is on disk."""
    import multiprocessing

    started = time.monotonic()
    plans = {(m, plan) for n, k in SHAPES for m in SWEPT for plan in candidates(m, n, k)}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        failed = sum(pool.starmap(_compile, sorted(plans, key=str), chunksize=4))
    print(f"{len(plans)} plans compiled, {failed} not, in {time.monotonic() - started:.0f} s", flush=True)


def _compile(m: int, plan: SparsePlan) -> bool:
    """Whether this plan fails; sizes that are multiples of 16, as all of the sweep's are."""
    try:
        _, packed = weights(256, 4096, "cuda")
        sparse24_linear(torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16), packed, plan=plan)
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def sweep(seconds: float = 200, shapes: tuple[tuple[int, int], ...] = SHAPES) -> tuple[Plans, list[Row]]:
    """The fastest plan of each decode shape, and the five fastest of each as rows.

    Every candidate is checked against the reference, timed in a graph, and dropped when it is wrong.
    """
    started, best, rows = time.monotonic(), {}, []
    cases = [(n, k, m) for n, k in shapes for m in SWEPT]
    for i, (n, k, m) in enumerate(cases):
        w, packed = weights(n, k, "cuda")
        x = torch.randn(m, k, device="cuda", dtype=w.dtype)
        share = (seconds - (time.monotonic() - started)) / (len(cases) - i)
        until, found = time.monotonic() + share, []
        plans = list(candidates(m, n, k, torch.cuda.get_device_properties(0).multi_processor_count))
        order = torch.randperm(len(plans), generator=torch.Generator().manual_seed(0)).tolist()
        for at in order:
            if time.monotonic() > until:
                break
            plan = plans[at]
            try:
                run_it = partial(sparse24_linear, x, packed, plan=plan)
                if error_of(run_it(), x, w) < GOOD_ENOUGH:
                    found.append((measure({"it": run_it}, device="cuda", graph=True)["it"].median, plan))
            except Exception:  # too much shared memory, or too many registers
                continue
        found.sort(key=lambda pair: pair[0])
        if found:
            best[m, n, k] = found[0][1]
        print(f"{time.monotonic() - started:4.0f} s  {m} × {n} × {k}: {len(found)} plans", end="", flush=True)
        print(f", {found[0][0] * 1e6:.1f} µs {found[0][1]}" if found else "", flush=True)
        for s, plan in found[:5]:
            rows.append({"kind": "sweep", "m": m, "n": n, "k": k, "us": s * 1e6, "plan": list(plan)})
    return best, rows


def rows_of(plans: Plans, seconds: float = math.inf) -> list[Row]:
    from llmcourse.bench.ceilings import copy_bandwidth

    torch.manual_seed(0)
    started, ceiling = time.monotonic(), copy_bandwidth("cuda")
    rows: list[Row] = [{"who": "ceiling: copy", "gb_per_s": ceiling / 1e9}]
    for n, k in SHAPES:
        first = Layer.of(n, k)
        fill = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        layers = [first, *(Layer.of(n, k) for _ in range(ceil_div(fill, first.packed.nbytes)))]
        for m in (*DECODE, *PREFILL):
            if time.monotonic() - started > seconds:
                return rows
            found = case_rows(m, layers, ceiling, plans)
            rows += found
            said = ", ".join(f"{r['who']} {r['us']:.1f}" if "us" in r else f"{r['who']} –" for r in found)
            print(f"{time.monotonic() - started:4.0f} s  {m} × {n} × {k}: {said} µs", flush=True)
    return rows


def run(device: str) -> tuple[list[Row], list[str]]:
    """All shapes on a GPU; on a CPU the bytes that the two kernels ask for, counted on a small shape."""
    if device == "cuda":
        return rows_of({}), NOTES
    from llmcourse.kernels.counters import counting

    torch.manual_seed(0)
    rows: list[Row] = []
    w, packed = weights(64, 256, "cpu")
    for m, plan in ((1, SparsePlan("select", 16, 64)), (16, SparsePlan("expand", 16, 64, 16))):
        x = torch.randn(m, 256, dtype=torch.bfloat16)
        with counting() as counts:
            y = sparse24_linear(x, packed, plan=plan)
        rows.append(
            {
                "who": plan.kernel,
                "m": m,
                "n": 64,
                "k": 256,
                "weight_bytes": packed.nbytes,
                "dense_bytes": w.nbytes,
                "bytes": counts.bytes,
                "unique_bytes": counts.unique_bytes,
                "least": minimum_bytes(m, 64, 256, 2),
                "error": error_of(y, x, w),
            }
        )
    return rows, ["bytes counted in Triton's interpreter; no times without a GPU"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmcourse.bench.sparse24")
    parser.add_argument("--sweep", action="store_true", help="find the best plans first, and use them")
    parser.add_argument("--seconds", type=float, default=200, help="of the sweep")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--out", type=Path, help="folder for the record, and for sparse24_sweep.json")
    options = parser.parse_args(arguments)
    from llmcourse.bench.records import new_record, save

    plans: Plans = {}
    if options.sweep:
        prepare(options.workers)
        plans, found = sweep(options.seconds)
        if options.out:
            (options.out / "sparse24_sweep.json").write_text(json.dumps(found, indent=1))
    rows = rows_of(plans)
    if options.out:
        print("written:", save(new_record("sparse24", "cuda", rows, NOTES), options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
