"""Training on several processes, on one machine or many, with `torch.distributed`.

    launch          start workers from a notebook or script; errors that name the rank (also under torchrun)
    collectives     counted collectives, and the ring all-reduce made of sends
    data_parallel   the whole model on each rank, gradients averaged in buckets during backward
    zero            optimizer state, gradients and parameters sharded (ZeRO-1, -2, -3)
    tensor          a part of every weight matrix on each rank: `parallelize(model, wire)`
    schedule        in which order a pipeline's stages work (GPipe, 1F1B), simulated
    pipeline        some of the blocks on each rank, run in such an order
    compress        what CocktailSGD sends: random sparsification, top-k, quantisation
    cocktail        data parallelism over a slow network with it: error feedback, overlapped
    link            an emulated slow link

    demo            a small GPT trained in any of these ways, also under torchrun: `python -m` this
    fine_tune       the same GPT fine-tuned with all gradients sent or a cocktail
    at_work         lab 13's functions in real workers

`launch` is made of `worker` (what a process does), `nursery` and `warm` (where it comes from), `failure`
(what is said of one that fails), `results` and `torchrun`.

A worker is a function of its context:

    def train(context, steps):
        wire = Wire()
        parallel = DataParallel(build_model(), wire)
        ...
        return losses

    losses = run_workers(train, 2, 100)[0]
"""

from llmcourse.train.parallel.cocktail import CompressedDataParallel
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
from llmcourse.train.parallel.pipeline import Pipeline, cut
from llmcourse.train.parallel.schedule import gpipe, one_f_one_b
from llmcourse.train.parallel.tensor import parallelize
from llmcourse.train.parallel.zero import Zero

__all__ = [
    "CompressedDataParallel",
    "DataParallel",
    "Pipeline",
    "Results",
    "Wire",
    "WorkerContext",
    "WorkerError",
    "Zero",
    "cut",
    "gpipe",
    "one_f_one_b",
    "parallelize",
    "ring_all_reduce",
    "run_workers",
    "shard_batch",
    "under_torchrun",
    "world",
]
