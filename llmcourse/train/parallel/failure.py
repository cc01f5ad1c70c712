"""What is said of a worker that failed: who it was, how it ended, and where it stood."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from llmcourse.errors import CourseError

LOST_CONNECTION = (
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
    "gloo",
)
OF_A_CONNECTION = ("DistBackendError", "DistNetworkError", "DistStoreError", "RuntimeError")
WAITING = (os.path.join("torch", "distributed", ""), os.path.join("torch", "cuda", ""))
NOT_THE_CALLERS = (
    f"{os.sep}torch{os.sep}",
    "<frozen ",
    '"<string>"',
    os.path.join("parallel", "worker.py"),
    os.path.join("parallel", "nursery.py"),
)


class WorkerError(CourseError, RuntimeError):
    """A worker raised, died or ran out of time. `rank` is the one to look at, `logs` each rank's lines.

    how         "raised", "died" or "hung"
    original    the exception that the worker raised, if there is one and it can be sent
    """

    def __init__(
        self,
        what: str,
        why: str,
        fix: str,
        *,
        rank: int,
        how: str,
        logs: list[list[str]],
        original: BaseException | None = None,
    ) -> None:
        super().__init__(what, why, fix)
        self.rank, self.how, self.logs, self.original = rank, how, logs, original


def is_consequence(record: dict[str, Any]) -> bool:
    """Whether an error only says that another rank is gone. The record has its `kind` and `text`."""
    return record["kind"] in OF_A_CONNECTION and any(sign in record["text"] for sign in LOST_CONNECTION)


def ending(status: int) -> str:
    """An exit status (negative for a signal) in words."""
    if status >= 0:
        return f"it left with exit code {status}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-status} ({signal.Signals(-status).name})"
    return f"killed by signal {-status}"


def indented(text: str) -> str:
    return text.rstrip().replace("\n", "\n  ")


class Stack:
    """Where a worker stood when it was asked or crashed: the frames of its main thread, innermost first."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(errors="replace") if path.exists() else ""
        # The last thread that faulthandler lists is the main one.
        lines = text.rpartition("most recent call first):")[2].partition("\n\n")[0].splitlines()
        self.frames = [line.strip() for line in lines if line.strip()]

    def __bool__(self) -> bool:
        return bool(self.frames)

    def __str__(self) -> str:
        own = [f for f in self.frames if not any(part in f for part in NOT_THE_CALLERS)] or self.frames
        inner = "" if own[:1] == self.frames[:1] else f" (in {self.frames[0].rpartition(' in ')[2]})"
        return ", called from ".join(short(f) for f in own[:3]) + inner

    @property
    def waits_for_others(self) -> bool:
        """Whether it stands in a collective, or waits for a GPU that does: then look at another rank."""
        return any(part in frame for part in WAITING for frame in self.frames)


def short(frame: str) -> str:
    """`File "/a/b/c.py", line 3 in f` as `c.py:3 in f`."""
    with contextlib.suppress(ValueError):
        file, rest = frame.removeprefix('File "').split('", line ', 1)
        return f"{Path(file).name}:{rest}"
    return frame
