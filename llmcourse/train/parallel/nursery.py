"""The process that workers are forked from: it has imported PyTorch, so that they start in milliseconds.

Importing PyTorch takes seconds, and four workers on two cores take four times that. So `launch` keeps one
process, without threads and without a GPU context, that waits for orders on its standard input and forks:

    {"start": {"folder": …, "ranks": 4, "fresh": false}}    fork a worker for each rank
    {"kill": true}                                          end all workers, and all that they started

and says on its standard output what becomes of them: ready, started (rank, pid), ended (rank, status).

It is also what makes sure that nothing is left behind. Each worker leads a process group of its own, which is
killed when the worker ends, however it ends; all of them are killed when standard input closes, that is when
the notebook or script that gave the orders is gone; and the kernel kills a worker whose nursery is killed
(`PR_SET_PDEATHSIG`, Linux).

A GPU context does not survive a fork. Workers for NCCL are therefore `fresh`: Python starts anew in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

IDLE_SECONDS = 900.0
PR_SET_PDEATHSIG = 1


class Nursery:
    """Children by pid, with their ranks. `private` are the file descriptors that no child may keep."""

    def __init__(self, answers: TextIO, private: Sequence[int]) -> None:
        self.answers, self.private = answers, private
        self.children: dict[int, int] = {}
        self.run = ""

    def say(self, **event: Any) -> None:
        self.answers.write(json.dumps(event) + "\n")
        self.answers.flush()

    def start(self, folder: str, ranks: int, fresh: bool) -> None:
        self.kill()  # of a run that was interrupted
        self.run = folder
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                become_worker(folder, rank, fresh, self.private)
            self.children[pid] = rank
            self.say(event="started", run=folder, rank=rank, pid=pid)

    def reap(self, *, wait: bool = False) -> None:
        while self.children:
            pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
            if pid == 0:
                return
            rank = self.children.pop(pid, None)
            if rank is not None:
                end_group(pid)
                code = os.waitstatus_to_exitcode(status)
                self.say(event="ended", run=self.run, rank=rank, status=code, at=time.time())

    def kill(self) -> None:
        for pid in self.children:
            end_group(pid)
            with contextlib.suppress(ProcessLookupError):  # not yet leader of a group
                os.kill(pid, signal.SIGKILL)
        self.reap(wait=True)


def end_group(pid: int) -> None:
    """Kill what is left of the process group that `pid` leads or led."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def become_worker(folder: str, rank: int, fresh: bool, private: Sequence[int]) -> NoReturn:
    """Never returns: the child does its work and ends without unwinding the nursery's frames."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        die_with_the_nursery()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(os.path.join(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if fresh:
            script = "from llmcourse.train.parallel.worker import main; main()"
            os.execv(sys.executable, [sys.executable, "-c", script, folder, str(rank)])
        for descriptor in private:
            os.close(descriptor)
        from llmcourse.train.parallel.worker import work

        code = work(folder, rank)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def die_with_the_nursery() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


def main() -> NoReturn:
    """Serve orders until standard input closes, or nothing was asked for `IDLE_SECONDS`."""
    try:
        serve()
    finally:
        os._exit(0)  # its children are gone: unloading PyTorch would take seconds


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints must not look like an answer
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    preload()
    nursery = Nursery(answers, (answers.fileno(), ended, wake))
    orders = b""
    try:
        nursery.say(event="ready")
        while True:
            ready, _, _ = select.select([0, ended], [], [], None if nursery.children else IDLE_SECONDS)
            if not ready:
                return
            if ended in ready:
                os.read(ended, 4096)
                nursery.reap()
            if 0 in ready:
                came = os.read(0, 1 << 16)
                if not came:
                    return
                *lines, orders = (orders + came).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    if "start" in order:
                        nursery.start(**order["start"])
                    else:
                        nursery.kill()
    except BrokenPipeError:  # nobody reads the answers
        pass
    finally:
        with contextlib.suppress(BrokenPipeError):
            nursery.kill()
        if nursery.run:  # of whoever was killed before it could clear up
            shutil.rmtree(nursery.run, ignore_errors=True)


def preload() -> None:
    """What nearly every worker imports. An optimizer's first step imports torch._dynamo: 2 s, once."""
    import torch
    import torch._dynamo
    import torch.distributed

    torch.set_num_threads(1)
