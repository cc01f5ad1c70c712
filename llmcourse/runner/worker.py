"""The process that executes one notebook: `python -m llmcourse.runner.worker`, started by `supervise`.

It reads its task as one line of JSON from standard input, and writes what happens as lines of JSON to
standard output (`Message` lists them). Standard input then stays open, and its end is the signal to
stop: however the run ends, even killed, the pipe closes, and the worker takes its kernel with it.

The executed copy is written as cells end, to a scratch file that then replaces the copy, so that it is
whole at every moment, whatever happens to this process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Literal, TypedDict

import psutil

from llmcourse.runner.discover import inspect, read
from llmcourse.runner.outcome import CellError, first_line

SAVES_SHARE = 0.05  # of the time may go into writing the executed copy
QUICK_SAVE = 0.02
SOURCE_KEPT, TRACEBACK_KEPT = 4_000, 20_000


class Task(TypedDict):
    """What a worker is told. Paths are absolute; `cwd` is where the kernel runs."""

    notebook: str
    executed: str
    scratch: str
    cwd: str
    parameters: dict[str, Any]
    start_timeout: float


class Message(TypedDict, total=False):
    """What a worker says.

    opened     total (code cells)
    kernel     pid
    cell       cell, line, source: the cell begins
    cell_done  cell, line, seconds, ok
    failed     error: a `CellError` as a dictionary, and exit_code where the kernel died
    ended      peak_mb. The last message; a worker that stops without it has died.
    """

    kind: Literal["opened", "kernel", "cell", "cell_done", "failed", "ended"]
    total: int
    pid: int
    cell: int
    line: str
    source: str
    seconds: float
    ok: bool
    error: dict[str, Any]
    exit_code: int | None
    peak_mb: float


class Record:
    """The engine's `Recorder`: turns what happens into messages, and keeps the executed copy on disk."""

    def __init__(self, say: Callable[[Message], None], executed: Path, source_cells: int) -> None:
        self.say = say
        self.executed = executed
        self.source_cells = source_cells
        self.nb: Any = None
        self.injected: int | None = None
        self.index: int | None = None
        self.began = self.saved = self.save_cost = 0.0
        self.cut: tuple[int, int] | None = None
        self.exit_code: int | None = None
        self.failed: CellError | None = None

    def number(self, index: int) -> int:
        """The source notebook's number, from 1, of the executed notebook's cell at `index`."""
        shifted = self.injected is not None and index >= self.injected
        return max(index, 1) if shifted else index + 1

    def failure(self, kind: str, message: str, index: int | None, traceback: str = "") -> CellError:
        if index is None:
            return CellError(kind, message, traceback=traceback)
        source = self.nb.cells[index].source
        return CellError(
            kind, message, self.number(index), first_line(source), source[:SOURCE_KEPT], traceback
        )

    def opened(self, nb: Any) -> None:
        self.nb = nb
        nb.metadata.papermill.update(input_path=self.executed.name, output_path=self.executed.name)
        if len(nb.cells) > self.source_cells:
            tags = [c.metadata.get("tags", []) for c in nb.cells]
            self.injected = next(i for i, t in enumerate(tags) if "injected-parameters" in t)
        total = sum(c.cell_type == "code" and bool(c.source.strip()) for c in nb.cells)
        self.say({"kind": "opened", "total": total})
        self.save()

    def kernel_started(self, pid: int) -> None:
        self.say({"kind": "kernel", "pid": pid})

    def kernel_lost(self, exit_code: int | None) -> None:
        self.exit_code = exit_code

    def cell_began(self, index: int) -> None:
        source = self.nb.cells[index].source
        self.index, self.began = index, monotonic()
        self.say(
            {
                "kind": "cell",
                "cell": self.number(index),
                "line": first_line(source),
                "source": source[:SOURCE_KEPT],
            }
        )

    def cell_ended(self, index: int, ok: bool) -> None:
        self.say(
            {
                "kind": "cell_done",
                "cell": self.number(index),
                "line": first_line(self.nb.cells[index].source),
                "seconds": monotonic() - self.began,
                "ok": ok and self.cut is None,
            }
        )
        if self.save_cost < QUICK_SAVE or self.save_cost < SAVES_SHARE * (monotonic() - self.saved):
            self.save()

    def output_cut(self, index: int, limit: int) -> None:
        self.cut = (index, limit)

    def closed(self) -> None:
        """The last cell that will run has run. (papermill adds cells of its own to a failed copy, later.)"""
        raised = [
            i for i, cell in enumerate(self.nb.cells) if cell.metadata.papermill.get("exception") is True
        ]
        if self.cut is not None:
            index, limit = self.cut
            self.failed = self.failure("output", f"it printed more than {limit / 1e6:.0f} MB", index)
        elif raised:
            self.failed = self._raised(self.nb.cells[raised[0]], raised[0])
        self.save()

    def _raised(self, cell: Any, index: int) -> CellError:
        from llmcourse.runner.engine import plain

        errors = [out for out in cell.outputs if out.output_type == "error"]
        if not errors:
            return self.failure("error", "it failed, and its kernel did not say why", index)
        name, value = errors[-1].ename, plain(errors[-1].evalue).strip()
        traceback = plain("\n".join(errors[-1].traceback))[-TRACEBACK_KEPT:]
        if name == "SystemExit":
            return self.failure(
                "exit", f"it called sys.exit({value}); the cells after it did not run", index, traceback
            )
        said = value.splitlines()[0] if value else ""
        return self.failure("error", f"{name}: {said}" if said else name, index, traceback)

    def save(self) -> None:
        import nbformat

        began = monotonic()
        scratch = self.executed.with_name(f".{self.executed.name}.part")
        try:
            scratch.write_text(nbformat.writes(self.nb), encoding="utf-8")
            os.replace(scratch, self.executed)
        finally:
            scratch.unlink(missing_ok=True)
        self.saved = monotonic()
        self.save_cost = self.saved - began


def work(task: Task, say: Callable[[Message], None]) -> None:
    """Execute the notebook of `task`. What goes wrong in the notebook is said, not raised."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from llmcourse.runner import engine

    engine.register()
    nb = read(Path(task["notebook"]))
    record = Record(say, Path(task["executed"]), len(nb.cells))
    failure: CellError | None = None
    try:
        papermill.execute_notebook(
            nb,
            None,
            parameters=declared(task["parameters"], inspect(nb)),
            engine_name=engine.ENGINE,
            recorder=record,
            scratch=Path(task["scratch"]),
            progress_bar=False,
            cwd=task["cwd"],
            start_timeout=task["start_timeout"],
        )
    except PapermillExecutionError:
        pass  # `record.failed` tells an error from one that the cell's tag `raises-exception` expects
    except engine.KernelStartError as error:
        failure = record.failure("start", str(error), None)
    except engine.KernelExitError as error:
        failure = record.failure("exit", str(error), record.index)
    except DeadKernelError:
        failure = record.failure("died", "its kernel died", record.index)
    if failure := record.failed or failure:
        say({"kind": "failed", "error": vars(failure), "exit_code": record.exit_code})


def declared(parameters: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name in names}


def main() -> None:
    say = _speaker()
    # jsonschema would spend a second on a grammar for internationalised URLs, which no notebook needs.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    task: Task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_run, args=(task["scratch"],), daemon=True).start()
    _offer_to_the_oom_killer()
    work(task, say)
    say({"kind": "ended", "peak_mb": _peak_mb()})
    os._exit(0)  # the copy is on disk and the kernel has ended: taking the interpreter apart is 0.5 s lost


def _speaker() -> Callable[[Message], None]:
    """Take standard output for messages alone; whatever else prints goes to standard error."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")  # not inherited by kernels
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: Message) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return say


def _end_with_the_run(scratch: str) -> None:
    while os.read(0, 1):  # not sys.stdin: its lock, held here, would stall the interpreter's shutdown
        pass
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    shutil.rmtree(scratch, ignore_errors=True)  # a run that was killed cannot do it
    os._exit(1)


def _offer_to_the_oom_killer() -> None:
    """When memory runs out, Linux should take a kernel (which inherits this), not the run itself."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _peak_mb() -> float:
    """The most memory that one child process held, in MB: exact, where sampling can miss a peak."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main()
