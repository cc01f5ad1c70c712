"""Start worker processes from a notebook or a script, and get back what each returned.

    def shout(context, word):
        context.log(f"I am {context.rank} of {context.world_size}")
        return word * context.rank

    results = run_workers(shout, 3, "ho")        # ["", "ho", "hoho"]

Each worker is a process of its own in a `torch.distributed` group: gloo on CPUs, NCCL with one GPU each. The
function may come from a module or from a notebook cell (it is then sent by value). Workers start from a warm
process (`warm`, `nursery`), so that only the first run waits for PyTorch's import.

**When a worker fails.** In a collective every rank waits for every other, so one that is gone stops all. A
run therefore ends as a whole: the first rank that raises, dies or runs out of time is named in a
`WorkerError`, with its traceback (or, where it hangs, the line at which it stands) and its last lines; the
others are killed, with all processes that they started.

**Under torchrun** the processes are there already, on one machine or many. `run_workers` then calls the
function in this process, as the rank that torchrun gave it, and gathers the results on every rank: a script
written with `run_workers` runs unchanged as `python script.py` and as `torchrun script.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from llmcourse.errors import DeviceError, MissingPackageError, ShapeError
from llmcourse.files import write_whole
from llmcourse.train.parallel.failure import Stack, WorkerError, ending, indented, is_consequence
from llmcourse.train.parallel.nursery import end_group
from llmcourse.train.parallel.results import Results
from llmcourse.train.parallel.torchrun import as_a_rank, under_torchrun, world
from llmcourse.train.parallel.warm import WarmProcess, close, warm, warm_process
from llmcourse.train.parallel.worker import WorkerContext

__all__ = [
    "Results",
    "WorkerContext",
    "WorkerError",
    "close",
    "run_workers",
    "under_torchrun",
    "warm",
    "world",
]

START_SECONDS = 120.0  # for importing PyTorch on a busy machine
_ONE_RUN = threading.RLock()


def run_workers(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    backend: str = "gloo",
    echo: bool = True,
) -> Results:
    """Call `function(context, *args)` in `world_size` processes; what each returned, in order of rank.

    function    of a module or a notebook; its first argument is its `WorkerContext`
    timeout     seconds from the start of the workers until all must have returned
    backend     "gloo" (CPU) or "nccl" (one GPU each)
    echo        print the workers' lines as they come, each with its rank

    A worker computes on one thread, starts with torch.manual_seed(0), and sees this process's environment,
    current folder and import path. One run at a time: others that are started meanwhile wait for it.

    Raises WorkerError when a worker raises, dies or takes too long; no process of the run is left then.
    Raises DeviceError when there are fewer GPUs than workers, or this system cannot fork.
    """
    if world_size < 1:
        raise ShapeError(f"{world_size} workers.", "A group has at least one member.", "world_size = 2.")
    if not 0 < timeout < 1e7:
        raise ShapeError(f"a time limit of {timeout} s.", "A run ends some day.", "timeout = 60.")
    if under_torchrun():
        return as_a_rank(function, world_size, args, timeout, backend)
    _require_devices(world_size, backend)
    with _ONE_RUN, tempfile.TemporaryDirectory(prefix="llmcourse-workers-") as folder:
        return _Run(Path(folder), world_size, timeout, backend, echo).of(function, args)


# ── one run ──────────────────────────────────────────────────────────────────────────────────────


class _Run:
    """The workers of one call, by rank: where they write, what they print, how they ended."""

    def __init__(self, folder: Path, world_size: int, timeout: float, backend: str, echo: bool) -> None:
        self.folder, self.world_size, self.timeout = folder, world_size, timeout
        self.backend, self.echo = backend, echo
        self.pids: dict[int, int] = {}
        self.ended: dict[int, tuple[int, float]] = {}  # rank: exit status (negative for a signal), when
        self.tails = [_Tail(folder / f"{rank}.log") for rank in range(world_size)]

    def of(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Results:
        store = dist.TCPStore(
            "127.0.0.1", 0, None, True, timedelta(seconds=self.timeout + 60), wait_for_workers=False
        )
        self._write_orders(function, args, store.port)
        nursery = warm_process()
        began = time.monotonic()
        try:
            nursery.order(
                start={
                    "folder": str(self.folder),
                    "ranks": self.world_size,
                    "fresh": _needs_fresh_processes(self.backend),
                }
            )
            began = self._wait(nursery)
        finally:  # also after an interrupt
            self._end(nursery)
            self._show_lines(last=True)
        results = Results(self._result(rank) for rank in range(self.world_size))
        results.logs, results.seconds = self.logs, time.monotonic() - began
        return results

    @property
    def logs(self) -> list[list[str]]:
        return [tail.lines for tail in self.tails]

    def _write_orders(self, function: Callable[..., Any], args: tuple[Any, ...], port: int) -> None:
        write_whole(self.folder / "call", _pickled_call(function, args), 0o600)
        local = {"GLOO_SOCKET_IFNAME": _loopback(), "NCCL_SOCKET_IFNAME": _loopback()}
        environment = local | dict(os.environ)
        spec = {
            "world_size": self.world_size,
            "backend": self.backend,
            "timeout": self.timeout,
            "port": port,
            "cwd": os.getcwd(),
            "path": [str(entry) for entry in sys.path],
            "environment": environment,
        }
        write_whole(self.folder / "spec.json", json.dumps(spec), 0o600)

    def _wait(self, nursery: WarmProcess) -> float:
        """Until all ranks ended well; when they started. Raises WorkerError for the first that did not."""
        began, deadline = 0.0, time.monotonic() + START_SECONDS
        while len(self.ended) < self.world_size:
            self._hear(nursery, 0.02)
            if self.pids and not began:
                began = time.monotonic()
                deadline = began + self.timeout
            self._show_lines()
            if nursery.gone:
                raise self._lost_nursery()
            if self._failed():
                self._settle(nursery)
                raise self._failure()
            if time.monotonic() > deadline:
                raise self._too_late()
        return began

    def _hear(self, nursery: WarmProcess, seconds: float) -> None:
        for event in nursery.events(seconds):
            if event.get("run") != str(self.folder):
                continue  # of a run that was interrupted
            if event["event"] == "started":
                self.pids[event["rank"]] = event["pid"]
            else:
                self.ended[event["rank"]] = (event["status"], event["at"])

    def _settle(self, nursery: WarmProcess) -> None:
        """Wait a moment, longer where only lost connections are known: who failed first may be heard last."""
        began = time.monotonic()
        while len(self.ended) < self.world_size and not nursery.gone:
            waited = time.monotonic() - began
            if waited > 3 or (waited > 0.3 and self._causes()):
                break
            self._hear(nursery, 0.02)
        self._show_lines(last=True)

    def _end(self, nursery: WarmProcess) -> None:
        """No process of this run is alive when this returns."""
        if len(self.ended) == self.world_size:
            return
        with contextlib.suppress(OSError):
            nursery.order(kill=True)
            until = time.monotonic() + 5
            while len(self.ended) < self.world_size and time.monotonic() < until and not nursery.gone:
                self._hear(nursery, 0.05)
        if len(self.ended) < self.world_size:
            close()
            for rank, pid in self.pids.items():
                if rank not in self.ended:
                    end_group(pid)

    def _show_lines(self, *, last: bool = False) -> None:
        for rank, tail in enumerate(self.tails):
            for line in tail.new_lines(last=last):
                if self.echo:
                    print(f"[rank {rank}] {line}", flush=True)

    # ── how it ended ─────────────────────────────────────────────────────────────────────────────

    def _has(self, what: str, rank: int) -> bool:
        return (self.folder / f"{rank}.{what}").exists()

    def _result(self, rank: int) -> Any:
        return pickle.loads((self.folder / f"{rank}.result").read_bytes())

    def _failed(self) -> list[int]:
        """The ranks that ended without a result."""
        return [rank for rank in sorted(self.ended) if not self._has("result", rank)]

    def _raised(self) -> dict[int, dict[str, Any]]:
        """What ranks have written of their exceptions."""
        return {
            rank: pickle.loads((self.folder / f"{rank}.error").read_bytes())
            for rank in range(self.world_size)
            if self._has("error", rank)
        }

    def _causes(self) -> list[int]:
        """The failed ranks but for those that only lost their connection to another."""
        raised = self._raised()
        return [r for r in {*self._failed(), *raised} if r not in raised or not is_consequence(raised[r])]

    def _failure(self) -> WorkerError:
        """What to say of the rank that failed first."""
        raised = self._raised()
        rank = min(
            self._causes() or {*self._failed(), *raised},
            key=lambda r: raised[r]["at"] if r in raised else self.ended[r][1],
        )
        where = f"rank {rank} of {self.world_size}"
        if rank in raised:
            record = raised[rank]
            return self._error(
                f"{where} raised {record['kind']}: {record['text']}",
                "It came from\n  " + indented(record["frames"]),
                "the same with world_size = 1, or context.log before the line that fails.",
                rank=rank,
                how="raised",
                original=record["original"],
            )
        stood = f"It stood at {self._stack(rank)}. " if self._stack(rank) else ""
        return self._error(
            f"{where} died: {ending(self.ended[rank][0])}.",
            f"{stood}The other ranks would have waited for it for ever, and were ended.",
            "looking at its last lines; a process that is killed from outside often ran out of memory.",
            rank=rank,
            how="died",
        )

    def _too_late(self) -> WorkerError:
        waiting = [r for r in range(self.world_size) if not self._has("result", r)]
        for rank in waiting:
            if rank in self.pids and rank not in self.ended:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(self.pids[rank], signal.SIGUSR1)
        until = time.monotonic() + 0.5
        while time.monotonic() < until and not all(self._stack(rank) for rank in waiting):
            time.sleep(0.02)
        time.sleep(0.05)  # a stack is written line by line
        waiting = waiting or [0]  # all have their results, and one does not end
        names = ", ".join(map(str, waiting))
        plural = "s" if len(waiting) > 1 else ""
        done = f" ({self.world_size - len(waiting)} returned)" if len(waiting) < self.world_size else ""
        astray = [r for r in waiting if not self._stack(r).waits_for_others]
        look = f"\n  Only rank {astray[0]} is in no collective." if len(astray) == 1 < len(waiting) else ""
        return self._error(
            f"rank{plural} {names} of {self.world_size} had not returned after {self.timeout:g} s{done}.",
            "Where each stood:\n"
            + "\n".join(f"    rank {r}: {self._stack(r) or 'it did not answer'}" for r in waiting)
            + look,
            "a longer timeout if this was work; if ranks wait, every send needs its recv, and all ranks "
            "must call the same collectives in the same order.",
            rank=(astray or waiting)[0],
            how="hung",
        )

    def _stack(self, rank: int) -> Stack:
        return Stack(self.folder / f"{rank}.stack")

    def _lost_nursery(self) -> WorkerError:
        return self._error(
            "the process that starts the workers ended.",
            "Something outside killed it, most often for want of memory.",
            "fewer workers, or smaller ones.",
            rank=0,
            how="died",
        )

    def _error(
        self, what: str, why: str, fix: str, *, rank: int, how: str, original: bytes | None = None
    ) -> WorkerError:
        self._show_lines(last=True)
        if lines := self.logs[rank][-8:]:
            why += f"\n  Last lines of rank {rank}:\n" + "\n".join(f"    {line}" for line in lines)
        cause = None
        if original is not None:
            with contextlib.suppress(Exception):
                cause = pickle.loads(original)
        return WorkerError(what, why, fix, rank=rank, how=how, logs=self.logs, original=cause)


class _Tail:
    """The lines of a growing file, each once."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[str]()
        self._at, self._rest = 0, b""

    def new_lines(self, *, last: bool) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._at)
            came = file.read()
        self._at += len(came)
        *whole, self._rest = (self._rest + came).split(b"\n")
        if last and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        new = [line.decode(errors="replace") for line in whole]
        self.lines += new
        return new


def _pickled_call(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The function with its arguments: by reference where a worker can import it, else by value."""
    try:
        import cloudpickle
    except ImportError as missing:
        try:
            return pickle.dumps((function, args))
        except (pickle.PicklingError, AttributeError, TypeError):
            raise MissingPackageError(
                "cloudpickle is not installed.",
                "A function that no module has, such as a notebook's, goes to the workers through it.",
                "pip install cloudpickle.",
            ) from missing
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    module = sys.modules.get(getattr(inner, "__module__", None) or "")
    with contextlib.ExitStack() as undo:
        if module is not None and module.__name__ != "__main__" and not _importable(module):
            cloudpickle.register_pickle_by_value(module)
            undo.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            return cloudpickle.dumps((function, args))
        except Exception as error:
            raise ShapeError(
                f"the function or its arguments cannot be sent to other processes: {error}.",
                "They are pickled; locks, open files, generators and running processes cannot be.",
                "building such things inside the function.",
            ) from error


def _importable(module: ModuleType) -> bool:
    try:
        return importlib.util.find_spec(module.__name__) is not None
    except (ImportError, ValueError):
        return False


def _needs_fresh_processes(backend: str) -> bool:
    """Neither a GPU's context nor macOS's frameworks survive a fork."""
    return "nccl" in backend or sys.platform == "darwin"


def _require_devices(world_size: int, backend: str) -> None:
    if not hasattr(os, "fork"):
        raise DeviceError(
            f"worker processes cannot be forked on {sys.platform}.",
            "They start as copies of one process that has imported PyTorch.",
            "Linux, macOS, or WSL on Windows.",
        )
    if "nccl" in backend and (found := torch.cuda.device_count()) < world_size:
        raise DeviceError(
            f"{world_size} workers were asked for with NCCL, and there are {found} GPUs.",
            "NCCL gives each process a GPU of its own.",
            f"world_size = {found}, or backend='gloo'." if found else "backend='gloo'.",
        )


def _loopback() -> str:
    """The interface by which processes of one machine find each other: no host name has to be resolved."""
    return "lo0" if sys.platform == "darwin" else "lo"
