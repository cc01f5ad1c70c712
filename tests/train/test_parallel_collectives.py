"""Collectives give what they promise, and their counters what a rank must send."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.train.parallel.collectives import Call, Wire, ring_all_reduce
from llmcourse.train.parallel.launch import WorkerContext, WorkerError, run_workers

RANKS = [1, 2, 3, 4]
SHAPES = [(1,), (7,), (3, 5), (4, 2, 3), (257,), (0,)]


def drawn(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def rings(context: WorkerContext) -> list[tuple[Tensor, int, int, int]]:
    found = []
    for shape in SHAPES:
        wire = Wire()
        tensor = drawn(context.rank, shape)
        same = ring_all_reduce(tensor, wire)
        assert same is tensor
        found.append((tensor, wire.bytes_sent["send"], wire.calls["send"], wire.calls["recv"]))
    return found


@pytest.mark.parametrize("n", RANKS)
def test_the_ring_sums_odd_shapes_exactly_alike_on_all_ranks(n: int) -> None:
    results = run_workers(rings, n, echo=False)
    for i, shape in enumerate(SHAPES):
        expected = sum(drawn(rank, shape) for rank in range(n))
        for rank in range(n):
            torch.testing.assert_close(results[rank][i][0], expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(results[rank][i][0], results[0][i][0])


@pytest.mark.parametrize("n", RANKS)
def test_the_ring_sends_what_the_table_says(n: int) -> None:
    results = run_workers(rings, n, echo=False)
    for i, shape in enumerate(SHAPES):
        size = 8 * drawn(0, shape).numel()
        sent = [results[rank][i][1] for rank in range(n)]
        assert sum(sent) == 2 * (n - 1) * size  # all ranks together: exact, whatever the remainder
        chunk = -(-drawn(0, shape).numel() // n) * 8
        assert all(s <= 2 * (n - 1) * chunk for s in sent)
        assert all(results[rank][i][2:] == (2 * (n - 1), 2 * (n - 1)) for rank in range(n))


def everything(context: WorkerContext) -> dict[str, object]:
    n, rank, wire = context.world_size, context.rank, Wire()
    mine = torch.arange(2.0 * n) + 100 * rank
    total = mine.clone()
    wire.all_reduce(total)
    share = torch.empty(2)
    wire.reduce_scatter(share, mine)
    whole = torch.empty(2 * n)
    wire.all_gather(whole, share)
    swapped = torch.empty_like(mine)
    wire.all_to_all(swapped, mine)
    named = mine.clone()
    wire.broadcast(named, src=n - 1)
    wire.barrier()
    return {
        "total": total,
        "share": share,
        "whole": whole,
        "swapped": swapped,
        "named": named,
        "bytes": dict(wire.bytes_sent),
        "summary": wire.summary(),
        "sum": wire.total_bytes,
        "sequence": wire.sequence,
    }


@pytest.mark.parametrize("n", RANKS)
def test_collectives_give_what_they_promise(n: int) -> None:
    base = torch.arange(2.0 * n)
    total = n * base + 100 * n * (n - 1) / 2
    for rank, found in enumerate(run_workers(everything, n, echo=False)):
        assert torch.equal(found["total"], total)
        assert torch.equal(found["share"], total[2 * rank : 2 * rank + 2])
        assert torch.equal(found["whole"], total)
        rows = [base[2 * rank : 2 * rank + 2] + 100 * other for other in range(n)]
        assert torch.equal(found["swapped"], torch.cat(rows))
        assert torch.equal(found["named"], base + 100 * (n - 1))


@pytest.mark.parametrize("n", RANKS)
def test_bytes_are_those_of_the_table(n: int) -> None:
    size = 4 * 2 * n  # of the tensor of `everything`, 2n float32
    for rank, found in enumerate(run_workers(everything, n, echo=False)):
        assert found["bytes"] == {
            "all_reduce": 2 * (n - 1) * size // n,
            "reduce_scatter": (n - 1) * size // n,
            "all_gather": (n - 1) * size // n,
            "all_to_all": (n - 1) * size // n,
            "broadcast": 0 if rank == (n - 2) % n else size,
            "barrier": 0,
        }
        assert found["sum"] == sum(found["bytes"].values())
        assert found["sequence"][0] == Call("all_reduce", 2 * n, 2 * (n - 1) * size // n)
        assert found["summary"] == "all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, barrier"


def pass_on(context: WorkerContext) -> tuple[float, float, dict[str, int], dict[str, int], str]:
    """Hand the rank round a ring, first in the foreground and then in the background."""
    wire, value, n = Wire(), torch.tensor([float(context.rank)]), context.world_size
    right, left = (context.rank + 1) % n, (context.rank - 1) % n
    came = torch.empty(1)
    if context.rank % 2 == 0:
        wire.send(value, right)
        wire.recv(came, left)
    else:
        wire.recv(came, left)
        wire.send(value, right)
    later = torch.empty(1)
    for work in [wire.isend(value, right, tag=1), wire.irecv(later, left, tag=1)]:
        work.wait()
    calls, sent = dict(wire.calls), dict(wire.bytes_sent)
    wire.reset()
    for _ in range(3):
        wire.exchange(value, right, came, left)
    return came.item(), later.item(), calls, sent, f"{wire.summary()}; {wire.total_bytes}"


def test_sends_arrive_and_are_counted_for_the_sender_alone() -> None:
    for rank, (came, later, calls, sent, summary) in enumerate(run_workers(pass_on, 4, echo=False)):
        assert came == later == (rank - 1) % 4
        assert calls == {"send": 2, "recv": 2}
        assert sent == {"send": 8, "recv": 0}
        assert summary == "send, recv, send, recv, send, recv; 12"


def test_repeated_calls_are_folded_in_the_summary() -> None:
    def repeat(context: WorkerContext) -> str:
        wire = Wire()
        for _ in range(3):
            wire.all_reduce(torch.ones(2))
        wire.barrier()
        return wire.summary()

    assert run_workers(repeat, 2, echo=False) == ["all_reduce ×3, barrier"] * 2


def test_a_group_counts_its_own_members() -> None:
    def halves(context: WorkerContext) -> tuple[float, int, int]:
        import torch.distributed as dist

        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        wire = Wire(groups[context.rank // 2])
        value = torch.tensor([float(context.rank)])
        wire.broadcast(value, src=1)
        wire.all_reduce(value)
        ring = torch.tensor([1.0, 1.0])
        ring_all_reduce(ring, wire)
        return value.item(), wire.size, int(ring.sum())

    assert run_workers(halves, 4, echo=False) == [(2.0, 2, 4), (2.0, 2, 4), (6.0, 2, 4), (6.0, 2, 4)]


@pytest.mark.parametrize("name", ["reduce_scatter", "all_gather", "all_to_all"])
def test_shares_that_do_not_fit_are_refused(name: str) -> None:
    def unequal(context: WorkerContext) -> None:
        getattr(Wire(), name)(torch.empty(2), torch.empty(5))

    with pytest.raises(WorkerError) as caught:
        run_workers(unequal, 2, echo=False)
    assert isinstance(caught.value.original, ShapeError)
