"""Benchmark `cocktail`: fine-tuning a character GPT over a slow network, by what its workers send.

    llmcourse bench cocktail --device cpu --out llmcourse/bench/records

loss    a GPT of 86,592 weights that has read some Shakespeare is trained on by 2 workers (with one seed also
        by 4): nats a character on unseen text at the end, beside those with every gradient sent
time    a step of a GPT of 2.6 million weights on emulated links: what the workers send takes as long as it
        would on a link of that speed, and is sent while they compute

The ways are all gradients in float32, all in float16, the 2 % of all moves that are largest (float32, error
feedback), and CocktailSGD at the paper's setting: of a random tenth the fifth that moved most, in 4 bits.
Workers are processes: on CPUs through gloo, on GPUs through NCCL.
"""

from __future__ import annotations

import os
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from llmcourse.errors import DeviceError
from llmcourse.train.parallel.compress import PAPER, Cocktail
from llmcourse.train.parallel.fine_tune import Task, Weights, fine_tune, pretrain
from llmcourse.train.parallel.launch import run_workers
from llmcourse.train.parallel.link import Link, StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llmcourse.bench.records import Record

Row = dict[str, Any]
DENSE = "all gradients, float32"
WAYS: dict[str, Cocktail | torch.dtype | None] = {
    DENSE: None,
    "all gradients, float16": torch.float16,
    "top 2 %": Cocktail(random=1.0, top=0.02, bits=32),
    "cocktail": PAPER,
}
SEEDS = (0, 1, 2)
LINKS = (None, Link(500), Link(100))
LOSS = Task()
PRETRAINED = 200  # steps
TIME = Task(width=256, layers=4, batch=2, steps=6, tested=0)
ROUNDS = 3
LIMIT = 300.0


def run(device: str) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them. Raises DeviceError with one GPU only."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        raise DeviceError(
            f"this machine has {torch.cuda.device_count()} GPU.",
            "Workers send to each other, and NCCL wants a GPU for each.",
            "a machine with two, or --device cpu.",
        )
    backend, load = "nccl" if device == "cuda" else "gloo", os.getloadavg()[0]
    most = 4 if device == "cpu" or torch.cuda.device_count() >= 4 else 2
    rows = [row for seed in SEEDS for row in losses(seed, 2, WAYS, backend=backend)]
    if most > 2:
        few = {name: WAYS[name] for name in (DENSE, "cocktail")}
        rows += losses(SEEDS[0], most, few, backend=backend)
    rows += times(backend=backend)
    notes = [
        f"Worker processes of one machine through {backend}"
        + (", each on one thread." if device == "cpu" else ", each with a GPU."),
        f"loss: {PRETRAINED} steps in one process, then {LOSS.steps} on all workers, each with batches of "
        f"{LOSS.batch} × {LOSS.length} characters; held_out in nats a character, above_dense in percent.",
        f"time: {TIME.layers} layers of width {TIME.width}, batches of {TIME.batch} × {TIME.length} tokens; "
        f"median of {ROUNDS * (TIME.steps - 1)} steps of the slower worker. Compressing is plain PyTorch; "
        "the top 2 % are looked for among all weights.",
        "Links are emulated: the real bytes of the real exchange, made to last as long as on a link of that "
        "speed, without latency. Sending overlaps with computing in every way.",
        "bytes_a_step are those that one worker sends.",
    ]
    if load > 0.5:
        notes.append(f"Other programs ran meanwhile: {load:.1f} at the start, on {os.cpu_count()} cores.")
    return rows, notes


def losses(seed: int, workers: int, ways: dict[str, Any], *, backend: str, task: Task = LOSS) -> list[Row]:
    """Where the loss ends, by what is sent; all ways start from the same weights."""
    task, rows = replace(task, seed=seed), list[Row]()
    start = pretrain(task, PRETRAINED)
    for name, how in ways.items():
        results = run_workers(
            fine_tune, workers, start, task, how, timeout=LIMIT, backend=backend, echo=False
        )
        first = results[0]
        dense = rows[0]["held_out"] if rows else first.held_out
        rows.append(
            {
                "name": "loss",
                "sent": name,
                "seed": seed,
                "workers": workers,
                "held_out": first.held_out,
                "above_dense": 100 * (first.held_out / dense - 1),
                "bytes_a_step": first.sent,
                "bits_a_weight": 8 * first.sent / first.weights,
                "equal_on_all": len({r.held_out for r in results}) == 1,
            }
        )
    return rows


def times(*, backend: str, task: Task = TIME) -> list[Row]:
    """A step's time on each link, by what is sent. The ways take turns, so that all meet the same weather."""
    start, steps, rows = pretrain(task, 0), dict[tuple[str, Link | None], list[float]](), list[Row]()
    for turn in range(ROUNDS):
        for link in LINKS:
            for name in WAYS:
                row, seconds = timed(name, link, start, task, backend=backend)
                steps.setdefault((name, link), []).extend(seconds)
                if turn == ROUNDS - 1:
                    rows.append(
                        row | {"ms": 1e3 * median(steps[name, link]), "count": len(steps[name, link])}
                    )
    return rows


def timed(
    name: str, link: Link | None, start: Weights, task: Task, *, backend: str
) -> tuple[Row, list[float]]:
    """What two workers send on a link, and the slower one's seconds for each step after the first."""
    results = run_workers(
        fine_tune, 2, start, task, WAYS[name], link, timeout=LIMIT, backend=backend, echo=False
    )
    sent = results[0].sent
    row = {
        "name": "time",
        "sent": name,
        "link": "none" if link is None else str(link),
        "mbit_per_s": None if link is None else link.mbit_per_s,
        "weights": results[0].weights,
        "bytes_a_step": sent,
        "sending_ms": None if link is None else 1e3 * link.seconds(sent),
    }
    return row, [max(both) for both in zip(*(r.times[1:] for r in results), strict=True)]


# ------------------------------------------------------------------------------------------- a record, shown


def ends(record: Record) -> list[str]:
    """A line for each way and number of workers: how far above all gradients the loss ends, at most."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in record.results:
        if row["name"] == "loss" and row["sent"] != DENSE:
            found.setdefault((row["sent"], row["workers"]), []).append(row["above_dense"])
    return [
        f"{sent}, {workers} workers: {max(above):.2f} % above all gradients at most (runs: {len(above)})"
        for (sent, workers), above in found.items()
    ]


def draw(axes: Axes, record: Record) -> None:
    """A step's time over the link's speed: dots as recorded, lines the larger of computing and sending."""
    colors = ("#0072B2", "#CC79A7", "#D55E00", "#009E73")
    speeds = [10 ** (i / 20) for i in range(20, 81)]
    rows = [row for row in record.results if row["name"] == "time"]
    for sent, color in zip(WAYS, colors, strict=True):
        alone, *linked = [row for row in rows if row["sent"] == sent]
        nbytes, compute = alone["bytes_a_step"], alone["ms"] / 1e3
        steps = [StepTime(compute, Link(mbit).seconds(nbytes), overlapped=True).step for mbit in speeds]
        axes.loglog(speeds, [1e3 * s for s in steps], color=color, label=f"{sent}: {nbytes / 1e6:.2f} MB")
        axes.plot([row["mbit_per_s"] for row in linked], [row["ms"] for row in linked], "o", color=color)
    axes.set(xlabel="Mbit/s", ylabel="ms a step")
    axes.set_title(record.caption, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
