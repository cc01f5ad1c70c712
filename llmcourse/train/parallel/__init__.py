"""Training on several processes, on one machine or many, with `torch.distributed`.

    launch          start workers from a notebook or script; errors that name the rank (also under torchrun)
    collectives     counted collectives, and the ring all-reduce made of sends
    data_parallel   the whole model on each rank, gradients averaged in buckets during backward
    zero            optimizer state, gradients and parameters sharded (ZeRO-1, -2, -3)

A worker is a function of its context:

    def train(context, steps):
        wire = Wire()
        parallel = DataParallel(build_model(), wire)
        ...
        return losses

    losses = run_workers(train, 2, 100)[0]
"""

from llmcourse.train.parallel.collectives import Wire, ring_all_reduce
from llmcourse.train.parallel.data_parallel import DataParallel, shard_batch
from llmcourse.train.parallel.launch import (
    Results,
    WorkerContext,
    WorkerError,
    run_workers,
    under_torchrun,
    world,
)
from llmcourse.train.parallel.zero import Zero

__all__ = [
    "DataParallel",
    "Results",
    "Wire",
    "WorkerContext",
    "WorkerError",
    "Zero",
    "ring_all_reduce",
    "run_workers",
    "shard_batch",
    "under_torchrun",
    "world",
]
