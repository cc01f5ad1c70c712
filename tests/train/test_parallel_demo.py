"""The demonstration trains as one process does, in every way, and is the same script on many machines."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmcourse.train.fit import one_thread
from llmcourse.train.parallel.demo import WAYS, Job, train, train_alone
from llmcourse.train.parallel.launch import run_workers

DEMO = "llmcourse.train.parallel.demo"
JOB = Job(d_model=32, n_layers=2, length=16, batch=12)


@pytest.mark.parametrize("how", ["tensor", "pipeline"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_split_model_has_the_losses_of_one_process(how: str, n: int) -> None:
    job = JOB.shared_by(n)
    with one_thread():
        alone = train_alone(job)
    assert alone[-1] < alone[0] - 0.3  # it did learn
    for losses, sent in run_workers(train, n, job, how, echo=False):
        assert losses == pytest.approx(alone, abs=1e-5)
        assert (sent > 0) == (n > 1)


def test_a_job_grows_only_where_ranks_cannot_share_it() -> None:
    assert Job().shared_by(2) == Job()
    for n in (1, 3, 6):
        job = Job().shared_by(n)
        assert (job.batch % n, job.d_model // 32 % n, job.n_layers >= n) == (0, 0, True)


def demo(launcher: list[str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", DEMO, "--steps", "3", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def away(printed: str) -> float:
    """The distance from one process's losses that the demonstration prints."""
    (found,) = re.findall(r"at most (\S+) away from one process", printed)
    return float(found)


@pytest.mark.parametrize("how", ["tensor", "pipeline"])
def test_the_command_starts_its_own_processes(how: str) -> None:
    out, err = demo([], "--how", how).communicate(timeout=120)
    assert f"{how} on 2 processes, cpu" in out, err
    assert away(out) < 1e-5


def test_two_machines_train_together_under_torchrun() -> None:
    """Two torchruns that meet at one address, two processes each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
    sizes = ["--nnodes", "2", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    launcher = ["-m", "torch.distributed.run", *sizes, *meeting]
    nodes = [demo(launcher, "--how", "pipeline") for _ in range(2)]
    try:
        said = [node.communicate(timeout=180) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "pipeline on 4 processes, cpu" in "".join(out for out, _ in said)
    assert away("".join(out for out, _ in said)) < 1e-5


def test_every_way_is_known_to_the_command_and_told() -> None:
    import llmcourse.train.parallel.demo as module

    assert all(way in (module.__doc__ or "") for way in ("data", "zero1", "tensor", "pipeline"))
    assert {"data", "tensor", "pipeline"} < set(WAYS)
