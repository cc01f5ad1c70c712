"""Workers with a GPU each, through NCCL: the same losses, and nothing left of a run that fails."""

from __future__ import annotations

import os
import time

import pytest
import torch

from llmcourse.train.parallel.collectives import Wire, ring_all_reduce
from llmcourse.train.parallel.demo import WAYS, Job, train, train_alone
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
