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
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from llmcourse.bench.parallel_splits import (
    PIPELINE_ON_A_CPU,
    PIPELINE_ON_A_GPU,
    TENSOR_ON_A_CPU,
    TENSOR_ON_A_GPU,
    Split,
    dtensor_layers,
    our_blocks,
    our_layers,
    our_pipeline,
    torch_pipeline,
    whole_decoder,
    whole_layers,
)
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
from llmcourse.bench.timing import Sample
from llmcourse.errors import DeviceError
from llmcourse.train.parallel.collectives import Wire, ring_all_reduce
from llmcourse.train.parallel.demo import WAYS, Job, train, train_alone
from llmcourse.train.parallel.launch import WorkerError, run_workers
from llmcourse.train.parallel.schedule import gpipe, ideal_bubble, one_f_one_b
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

TENSOR_WAYS: dict[str, tuple[str, Any]] = {
    "whole": ("one process", whole_layers),
    "columns and rows": ("ours", our_layers),
    "columns and rows, no overlap": ("ours", partial(our_layers, overlap=False)),
    "parallelize": ("ours", our_blocks),
    "DTensor": ("PyTorch", dtensor_layers),
}
PIPELINE_WAYS: dict[str, tuple[str, Any]] = {
    "whole": ("one process", whole_decoder),
    "GPipe": ("ours", partial(our_pipeline, order=gpipe)),
    "1F1B": ("ours", partial(our_pipeline, order=one_f_one_b)),
    "ScheduleGPipe": ("PyTorch", partial(torch_pipeline, schedule="ScheduleGPipe")),
    "Schedule1F1B": ("PyTorch", partial(torch_pipeline, schedule="Schedule1F1B")),
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
    missing: list[str] = []
    for section in (equality, all_reduce, data, tensor, pipeline):
        try:
            rows += run_workers(section, RANKS, size, timeout=LIMIT, backend=backend, echo=False)[0]
        except WorkerError as error:  # the other sections took minutes of two GPUs: they are kept
            print(f"{section.__name__} failed: {error}", file=sys.stderr)
            missing.append(f"NOT MEASURED, it failed: {section.__name__} ({error.what.splitlines()[0]})")
            if not rows:
                raise
    notes = [
        *missing,
        f"{RANKS} processes of one machine through {backend}; one process is one "
        f"{'GPU' if device == 'cuda' else 'CPU thread'}.",
        f"data: {size.n_layers} layers of width {size.d_model}, {size.dtype} weights and AdamW, "
        f"{size.batch} sequences of {size.length} tokens on each rank; steps take turns, the slowest rank's "
        "median counts.",
        "tensor: DTensor and columns and rows cut the same layers; parallelize cuts the course's own blocks "
        "with the same weights, where q, k and v are stacked.",
        "tensor and pipeline: forward and backward without an update; efficiency is one process's time over "
        "twice theirs; without_bubble is what a pipeline's schedule leaves of it.",
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


def tensor(context: WorkerContext, size: Size) -> list[Row]:
    """A stack of layers, forward and backward: whole on one process, split by us and by DTensor."""
    split = TENSOR_ON_A_GPU if context.device.type == "cuda" else TENSOR_ON_A_CPU
    steps = {name: make(context, split) for name, (_, make) in TENSOR_WAYS.items()}
    whole = steps["whole"]()
    apart = {name: relative(step(), whole) for name, step in steps.items()}
    samples = take_turns(context, steps, split.repeats)
    shape = f"{split.layers} layers of width {split.width}, "
    shape += f"{split.batch}×{split.length} tokens, {type_name(split)}"
    return [
        {
            "name": f"tensor, {name}",
            "who": who,
            "ms": 1e3 * samples[name].median,
            **spread(samples[name]),
            "efficiency": share(context, samples, name),
            "apart": apart[name],
            "shape": shape,
        }
        for name, (who, _) in TENSOR_WAYS.items()
    ]


def pipeline(context: WorkerContext, size: Size) -> list[Row]:
    """The decoder in stages: whole on one process, and by both schedules, ours and PyTorch's."""
    split = PIPELINE_ON_A_GPU if context.device.type == "cuda" else PIPELINE_ON_A_CPU
    steps = {name: make(context, split) for name, (_, make) in PIPELINE_WAYS.items()}
    losses = {name: float(step()) for name, step in steps.items()}
    samples = take_turns(context, steps, split.repeats)
    shape = f"{split.layers} layers of width {split.width}, {split.micros} micro-batches of "
    shape += f"{split.batch // split.micros}×{split.length} tokens, {type_name(split)}"
    return [
        {
            "name": f"pipeline, {name}",
            "who": who,
            "ms": 1e3 * samples[name].median,
            **spread(samples[name]),
            "efficiency": share(context, samples, name),
            "without_bubble": 1 - ideal_bubble(1 if name == "whole" else context.world_size, split.micros),
            "apart": abs(losses[name] - losses["whole"]),
            "shape": shape,
        }
        for name, (who, _) in PIPELINE_WAYS.items()
    ]


def share(context: WorkerContext, samples: Mapping[str, Sample], name: str) -> float:
    """One process's time over what all ranks together spend."""
    ranks = 1 if name == "whole" else context.world_size
    return samples["whole"].median / (ranks * samples[name].median)


def relative(a: Any, b: Any) -> float:
    """The largest difference over the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


def type_name(split: Split) -> str:
    return str(split.dtype).removeprefix("torch.")


def spread(sample: Sample) -> Row:
    return {"low_ms": 1e3 * sample.low, "high_ms": 1e3 * sample.high, "count": sample.count}
