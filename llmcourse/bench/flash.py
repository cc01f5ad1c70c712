"""Benchmark `flash`: our FlashAttention beside FlashAttention-2, cuDNN, flex_attention and the ceiling.

    llmcourse bench flash --device cuda --out llmcourse/bench/records
    python -m llmcourse.bench.flash --prepare                          # compile what flex_attention needs
    python -m llmcourse.bench.flash --only forward,gqa --out FOLDER    # some groups, into the same record

Every result is compared with float64 before it is timed; who is wrong is not timed. Peers take turns, L2 is
swept before every call. TFLOP/s count visible pairs only, 4·D FLOPs each forward and 10·D backward, for all
alike. The ceilings stand beside: `attention_ceiling.predict` with the matmul rate and copy bandwidth measured
in the same run, with products and exponentials one after the other, and side by side.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmcourse.bench.flash_cases import (
    LENGTHS,
    Case,
    Chosen,
    Inputs,
    call,
    cases,
    error_of,
    exact,
    ours,
    peers,
    plain,
)
from llmcourse.bench.flash_sweep import best_of
from llmcourse.bench.records import FOLDER, Record, all_records, describe_device, new_record, save
from llmcourse.bench.timing import measure
from llmcourse.errors import DeviceError
from llmcourse.kernels.attention_ceiling import GENERATIONS, Rates, predict, rates

GROUPS = ("forward", "backward", "gqa", "small", "window", "varlen", "memory")
GOOD_ENOUGH = 0.03  # of bf16
AHEAD = 10  # sweeps before a call, in which the host gets ahead: launching ours takes about 0.2 ms of it
NOTES = [
    "about 16,384 tokens a batch, 2,048 columns; bf16; random data; L2 swept before a call; peers in turns",
    "tflops: FLOPs of visible pairs (4·D forward, 10·D backward) over the median; backward by autograd.grad",
    "times_ours: this time over our fastest rung's of the same case; below 1 is faster than ours",
    "ceiling_tflops: attention_ceiling.predict with this run's matmul rate, products beside exponentials, "
    "backward in one kernel of five products",
    "no_overlap_tflops: products and exponentials one after the other, backward in two kernels of seven",
    "error: ‖out − exact‖ / ‖exact‖ against float64, forward of the worst query, backward of the worst "
    "gradient; of one key head of the first sequence",
    "peak_bytes: memory beyond the inputs that a call holds at its worst",
]


def measured_rates(device: str) -> Rates:
    """This GPU's published rates with the matmul rate and copy bandwidth of this run."""
    from llmcourse.bench.ceilings import copy_bandwidth, matmul_rate

    name = describe_device(device)["name"]
    return rates(name, "bf16", matmul=matmul_rate(device, torch.bfloat16), copy=copy_bandwidth(device))


def ceilings_of(case: Case, r: Rates | None) -> dict[str, float]:
    """The two ceilings of a case in TFLOP/s; none where the model says nothing (windows, packed)."""
    if r is None or case.window or case.lengths:
        return {}

    def top(generation: str) -> float:
        found = predict(
            r,
            GENERATIONS[generation],
            batch=case.batch,
            heads=case.heads,
            queries=case.length,
            keys=case.length,
            head_dim=case.head_dim,
            causal=case.causal,
            backward=case.backward,
        )
        return found.flops_per_s / 1e12

    best = "one kernel" if case.backward else "overlapped"
    return {"ceiling_tflops": top(best), "no_overlap_tflops": top("wgmma")}


def measure_case(
    case: Case,
    device: str,
    r: Rates | None = None,
    *,
    flex: bool = True,
    timed: bool = True,
    chosen: Chosen | None = None,
    without: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """A row for everybody but `without`: time, rate and error, or why there is none.

    Raises   DeviceError if none of our rungs is right: then something is broken, and no figure is worth it.
    """
    x = Inputs.of(case, device)
    interpret = device != "cuda"
    right = exact(case, x)
    head: dict[str, Any] = {
        "group": case.group,
        "case": case.name,
        "batch": case.batch,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "length": case.length,
        "head_dim": case.head_dim,
        "causal": case.causal,
        "window": case.window,
        "direction": "backward" if case.backward else "forward",
        **ceilings_of(case, r),
    }
    functions, errors, reasons = {}, {}, {}
    own = ours(case, x, interpret=interpret, chosen=chosen)
    try:
        others = peers(case, x, flex=flex)
    except Exception as e:
        others, reasons["peers"] = {}, _short(e)
    for name, peer in {**{name: peer for name, (peer, _) in own.items()}, **others}.items():
        if any(word in name for word in without):
            continue
        try:
            function = call(case, x, peer)
            error = error_of(case, x, function(), right)
        except Exception as e:  # a peer may lack a kernel for these sizes, or the machine memory
            reasons[name] = _short(e)
            continue
        if error < GOOD_ENOUGH:
            functions[name], errors[name] = function, error
        else:
            reasons[name] = f"wrong: off by {error:.3g} of the exact result"
    del right
    if not any(name.startswith("ours") for name in functions):
        raise DeviceError(
            f"no rung of ours is right for {case.name}: {reasons}.",
            "What computes something else must not be timed.",
            "`pytest tests/gpu`, which finds the smallest shape that fails.",
        )
    rows = [{**head, "who": name, "unavailable": reason} for name, reason in reasons.items()]
    if not timed:
        return rows + [{**head, "who": name, "error": errors[name]} for name in functions]
    # No CUDA graphs: autograd cannot be captured.
    samples = measure(functions, device=device, graph=False, sweeps=AHEAD)
    best = min(s.median for name, s in samples.items() if name.startswith("ours"))
    for name, sample in samples.items():
        row: dict[str, Any] = {
            **head,
            "who": name,
            "us": sample.median * 1e6,
            "us_p10": sample.low * 1e6,
            "us_p90": sample.high * 1e6,
            "tflops": sample.rate(case.flops) / 1e12,
            "times_ours": sample.median / best,
            "error": errors[name],
        }
        if name in own:
            row["plan"] = own[name][1]
        if "ceiling_tflops" in head:
            row["of_ceiling"] = row["tflops"] / head["ceiling_tflops"]
            row["of_no_overlap"] = row["tflops"] / head["no_overlap_tflops"]
        rows.append(row)
    return rows


def memory_rows(
    device: str, lengths: tuple[int, ...] = LENGTHS, *, without: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Memory that naive attention and ours hold beyond their inputs, 8 heads of 64, forward and backward."""
    from llmcourse.bench.kernels import peak_bytes

    rows = []
    for length in lengths:
        for backward in (False, True):
            case = Case("memory", 1, 8, 8, length, 64, True, backward=backward)
            x = Inputs.of(case, device)
            everybody = {"naive": (plain, ""), **ours(case, x, interpret=device != "cuda")}
            for name, (peer, _) in everybody.items():
                if any(word in name for word in without):
                    continue
                row = {"group": "memory", "case": case.name, "who": name, "length": length, "head_dim": 64}
                row["direction"] = "forward and backward" if backward else "forward"

                def both(peer: Any = peer, x: Inputs = x, backward: bool = backward) -> Any:
                    o = peer(x.q, x.k, x.v)
                    return torch.autograd.grad(o, (x.q, x.k, x.v), x.do) if backward else o

                try:
                    row["peak_bytes"] = peak_bytes(both) if device == "cuda" else None
                    if device != "cuda":
                        both()
                except Exception as e:
                    row["unavailable"] = _short(e)
                rows.append(row)
            del x, everybody
    return rows


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


def rows_of(
    device: str,
    groups: tuple[str, ...] = GROUPS,
    *,
    seconds: float = math.inf,
    flex: bool = True,
    chosen: Chosen | None = None,
    without: tuple[str, ...] = (),
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one case after another; the last ones are left out when the time is up."""
    started = time.monotonic()
    torch.manual_seed(0)
    r = measured_rates(device)
    yield [
        {"group": "ceiling", "who": "torch.mm 8192³", "tflops": r.matmul / 1e12},
        {"group": "ceiling", "who": "copy", "gb_per_s": r.copy / 1e9},
        {"group": "ceiling", "who": "exponentials, published", "per_s": r.exponentials},
    ]
    if "memory" in groups:
        yield memory_rows(device, without=without)
    for case in cases():
        if case.group not in groups:
            continue
        spent = time.monotonic() - started
        if spent > seconds:
            yield [{"group": case.group, "case": case.name, "who": "all", "unavailable": "no time was left"}]
            continue
        rows = measure_case(case, device, r, flex=flex, chosen=chosen, without=without)
        found = ", ".join(
            f"{row['who'].removeprefix('ours: ')} {row['tflops']:.0f}"
            if "tflops" in row
            else f"{row['who']} –"
            for row in rows
        )
        print(f"{time.monotonic() - started:4.0f} s  {case.name}: {found}", flush=True)
        for row in rows:
            if "unavailable" in row:
                print(f"        {row['who']}: {row['unavailable']}", flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
        yield rows


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All groups on a GPU; on a CPU small sizes through the interpreters, errors and no times."""
    if device == "cuda":
        return [row for rows in rows_of(device) for row in rows], NOTES
    torch.manual_seed(0)
    small: list[dict[str, Any]] = []
    for case in cases(tokens=96, lengths=(32, 80)):
        small += measure_case(case, device, timed=False)
    return small, ["small sizes in Triton's interpreter and by threads; errors, and no times without a GPU"]


def merged(rows: list[dict[str, Any]], groups: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """Rows of this run, and of the record in `folder` on this GPU those of groups that this run had not."""
    name = describe_device("cuda")["name"]
    for record in all_records(folder):
        if record.name == "flash" and record.device["name"] == name:
            kept = [row for row in record.results if row["group"] not in (*groups, "ceiling")]
            return rows + kept
    return rows


def prepare(workers: int) -> None:
    """Compile flex_attention for all cases in parallel processes: its cache is on disk."""
    import multiprocessing

    started = time.monotonic()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are this pool's
    wanted = [i for i, case in enumerate(cases()) if case.group != "varlen"]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        for i, reason in pool.imap_unordered(_compile_flex, wanted):
            if reason:
                print(f"case {i}: {reason}", flush=True)
    print(f"{len(wanted)} cases compiled in {time.monotonic() - started:.0f} s", flush=True)


def _compile_flex(i: int) -> tuple[int, str]:
    from llmcourse.bench.flash_cases import flex_peer

    case = list(cases())[i]
    try:
        x = Inputs.of(case, "cuda")
        call(case, x, flex_peer(case, x))()
        torch.cuda.synchronize()
    except Exception as e:
        return i, _short(e)
    return i, ""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmcourse.bench.flash")
    parser.add_argument("--only", default="", help=f"groups, of {', '.join(GROUPS)}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--without", default="", help="leave out whose name has one of these words: hopper")
    parser.add_argument("--no-flex", action="store_true", help="without flex_attention, which compiles long")
    parser.add_argument(
        "--prepare", action="store_true", help="compile flex_attention for all cases, no more"
    )
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--sweep", type=Path, help="a record of flash_sweep: take its best plans for ours")
    parser.add_argument("--out", type=Path, default=None, help=f"folder of the record, such as {FOLDER.name}")
    options = parser.parse_args(arguments)
    if options.prepare:
        prepare(options.workers)
        return
    groups = tuple(g for g in GROUPS if not options.only or g in options.only.split(","))
    rows: list[dict[str, Any]] = []
    chosen = best_of(options.sweep) if options.sweep else None
    without = tuple(word for word in options.without.split(",") if word)
    for some in rows_of(
        "cuda", groups, seconds=options.seconds, flex=not options.no_flex, chosen=chosen, without=without
    ):
        rows += some
        if options.out:  # after every case, so that a machine that goes away takes little with it
            record: Record = new_record("flash", "cuda", merged(rows, groups, options.out), NOTES)
            save(record, options.out)
    print(f"{len(rows)} rows", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
