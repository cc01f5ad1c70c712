"""Data parallel training takes the steps of one process, overlapped or not, whatever the buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmcourse.errors import GraphError, ShapeError
from llmcourse.train.fit import cross_entropy, one_thread
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.data_parallel import DataParallel, shard_batch
from llmcourse.train.parallel.demo import Job, train, train_alone
from llmcourse.train.parallel.launch import WorkerContext, WorkerError, run_workers
from llmcourse.train.tasks import Batch

JOB = Job(d_model=32, n_layers=2, length=16, batch=12)


@pytest.fixture(scope="module")
def alone() -> list[float]:
    with one_thread():
        return train_alone(JOB)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ten_steps_have_the_losses_of_one_process(n: int, alone: list[float]) -> None:
    for losses, _ in run_workers(train, n, JOB, "data", echo=False):
        assert losses == pytest.approx(alone, abs=1e-5)
    assert alone[-1] < alone[0] - 0.3  # they did learn


def in_buckets(context: WorkerContext, bucket_bytes: int, overlap: bool) -> dict[str, Any]:
    model, batches = JOB.start(context.device)
    wire = Wire()
    parallel = DataParallel(model, wire, bucket_bytes=bucket_bytes, overlap=overlap)
    optimizer = JOB.optimizer(model.parameters())
    wire.reset()
    for batch in batches:
        cross_entropy(parallel, shard_batch(batch, context.rank, context.world_size)).backward()  # type: ignore[arg-type]
        parallel.finish()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": [p.detach() for p in model.parameters()],
        "buckets": len(parallel.buckets),
        "early": parallel.left_during_backward,
        "calls": wire.calls["all_reduce"],
        "bytes": wire.total_bytes,
    }


def by_ddp(context: WorkerContext) -> list[Tensor]:
    model, batches = JOB.start(context.device)
    peer = nn.parallel.DistributedDataParallel(model)
    optimizer = JOB.optimizer(model.parameters())
    for batch in batches:
        cross_entropy(peer, shard_batch(batch, context.rank, context.world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_weights_after_ten_steps_are_those_of_ddp() -> None:
    theirs = run_workers(by_ddp, 2, echo=False)[0]
    for bucket_bytes in (1, 20_000, 1 << 30):
        for rank in run_workers(in_buckets, 2, bucket_bytes, True, echo=False):
            for mine, peer in zip(rank["weights"], theirs, strict=True):
                torch.testing.assert_close(mine, peer, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_buckets_change_the_calls_and_not_the_bytes(n: int) -> None:
    model = JOB.start(torch.device("cpu"))[0]
    tensors, size = len(list(model.parameters())), sum(p.nbytes for p in model.parameters())
    each, all_in_one = (run_workers(in_buckets, n, b, True, echo=False)[0] for b in (1, 1 << 30))
    assert each["buckets"] == tensors
    assert all_in_one["buckets"] == 1
    for run in (each, all_in_one):
        assert run["calls"] == JOB.steps * run["buckets"]
        assert run["bytes"] == pytest.approx(JOB.steps * 2 * (n - 1) / n * size, rel=1e-4)


def test_buckets_leave_during_backward_only_where_overlap_is_on() -> None:
    on, off = (run_workers(in_buckets, 2, 20_000, overlap, echo=False)[0] for overlap in (True, False))
    assert on["buckets"] == off["buckets"] > 3
    assert on["early"] == on["buckets"] - 1  # the last one has nothing to hide behind
    assert off["early"] == 0
    assert all(torch.equal(a, b) for a, b in zip(on["weights"], off["weights"], strict=True))


class Branches(nn.Module):
    """Two layers whose order in the graph depends on the rank; a third that is not used."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)  # ranks start apart: rank 0's weights must win
        self.a, self.b, self.unused = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor(1.0 + rank))
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if self.rank % 2 else (self.b, self.a)
        return (first(x).tanh() + second(x).tanh()) * self.scale


def branches(context: WorkerContext) -> tuple[list[Tensor], list[Tensor]]:
    model = Branches(context.rank)
    parallel = DataParallel(model, Wire(), bucket_bytes=1)
    x = torch.arange(20.0).view(4, 5)[2 * context.rank : 2 * context.rank + 2] / 20
    for turn in range(2):  # the second finds what the first has left in the buckets
        model.zero_grad()
        loss = parallel(x).square().mean()
        (loss if turn else loss + model.unused.weight.sum()).backward()
        parallel.finish()
    return [p.detach() for p in model.parameters()], [p.grad for p in model.parameters()]  # type: ignore[misc]


def test_ranks_whose_gradients_come_in_another_order_average_the_same_parameters() -> None:
    reference = Branches(0)
    reference(torch.arange(20.0).view(4, 5) / 20).square().mean().backward()
    for weights, gradients in run_workers(branches, 2, echo=False):
        for p, weight, gradient in zip(reference.parameters(), weights, gradients, strict=True):
            assert torch.equal(p, weight)
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(gradient, expected)


def accumulated(context: WorkerContext) -> tuple[list[Tensor], int]:
    """Two micro-batches a step, one exchange."""
    model, batches = JOB.start(context.device)
    wire = Wire()
    parallel = DataParallel(model, wire, bucket_bytes=1 << 30)
    wire.reset()
    batch = next(batches)
    mine = shard_batch(batch, context.rank, context.world_size)
    with parallel.no_sync():
        (cross_entropy(parallel, shard_batch(mine, 0, 2)) / 2).backward()  # type: ignore[arg-type]
    (cross_entropy(parallel, shard_batch(mine, 1, 2)) / 2).backward()  # type: ignore[arg-type]
    parallel.finish()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], wire.calls["all_reduce"]


def test_accumulated_micro_batches_give_the_whole_batch_with_one_exchange() -> None:
    model, batches = JOB.start(torch.device("cpu"))
    cross_entropy(model, next(batches)).backward()
    for gradients, calls in run_workers(accumulated, 3, echo=False):
        assert calls == 1
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_kept_add_up_over_steps() -> None:
    def twice(context: WorkerContext) -> Tensor:
        model = nn.Linear(3, 1, bias=False)
        parallel = DataParallel(model, Wire())
        for _ in range(2):
            parallel(torch.ones(1, 3) * (context.rank + 1)).sum().backward()
            parallel.finish()
        assert model.weight.grad is not None
        return model.weight.grad

    for gradient in run_workers(twice, 2, echo=False):
        assert torch.equal(gradient, torch.full((1, 3), 3.0))  # 1.5 twice


def test_a_forgotten_finish_is_an_error_and_not_a_wrong_gradient() -> None:
    def forget(context: WorkerContext) -> None:
        parallel = DataParallel(nn.Linear(3, 1), Wire())
        for _ in range(2):
            parallel(torch.ones(1, 3)).sum().backward()

    with pytest.raises(WorkerError, match="before the gradients of the first were finished") as caught:
        run_workers(forget, 2, echo=False)
    assert isinstance(caught.value.original, GraphError)


def test_another_exchange_can_take_the_place_of_the_all_reduce() -> None:
    def late(context: WorkerContext) -> tuple[list[int], list[Tensor]]:
        model, seen = nn.Linear(4, 2), []

        class Later:
            def __init__(self, flat: Tensor) -> None:
                self.flat = flat

            def wait(self) -> None:
                self.flat.fill_(7.0)

        def exchange(index: int, flat: Tensor) -> Later:
            seen.append(index)
            return Later(flat)

        parallel = DataParallel(model, Wire(), bucket_bytes=1, exchange=exchange)
        parallel(torch.ones(1, 4)).sum().backward()
        parallel.finish()
        return seen, [p.grad for p in model.parameters() if p.grad is not None]

    seen, gradients = run_workers(late, 1, echo=False)[0]
    assert seen == [0, 1]
    assert all((g == 7).all() for g in gradients)


def test_a_frozen_model_has_nothing_to_average() -> None:
    def frozen(context: WorkerContext) -> None:
        DataParallel(nn.Linear(2, 2).requires_grad_(False), Wire())

    with pytest.raises(WorkerError, match="wants a gradient"):
        run_workers(frozen, 1, echo=False)


def test_a_batch_is_dealt_out_whole_and_evenly() -> None:
    batch = Batch((torch.arange(12).view(6, 2),), torch.arange(12).view(6, 2) + 1)
    parts = [shard_batch(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([p.inputs[0] for p in parts]), batch.inputs[0])
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
    with pytest.raises(ShapeError, match="6 sequences for 4 ranks"):
        shard_batch(batch, 0, 4)


def test_average_of_the_ranks_is_not_their_sum() -> None:
    def constant(context: WorkerContext) -> float:
        model = nn.Linear(1, 1, bias=False)
        parallel = DataParallel(model, Wire())
        parallel(torch.full((1, 1), float(context.rank))).sum().backward()
        parallel.finish()
        dist.barrier()
        assert model.weight.grad is not None
        return model.weight.grad.item()

    assert run_workers(constant, 4, echo=False) == [1.5] * 4
