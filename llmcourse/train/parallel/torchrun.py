"""Being one of the processes that torchrun started, on one machine or on many.

    torchrun --nproc-per-node 2 -m llmcourse.train.parallel.demo

    on each of two machines:
    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id 1 \\
        -m llmcourse.train.parallel.demo
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llmcourse.errors import ShapeError
from llmcourse.train.parallel.results import Results
from llmcourse.train.parallel.worker import WorkerContext, device_of, join


def under_torchrun() -> bool:
    """Whether torchrun (or `python -m torch.distributed.run`) started this process."""
    return dist.is_torchelastic_launched()


def world(default: int) -> int:
    """How many workers a script should ask for: all that torchrun started, else `default`."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else default


def as_a_rank(
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float, backend: str
) -> Results:
    """Call the function as the rank that this process is; on every rank, what each returned."""
    started = int(os.environ["WORLD_SIZE"])
    if world_size != started:
        raise ShapeError(
            f"{world_size} workers were asked for, and torchrun started {started}.",
            "Under torchrun the processes are there before the script.",
            f"torchrun --nproc-per-node {world_size}, or world_size = world(default={world_size}).",
        )
    context = context_from_environment(backend, timeout)
    began = time.monotonic()
    faulthandler.dump_traceback_later(timeout, exit=True)  # torchrun then ends the other ranks
    try:
        result = function(context, *args)
    finally:
        faulthandler.cancel_dump_traceback_later()
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, result)
    results = Results(everyone)
    results.logs, results.seconds = [[] for _ in everyone], time.monotonic() - began
    return results


def context_from_environment(backend: str, timeout: float) -> WorkerContext:
    """Join torchrun's process group, once for all runs of a script."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not dist.is_initialized():
        atexit.register(leave)
        # Its functions take the group of that moment as their default, and would keep it alive for ever.
        importlib.import_module("torch.distributed.nn.functional")
        return join(
            rank, int(os.environ["WORLD_SIZE"]), local_rank, backend, seconds=timeout + 60, store=None
        )
    return WorkerContext(
        rank, dist.get_world_size(), local_rank, device_of(backend, local_rank), backend, tagged=True
    )


def leave() -> None:
    """End the process group and gloo's threads: one that works while Python ends aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # groups in reference cycles, with their threads
