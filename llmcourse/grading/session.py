"""A submission at work: its cells run in order, then its functions answer calls.

    with Session(cells, forbidden=lab.forbidden, slot=3) as session:
        results = session.run()
        sum_to = RemoteSubject(session, "sum_to")
        sum_to(np.ones((3, 2)))

A cell or a call may hang, end its own process or use more than it is given. It is then marked with what
it did, and the next request finds a new process in which the cells before have run again, without those
that ended one. So one exercise that hangs does not take the marks of the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from llmcourse.grading.limits import Limits
from llmcourse.grading.outputs import clean_text, cleaned
from llmcourse.grading.perform import Call, Failure
from llmcourse.grading.process import Ended, Process, no_answer

LEFT_BEHIND = {
    "ProcessDied",
    "ProcessLimit",
    "MemoryLimit",
    "CpuLimit",
    "FileLimit",
    "ChannelClosed",
    "BadAnswer",
}


@dataclass(frozen=True)
class Cell:
    """A code cell: its id, and its source as it is to be run."""

    id: str
    source: str


@dataclass
class CellResult:
    """What became of a cell.

    outputs   in the notebook format's form: text and PNG pictures
    error     what it raised
    note      why its process was ended, or why the cell did not run; empty for most
    """

    id: str
    outputs: list[dict[str, Any]] = field(default_factory=list)
    error: Failure | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None and not self.note


class LearnerError(Exception):
    """A learner's function raised, or gave no result. `kind` names the exception or the limit."""

    def __init__(self, failure: Failure) -> None:
        self.failure, self.kind, self.message = failure, failure.kind, failure.message
        super().__init__(f"{failure.kind}: {failure.message}")


class Session:
    """One submission's cells, and calls of the functions that they define.

    hide        files and folders (Path), modules (str) that are out of its sight
    forbidden   modules whose import fails, and that are out of its sight
    slot        a number that no other session has at the same time; by default, this process's id
    sandbox     False: an ordinary process, for a learner's own code on their own machine

    Use it in one thread: its processes end with the thread that started them.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        *,
        limits: Limits | None = None,
        sandbox: bool = True,
        hide: Iterable[Path | str] = (),
        forbidden: Iterable[str] = (),
        slot: int | None = None,
    ) -> None:
        self.cells, self.limits, self.sandbox = list(cells), limits or Limits(), sandbox
        self.slot = os.getpid() if slot is None else slot
        self.hide, self.forbidden = list(hide), list(forbidden)
        self.results: list[CellResult] = []
        self.starts = 0
        self.seconds = self.cpu_seconds = self.peak_mb = 0.0
        self._process: Process | None = None
        self._fatal: set[int] = set()  # cells that ended a process, and are not run again
        self._served = 0  # calls that the process has answered
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # ── what is asked of it ──────────────────────────────────────────────────────────────────────

    def run(self) -> list[CellResult]:
        """Run all cells in order, once. Raises SandboxError if no process can be started."""
        while (index := len(self.results)) < len(self.cells):
            result = CellResult(self.cells[index].id)
            try:
                self._run_cell(index, result)
            except Ended as ended:
                result.note = ended.says
            self.results.append(result)
            if self.seconds >= self.limits.wall_seconds:
                why = f"was not run: the submission {self._out_of_time().says}"
                self.results += [CellResult(cell.id, note=why) for cell in self.cells[index + 1 :]]
        return self.results

    def defines(self, name: str) -> bool:
        """Whether the cells, once run, have defined a function called `name`."""
        try:
            answer = self._request("did not answer", do="defines", name=name)
        except Ended:
            return False
        return answer.get("defines") is True

    def call(self, name: str, args: Sequence[Any], watch: Sequence[str] = (), grads: bool = False) -> Call:
        """Call a function of the notebook (see `perform`). Functions among the arguments run here.

        A function that hangs, ends its process or exceeds a limit gives a call whose error has the kind
        TimeLimit, WallLimit, ProcessDied, MemoryLimit, ProcessLimit, CpuLimit, FileLimit, ChannelClosed or
        BadAnswer; one whose result is too large, MessageTooLarge.
        """
        args = tuple(args)
        began = monotonic()
        while True:
            worn = self._process is not None and self._served > 0
            try:
                return self._call(name, args, list(watch), grads)
            except Ended as ended:
                # What an earlier call left behind may have done it. Oracles count: they are asked once.
                if worn and ended.kind in LEFT_BEHIND and not any(callable(a) for a in args):
                    continue
                who = "the submission" if ended.kind == "WallLimit" else name
                error = Failure(ended.kind, f"{who} {ended.says}")
                return Call(args, error=error, seconds=monotonic() - began)

    def _call(self, name: str, args: tuple[Any, ...], watch: list[str], grads: bool) -> Call:
        late = f"did not return within {self.limits.call_seconds:g} s"
        answer = self._request(late, do="call", name=name, args=args, watch=watch, grads=grads)
        self._served += 1
        try:
            return Call.from_plain(answer["call"], args)
        except Exception:  # whatever a wrong form leads to
            self._drop()
            raise no_answer() from None

    def close(self) -> None:
        """End the process and all that it started. The session cannot be used again."""
        self._closed = True
        self._drop()

    # ── processes ────────────────────────────────────────────────────────────────────────────────

    def _request(self, late: str, **request: Any) -> dict[str, Any]:
        if len(self.results) < len(self.cells):
            self.run()
        return self._ask(self._ready(len(self.cells)), self.limits.call_seconds, late, **request)

    def _run_cell(self, index: int, result: CellResult) -> None:
        process = self._ready(index)
        began = monotonic()
        try:
            answer = self._ask_for_cell(process, index)
            result.outputs = cleaned(answer, index + 1, self.limits.output_chars)
            result.error = None if answer["error"] is None else _failure(answer["error"])
        except Exception as error:
            self._fatal.add(index)
            if isinstance(error, Ended):
                raise
            self._drop()
            raise no_answer() from None  # whatever a wrong form led to
        finally:
            result.seconds = monotonic() - began

    def _ask_for_cell(self, process: Process, index: int) -> dict[str, Any]:
        cell, limit = self.cells[index], self.limits.cell_seconds
        late = f"did not end within {limit:g} s"
        return self._ask(process, limit, late, do="cell", id=cell.id, source=cell.source)

    def _ready(self, count: int) -> Process:
        """A process in which the first `count` cells have run, but for those that ended one."""
        if self._closed:
            raise Ended("Closed", "was closed")
        while self._process is None:
            process = self._start()
            try:
                for index in [i for i in range(count) if i not in self._fatal]:
                    self._ask_for_cell(process, index)
            except Ended as ended:
                if ended.kind == "WallLimit":
                    raise
                self._fatal.add(index)
                self.results[index].note = f"{ended.says}, when it was run again"
        return self._process

    def _start(self) -> Process:
        self._wall_left()
        began = monotonic()
        self._process = Process(
            self.limits,
            sandboxed=self.sandbox,
            hide=self.hide,
            forbidden=self.forbidden,
            slot=self.slot,
        )
        self.starts += 1
        self._served = 0
        self.seconds += monotonic() - began
        return self._process

    def _ask(self, process: Process, seconds: float, late: str, **request: Any) -> dict[str, Any]:
        left = self._wall_left()
        began, judging = monotonic(), process.judging
        try:
            answer = process.ask(min(seconds, left), late, **request)
            if request["do"] == "cell":
                process.look()  # what a cell left running is the cell's, and not the next call's
            return answer
        except BaseException as error:
            self._drop()
            if isinstance(error, Ended) and error.kind == "TimeLimit" and left < seconds:
                raise self._out_of_time() from None
            raise
        finally:
            self.seconds += monotonic() - began - (process.judging - judging)

    def _wall_left(self) -> float:
        left = self.limits.wall_seconds - self.seconds
        if left <= 0:
            raise self._out_of_time()
        return left

    def _out_of_time(self) -> Ended:
        return Ended("WallLimit", f"used up the {self.limits.wall_seconds:g} s that a submission has")

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()
            self.cpu_seconds += process.watch.cpu_seconds
            self.peak_mb = max(self.peak_mb, process.watch.peak_mb)


def _failure(found: dict[str, Any]) -> Failure:
    """What a cell raised, rebuilt. Raises KeyError, TypeError or ValueError if it is none."""
    kind, message, source, trace = (
        clean_text(found[k])[:6000] for k in ("kind", "message", "source", "trace")
    )
    return Failure(kind, message, int(found["line"]), source, trace)


class RemoteSubject:
    """A function of a submission, for `judge`; and, called like a function, for an instructor's cells.

    Once it has not returned in time it is not called again: an exercise whose function hangs would
    otherwise use up the time of the others, check by check.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self.__name__ = name
        self._hung: Failure | None = None

    def call(self, args: Sequence[Any], watch: Sequence[str] = (), grads: bool = False) -> Call:
        """See `Session.call`."""
        if self._hung is not None:
            return Call(tuple(args), error=self._hung)
        call = self.session.call(self.name, args, watch, grads)
        if call.error is not None and call.error.kind == "TimeLimit":
            self._hung = call.error
        return call

    def __getitem__(self, shape: Sequence[Any]) -> Any:
        """A launch of a CUDA kernel, `fn[grid, block](…)`: it runs in this process (see `kernel_subject`)."""
        from llmcourse.grading.kernel_subject import JudgedLauncher

        return JudgedLauncher(self, shape)

    def __call__(self, *args: Any) -> Any:
        """The function's value. Raises LearnerError if it has none."""
        call = self.call(args)
        if call.error is not None:
            raise LearnerError(call.error)
        return call.value
