"""One notebook, in a process of its own, watched.

    run ── supervise (a thread here) ── worker (process: papermill, nbclient) ── kernel (process)

The worker drives the kernel and says what happens; the supervisor holds the clock. It interrupts a
cell that takes too long, kills a kernel that will not be interrupted, notices a worker that died, adds
up the kernel's memory, and when it returns no process that the notebook started is alive.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from time import monotonic
from typing import IO, Any

import psutil

from llmcourse.runner.discover import refuse_to_overwrite
from llmcourse.runner.outcome import CellError, CellRun, Event, Outcome
from llmcourse.runner.worker import Message, Task

TICK = 0.1
MEASURE_EVERY = 0.4
INTERRUPT_GRACE = 3.0  # seconds from a cell's interrupt to the kill of its kernel
LOST_GRACE = 5.0  # and from there to the kill of the worker
SILENCE = 60.0  # seconds that a worker may say nothing while no cell runs


def execute(
    path: Path,
    out: Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    cell_timeout: float = 120.0,
    start_timeout: float = 60.0,
    name: str | None = None,
    threads: int | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Outcome:
    """Execute one notebook in a process of its own; write the executed copy to `out`/NAME.ipynb.

    Parameters are passed as far as the notebook declares them. `cell_timeout` is in seconds, 0 for no
    limit. `threads` bounds the kernel's numeric threads. A failing notebook is an `Outcome` whose
    `error` says where and why; nothing is raised for it.
    """
    return Supervisor(
        path,
        out,
        parameters=parameters,
        cell_timeout=cell_timeout,
        start_timeout=start_timeout,
        name=name,
        threads=threads,
        on_event=on_event,
    ).run()


class Supervisor:
    """`execute`, as an object: another thread may `stop()` it and read `used_mb`."""

    def __init__(
        self,
        path: Path,
        out: Path,
        *,
        parameters: Mapping[str, Any] | None = None,
        cell_timeout: float = 120.0,
        start_timeout: float = 60.0,
        name: str | None = None,
        threads: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.path = Path(path).resolve()
        self.name = name or self.path.stem
        self.executed = Path(out).resolve() / f"{self.name}.ipynb"
        refuse_to_overwrite([self.path], out)
        self.parameters = dict(parameters or {})
        self.cell_timeout, self.start_timeout = cell_timeout, start_timeout
        self.threads = threads
        self.on_event = on_event or (lambda event: None)
        self.used_mb = self.peak_mb = 0.0
        self.total = 0
        self.cells: list[CellRun] = []
        self.current: Message | None = None  # the cell that runs, or that failed last
        self.error: CellError | None = None
        self.ended = False
        self._stop = threading.Event()
        self._kernel: psutil.Process | None = None
        self._family: dict[int, psutil.Process] = {}
        self._heard = self._measured = monotonic()
        self._interrupted: float | None = None
        self._ticking = False  # a cell runs, and its time counts

    def stop(self) -> None:
        """End the notebook now, with everything that it started."""
        self._stop.set()

    def run(self) -> Outcome:
        began = monotonic()
        self.executed.parent.mkdir(parents=True, exist_ok=True)
        self.executed.unlink(missing_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="llmcourse-"))
        try:
            with open(scratch / "worker.log", "wb") as log:
                exit_code = self._watch(scratch, log)
            if not self.ended and self.error is None:
                log_tail = _tail(scratch / "worker.log")
                reason = f": {log_tail.splitlines()[-1]}" if log_tail and exit_code > 0 else ""
                ending = f"the process that drives its kernel {how_it_ended(exit_code)}{reason}"
                self.error = self._fail("worker", ending, log_tail)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        outcome = Outcome(
            name=self.name,
            ok=self.error is None,
            seconds=monotonic() - began,
            executed_path=self.executed if self.executed.is_file() else None,
            error=self.error,
            cells=self.cells,
            total_cells=self.total,
            peak_mb=round(self.peak_mb, 1) or None,
        )
        self._tell("finished", ok=outcome.ok, seconds=outcome.seconds, message=str(self.error or ""))
        return outcome

    # ── the worker ───────────────────────────────────────────────────────────────────────────────

    def _watch(self, scratch: Path, log: IO[bytes]) -> int:
        """Start the worker, follow it to its end, and return its exit code."""
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "llmcourse.runner.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=self._environment(scratch),
            start_new_session=True,  # a Ctrl-C in the terminal is the run's to handle, not the kernel's
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        inbox: Queue[Message | None] = Queue()
        threading.Thread(target=_listen, args=(worker.stdout, inbox), daemon=True).start()
        try:
            self._hand_over(worker.stdin, scratch)
            while True:
                try:
                    message = inbox.get(timeout=TICK)
                except Empty:
                    message = {}
                if message is None:
                    break
                if message:
                    self._hear(message)
                if self._stop.is_set():
                    self.error = self.error or self._fail("stopped", "the run was stopped")
                    break
                self._measure()
                if self._keep_time():
                    break
        finally:
            self._end(worker)
        return worker.returncode

    def _hand_over(self, channel: IO[bytes], scratch: Path) -> None:
        task: Task = {
            "notebook": str(self.path),
            "executed": str(self.executed),
            "scratch": str(scratch),
            "cwd": str(self.path.parent),
            "parameters": self.parameters,
            "start_timeout": self.start_timeout,
        }
        with suppress(BrokenPipeError):  # it died at once: the end of its output says so
            channel.write(json.dumps(task).encode() + b"\n")
            channel.flush()

    def _environment(self, scratch: Path) -> dict[str, str]:
        """The kernel's environment: no learner progress is touched, hashes repeat, threads are shared out."""
        env = os.environ | {
            "LLMCOURSE_PROGRESS": str(scratch / "progress.json"),
            "PYTHONHASHSEED": "0",
            "JUPYTER_PREFER_ENV_PATH": "1",  # `python3` is this Python, whatever kernels the user has
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # no debugger advice on standard error
        }
        if self.threads is not None:
            for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                env.setdefault(variable, str(self.threads))
        checkout = Path(__file__).resolve().parents[2]
        if (checkout / "pyproject.toml").is_file():  # the kernel imports the same package as the run
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), env.get("PYTHONPATH")]))
        return env

    # ── what it says ─────────────────────────────────────────────────────────────────────────────

    def _hear(self, message: Message) -> None:
        self._heard = monotonic()
        match message["kind"]:
            case "opened":
                self.total = message["total"]
                self._tell("started", total=self.total)
            case "kernel":
                with suppress(psutil.NoSuchProcess):
                    self._kernel = psutil.Process(message["pid"])
            case "cell":
                self.current, self._ticking = message, True
                self._tell("cell", cell=message["cell"], line=message["line"], total=self.total)
            case "cell_done":
                self.current, self._ticking = None if message["ok"] else self.current, False
                run = CellRun(
                    message["cell"],
                    message["line"],
                    round(message["seconds"], 3),
                    message["ok"] and self._interrupted is None,
                )
                self.cells.append(run)
                self._tell("cell_done", cell=run.cell, line=run.line, seconds=run.seconds, ok=run.ok)
            case "failed":
                self.current, self._ticking = None, False
                if self.error is None:
                    self.error = self._explain(CellError(**message["error"]), message["exit_code"])
            case "ended":
                self.ended = True
                self.peak_mb = max(self.peak_mb, message["peak_mb"])

    def _explain(self, error: CellError, exit_code: int | None) -> CellError:
        if error.kind != "died":
            return error
        said = f"its kernel {how_it_ended(exit_code)}"
        if exit_code == -signal.SIGKILL:
            said += f"; most often the machine ran out of memory (it held {self.peak_mb:,.0f} MB)"
        return replace(error, message=said)

    def _fail(self, kind: str, message: str, traceback: str = "") -> CellError:
        at = self.current
        if at is None:
            return CellError(kind, message, traceback=traceback)
        return CellError(kind, message, at["cell"], at["line"], at["source"], traceback)

    def _tell(self, kind: str, **details: Any) -> None:
        self.on_event(Event(kind, self.name, **details))

    # ── time and memory ──────────────────────────────────────────────────────────────────────────

    def _keep_time(self) -> bool:
        """Act on what takes too long; True when the worker itself is past saving."""
        now = monotonic()
        if self._interrupted is not None:
            late = now - self._interrupted
            if late > INTERRUPT_GRACE:
                self._kill_kernel()
            return late > INTERRUPT_GRACE + LOST_GRACE
        waited = now - self._heard
        if self._ticking:
            if self.cell_timeout and waited > self.cell_timeout:
                self.error = self._fail("timeout", f"it took more than {self.cell_timeout:g} s")
                self._interrupted = now
                _signal_group(self._kernel, signal.SIGINT)
            return False
        if waited > SILENCE + 2 * self.start_timeout:
            self.error = self.error or self._fail("worker", f"nothing was heard of it for {waited:.0f} s")
            return True
        return False

    def _measure(self) -> None:
        """Add up the memory of the kernel and its children, and remember who they are."""
        now = monotonic()
        if self._kernel is None or now - self._measured < MEASURE_EVERY:
            return
        self._measured = now
        used = 0
        try:
            for process in [self._kernel, *self._kernel.children(recursive=True)]:
                self._family[process.pid] = process
                used += process.memory_info().rss
        except psutil.Error:
            pass
        self.used_mb = used / 1e6
        self.peak_mb = max(self.peak_mb, self.used_mb)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────

    def _end(self, worker: subprocess.Popen[bytes]) -> None:
        """Leave no process behind: the worker, the kernel, or what its cells started."""
        assert worker.stdin is not None
        if self.ended:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(LOST_GRACE)
        with suppress(BrokenPipeError):
            worker.stdin.close()  # the worker's sign to kill its kernel and end
        try:
            worker.wait(LOST_GRACE)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        self._kill_kernel()
        self.used_mb = 0.0

    def _kill_kernel(self) -> None:
        if self._kernel is None:
            return
        for process in self._family.values():
            with suppress(psutil.Error):
                process.kill()  # psutil makes sure that it is still the same process
        _signal_group(self._kernel, signal.SIGKILL)


def _listen(channel: IO[bytes], inbox: Queue[Message | None]) -> None:
    with channel:
        for line in channel:
            try:
                inbox.put(json.loads(line))
            except ValueError:
                break  # cut off in the middle: the worker died while it wrote
    inbox.put(None)


def _signal_group(kernel: psutil.Process | None, number: int) -> None:
    """Signal a kernel and what it started: a kernel leads a process group of its own."""
    if kernel is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(kernel.pid, number)


def how_it_ended(exit_code: int | None) -> str:
    """An exit code in words."""
    if exit_code is None:
        return "died"
    if exit_code >= 0:
        return f"ended by itself (exit code {exit_code})"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


def _tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log file; empty when there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
