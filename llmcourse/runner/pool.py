"""Several notebooks at once on this machine, as many as its cores and its memory allow.

A notebook starts when a place is free and when what it expects to need fits in what is available:

    available now  ≥  its own need  +  Σ over running notebooks of (expected − already held)

Memory that a running notebook expects and does not hold yet is spoken for, though the system still
counts it as free. The first in line waits for its turn rather than being overtaken for ever, and a
notebook that would not fit even alone runs alone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import psutil

from llmcourse.errors import NotebookError
from llmcourse.runner.discover import Notebook, check, refuse_to_overwrite
from llmcourse.runner.outcome import CellError, Event, Outcome
from llmcourse.runner.supervise import Supervisor


class Stopped(KeyboardInterrupt):
    """The run was stopped (Ctrl-C, SIGTERM); `outcomes` holds what there is, in the order asked for."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        super().__init__()
        self.outcomes = outcomes


def execute_all(
    paths: Sequence[Path],
    *,
    parameters: Mapping[str, Any],
    jobs: int | None = None,
    cell_timeout: float = 120.0,
    out: Path,
    on_event: Callable[[Event], None] | None = None,
) -> list[Outcome]:
    """Execute notebooks, several at once; one `Outcome` for each, in the order given.

    Executed copies go to `out`/NAME.ipynb. `jobs` defaults to the number of cores, `cell_timeout` is in
    seconds (0: no limit). `on_event` is called from several threads. A failing notebook does not stop
    the others. Raises NotebookError when a file is no notebook, `Stopped` on Ctrl-C; by then every
    process that was started has ended.
    """
    return run_here(
        check([Path(path).resolve() for path in paths]),
        parameters=parameters,
        jobs=jobs,
        cell_timeout=cell_timeout,
        out=out,
        on_event=on_event,
    )


def run_here(
    notebooks: Sequence[Notebook],
    *,
    parameters: Mapping[str, Any],
    jobs: int | None = None,
    cell_timeout: float = 120.0,
    out: Path,
    on_event: Callable[[Event], None] | None = None,
) -> list[Outcome]:
    """`execute_all` for notebooks that have been looked at already."""
    refuse_to_overwrite((notebook.path for notebook in notebooks), out)
    places = places_for(jobs, len(notebooks))
    threads = max(1, core_count() // places) if places > 1 else None
    waiting = deque(enumerate(notebooks))
    running: dict[int, tuple[Notebook, Supervisor, threading.Thread]] = {}
    outcomes: dict[int, Outcome] = {}
    done: Queue[tuple[int, Outcome]] = Queue()

    def start(index: int, notebook: Notebook) -> None:
        supervisor = Supervisor(
            notebook.path,
            out,
            parameters=parameters,
            cell_timeout=cell_timeout,
            name=notebook.name,
            threads=threads,
            on_event=on_event,
        )
        thread = threading.Thread(target=_supervise, args=(index, supervisor, done), name=notebook.name)
        running[index] = notebook, supervisor, thread
        thread.start()

    try:
        while waiting or running:
            while waiting and len(running) < places:
                index, notebook = waiting[0]
                held = [(other.memory_mb, supervisor.used_mb) for other, supervisor, _ in running.values()]
                if running and not fits(notebook.memory_mb, held, available_mb()):
                    break
                waiting.popleft()
                start(index, notebook)
            index, outcomes[index] = done.get()
            running.pop(index)[2].join()
    except KeyboardInterrupt:
        for _, supervisor, _ in running.values():
            supervisor.stop()
        for index, (notebook, _, thread) in running.items():
            thread.join()
            outcomes.setdefault(index, not_run(notebook))
        while not done.empty():
            index, outcomes[index] = done.get()
        raise Stopped([outcomes.get(i) or not_run(nb) for i, nb in enumerate(notebooks)]) from None
    return [outcomes[i] for i in range(len(notebooks))]


def _supervise(index: int, supervisor: Supervisor, done: Queue[tuple[int, Outcome]]) -> None:
    try:
        outcome = supervisor.run()
    except Exception as error:  # e.g. a full disk: this notebook's failure, not the run's
        said = CellError("worker", f"it could not be run: {type(error).__name__}: {error}")
        outcome = Outcome(supervisor.name, False, 0.0, error=said)
    done.put((index, outcome))


def not_run(notebook: Notebook) -> Outcome:
    return Outcome(
        notebook.name, False, 0.0, error=CellError("stopped", "the run was stopped before it ended")
    )


def places_for(jobs: int | None, count: int, what: str = "notebook") -> int:
    """How many of `count` notebooks may run at once; by default one for each core."""
    if jobs is not None and jobs < 1:
        raise NotebookError(
            f"--jobs {jobs} leaves no {what} to run at a time.",
            "A run needs at least one place.",
            f"--jobs 1, or leave it out for one {what} on each of the {core_count()} cores.",
        )
    return max(1, min(jobs or core_count(), count))


def fits(need_mb: float, running: Iterable[tuple[float, float]], available_mb: float) -> bool:
    """Whether a notebook fits beside the running ones, given as (expected, already held) in MB."""
    spoken_for = sum(max(0.0, expected - held) for expected, held in running)
    return need_mb + spoken_for <= available_mb


def core_count() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def available_mb(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that can still be had: the machine's, or the container's where that is less."""
    free = float(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            used = int((cgroup / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            free = min(free, float(int(limit) - used))
    except (OSError, ValueError):
        pass
    return free / 1e6
