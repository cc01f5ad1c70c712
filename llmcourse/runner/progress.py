"""What a run shows while it runs: bars on a terminal, plain lines in a log.

A terminal gets one bar for each running notebook (cells done, seconds, the current cell's first line)
and a line for each finished one. Anywhere else, each notebook gets a line when it starts and one when
it ends, and each failing cell one, so that a log can be read, and searched, afterwards.
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from llmcourse.runner.outcome import Event, first_line


class Lines:
    """One line for each event that a log should keep."""

    def __init__(self, notebooks: int, file: IO[str] | None = None) -> None:
        self.notebooks, self.file = notebooks, file or sys.stdout
        self.ended = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        with self._lock:
            if (line := self._line(event)) is not None:
                print(line, file=self.file, flush=True)

    def _line(self, event: Event) -> str | None:
        match event.kind:
            case "started":
                return f"{event.name}: started, {event.total} cells{_on(event)}"
            case "cell_done" if not event.ok:
                return f"{event.name}: cell {event.cell} failed after {event.seconds:.1f} s: {event.line}"
            case "note":
                return f"{event.name}: {event.message}"
            case "finished":
                self.ended += 1
                return f"{event.name}: {summary(event)} [{self.ended}/{self.notebooks}]"
        return None


class Bars:
    """A live bar for each running notebook."""

    def __init__(self, notebooks: int, console: Console | None = None) -> None:
        self.notebooks = notebooks
        self.ended = 0
        self.progress = Progress(
            TextColumn("{task.fields[name]}", style="bold"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[line]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._show(event)

    def _show(self, event: Event) -> None:
        name = event.name
        match event.kind:
            case "started":
                if name in self._tasks:
                    self.progress.remove_task(self._tasks.pop(name))
                self._tasks[name] = self.progress.add_task(
                    name, total=event.total, name=escape(name), line=f"starting{_on(event)}"
                )
            case "cell" if name in self._tasks:
                self.progress.update(self._tasks[name], line=first_line(event.line, self._room()))
            case "cell_done" if name in self._tasks:
                self.progress.advance(self._tasks[name])
            case "note":
                self._print(f"  {escape(name)}: {escape(event.message)}")
            case "finished":
                self.ended += 1
                if name in self._tasks:
                    self.progress.remove_task(self._tasks.pop(name))
                mark = "[green]✓[/]" if event.ok else "[red]✗[/]"
                count = f"[dim]{self.ended}/{self.notebooks}[/]"
                self._print(f"{mark} {escape(name)}  {escape(summary(event))}  {count}")

    def _print(self, line: str) -> None:
        self.progress.console.print(line, highlight=False)

    def _room(self) -> int:
        """Characters left for the cell's line, so that a bar stays on one line."""
        return max(12, self.progress.console.width - 72)


def show(notebooks: int) -> Lines | Bars:
    """Bars when standard output is a terminal, lines when it is not."""
    return Bars(notebooks) if sys.stdout.isatty() else Lines(notebooks)


def summary(event: Event) -> str:
    """`ok in 12.3 s`, or the failure."""
    return (
        f"ok in {event.seconds:.1f} s" if event.ok else f"FAILED after {event.seconds:.1f} s: {event.message}"
    )


def _on(event: Event) -> str:
    return f" ({event.message})" if event.message else ""
