"""A decoder split over the ranks: inside its layers (tensor parallel) or between them (pipeline).

The whole on one process, PyTorch's split of it (DTensor's plan, `torch.distributed.pipelining`) and ours, in
turn. Between layers all work on the same modules, the course's `Transformer`. Inside them on these:

    whole, DTensor, columns and rows
        `Layer`, plain PyTorch. Its q, k and v lie together head by head, so that a piece of the rows is whole
        heads: what DTensor's ColwiseParallel can cut. Ours sends the gradient of x while that of the weight
        is computed (`no overlap`: it waits first)
    parallelize
        the course's own blocks with the same weights. There q, k and v of all heads are stacked, and each of
        the three is cut (`sections`)

The order of rows is all that differs: each computes the same numbers, with two sums over the ranks a layer
forward and two backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.bench.parallel_steps import drawn
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.step import Step as Pass
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.pipeline import Pipeline, asked_loss, cut
from llmcourse.train.parallel.tensor import ColumnParallelLinear, RowParallelLinear, parallelize
from llmcourse.train.parallel.worker import WorkerContext
from llmcourse.train.tasks import Batch

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
    """Causal attention and a feed-forward part, each after a norm. Heads are as many as the weights make.

    The rows of `qkv` are q, k and v of the first head, then of the second …: a part of them is whole heads.
    """

    def __init__(self, size: Split) -> None:
        super().__init__()
        width, self.head_dim = size.width, size.head_dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.head_dim)).transpose(1, 3)
        q, k, v = heads.unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


COLUMNS, ROWS = ("qkv", "up"), ("o", "down")


@cache
def drawn_layers(size: Split, device: torch.device) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(Layer(size) for _ in range(size.layers))).to(device, size.dtype)


def stack(size: Split, device: torch.device) -> nn.Sequential:
    """The layers, new, with the same weights each time and on every rank."""
    return copy.deepcopy(drawn_layers(size, device))


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
    plan: dict[str, Any] = {name: ColwiseParallel() for name in COLUMNS}
    plan |= {name: RowwiseParallel() for name in ROWS}
    for layer in model:
        parallelize_module(layer, mesh, plan)
    return forward_backward(model, hidden(size, context.device))


def our_layers(context: WorkerContext, size: Split, *, overlap: bool = True) -> Step:
    """The same split by ColumnParallelLinear and RowParallelLinear."""
    model, wire = stack(size, context.device), Wire()
    for layer in model:
        for name in COLUMNS:
            setattr(layer, name, ColumnParallelLinear(getattr(layer, name), wire, overlap=overlap))
        for name in ROWS:
            setattr(layer, name, RowParallelLinear(getattr(layer, name), wire))
    return forward_backward(model, hidden(size, context.device))


class Blocks(nn.Module):
    """The blocks of a decoder without its embedding and head: x [B, S, E] → [B, S, E]."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.blocks = model.blocks

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        at = Pass(torch.arange(length, device=x.device).expand(len(x), -1), 0, length, causal=length > 1)
        for block in self.blocks:
            x = block(x, at, None)
        return x


def our_blocks(context: WorkerContext, size: Split) -> Step:
    """The course's model with the layers' weights, split by `parallelize`."""
    model = with_weights_of(stack(size, context.device), size)
    return forward_backward(Blocks(parallelize(model, Wire())), hidden(size, context.device))


def with_weights_of(layers: nn.Sequential, size: Split) -> Transformer:
    """A decoder of the course whose blocks compute what these layers do."""
    config = decoder_config(size, vocab_size=2, position="none", norm="layer", mlp="gelu")
    theirs, ours = layers.state_dict(), dict[str, Tensor]()
    for i in range(size.layers):
        by_head = theirs[f"{i}.qkv.weight"].unflatten(0, (-1, 3, size.head_dim))
        ours[f"blocks.{i}.mixer.qkv.weight"] = by_head.transpose(0, 1).flatten(0, 2)
        for name, theirs_is in (("mixer.out", "o"), ("mlp.up", "up"), ("mlp.down", "down")):
            ours[f"blocks.{i}.{name}.weight"] = theirs[f"{i}.{theirs_is}.weight"]
    any_weight = next(layers.parameters())
    model = Transformer(config).to(any_weight.device, any_weight.dtype)
    model.load_state_dict(ours, strict=False)  # the norms of both are as they are made
    return model


# ------------------------------------------------------------------------------------------ between layers


def decoder(size: Split, device: torch.device) -> Transformer:
    """The course's model, new, with the same weights each time and on every rank."""
    return copy.deepcopy(drawn(decoder_config(size, size.vocab_size), device, size.dtype))


def decoder_config(size: Split, vocab_size: int, **others: Any) -> ModelConfig:
    heads = size.width // size.head_dim
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=size.width,
        n_layers=size.layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=size.head_dim,
        d_ff=4 * size.width,
        **others,
    )


def tokens(size: Split, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size.vocab_size, (size.batch, size.length + 1), generator=generator).to(device)
    return Batch((ids[:, :-1].contiguous(),), ids[:, 1:].contiguous())


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return asked_loss(logits, targets) / targets.numel()


def whole_decoder(context: WorkerContext, size: Split) -> Step:
    """All micro-batches one after the other on one process, gradients added up."""
    model, batch = decoder(size, context.device), tokens(size, context.device)

    def step() -> Tensor:
        total = torch.zeros((), device=context.device)
        pieces = zip(batch.inputs[0].chunk(size.micros), batch.targets.chunk(size.micros), strict=True)
        for x, y in pieces:
            loss = mean_loss(model(x), y) / size.micros
            loss.backward()
            total += loss.detach()
        model.zero_grad()
        return total

    return step


def our_pipeline(context: WorkerContext, size: Split, *, order: Callable[[int, int], Any]) -> Step:
    """Each rank a stage, worked through in the given order."""
    stage = cut(decoder(size, context.device), context.rank, context.world_size)
    pipeline = Pipeline(stage, order(context.world_size, size.micros))
    batch = tokens(size, context.device)
    return lambda: pipeline.step(batch)


def torch_pipeline(context: WorkerContext, size: Split, *, schedule: str) -> Step:
    """`torch.distributed.pipelining` with the same stages."""
    from torch.distributed import pipelining

    rank, count = context.rank, context.world_size
    module, batch = cut(decoder(size, context.device), rank, count), tokens(size, context.device)
    stage = pipelining.PipelineStage(module, rank, count, context.device)
    plan = getattr(pipelining, schedule)(stage, size.micros, loss_fn=mean_loss)

    def step() -> Tensor:
        losses: list[Tensor] = []
        if rank == 0:
            plan.step(batch.inputs[0])
        elif rank == count - 1:
            plan.step(target=batch.targets, losses=losses)
        else:
            plan.step()
        module.zero_grad()
        mean = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=context.device)
        dist.broadcast(mean, count - 1)
        return mean

    return step
