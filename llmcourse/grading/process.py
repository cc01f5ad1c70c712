"""One learner's process as the judge sees it: started, asked, ended.

Every way in which it can end, or fail to answer, becomes an `Ended` with a kind and a sentence that an
instructor and a learner understand. After that, or after `close`, neither the process nor anything
that it started is alive.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

from llmcourse.errors import SandboxError
from llmcourse.grading import sandbox, seccomp
from llmcourse.grading.channel import ChannelClosed, ChannelError, ChannelGarbage, ChannelTimeout, pair
from llmcourse.grading.limits import CHANNEL_LOST, MB, Limits
from llmcourse.grading.watch import Family, Watch

MODULE = "llmcourse.grading.learner"
MARK = "LLMCOURSE_SUBMISSION"
CHANNEL_CLOSED = "closed its connection to the judge"
EXIT_GRACE = 2.0  # seconds between the end of a channel and the end of its process
OWN_PROCESSES = 2  # of bubblewrap: outside, and first inside


class Ended(Exception):
    """The process is over. `kind` is a name such as TimeLimit; `says` goes on from "it …"."""

    def __init__(self, kind: str, says: str) -> None:
        self.kind, self.says = kind, says
        super().__init__(f"{kind}: it {says}")


def no_answer() -> Ended:
    return Ended("BadAnswer", "sent the judge something that is no answer")


class Process:
    """A learner's process, in a sandbox or (`sandboxed=False`) as a process like any other.

    It ends with the thread that started it: the kernel ends it when that thread is gone.

    Raises   SandboxError when it does not come up. No code of the learner's has run by then.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        sandboxed: bool = True,
        hide: Iterable[Path | str] = (),
        forbidden: Iterable[str] = (),
        slot: int = 0,
    ) -> None:
        self.limits, self.sandboxed = limits, sandboxed
        self.judging = 0.0  # seconds that functions of ours took within its calls
        self._n = 0
        self._functions: dict[int, Callable[..., Any]] = {}  # among the arguments of the call that runs
        self._numbers = count(1)
        self._folder = None if sandboxed else Path(tempfile.mkdtemp(prefix="llmcourse-"))
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        self.channel, theirs = pair(limits.message_mb * MB)
        with theirs:
            try:
                self._popen = self._start(theirs.fileno(), list(hide), list(forbidden), slot)
            except OSError as error:
                self.channel.close()
                self._remove_folder()
                raise _not_started(str(error)) from None
        self.family = Family(self._popen.pid, "" if sandboxed else self._mark, guarded=sandboxed)
        overhead, folders = (OWN_PROCESSES, tuple(sandbox.WRITABLE)) if sandboxed else (0, ())
        self.watch = Watch(self.family, limits, overhead, folders)
        try:
            self.channel.receive(monotonic() + limits.start_seconds)
        except ChannelError as error:
            raise _not_started(self._last_words() or str(error)) from None
        except BaseException:
            self.close()
            raise
        self.watch.start()

    def _start(
        self, fd: int, hide: list[Path | str], forbidden: list[str], slot: int
    ) -> subprocess.Popen[bytes]:
        settings = {
            "limits": asdict(self.limits),
            "forbidden": forbidden,
            "sandboxed": self.sandboxed,
            "own_user": self.sandboxed and _counts_its_own_processes(),
        }
        argv = [sys.executable, "-P", "-s", "-m", MODULE, str(fd), json.dumps(settings)]
        if self._folder is not None:
            env = os.environ | _course_environment(self._folder) | dict([self._mark.split("=")])
            return self._popen_with(argv, [fd], env=env, cwd=self._folder)
        with tempfile.TemporaryFile() as filter_file:
            filter_file.write(program := seccomp.program())
            filter_file.seek(0)
            filter_fd = filter_file.fileno() if program else None
            command = sandbox.command(
                argv, self.limits, hide=[*hide, *forbidden], slot=slot, filter_fd=filter_fd
            )
            # bubblewrap's own first process keeps the environment that it was started with.
            env = {"PATH": os.environ.get("PATH", os.defpath)}
            return self._popen_with(command, [fd, filter_file.fileno()], env=env)

    def _popen_with(self, argv: list[str], fds: list[int], **options: Any) -> subprocess.Popen[bytes]:
        nothing, said = subprocess.DEVNULL, subprocess.PIPE
        return subprocess.Popen(
            argv, pass_fds=fds, stdin=nothing, stdout=nothing, stderr=said, start_new_session=True, **options
        )

    def _last_words(self) -> str:
        """Close, and return the last line that a process that did not come up has written."""
        assert self._popen.stderr is not None
        with os.fdopen(os.dup(self._popen.stderr.fileno()), "rb") as said:
            self.close()
            lines = said.read(100_000).decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    # ── questions ────────────────────────────────────────────────────────────────────────────────

    def ask(self, seconds: float, late: str, **request: Any) -> dict[str, Any]:
        """The answer to a request (see `learner`). Functions in it stay here and are called from there.

        The time that such a function takes here does not count, up to as long again as `seconds`.

        Raises   Ended; when there is no answer within `seconds`, with `late` as what it did.
        """
        self._n += 1
        began = monotonic()
        deadline, latest = began + seconds, began + 2 * seconds
        self._functions = {}
        try:
            self.channel.send({"n": self._n, **request}, deadline, self._keep)
            while True:
                answer = self.channel.receive(deadline)
                if type(answer) is not dict or not _is(answer.get("n"), self._n):
                    raise ChannelGarbage("an answer to another question")
                if "ask" not in answer:
                    return answer
                started = monotonic()
                reply = self._call_here(answer)
                spent = monotonic() - started
                self.judging += spent
                deadline = min(deadline + spent, latest)
                self.channel.send(reply, deadline, self._keep)
        except ChannelTimeout:
            raise self._end(Ended("TimeLimit", late)) from None
        except ChannelGarbage:
            raise self._end(no_answer()) from None
        except ChannelClosed:
            raise self._end(None) from None
        except BaseException:  # ours, such as an interrupt: what is under way cannot be taken up again
            self.close()
            raise

    def look(self) -> None:
        """Raises Ended if what the last request left running is over a limit already."""
        if breach := self.watch.measure():
            raise self._end(Ended(*breach))

    def _keep(self, fn: Callable[..., Any]) -> int:
        """The number by which the other side calls `fn`."""
        for number, known in self._functions.items():
            if known is fn:
                return number
        self._functions[number := next(self._numbers)] = fn
        return number

    def _call_here(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            fn = self._functions.get(question["ask"])
            if fn is None:
                raise RuntimeError("that function was an argument of a call that is over")
            return {"value": fn(*question["args"], **question["kwargs"])}
        except Exception as error:
            return {"raised": type(error).__name__, "message": str(error)[:2000]}

    # ── the end ──────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """End it, and all that it started."""
        self.watch.stop()
        self.watch.measure()  # what was used since the last look counts too
        self.channel.close()
        self.family.end()
        try:
            self._popen.wait(EXIT_GRACE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        if self._popen.stderr is not None:
            self._popen.stderr.close()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, ended: Ended | None) -> Ended:
        """Close, and say how it ended: over a limit, as `ended` says, or by itself."""
        code: int | None = None
        if ended is None:
            try:
                code = self._popen.wait(EXIT_GRACE)
            except subprocess.TimeoutExpired:
                ended = Ended("ChannelClosed", CHANNEL_CLOSED)
        self.close()
        if self.watch.breach is not None:
            return Ended(*self.watch.breach)
        return ended or self._by_itself(code or 0)

    def _by_itself(self, code: int) -> Ended:
        number = -code if code < 0 else code - 128 if self.sandboxed and code > 128 else 0
        if code == CHANNEL_LOST:
            return Ended("ChannelClosed", CHANNEL_CLOSED)
        if number == signal.SIGXCPU:
            return Ended("CpuLimit", f"used up its {self.limits.cpu_seconds:g} s of processor time")
        try:
            how = f"was ended by {signal.Signals(number).name}"
        except ValueError:
            how = "ended its own process" + (f" (exit code {code})" if code else "")
        return Ended("ProcessDied", how)


def _not_started(reason: str) -> SandboxError:
    return SandboxError(
        f"the process for a submission did not start: {reason}.",
        "None of the submission's code had run by then, so it is not the submission's fault.",
        "llmcourse doctor, which says what this machine lacks; or fewer submissions at a time.",
    )


def _is(found: Any, number: int) -> bool:
    """Whether what arrived is that number: an array in its place would compare element by element."""
    return type(found) is int and found == number


def _course_environment(folder: Path) -> dict[str, str]:
    """Of the sandbox's environment, what a process on the learner's own machine needs too."""
    env = sandbox.environment(str(folder))
    theirs = ("HOME", "USER", "PATH", "LANG", "TMPDIR", "MPLCONFIGDIR", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in env.items() if name not in theirs}


def _counts_its_own_processes() -> bool:
    """Whether the kernel counts a sandbox's processes apart from its user's others: those of a user of
    its own, or since Linux 5.14 those of a user namespace."""
    if os.geteuid() == 0:
        return True
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)))) >= (5, 14)
