"""A decoder split over the ranks: inside its layers (tensor parallel) or between them (pipeline).

The whole on one process, PyTorch's split of it (DTensor's plan, `torch.distributed.pipelining`) and ours, in
turn. What is split is written out here in plain PyTorch, so that all three do the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.train.parallel.worker import WorkerContext

Step = Callable[[], object]


@dataclass(frozen=True)
class Split:
    """Sizes of a stack of layers, of the batch, and of the micro-batches that a pipeline cuts it into."""

    width: int
    layers: int
    head_dim: int
    vocab_size: int
    batch: int
    length: int
    micros: int
    dtype: torch.dtype
    repeats: int = 20


TENSOR_ON_A_GPU = Split(4096, 4, 128, 0, 4, 2048, 1, torch.bfloat16)
TENSOR_ON_A_CPU = Split(64, 2, 16, 0, 2, 32, 1, torch.float32)
PIPELINE_ON_A_GPU = Split(2048, 16, 128, 32_000, 16, 1024, 8, torch.bfloat16)
PIPELINE_ON_A_CPU = Split(64, 4, 16, 96, 8, 32, 4, torch.float32)


class Layer(nn.Module):
    """Causal attention and a feed-forward part, each after a norm. Heads are as many as the weights make."""

    def __init__(self, size: Split) -> None:
        super().__init__()
        width, self.head_dim = size.width, size.head_dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def stack(size: Split, device: torch.device) -> nn.Sequential:
    """The layers, the same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(Layer(size) for _ in range(size.layers))).to(device, size.dtype)


def hidden(size: Split, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size.batch, size.length, size.width, generator=generator)
    return x.to(device, size.dtype).requires_grad_()


# ------------------------------------------------------------------------------------------- inside layers


def forward_backward(model: nn.Module, x: Tensor) -> Step:
    """One pass down and up, gradients of weights and input given up again."""

    def step() -> Tensor:
        y = model(x)
        y.backward(torch.ones_like(y))
        for p in model.parameters():
            p.grad = None
        x.grad = None
        return y.detach()

    return step


def whole_layers(context: WorkerContext, size: Split) -> Step:
    return forward_backward(stack(size, context.device), hidden(size, context.device))


def dtensor_layers(context: WorkerContext, size: Split) -> Step:
    """PyTorch's plan: the first product of each part by columns, the second by rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = stack(size, context.device)
    mesh = init_device_mesh(context.device.type, (context.world_size,))
    plan: dict[str, Any] = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {name: RowwiseParallel() for name in ("o", "down")}
    for layer in model:
        parallelize_module(layer, mesh, plan)
    return forward_backward(model, hidden(size, context.device))


# ------------------------------------------------------------------------------------------ between layers


def stages(size: Split, count: int, device: torch.device) -> list[nn.Sequential]:
    """The decoder cut into `count` parts of as many layers: tokens into the first, logits out of the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [Layer(size) for _ in range(size.layers)]
        first: nn.Module = nn.Embedding(size.vocab_size, size.width)
        last: nn.Module = nn.Linear(size.width, size.vocab_size, bias=False)
    each = size.layers // count
    parts = [layers[i * each : (i + 1) * each] for i in range(count)]
    parts[0], parts[-1] = [first, *parts[0]], [*parts[-1], last]
    return [nn.Sequential(*part).to(device, size.dtype) for part in parts]


def tokens(size: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, length]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size.vocab_size, (size.batch, size.length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def whole_decoder(context: WorkerContext, size: Split) -> Step:
    """All micro-batches one after the other on one process, gradients added up."""
    model = nn.Sequential(*stages(size, context.world_size, context.device))
    inputs, targets = tokens(size, context.device)

    def step() -> Tensor:
        total = torch.zeros((), device=context.device)
        for x, y in zip(inputs.chunk(size.micros), targets.chunk(size.micros), strict=True):
            loss = loss_of(model(x), y) / size.micros
            loss.backward()
            total += loss.detach()
        model.zero_grad()
        return total

    return step


def torch_pipeline(context: WorkerContext, size: Split, *, schedule: str) -> Step:
    """`torch.distributed.pipelining` with the same stages. The last rank's step returns the loss."""
    from torch.distributed import pipelining

    rank, count = context.rank, context.world_size
    module = stages(size, count, context.device)[rank]
    stage = pipelining.PipelineStage(module, rank, count, context.device)
    plan = getattr(pipelining, schedule)(stage, size.micros, loss_fn=loss_of)
    inputs, targets = tokens(size, context.device)

    def step() -> Tensor | None:
        losses: list[Tensor] = []
        if rank == 0:
            plan.step(inputs)
        elif rank == count - 1:
            plan.step(target=targets, losses=losses)
        else:
            plan.step()
        module.zero_grad()
        return torch.stack(losses).mean().detach() if losses else None

    return step


def from_last(context: WorkerContext, value: Tensor | None) -> float:
    """The last rank's number, on every rank."""
    shared = torch.zeros((), device=context.device) if value is None else value.detach().float().clone()
    dist.broadcast(shared, context.world_size - 1)
    return shared.item()
