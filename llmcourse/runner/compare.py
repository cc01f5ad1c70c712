"""Hold what a notebook says on disk against what it said when it was just run.

The judgement is nbval's own: which cells count (tags such as `nbval-ignore-output`, or the same words as
a comment), how streams are joined, which fields must agree. nbval, however, runs every notebook again
itself. The course has just run them all, with parameters, progress and limits, so nbval's comparator is
applied to those executed copies. A test holds the two ways against each other.

Stricter than nbval in two points, where a notebook would pass without being checked: a stored cell that
was never run is a difference, and so is a cell that fails, whatever its tags, unless it is meant to
(`raises-exception`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import ndiff
from types import SimpleNamespace
from typing import Any

from nbformat import NotebookNode

from llmcourse.errors import MissingPackageError, NotebookError
from llmcourse.runner.canonical import INJECTED
from llmcourse.runner.page import label

try:
    from nbval.plugin import IPyNbCell, coalesce_streams, find_comment_markers, find_metadata_tags, nocolors
except ImportError as error:
    raise MissingPackageError(
        "nbval is not installed.",
        "Stored outputs are compared by its rules.",
        "pip install 'llmcourse[test]'.",
    ) from error

# The fields that nbval leaves out by default: run numbers, pictures, names of widgets in a kernel's memory.
UNCOMPARED = (
    "metadata",
    "traceback",
    "prompt_number",
    "output_type",
    "name",
    "execution_count",
    "application/vnd.jupyter.widget-view+json",
    "image/png",
    "image/jpeg",
)
LINES_SHOWN = 12


@dataclass(frozen=True)
class Difference:
    """One cell whose fresh output is not the stored one. `field` is a stream's name or a MIME type."""

    cell: str
    field: str
    stored: str
    found: str

    def __str__(self) -> str:
        lines = [
            {"- ": "stored  ", "+ ": "now     "}[line[:2]] + line[2:]
            for line in ndiff(self.stored.splitlines(), self.found.splitlines())
            if line[:2] in ("- ", "+ ")
        ]
        if len(lines) > LINES_SHOWN:
            lines[LINES_SHOWN:] = [f"… and {len(lines) - LINES_SHOWN} more lines"]
        return f"cell {self.cell} · {self.field}\n" + "\n".join(f"  {line}" for line in lines)


def compare(stored: NotebookNode, executed: NotebookNode) -> list[Difference]:
    """The cells of `stored` that `executed`, a freshly run copy of it, does not confirm.

    Raises NotebookError when `executed` is a copy of another notebook, or of another state of this one.
    """
    return [
        difference
        for before, after in _pairs(stored, executed)
        if (difference := _difference(before, after)) is not None
    ]


def _pairs(stored: NotebookNode, executed: NotebookNode) -> Iterator[tuple[NotebookNode, NotebookNode]]:
    before = [cell for cell in stored.cells if cell.cell_type == "code"]
    after = [
        cell
        for cell in executed.cells
        if cell.cell_type == "code" and INJECTED not in cell.metadata.get("tags", [])
    ]
    if [cell.source for cell in before] != [cell.source for cell in after]:
        raise NotebookError(
            f"an executed copy of {len(after)} code cells is not of this notebook of {len(before)}.",
            "Outputs can be compared only between two runs of the same code.",
            "running the notebook again.",
        )
    return zip(before, after, strict=True)


def _difference(before: NotebookNode, after: NotebookNode) -> Difference | None:
    options = dict(find_metadata_tags(before.metadata)) | dict(find_comment_markers(before.source))
    if options.get("skip"):
        return None
    failed = next((out for out in after.outputs if out.output_type == "error"), None)
    if failed is not None and not options.get("check_exception"):
        return Difference(label(before), "error", "no error", f"{failed.ename}: {failed.evalue}")
    if before.execution_count is None:
        return Difference(label(before), "run", "never run", "has a result now")
    if not options.get("check", True):
        return None
    judge = _Judge()
    if judge.compare_outputs(_joined(after), _joined(before)):
        return None
    return judge.difference(label(before))


def _joined(cell: NotebookNode) -> list[NotebookNode]:
    return coalesce_streams([out.copy() for out in cell.outputs])  # it joins in place


class _Judge:
    """nbval's comparison of two lists of outputs, without the pytest item that it is a method of."""

    compare_outputs = IPyNbCell.compare_outputs
    sanitize = IPyNbCell.sanitize
    colors = nocolors

    def __init__(self) -> None:
        self.parent = SimpleNamespace(skip_compare=UNCOMPARED, sanitize_patterns={})
        self.comparison_traceback: list[str] = []
        self.values: tuple[str, Any, Any] | None = None

    def format_output_compare(self, key: str, stored: Any, found: Any) -> None:
        self.values = (key, stored, found)

    def difference(self, cell: str) -> Difference:
        if self.values is None:  # nbval found other outputs, not other values, and says so in words
            return Difference(cell, "outputs", "", "\n".join(self.comparison_traceback))
        key, stored, found = self.values
        return Difference(cell, key, str(stored), str(found))
