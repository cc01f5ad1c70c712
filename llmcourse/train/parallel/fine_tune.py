"""Fine-tune a small GPT on several workers: all gradients sent, or a cocktail, on a fast or a slow link.

The experiment behind CocktailSGD's claim, at a size that runs in seconds. A GPT that has read some
Shakespeare (`pretrain`) is trained on by W workers (`fine_tune`), each with batches of its own, once through
dense data parallelism and once through `cocktail`; both overlap what they send with computing, both with the
same link.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise

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
    """plays of the text, the sequences of each worker's batch and their length, steps and highest rate.

    width, layers   of the GPT;  seed   of its first weights, of the text's order and of what is sampled
    tested          batches of unseen text at the end; 0 leaves that out
    """

    plays: int = 2
    batch: int = 8
    length: int = 48
    steps: int = 150
    lr: float = 5e-4
    seed: int = 0
    width: int = 64
    layers: int = 2
    tested: int = 3

    def text(self) -> Text:
        return Text.shakespeare(self.plays)

    def model(self, vocab_size: int) -> Transformer:
        sizes = {"d_model": self.width, "head_dim": self.width // 4, "d_ff": 2 * self.width}
        return build(Transformer, small(vocab_size, self.layers, **sizes), seed=self.seed)


@dataclass(frozen=True)
class Run:
    """What came of it. losses of rank 0's batches at every step; held_out in nats a character

    sent       bytes that a worker sends in a step
    seconds    of a step, waiting for the link included: the whole run divided by its steps
    times      seconds of each step; what the last ones send is waited for after them
    weights    how many the model has
    """

    losses: list[float]
    held_out: float
    sent: float
    seconds: float
    times: list[float]
    weights: int


@one_thread()
def pretrain(task: Task, steps: int) -> Weights:
    """A GPT of 86,000 weights after so many steps in this process; after none, as it was drawn."""
    text = task.text()
    model = task.model(text.vocab_size)
    if steps:
        fit(model, text.batches(batch=16, length=task.length, seed=task.seed), steps=steps, lr=1e-2)
    return model.state_dict()


def fine_tune(
    context: WorkerContext,
    weights: Weights,
    task: Task,
    how: Cocktail | torch.dtype | None,
    link: Link | None = None,
) -> Run:
    """As one rank: train on from `weights`. `how` None sends every gradient, a type every gradient in it."""
    text = task.text()
    model = task.model(text.vocab_size)
    model.load_state_dict(weights)
    model.to(context.device)
    wire = Wire(dist.new_group())
    parallel = (
        CompressedDataParallel(model, wire, how, link=link, seed=task.seed)
        if isinstance(how, Cocktail)
        else Dense(model, wire, link, how)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, betas=(0.9, 0.98))
    batches = text.batches(
        batch=task.batch, length=task.length, seed=10 + context.rank + 100 * task.seed, device=context.device
    )
    wire.reset()  # the weights were made equal through it
    dist.barrier()
    losses, ends = [], [time.perf_counter()]
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
        ends.append(time.perf_counter())
        if (step + 1) % max(1, task.steps // 3) == 0 and context.rank == 0:
            context.log(f"step {step + 1:4d}  loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
    if isinstance(parallel, CompressedDataParallel):
        parallel.finish()
    seconds = (time.perf_counter() - ends[0]) / task.steps
    return Run(
        losses,
        held_out_loss(model, task, text),
        wire.total_bytes / task.steps,
        seconds,
        [after - before for before, after in pairwise(ends)],
        sum(p.numel() for p in model.parameters()),
    )


class Dense(DataParallel):
    """Data parallel whose buckets take an emulated link, in a thread, while backward goes on.

    sent_as   the type in which gradients travel and are summed; None: their own
    """

    def __init__(
        self, model: nn.Module, wire: Wire, link: Link | None, sent_as: torch.dtype | None = None
    ) -> None:
        self.link, self.sent_as, self._thread = link, sent_as, ThreadPoolExecutor(1, "buckets")
        super().__init__(model, wire, bucket_bytes=100_000, exchange=self._start)

    def _start(self, index: int, flat: Tensor) -> Sending:
        return Sending(self._thread.submit(self._send, flat))

    def _send(self, flat: Tensor) -> None:
        flat /= self.wire.size
        sent = flat if self.sent_as is None else flat.to(self.sent_as)
        if self.link is None:
            self.wire.all_reduce(sent)
        else:
            with self.link.carrying(self.wire):
                self.wire.all_reduce(sent)
        if sent is not flat:
            flat.copy_(sent)


@dataclass
class Sending:
    """A bucket under way."""

    future: Future[None]

    def wait(self) -> None:
        self.future.result()


@torch.no_grad()
def held_out_loss(model: nn.Module, task: Task, text: Text) -> float:
    """Nats a character on text that no worker has seen, the same for every run; NaN where none is asked."""
    if not task.tested:
        return math.nan
    device = next(model.parameters()).device
    batches = text.batches(batch=64, length=task.length, seed=99, held_out=True, device=device)
    return sum(cross_entropy(model, batch).item() for batch in islice(batches, task.tested)) / task.tested
