"""Benchmark `parallel`: two GPUs through NCCL against one, and against PyTorch's own way of each.

    llmcourse bench parallel --device cuda --out llmcourse/bench/records

equality    losses of ten float32 steps on 2 processes, at most so far from those of one
all-reduce  the ring made of sends beside the back end's, by size: bytes a rank sends a second
data        a decoder trained with the same batch on each rank: DataParallel and ZeRO beside DDP and FSDP2.
            Efficiency: the time of a step of one process alone over the time of theirs (both ranks train
            alone at the same time, in turn with the others)
tensor      attention and feed-forward layers split over the ranks, beside DTensor's plan of the same split.
            Efficiency: one process's time for the whole layer over twice theirs
pipeline    the decoder in two stages, beside torch.distributed.pipelining. Efficiency: one process's time
            for all micro-batches over twice theirs; the bubble alone would leave m/(m+p−1)

On a CPU the same, small, through gloo: its numbers then mean little.
"""

from __future__ import annotations

import gc
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from llmcourse.bench.parallel_steps import (
    ON_A_CPU,
    ON_A_GPU,
    Row,
    Size,
    alone,
    data_parallel,
    ddp,
    fsdp2,
    peak_bytes,
    take_turns,
    zero,
)
from llmcourse.errors import DeviceError
from llmcourse.train.parallel.collectives import Wire, ring_all_reduce
from llmcourse.train.parallel.demo import WAYS, Job, train, train_alone
from llmcourse.train.parallel.launch import run_workers
from llmcourse.train.parallel.worker import WorkerContext

RANKS = 2
LIMIT = 400.0
DATA_WAYS: dict[str, tuple[str, Any]] = {
    "alone": ("one process", alone),
    "data parallel": ("ours", partial(data_parallel, overlap=True)),
    "data parallel, no overlap": ("ours", partial(data_parallel, overlap=False)),
    "DDP": ("PyTorch", ddp),
    "ZeRO-1": ("ours", partial(zero, stage=1)),
    "ZeRO-2": ("ours", partial(zero, stage=2)),
    "ZeRO-3": ("ours", partial(zero, stage=3)),
    "ZeRO-3, no prefetch": ("ours", partial(zero, stage=3, prefetch=False)),
    "FSDP2": ("PyTorch", partial(fsdp2, reshard=True)),
    "FSDP2, parameters kept": ("PyTorch", partial(fsdp2, reshard=False)),
}


def run(device: str) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them. Raises DeviceError with one GPU only."""
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        raise DeviceError(
            f"this machine has {torch.cuda.device_count()} GPU.",
            "The benchmark compares two GPUs with one.",
            "a machine with two, or --device cpu, which runs it small through gloo.",
        )
    backend, size = ("nccl", ON_A_GPU) if device == "cuda" else ("gloo", ON_A_CPU)
    rows: list[Row] = []
    for section in (equality, all_reduce, data):
        rows += run_workers(section, RANKS, size, timeout=LIMIT, backend=backend, echo=False)[0]
    notes = [
        f"{RANKS} processes of one machine through {backend}; one process is one "
        f"{'GPU' if device == 'cuda' else 'CPU thread'}.",
        f"data: {size.n_layers} layers of width {size.d_model}, {size.dtype} weights and AdamW, "
        f"{size.batch} sequences of {size.length} tokens on each rank; steps take turns, the slowest rank's "
        "median counts.",
        "bytes sent a step are the least that the collectives need (a ring attains them); peak memory is "
        "above what was held before the model was built.",
    ]
    if device == "cuda":
        notes.append(f"NCCL_NVLS_ENABLE={os.environ.get('NCCL_NVLS_ENABLE', 'not set')} (NVLink multicast).")
    else:
        notes.append("Small sizes: a check that it runs. Two processes may share what one had alone.")
    return rows, notes


# ------------------------------------------------------------------------------------------------- sections


def equality(context: WorkerContext, size: Size) -> list[Row]:
    """Ten float32 steps of the demonstration's model, together and alone."""
    job = Job()
    expected = train_alone(job, context.device)
    rows = []
    for how in WAYS:
        losses, sent = train(context, job, how)
        apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        rows.append({"name": f"equality, {how}", "losses_apart": apart, "bytes_a_step": sent})
    return rows


def all_reduce(context: WorkerContext, size: Size) -> list[Row]:
    """Sums of growing size, by the ring of sends and by the back end."""
    largest = 28 if context.device.type == "cuda" else 20
    rows = []
    for power in range(12, largest + 1, 4):
        tensor = torch.zeros(2**power // 4, device=context.device)
        wire = Wire()
        samples = take_turns(
            context,
            {
                "ring of sends": partial(ring_all_reduce, tensor, wire),
                context.backend: partial(dist.all_reduce, tensor),
            },
            repeats=20,
        )
        sent = 2 * (context.world_size - 1) * tensor.nbytes // context.world_size
        for who, sample in samples.items():
            rows.append(
                {
                    "name": "all-reduce",
                    "who": who,
                    "bytes": tensor.nbytes,
                    "us": 1e6 * sample.median,
                    "sent_bytes_per_s": sent / sample.median,
                    **spread(sample),
                }
            )
    return rows


def data(context: WorkerContext, size: Size) -> list[Row]:
    """Every way of data-parallel training: its time beside one process's, its bytes, its peak memory."""
    peaks = {}
    for name, (_, make) in DATA_WAYS.items():
        peaks[name] = peak_bytes(context, partial(make, context, size))
        gc.collect()
    steppers = {name: make(context, size) for name, (_, make) in DATA_WAYS.items()}
    samples = take_turns(context, {name: s.step for name, s in steppers.items()}, size.repeats)
    rows = []
    for name, (who, _) in DATA_WAYS.items():
        sample, wire, sent, calls = samples[name], steppers[name].wire, None, None
        if wire is not None:
            wire.reset()
            steppers[name].step()
            sent, calls = wire.total_bytes, sum(wire.calls.values())
        ranks = 1 if name == "alone" else context.world_size
        rows.append(
            {
                "name": f"data, {name}",
                "who": who,
                "ms": 1e3 * sample.median,
                **spread(sample),
                "tokens_per_s": ranks * size.tokens / sample.median,
                "efficiency": samples["alone"].median / sample.median,
                "bytes_a_step": sent,
                "calls_a_step": calls,
                "peak_bytes": peaks[name],
            }
        )
    return rows


def spread(sample: Any) -> Row:
    return {"low_ms": 1e3 * sample.low, "high_ms": 1e3 * sample.high, "count": sample.count}
