"""What a worker process does: join the group, call the function, write down what came of it.

A worker finds its orders in a folder (`call`, the pickled function with its arguments, and `spec.json`) and
leaves there `RANK.result` or `RANK.error`, each whole or not at all. What it prints goes to `RANK.log`, and
on the signal SIGUSR1, or when it crashes, it writes where it stands to `RANK.stack`, also in the midst of a
collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from llmcourse.files import write_whole

SHUTDOWN = "llmcourse/finished"


@dataclass(frozen=True)
class WorkerContext:
    """Who a worker is.

    rank, world_size    its number from 0, and how many there are
    local_rank          its number on its machine: which GPU is its own
    device              where its tensors belong: the CPU under gloo, its own GPU under NCCL
    backend             "gloo" or "nccl"
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    tagged: bool = False

    def log(self, text: object) -> None:
        """Print a line; the process that started the workers shows it with the rank before it."""
        print(f"[rank {self.rank}] {text}" if self.tagged else text, flush=True)


def device_of(backend: str, local_rank: int) -> torch.device:
    """The CPU, or under NCCL this rank's GPU, made the current one."""
    if "nccl" not in backend:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def join(
    rank: int, world_size: int, local_rank: int, backend: str, *, seconds: float, store: dist.Store | None
) -> WorkerContext:
    """Make this process rank `rank` of a process group. Without a store, torchrun's variables say where."""
    device = device_of(backend, local_rank)
    where = {} if store is None else {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=seconds),
        device_id=device if device.type == "cuda" else None,
        **where,  # type: ignore[arg-type]
    )
    return WorkerContext(rank, world_size, local_rank, device, backend, tagged=store is None)


def work(folder_name: str, rank: int) -> int:
    """Be rank `rank` of the run whose orders lie in `folder_name`; 0 if the function returned."""
    folder = Path(folder_name)
    spec = json.loads((folder / "spec.json").read_text())
    stack = open(folder / f"{rank}.stack", "w")  # noqa: SIM115 - open as long as the process lives
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(file=stack)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    try:
        prepare(spec, rank)
        seconds = float(spec["timeout"]) + 60  # the parent ends a run that takes too long, and says why
        store = dist.TCPStore(
            "127.0.0.1", spec["port"], None, False, timedelta(seconds=seconds), wait_for_workers=False
        )
        context = join(rank, spec["world_size"], rank, spec["backend"], seconds=seconds, store=store)
        function, arguments = pickle.loads((folder / "call").read_bytes())
        result = function(context, *arguments)
        write_whole(folder / f"{rank}.result", pickled(result), 0o600)
    except BaseException as error:
        report(folder / f"{rank}.error", error)
        return 1
    with contextlib.suppress(Exception):  # the result is written: what breaks now is another rank's end
        leave_together(store, spec["world_size"], seconds)
    return 0


def prepare(spec: dict[str, Any], rank: int) -> None:
    """The parent's environment, folder and import path; torchrun's variables; one thread; a fixed seed."""
    os.environ.clear()
    os.environ.update(spec["environment"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(spec["world_size"]),
        LOCAL_WORLD_SIZE=str(spec["world_size"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(spec["port"]),
    )
    os.chdir(spec["cwd"])
    sys.path[:] = spec["path"]
    torch.set_num_threads(1)
    torch.manual_seed(0)


def leave_together(store: dist.Store, world_size: int, seconds: float) -> None:
    """Wait until every rank has its result: a rank that goes first would break the others' connections."""
    if store.add(SHUTDOWN, 1) == world_size:
        store.set(SHUTDOWN + "/all", "1")
    store.wait([SHUTDOWN + "/all"], timedelta(seconds=seconds))
    dist.destroy_process_group()


def pickled(value: object) -> bytes:
    """By reference what a module has, by value what only a notebook has."""
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps(value)
    return cloudpickle.dumps(value)


def report(path: Path, error: BaseException) -> None:
    """Write type, text, the frames from the caller's function on, and the time of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = f"{os.sep}torch{os.sep}"  # of PyTorch's own frames, where it was raised will do
    shown = [f for f in frames[:-1] if f.filename != __file__ and inside not in f.filename] + frames[-1:]
    try:
        original: bytes | None = pickled(error)
    except Exception:
        original = None
    record = {
        "kind": type(error).__name__,
        "text": str(error),
        "frames": "".join(traceback.format_list(shown)),
        "at": time.time(),
    }
    write_whole(path, pickle.dumps(record | {"original": original}), 0o600)


def main() -> NoReturn:
    """A worker in a process of its own: folder and rank are on the command line."""
    code = work(sys.argv[1], int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
