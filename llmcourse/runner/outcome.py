"""What became of a notebook: the records that the runner returns, reports and sends between machines.

Cells are numbered from 1 as they lie in the source notebook, Markdown cells included. The cell that
papermill injects below the parameters cell carries the parameters cell's number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CellError:
    """Why a notebook failed, and where.

    `kind` is one of
        error     the cell raised
        timeout   the cell ran longer than it may
        output    the cell printed more than a report can hold
        exit      the cell ended the kernel (`exit()`, `sys.exit()`)
        died      the kernel's process ended by itself or was killed (out of memory, `os._exit`)
        start     no kernel came up (`cell` is None)
        worker    the process that drives the kernel died
        stopped   the run was stopped (Ctrl-C, SIGTERM)
    """

    kind: str
    message: str
    cell: int | None = None
    line: str = ""
    source: str = ""
    traceback: str = ""

    @property
    def index(self) -> int | None:
        """The cell's position in the source notebook's `cells`, from 0."""
        return None if self.cell is None else self.cell - 1

    @property
    def where(self) -> str:
        """`cell 7 (`loss.backward()`)`, or nothing when no cell had started."""
        if self.cell is None:
            return ""
        return f"cell {self.cell} (`{self.line}`)" if self.line else f"cell {self.cell}"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


@dataclass(frozen=True)
class CellRun:
    """One code cell that ran: its number, its first line, how long it took in seconds."""

    cell: int
    line: str
    seconds: float
    ok: bool = True


@dataclass(frozen=True)
class Outcome:
    """One executed notebook.

    `executed_path` is the executed copy: every cell up to the failure has its outputs. It holds
    papermill's cell tagged `injected-parameters`, which the source notebook does not. It is None only
    when nothing could be written. `peak_mb` is the most memory that the kernel and its children held.
    """

    name: str
    ok: bool
    seconds: float
    executed_path: Path | None = None
    error: CellError | None = None
    cells: list[CellRun] = field(default_factory=list)
    total_cells: int = 0
    peak_mb: float | None = None
    node: str = ""
    attempts: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        plain = asdict(self)
        plain["executed_path"] = None if self.executed_path is None else str(self.executed_path)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Outcome:
        """The inverse of `as_dict`."""
        path, error = plain["executed_path"], plain["error"]
        return cls(
            **{
                **plain,
                "executed_path": None if path is None else Path(path),
                "error": None if error is None else CellError(**error),
                "cells": [CellRun(**cell) for cell in plain["cells"]],
            }
        )


@dataclass(frozen=True)
class Event:
    """Something that happened while a notebook ran, for whoever draws the progress.

    kind      started (total: code cells), cell (a cell began), cell_done (seconds, ok),
              note (message), finished (ok, seconds, message)
    """

    kind: str
    name: str
    cell: int = 0
    line: str = ""
    total: int = 0
    seconds: float = 0.0
    ok: bool = True
    message: str = ""


def first_line(source: str, width: int = 60) -> str:
    """The first line of a cell that says something, cut to `width` characters."""
    line = next((line.strip() for line in source.splitlines() if line.strip()), "")
    return line if len(line) <= width else line[: width - 1] + "…"
