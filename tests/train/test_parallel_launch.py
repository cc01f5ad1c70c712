"""Workers: what they return and say, and what is left of them when they fail."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from llmcourse import errors
from llmcourse.errors import CourseError, DeviceError, ShapeError
from llmcourse.train.parallel import launch, warm
from llmcourse.train.parallel.launch import WorkerContext, WorkerError, run_workers

LIMIT = 3.0
FAILURES = ("leaves", "killed", "raises", "crashes")


def who(context: WorkerContext) -> tuple[int, int, str, float]:
    total = torch.tensor(float(context.rank + 1))
    dist.all_reduce(total)
    context.log(f"{context.rank} here")
    return context.rank, context.world_size, str(context.device), total.item()


def fail(context: WorkerContext, how: str, folder: Path) -> None:
    """Rank 1 fails with a child of its own, while the others wait for it in a collective."""
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"{context.rank}").write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    if context.rank == 1:
        print("last words", flush=True)
        match how:
            case "leaves":
                os._exit(7)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raises":
                raise LookupError("no such token")
            case "crashes":
                os.abort()
            case "sleeps":
                time.sleep(600)
            case "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(5))


def processes(folder: Path, *, ranks: int) -> list[int]:
    notes = [folder / str(rank) for rank in range(ranks)]
    return [int(pid) for note in notes for pid in note.read_text().split()]


def alive(pids: list[int]) -> list[int]:
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def gone(pids: list[int], within: float = 5.0) -> bool:
    until = time.monotonic() + within
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pids)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_rank_returns_its_own_result_in_order(n: int) -> None:
    total = n * (n + 1) / 2
    assert run_workers(who, n, echo=False) == [(rank, n, "cpu", total) for rank in range(n)]


def test_a_function_that_no_module_has_is_sent_by_value_with_what_it_refers_to() -> None:
    factor = torch.tensor([2.0, 3.0])

    def scaled(context: WorkerContext, by: float) -> torch.Tensor:
        return factor * by * context.rank

    zero, one = run_workers(scaled, 2, 10.0, echo=False)
    assert torch.equal(zero, torch.zeros(2))
    assert torch.equal(one, torch.tensor([20.0, 30.0]))


def test_lines_are_shown_with_their_rank_and_kept_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    results = run_workers(who, 2)
    assert results.logs == [["0 here"], ["1 here"]]
    assert sorted(capsys.readouterr().out.splitlines()) == ["[rank 0] 0 here", "[rank 1] 1 here"]
    run_workers(who, 2, echo=False)
    assert capsys.readouterr().out == ""


def test_workers_see_the_environment_and_folder_of_now_and_compute_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(context: WorkerContext) -> tuple[str, str, str, int, float]:
        draw = torch.rand(1).item()
        return os.environ["COLOUR"], os.getcwd(), os.environ["RANK"], torch.get_num_threads(), draw

    run_workers(who, 1, echo=False)  # the warm process is older than what follows
    monkeypatch.setenv("COLOUR", "green")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw = torch.rand(1).item()
    for rank, seen in enumerate(run_workers(look, 2, echo=False)):
        assert seen == ("green", str(tmp_path), str(rank), 1, draw)


def test_workers_in_fresh_processes_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_needs_fresh_processes", lambda backend: True)
    assert run_workers(who, 2, echo=False) == [(0, 2, "cpu", 3.0), (1, 2, "cpu", 3.0)]


@pytest.mark.parametrize("how", FAILURES)
def test_a_worker_that_dies_is_named_and_nothing_is_left(how: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 of 3") as caught:
        run_workers(fail, 3, how, tmp_path, timeout=30, echo=False)
    assert time.monotonic() - began < 20  # it did not wait for the time limit
    assert caught.value.rank == 1
    assert caught.value.how == ("raised" if how == "raises" else "died")
    assert "last words" in str(caught.value)
    expected = {
        "leaves": "exit code 7",
        "killed": "SIGKILL",
        "raises": "LookupError: no such token",
        "crashes": "SIGABRT",
    }
    assert expected[how] in str(caught.value)
    assert gone(processes(tmp_path, ranks=3))


def test_what_a_worker_raised_is_kept_with_the_line_that_raised_it(tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        run_workers(fail, 2, "raises", tmp_path, echo=False)
    assert isinstance(caught.value.original, LookupError)
    assert 'raise LookupError("no such token")' in str(caught.value)
    assert "worker.py" not in str(caught.value)


@pytest.mark.parametrize("how", ["sleeps", "stops"])
def test_a_worker_that_hangs_is_named_within_the_time_limit_and_nothing_is_left(
    how: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"had not returned after 3 s") as caught:
        run_workers(fail, 3, how, tmp_path, timeout=LIMIT, echo=False)
    assert time.monotonic() - began < LIMIT + 10
    assert (caught.value.rank, caught.value.how) == (1, "hung")
    text = str(caught.value)
    assert re.search(r"rank 0: test_parallel_launch\.py:\d+ in fail \(in all_reduce\)", text)
    assert "Only rank 1 is in no collective" in text
    if how == "sleeps":
        assert re.search(r"rank 1: test_parallel_launch\.py:\d+ in fail\n", text)
    assert gone(processes(tmp_path, ranks=3))


def test_a_rank_that_returns_early_does_not_end_the_others() -> None:
    def early(context: WorkerContext) -> float:
        if context.rank == 0:
            return 0.0
        time.sleep(0.5)
        value = torch.tensor(1.0)
        dist.send(value, 2) if context.rank == 1 else dist.recv(value, 1)
        return value.item()

    assert run_workers(early, 3, echo=False) == [0.0, 1.0, 1.0]


def test_the_next_run_works_after_one_that_failed(tmp_path: Path) -> None:
    with pytest.raises(WorkerError):
        run_workers(fail, 2, "killed", tmp_path, echo=False)
    assert len(run_workers(who, 2, echo=False)) == 2


def test_an_interrupt_ends_the_workers(tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "1").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    # A background job of a shell inherits that interrupts are ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_workers(fail, 2, "sleeps", tmp_path, timeout=60, echo=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone(processes(tmp_path, ranks=2))


def test_workers_die_with_the_script_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_parallel_launch import fail
            from llmcourse.train.parallel import run_workers
            run_workers(fail, 2, "sleeps", Path({str(tmp_path)!r}), timeout=120)
            """
        )
    )
    started = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not all((tmp_path / str(r)).exists() for r in range(2)) and time.monotonic() < until:
        time.sleep(0.1)
    nursery = [p.pid for p in psutil.Process(started.pid).children()]
    assert len(nursery) == 1
    time.sleep(0.3)
    started.kill()
    started.wait()
    assert gone([*processes(tmp_path, ranks=2), *nursery], within=10)


def test_workers_die_with_the_process_that_forked_them(tmp_path: Path) -> None:
    def kill_it() -> None:
        while not (tmp_path / "1").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        warm.warm_process().process.kill()

    threading.Thread(target=kill_it, daemon=True).start()
    with pytest.raises(WorkerError, match="the process that starts the workers ended"):
        run_workers(fail, 2, "sleeps", tmp_path, timeout=60, echo=False)
    assert gone(processes(tmp_path, ranks=2))
    assert len(run_workers(who, 2, echo=False)) == 2


def test_closing_leaves_no_process() -> None:
    run_workers(who, 2, echo=False)
    mine = psutil.Process()
    nurseries = [p.pid for p in mine.children() if "nursery" in " ".join(p.cmdline())]
    assert len(nurseries) == 1
    launch.close()
    assert gone(nurseries)


def test_what_cannot_be_sent_is_refused_before_anything_starts() -> None:
    with pytest.raises(ShapeError, match="cannot be sent to other processes"):
        run_workers(who, 2, threading.Lock())
    with pytest.raises(ShapeError, match="0 workers"):
        run_workers(who, 0)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there are as many GPUs")
def test_nccl_without_enough_gpus_is_refused() -> None:
    with pytest.raises(DeviceError, match="8 workers were asked for with NCCL"):
        run_workers(who, 8, backend="nccl")


def test_a_result_that_cannot_be_sent_back_is_the_workers_error() -> None:
    def locked(context: WorkerContext) -> object:
        return threading.Lock()

    with pytest.raises(WorkerError, match="cannot pickle"):
        run_workers(locked, 1, echo=False)


def test_the_same_script_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, torch.distributed as dist
            from llmcourse.train.parallel import run_workers, world

            def add(context, by):
                total = torch.tensor(float(context.rank + by))
                dist.all_reduce(total)
                return total.item()

            if __name__ == "__main__":
                print(f"results {list(run_workers(add, world(default=2), 10))}")
            """
        )
    )
    alone = [sys.executable, str(script)]
    many = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command, copies in ((alone, 1), (many, 2)):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("results [21.0, 21.0]") == copies


def test_under_torchrun_no_thread_of_the_group_is_left_when_python_ends(tmp_path: Path) -> None:
    """A thread that still lets go of a tensor then aborts the process, and with it the whole training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            import torch.distributed as dist
            from llmcourse.train.parallel import run_workers
            from llmcourse.train.parallel.torchrun import leave

            def threads():
                return len(os.listdir("/proc/self/task"))

            def work(context):
                import torch._dynamo  # as an optimizer does; it imports functions whose default is the group
                keeps = [dist.new_group([0])]
                keeps.append(keeps)
                return threads()

            before = threads()
            during, = run_workers(work, 1)
            leave()
            print("threads", during > before, threads() == before)
            """
        )
    )
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=os.environ | torchrun
    )
    assert "threads True True" in done.stdout, done.stderr


def test_every_error_of_the_course_travels_between_processes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in [k for k in kinds if issubclass(k, CourseError)]:
        error = pickle.loads(pickle.dumps(kind("what.", "why.", "this.")))
        assert type(error) is kind
        assert (error.what, str(error)) == ("what.", "what.\n  why.\n  Try this.")
