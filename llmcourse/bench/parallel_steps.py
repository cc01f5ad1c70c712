"""Training steps that take turns: ours and PyTorch's, in the same workers, on the same model and batches.

A `Stepper` is one way of training, set up and ready. `take_turns` times a step of each, over and over
(A B A B …), every rank starting together; what counts is the slowest rank's median.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llmcourse.bench.timing import Sample
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build, cross_entropy
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.data_parallel import DataParallel
from llmcourse.train.parallel.worker import WorkerContext
from llmcourse.train.parallel.zero import Zero
from llmcourse.train.tasks import Batch

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A decoder and the batch that each rank trains it on."""

    d_model: int
    n_layers: int
    head_dim: int
    vocab_size: int
    batch: int
    length: int
    repeats: int
    dtype: str

    @property
    def type(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def config(self) -> ModelConfig:
        heads = self.d_model // self.head_dim
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=heads,
            n_kv_heads=heads,
            head_dim=self.head_dim,
            d_ff=4 * self.d_model,
        )

    def model(self, device: torch.device) -> Transformer:
        """A new one, with the same weights each time."""
        return copy.deepcopy(drawn(self.config(), device, self.type))

    def data(self, device: torch.device, rank: int) -> Batch:
        generator = torch.Generator().manual_seed(rank)
        shape = (self.batch, self.length + 1)
        ids = torch.randint(0, self.vocab_size, shape, generator=generator).to(device)
        return Batch((ids[:, :-1],), ids[:, 1:])


@cache
def drawn(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Weights from a seed, drawn once for all ways of training: a billion take ten seconds."""
    return build(Transformer, config, seed=0).to(device, dtype)


ON_A_GPU = Size(1024, 24, 64, 32_000, 8, 1024, repeats=20, dtype="bfloat16")
ON_A_CPU = Size(64, 2, 32, 96, 8, 32, repeats=20, dtype="float32")


@dataclass
class Stepper:
    """A way of training: `step()` does one, `wire` counts what it sends where it is ours."""

    step: Callable[[], object]
    wire: Wire | None = None
    keep: list[object] = field(default_factory=list)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def plain(model: nn.Module, forward: Any, batch: Batch, finish: Callable[[], None]) -> Stepper:
    """Forward, backward, `finish`, and a step of AdamW on the model's own parameters."""
    optimizer = adamw(model.parameters())

    def step() -> None:
        cross_entropy(forward, batch).backward()
        finish()
        optimizer.step()
        optimizer.zero_grad()

    return Stepper(step)


def alone(context: WorkerContext, size: Size) -> Stepper:
    model = size.model(context.device)
    return plain(model, model, size.data(context.device, context.rank), lambda: None)


def data_parallel(context: WorkerContext, size: Size, *, overlap: bool) -> Stepper:
    model, wire = size.model(context.device), Wire()
    parallel = DataParallel(model, wire, bucket_bytes=25 << 20, overlap=overlap)  # DDP's default size
    stepper = plain(model, parallel, size.data(context.device, context.rank), parallel.finish)
    stepper.wire = wire
    return stepper


def zero(context: WorkerContext, size: Size, *, stage: int, prefetch: bool = True) -> Stepper:
    wire = Wire()
    trained = Zero(size.model(context.device), wire, adamw, stage=stage, prefetch=prefetch)
    batch = size.data(context.device, context.rank)

    def step() -> None:
        cross_entropy(trained, batch).backward()  # type: ignore[arg-type]
        trained.step()

    return Stepper(step, wire)


def ddp(context: WorkerContext, size: Size) -> Stepper:
    model = size.model(context.device)
    devices = [context.device.index] if context.device.type == "cuda" else None
    peer = nn.parallel.DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    return plain(model, peer, size.data(context.device, context.rank), lambda: None)


def fsdp2(context: WorkerContext, size: Size, *, reshard: bool) -> Stepper:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = size.model(context.device)
    mesh = init_device_mesh(context.device.type, (context.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return plain(model, model, size.data(context.device, context.rank), lambda: None)


def take_turns(
    context: WorkerContext, steppers: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 5
) -> dict[str, Sample]:
    """Seconds of a step of each, the slowest rank's: every rank starts each step together with the others."""

    def ready() -> None:
        if context.device.type == "cuda":
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(warmup + repeats):
        for name, step in steppers.items():
            dist.barrier()
            ready()
            began = time.perf_counter()
            step()
            ready()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    mine = torch.tensor([seconds[name] for name in steppers], dtype=torch.float64, device=context.device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)  # a step is over when its slowest rank is
    return {name: Sample.of(row) for name, row in zip(steppers, mine.tolist(), strict=True)}


def peak_bytes(context: WorkerContext, make: Callable[[], Stepper]) -> int | None:
    """The most memory of a GPU that a way of training holds, above what was held before it was set up."""
    if context.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stepper = make()
    for _ in range(3):
        stepper.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
