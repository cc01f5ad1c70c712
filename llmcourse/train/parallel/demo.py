"""Train a small GPT on Shakespeare's characters, on as many processes as there are.

    python -m llmcourse.train.parallel.demo                                  2 processes on this machine
    torchrun --nproc-per-node 4 -m llmcourse.train.parallel.demo --how zero3
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id 1 \\
        -m llmcourse.train.parallel.demo --backend nccl          (the same line on each machine)

    --how data       the whole model on each process, a part of the batch for each
          zero1 … 3  the same with optimizer state, gradients, parameters sharded
          tensor     a part of every weight matrix on each, the whole batch for all
          pipeline   some of the blocks on each, micro-batches in the order 1F1B

It prints the loss, the bytes that a rank sends each step, and how far the losses are from those of one
process that trains on the same batches alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build, cross_entropy
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.data_parallel import DataParallel, shard_batch
from llmcourse.train.parallel.launch import WorkerContext, run_workers, world
from llmcourse.train.parallel.pipeline import Pipeline, cut
from llmcourse.train.parallel.schedule import one_f_one_b
from llmcourse.train.parallel.tensor import parallelize
from llmcourse.train.parallel.zero import Zero
from llmcourse.train.tasks import Batch, Text

WAYS = ("data", "zero1", "zero2", "zero3", "tensor", "pipeline")


@dataclass(frozen=True)
class Job:
    """What is trained, on one process or on many: a model's sizes, its batches, and how many steps."""

    d_model: int = 64
    n_layers: int = 4
    length: int = 64
    batch: int = 16
    steps: int = 10
    lr: float = 3e-3
    plays: int = 1

    def model(self, vocab_size: int) -> Transformer:
        heads = max(1, self.d_model // 32)
        config = ModelConfig(
            vocab_size=vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=self.d_model // heads,
            d_ff=4 * self.d_model,
        )
        return build(Transformer, config, seed=0)

    def shared_by(self, ranks: int) -> Job:
        """This job, a little larger where so many ranks cannot share its batch, its heads or its blocks."""
        batch = self.batch if self.batch % ranks == 0 else 4 * ranks
        d_model = self.d_model if self.d_model // 32 % ranks == 0 else 32 * ranks
        return replace(self, batch=batch, d_model=d_model, n_layers=max(self.n_layers, ranks))

    def start(self, device: torch.device) -> tuple[Transformer, Iterator[Batch]]:
        """The untrained model and its batches, whole."""
        text = Text.shakespeare(plays=self.plays)
        batches = text.batches(batch=self.batch, length=self.length, seed=0, device=device)
        return self.model(text.vocab_size).to(device), islice(batches, self.steps)

    def optimizer(self, parameters: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr)  # type: ignore[arg-type]


def train_alone(job: Job, device: torch.device | str = "cpu") -> list[float]:
    """The loss of every step in one process, with whole batches: what all the others must equal."""
    model, batches = job.start(torch.device(device))
    optimizer = job.optimizer(model.parameters())
    losses = []
    for batch in batches:
        loss = cross_entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(context: WorkerContext, job: Job, how: str) -> tuple[list[float], int]:
    """As one rank: the loss of every step (mean over the ranks), and the bytes this rank sent for each."""
    model, batches = job.start(context.device)
    step, wires = set_up(model, context, job, how)
    for wire in wires:
        wire.reset()
    losses = [step(batch).detach() for batch in batches]
    sent = sum(wire.total_bytes for wire in wires) // max(1, len(losses))
    mean = torch.stack(losses)
    wires[0].all_reduce(mean)
    return (mean / context.world_size).tolist(), sent


def set_up(
    model: Transformer, context: WorkerContext, job: Job, how: str
) -> tuple[Callable[[Batch], Tensor], list[Wire]]:
    """What takes a step with a whole batch and returns this rank's loss; the wires it uses, all ranks' first.

    Tensor and pipeline parallelism know the loss of the whole batch on every rank, the others that of their
    part of it: either way its mean over the ranks is the loss.
    """
    rank, ranks = context.rank, context.world_size
    if how == "pipeline":
        stage = cut(model, rank, ranks)
        pipeline = Pipeline(stage, one_f_one_b(ranks, min(4 * ranks, job.batch)))
        optimizer = job.optimizer(stage.parameters())

        def pipelined(batch: Batch) -> Tensor:
            loss = pipeline.step(batch)
            optimizer.step()
            return loss

        wires = pipeline.borders.wires
        return pipelined, [wires.pop("everyone"), *wires.values()]

    wire = Wire()
    forward, finish, share = set_up_layers(model, wire, job, how)

    def step(batch: Batch) -> Tensor:
        loss = cross_entropy(forward, shard_batch(batch, rank, ranks) if share else batch)  # type: ignore[arg-type]
        loss.backward()
        finish()
        return loss

    return step, [wire]


def set_up_layers(
    model: Transformer, wire: Wire, job: Job, how: str
) -> tuple[Callable[..., Tensor], Callable[[], None], bool]:
    """What to call as the model, what to do after backward, and whether each rank has a part of the batch."""
    if how.startswith("zero"):
        zero = Zero(model, wire, job.optimizer, stage=int(how.removeprefix("zero")))
        return zero, zero.step, True
    parallel = parallelize(model, wire) if how == "tensor" else DataParallel(model, wire)
    optimizer = job.optimizer(model.parameters())

    def step() -> None:
        if isinstance(parallel, DataParallel):
            parallel.finish()
        optimizer.step()
        optimizer.zero_grad()

    return parallel, step, how == "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--how", choices=WAYS, default="data")
    parser.add_argument("--workers", type=int, default=2, help="where torchrun did not start them")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    chosen = parser.parse_args()
    n = world(default=chosen.workers)
    job = Job(steps=chosen.steps).shared_by(n)
    run_workers(compared, n, job, chosen.how, backend=chosen.backend, timeout=600)


def compared(context: WorkerContext, job: Job, how: str) -> float:
    """Train together, then alone on rank 0; the largest difference between the losses."""
    losses, sent = train(context, job, how)
    if context.rank:
        return 0.0
    alone = train_alone(job, context.device)
    apart = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
    context.log(f"{how} on {context.world_size} processes, {context.device.type}: loss of each step")
    context.log(" ".join(f"{loss:.4f}" for loss in losses))
    context.log(f"{sent:,} bytes sent a step; at most {apart:.1e} away from one process")
    return apart


if __name__ == "__main__":
    main()
