"""Workers with a GPU each, through NCCL: the same losses, and nothing left of a run that fails."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llmcourse.train.parallel.cocktail import CompressedDataParallel, flatten, simulate
from llmcourse.train.parallel.collectives import Wire, ring_all_reduce
from llmcourse.train.parallel.compress import DENSE, PAPER, Cocktail, compress, decompress
from llmcourse.train.parallel.demo import WAYS, Job, train, train_alone
from llmcourse.train.parallel.fine_tune import Task, fine_tune, pretrain
from llmcourse.train.parallel.launch import WorkerContext, WorkerError, run_workers

GPUS = torch.cuda.device_count()
RANKS = [pytest.param(n, marks=pytest.mark.skipif(n > GPUS, reason=f"needs {n} GPUs")) for n in (1, 2)]
JOB = Job(d_model=64, n_layers=3, batch=8, length=32)


def both(context: WorkerContext, how: str) -> tuple[list[float], list[float], str]:
    return train(context, JOB, how)[0], train_alone(JOB, context.device), str(context.device)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("how", WAYS)
def test_ten_steps_have_the_losses_of_one_gpu(how: str, n: int) -> None:
    for rank, (together, alone, device) in enumerate(run_workers(both, n, how, backend="nccl", echo=False)):
        assert device == f"cuda:{rank}"
        assert together == pytest.approx(alone, abs=1e-5)


def ring(context: WorkerContext) -> tuple[bool, int]:
    wire = Wire()
    mine = torch.arange(1001.0, device=context.device) * (context.rank + 1)
    total = ring_all_reduce(mine.clone(), wire)
    wire.all_reduce(mine)
    return torch.equal(total, mine), wire.bytes_sent["send"]


@pytest.mark.parametrize("n", RANKS)
def test_the_ring_sums_on_gpus(n: int) -> None:
    found = run_workers(ring, n, backend="nccl", echo=False)
    assert all(equal for equal, _ in found)
    assert sum(sent for _, sent in found) == 2 * (n - 1) * 4004


# ── a cocktail in place of gradients ─────────────────────────────────────────────────────────────────


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
@pytest.mark.parametrize("how", [PAPER, replace(PAPER, random=1.0, top=0.02, bits=32), DENSE], ids=str)
def test_a_packet_made_on_a_gpu_says_what_one_made_on_a_cpu_does(how: Cocktail) -> None:
    moves = torch.randn(5003, generator=torch.Generator().manual_seed(0))
    here, there = compress(moves, how), compress(moves.cuda(), how)
    assert there.is_cuda
    assert len(there) == len(here) == how.nbytes(5003)
    one, other = decompress(here, 5003, how), decompress(there, 5003, how).cpu()
    assert torch.equal(one != 0, other != 0)
    torch.testing.assert_close(
        one, other, rtol=0, atol=0 if how.bits == 32 else 0.02 * moves.abs().max().item()
    )


def regression(device: torch.device) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 40, generator=generator)
    model = nn.Linear(40, 7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.to(device), x.to(device), (x @ torch.randn(40, 7, generator=generator)).to(device)


def loss_of(model: nn.Linear, x: torch.Tensor, y: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return nn.functional.mse_loss(model(x[rank::size]), y[rank::size])


def in_processes(context: WorkerContext, how: Cocktail, own_stream: bool) -> list[float]:
    """Train, on a stream that is not the default one if asked, and say where the shared weights end."""
    model, x, y = regression(context.device)
    parallel = CompressedDataParallel(model, Wire(dist.new_group()), how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else None):
        for _ in range(25):
            optimizer.zero_grad()
            loss_of(model, x, y, context.rank, context.world_size).backward()
            optimizer.step()
            parallel.synchronise()
        parallel.finish()
        torch.cuda.synchronize()
    return flatten(list(model.parameters())).tolist()


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("how", [DENSE, PAPER, replace(PAPER, delay=0)], ids=["dense", "late", "in time"])
def test_workers_on_gpus_get_the_simulation_s_weights(how: Cocktail, own_stream: bool, n: int) -> None:
    model, x, y = regression(torch.device("cpu"))

    def backward(rank: int, step: int) -> float:
        loss = loss_of(model, x, y, rank, n)
        loss.backward()
        return loss.item()

    simulate(model, backward, lambda p: torch.optim.SGD(p, lr=0.05), world_size=n, steps=25, how=how)
    results = run_workers(in_processes, n, how, own_stream, backend="nccl", echo=False)
    assert all(weights == results[0] for weights in results)  # to the bit
    apart = (torch.tensor(results[0]) - flatten(list(model.parameters()))).abs()
    # A GPU rounds differently, so that now and then another of two nearly equal moves is sent.
    assert apart.mean() < (1e-5 if how is DENSE else 0.02)


@pytest.mark.parametrize("n", RANKS)
def test_a_char_gpt_trains_on_a_cocktail_through_nccl(n: int) -> None:
    task, ends = Task(steps=60), {}
    start = pretrain(task, 100)
    for name, how in {"dense": None, "half": torch.float16, "paper": PAPER}.items():
        runs = run_workers(fine_tune, n, start, task, how, backend="nccl", echo=False, timeout=120)
        ends[name] = runs[0].held_out
        assert all(run.held_out == pytest.approx(ends[name], abs=1e-6) for run in runs)
    assert ends["half"] == pytest.approx(ends["dense"], rel=1e-3)
    assert ends["paper"] == pytest.approx(ends["dense"], rel=0.02)


def dies(context: WorkerContext, how: str) -> None:
    value = torch.ones(1, device=context.device)
    Wire().all_reduce(value)
    if context.rank == 1:
        if how == "leaves":
            os._exit(3)
        time.sleep(600)
    Wire().all_reduce(value)
    torch.cuda.synchronize()


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("how", ["leaves", "sleeps"])
def test_a_rank_that_dies_or_hangs_is_named(how: str) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        run_workers(dies, 2, how, backend="nccl", timeout=40, echo=False)
    assert caught.value.rank == 1
    assert caught.value.how == ("died" if how == "leaves" else "hung")
    assert time.monotonic() - began < 60
