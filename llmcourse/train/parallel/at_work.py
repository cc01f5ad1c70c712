"""Lab 13's functions put to work: in real worker processes, in a training whose losses are known.

Every function here starts workers, lets them train with the learner's code in one place, and holds the losses
to those of a training without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.notebook import Table
from llmcourse.train.fit import cross_entropy
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.data_parallel import DataParallel, shard_batch
from llmcourse.train.parallel.demo import Job, train_alone
from llmcourse.train.parallel.failure import WorkerError
from llmcourse.train.parallel.launch import run_workers
from llmcourse.train.parallel.pipeline import Pipeline, cut
from llmcourse.train.parallel.schedule import Timeline, ideal_bubble
from llmcourse.train.parallel.worker import WorkerContext

JOB = Job(d_model=32, n_layers=2, length=32, batch=12, steps=10)
Function = Callable[..., Any]


def at_work(*arguments: Any, **options: Any) -> list[Any]:
    """`run_workers`; a function that is not written yet is told as such, and not as a worker's failure."""
    try:
        return run_workers(*arguments, **options)
    except WorkerError as error:
        if isinstance(error.original, NotImplementedError):
            raise error.original from None
        raise


class Done:
    """A transfer that is over before anybody waits for it."""

    def wait(self) -> None: ...


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference between two curves of losses; infinite where one is not a number."""
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)


# ── an all-reduce in data parallel ───────────────────────────────────────────────────────────────────


def on_a_ring(wire: Wire, rank: int, world_size: int, like: Tensor) -> tuple[Function, Function, Function]:
    """send(numbers), recv() and finish() of one all-reduce. Lengths go ahead; sends do not wait."""
    under_way: list[Any] = []

    def send(numbers: Tensor) -> None:
        numbers = numbers.detach().clone().contiguous()
        size = torch.tensor([numbers.numel()])
        for part in (size, numbers):
            under_way.append((part, wire.isend(part, (rank + 1) % world_size)))

    def recv() -> Tensor:
        source, size = (rank - 1) % world_size, torch.zeros(1, dtype=torch.long)
        wire.recv(size, source)
        return wire.recv(torch.empty(int(size), dtype=like.dtype), source)

    def finish() -> None:
        for _, work in under_way:
            work.wait()

    return send, recv, finish


def train_on_a_ring(context: WorkerContext, job: Job, ring_all_reduce: Function) -> tuple[list[float], int]:
    """As one rank: the loss of every step, and the bytes of gradients that this rank sent in a step."""
    wire, sent = Wire(), 0

    def exchange(index: int, flat: Tensor) -> Done:
        nonlocal sent
        send, recv, finish = on_a_ring(wire, context.rank, context.world_size, flat)

        def counted(numbers: Tensor) -> None:
            nonlocal sent
            sent += numbers.nbytes
            send(numbers)

        total = ring_all_reduce(context.rank, context.world_size, flat, counted, recv)
        finish()
        flat.copy_(total / context.world_size)
        return Done()

    losses = _data_parallel(context, job, wire, exchange)
    context.log(f"{job.steps} steps, {sent // job.steps:,} bytes of gradients sent in each")
    return losses, sent // job.steps


def _data_parallel(context: WorkerContext, job: Job, wire: Wire, exchange: Function) -> list[float]:
    """Mean losses of a data-parallel training in which `exchange` averages the gradients."""
    model, batches = job.start(context.device)
    parallel, optimizer = DataParallel(model, wire, exchange=exchange), job.optimizer(model.parameters())
    losses = []
    for batch in batches:
        loss = cross_entropy(model, shard_batch(batch, context.rank, context.world_size))
        loss.backward()
        parallel.finish()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    mean = torch.stack(losses)
    wire.all_reduce(mean)
    return (mean / context.world_size).tolist()


def ring_at_work(ring_all_reduce: Function, world_size: int = 3) -> Table:
    """A GPT trained by `world_size` processes whose gradients go round the learner's ring."""
    alone, weights = train_alone(JOB), sum(p.numel() for p in JOB.start(torch.device("cpu"))[0].parameters())
    results = at_work(train_on_a_ring, world_size, JOB, ring_all_reduce, timeout=120)
    rows = [
        (rank, f"{losses[0]:.4f} → {losses[-1]:.4f}", f"{apart(losses, alone):.0e}", sent)
        for rank, (losses, sent) in enumerate(results)
    ]
    least = 2 * (world_size - 1) / world_size * 4 * weights
    note = (
        f"ring_all_reduce summed the gradients of {world_size} workers; one process: {alone[0]:.4f} → "
        f"{alone[-1]:.4f}; a ring must send {least:,.0f} bytes a step"
    )
    return Table(["worker", "loss", "from one process", "bytes sent a step"], rows, note)


# ── a layer on W workers ─────────────────────────────────────────────────────────────────────────────


@dataclass
class Cut:
    """A linear layer whose forward and backward the learner's function computes."""

    fn: Function
    cut: str
    wire: Wire
    weight: nn.Parameter
    bias: nn.Parameter

    def __call__(self, x: Tensor) -> Tensor:
        return _CutLinear.apply(x, self.weight, self.bias, self)

    def call(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def all_reduce(numbers: Tensor) -> Tensor:
            total = numbers.detach().clone().contiguous()
            self.wire.all_reduce(total)
            return total

        weight, bias = self.weight.detach(), self.bias.detach()
        with torch.no_grad():
            y, grad_x, grad_w = self.fn(
                *(self.cut, self.wire.rank, self.wire.size, x.detach(), weight, bias, grad, all_reduce)
            )
        return y, grad_x, grad_w

    @property
    def block(self) -> tuple[slice, ...]:
        """The part of the weight that this worker owns."""
        dim = 0 if self.cut == "column" else 1
        size = self.weight.shape[dim] // self.wire.size
        own = slice(self.wire.rank * size, (self.wire.rank + 1) * size)
        return (own,) if dim == 0 else (slice(None), own)


class _CutLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: Cut) -> Tensor:
        ctx.layer, ctx.x = layer, x.detach()
        outputs = weight.shape[0] // layer.wire.size if layer.cut == "column" else weight.shape[0]
        return layer.call(ctx.x, x.new_zeros(len(x), outputs))[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        layer, grad = ctx.layer, grads[0].contiguous()
        _, grad_x, grad_w = layer.call(ctx.x, grad)
        whole_w, whole_b = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
        whole_w[layer.block] = grad_w
        whole_b[layer.block[0] if layer.cut == "column" else slice(None)] = grad.sum(0)
        return grad_x, whole_w, whole_b, None


def _mlp_data() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in ((12, 24), (24, 12), (12, 24), (24, 5))))
    x = torch.randn(64, 12)
    return model, x, (x[:, :5] * x[:, 5:10]).cumsum(1)


def _fit_mlp(
    layers: Iterable[Callable[[Tensor], Tensor]], parameters: Sequence[Tensor], x: Tensor, y: Tensor
) -> list[float]:
    first, second, third, last = layers
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(20):
        loss = F.mse_loss(last(F.gelu(third(second(F.gelu(first(x)))))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_cut_mlp(context: WorkerContext, parallel_linear: Function) -> list[float]:
    """As one rank: the losses of two MLPs in a row, in each a layer cut by outputs and one by inputs."""
    whole, x, y = _mlp_data()
    wire = Wire()
    layers = [
        Cut(parallel_linear, cut, wire, *linear.parameters())
        for cut, linear in zip(("column", "row") * 2, whole, strict=True)
    ]
    losses = _fit_mlp(layers, list(whole.parameters()), x, y)
    context.log(f"loss {losses[0]:.4f} → {losses[-1]:.4f}")
    return losses


def layer_at_work(parallel_linear: Function, world_size: int = 2) -> Table:
    """Two MLPs in a row on `world_size` processes, each with a part of every weight, trained together."""
    whole, x, y = _mlp_data()
    alone = _fit_mlp(whole, list(whole.parameters()), x, y)
    results = at_work(train_cut_mlp, world_size, parallel_linear)
    rows = [
        (rank, f"{losses[0]:.4f} → {losses[-1]:.4f}", f"{apart(losses, alone):.0e}")
        for rank, losses in enumerate(results)
    ]
    note = f"parallel_linear was every layer; one process: {alone[0]:.4f} → {alone[-1]:.4f}"
    return Table(["worker", "loss", "from one process"], rows, note)


# ── a pipeline's order ───────────────────────────────────────────────────────────────────────────────


def train_staged(
    context: WorkerContext, job: Job, order: Sequence[Sequence[tuple[str, int]]], pace: tuple[float, float]
) -> tuple[list[float], int, Timeline]:
    """As one stage: the losses, the most micro-batches held, and what all stages did in the last step."""
    model, batches = job.start(context.device)
    stage = cut(model, context.rank, context.world_size)
    pipeline = Pipeline(stage, order, pace=pace)
    optimizer, losses = job.optimizer(stage.parameters()), []
    for batch in batches:
        losses.append(pipeline.step(batch, record=True).item())
        optimizer.step()
    context.log(f"stage {context.rank}: held {pipeline.peak} micro-batches at most")
    return losses, pipeline.peak, pipeline.timeline()


def pipeline_at_work(one_f_one_b: Function, stages: int = 2, micros: int = 6) -> Table:
    """A GPT whose blocks are dealt to `stages` processes, which work in the order that the learner gives.

    Forwards and backwards are stretched to 10 and 20 ms, so that processes which share a core take as long as
    ones that do not.
    """
    order = [[(str(kind), int(i)) for kind, i in one_f_one_b(s, stages, micros)] for s in range(stages)]
    job = replace(JOB, steps=4)
    alone = train_alone(job)
    results = at_work(train_staged, stages, job, order, (0.01, 0.02))
    rows = [(f"{s}", peak, f"{apart(losses, alone):.0e}") for s, (losses, peak, _) in enumerate(results)]
    measured, ideal = results[0][2].bubble, ideal_bubble(stages, micros)
    note = (
        f"in the order of one_f_one_b: idle {measured:.0%} of the time, measured; "
        f"(p − 1) / (m + p − 1) = {ideal:.0%}"
    )
    return Table(["stage", "micro-batches held", "loss from one process"], rows, note)


# ── compressed gradients ─────────────────────────────────────────────────────────────────────────────


def train_top_k(context: WorkerContext, job: Job, top_k: Function, share: float) -> tuple[list[float], int]:
    """As one rank: losses, and bytes sent in a step, when each rank sends the top share of its gradients."""
    wire = Wire()
    errors: dict[int, Tensor] = {}

    def exchange(index: int, flat: Tensor) -> Done:
        error = errors.setdefault(index, torch.zeros_like(flat))
        k, n = max(1, round(share * len(flat))), wire.size
        indices, values, errors[index] = top_k(flat.clone(), error, k)
        all_indices = torch.empty(n * k, dtype=torch.int32)
        all_values = torch.empty(n * k)
        wire.all_gather(all_indices, indices.to(torch.int32))
        wire.all_gather(all_values, values.contiguous())
        flat.zero_().index_add_(0, all_indices.long(), all_values / n)
        return Done()

    losses = _data_parallel(context, job, wire, exchange)
    sent = wire.bytes_sent["all_gather"] // job.steps
    if context.rank == 0:
        context.log(f"top {share:.0%}: loss {losses[0]:.4f} → {losses[-1]:.4f}, {sent:,} bytes a step")
    return losses, sent


def top_k_at_work(top_k_error_feedback: Function, world_size: int = 2, steps: int = 60) -> Table:
    """A GPT trained on a part of its gradients, beside one that sends them all, and one that owes nothing."""
    job = Job(d_model=32, n_layers=2, length=32, batch=12, steps=steps)
    weights = sum(p.numel() for p in job.start(torch.device("cpu"))[0].parameters())
    dense = sum(train_alone(job)[-10:]) / 10
    rows: list[tuple[Any, ...]] = [("all", dense, 2 * (world_size - 1) * 4 * weights // world_size)]

    def forgetful(grad: Tensor, error: Tensor, k: int) -> Any:
        return top_k_error_feedback(grad, torch.zeros_like(error), k)

    for name, fn, share in (
        ("10%", top_k_error_feedback, 0.1),
        ("1%", top_k_error_feedback, 0.01),
        ("1%, the rest forgotten", forgetful, 0.01),
    ):
        losses, sent = at_work(train_top_k, world_size, job, fn, share, timeout=120)[0]
        rows.append((name, sum(losses[-10:]) / 10, sent))
    note = "top_k_error_feedback chose what is sent, in all rows but the first"
    return Table(["sent of each gradient", "loss, last 10 steps", "bytes sent a step"], rows, note)
