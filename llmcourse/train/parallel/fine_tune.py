"""Fine-tune a small GPT on several workers: all gradients sent, or a cocktail, on a fast or a slow link.

The experiment behind CocktailSGD's claim, at a size that runs in seconds. A GPT that has read some
Shakespeare (`pretrain`) is trained on by W workers (`fine_tune`), each with batches of its own, once through
dense data parallelism and once through `cocktail`; both overlap what they send with computing, both with the
same link.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmcourse.models import Transformer
from llmcourse.train.fit import build, cross_entropy, fit, one_thread, scale_at
from llmcourse.train.parallel.cocktail import CompressedDataParallel
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.compress import Cocktail
from llmcourse.train.parallel.data_parallel import DataParallel
from llmcourse.train.parallel.link import Link
from llmcourse.train.parallel.worker import WorkerContext
from llmcourse.train.small import small
from llmcourse.train.tasks import Text

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """plays of the text, the sequences of each worker's batch and their length, steps and highest rate."""

    plays: int = 2
    batch: int = 8
    length: int = 48
    steps: int = 150
    lr: float = 5e-4
    seed: int = 0

    def text(self) -> Text:
        return Text.shakespeare(self.plays)


@dataclass(frozen=True)
class Run:
    """What came of it. losses of rank 0's batches at every step; held_out in nats a character

    sent       bytes that a worker sends in a step
    seconds    of a step, waiting for the link included: the whole run divided by its steps
    """

    losses: list[float]
    held_out: float
    sent: float
    seconds: float


@one_thread()
def pretrain(task: Task, steps: int) -> Weights:
    """A GPT of 86,000 weights after so many steps in this process; after none, as it was drawn."""
    text = task.text()
    model = build(Transformer, small(text.vocab_size), seed=task.seed)
    if steps:
        fit(model, text.batches(batch=16, length=task.length, seed=task.seed), steps=steps, lr=1e-2)
    return model.state_dict()


def fine_tune(
    context: WorkerContext, weights: Weights, task: Task, how: Cocktail | None, link: Link | None = None
) -> Run:
    """As one rank: train on from `weights`; `how` None sends every gradient."""
    text = task.text()
    model = build(Transformer, small(text.vocab_size), seed=task.seed)
    model.load_state_dict(weights)
    wire = Wire(dist.new_group())
    parallel = (
        Dense(model, wire, link) if how is None else CompressedDataParallel(model, wire, how, link=link)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, betas=(0.9, 0.98))
    batches = text.batches(batch=task.batch, length=task.length, seed=10 + context.rank)
    wire.reset()  # the weights were made equal through it
    dist.barrier()
    losses, began = [], time.perf_counter()
    for step, batch in enumerate(islice(batches, task.steps)):
        optimizer.param_groups[0]["lr"] = task.lr * scale_at(step, task.steps, max(1, task.steps // 10))
        loss = cross_entropy(model, batch)
        loss.backward()
        if isinstance(parallel, Dense):
            parallel.finish()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(parallel, CompressedDataParallel):
            parallel.synchronise()
        losses.append(loss.item())
        if (step + 1) % max(1, task.steps // 3) == 0 and context.rank == 0:
            context.log(f"step {step + 1:4d}  loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
    if isinstance(parallel, CompressedDataParallel):
        parallel.finish()
    seconds = (time.perf_counter() - began) / task.steps
    return Run(losses, held_out_loss(model, task, text), wire.total_bytes / task.steps, seconds)


class Dense(DataParallel):
    """Data parallel whose buckets take an emulated link, in a thread, while backward goes on."""

    def __init__(self, model: nn.Module, wire: Wire, link: Link | None) -> None:
        self.link, self._thread = link, ThreadPoolExecutor(1, "buckets")
        super().__init__(model, wire, bucket_bytes=100_000, exchange=self._start)

    def _start(self, index: int, flat: Tensor) -> Sending:
        return Sending(self._thread.submit(self._send, flat))

    def _send(self, flat: Tensor) -> None:
        flat /= self.wire.size
        if self.link is None:
            self.wire.all_reduce(flat)
        else:
            with self.link.carrying(self.wire):
                self.wire.all_reduce(flat)


@dataclass
class Sending:
    """A bucket under way."""

    future: Future[None]

    def wait(self) -> None:
        self.future.result()


@torch.no_grad()
def held_out_loss(model: nn.Module, task: Task, text: Text) -> float:
    """Nats a character on text that no worker has seen, the same for every run."""
    batches = text.batches(batch=64, length=task.length, seed=99, held_out=True)
    return sum(cross_entropy(model, batch).item() for batch in islice(batches, 3)) / 3
