"""From a submission as it came to a clean notebook that can be judged, shown and kept.

The clean notebook is the lab's own notebook: its cells, in its order, with its metadata, points and
kernel. From the learner come three things only:

    solutions and answers    the source of each solution cell, put into the lab's cell of that name
    open cells               the source of cells that the lab neither locks nor grades, such as demos
    cells of their own       code and Markdown between the lab's cells, where they stood

So a check cell that was edited, copied, deleted or given other points does not matter, nor does what
metadata the file has. A solution is found by its grade_id, else by its cell's id, else by the function
that it defines, an answer by its place. Where a solution cell was copied, **the last copy that is more
than the stub counts**, as it would in a notebook that is run from top to bottom. Those before it stay
as cells of the learner's own: they may be its first half (JupyterLab splits a cell into two copies).

All Markdown of the learner's is made inert (see `inert`): an instructor's browser renders it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbformat import NotebookNode, from_dict

from llmcourse.grading.gates import nbgrader, regions
from llmcourse.grading.handed_in import (
    RawCell,
    RawNotebook,
    RefusedError,
    Submission,
    find_submissions,
    read_submission,
    shown,
)
from llmcourse.grading.inert import inert

__all__ = ["Intake", "Submission", "find_submissions", "take_in"]

MAX_OWN_CELLS = 300
MAX_OWN_TEXT = 200_000  # characters of all of them
MAX_REMARKS = 20

_DEFINES = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)


@dataclass
class Intake:
    """A submission, ready to be judged.

    notebook   nbformat 4.5, valid; the lab's own untouched notebook where nothing could be read
    remarks    what the student and the instructor should know, a sentence each
    found      whether a notebook was read
    digest     changes with anything of the learner's that is judged or marked
    """

    notebook: NotebookNode
    remarks: list[str] = field(default_factory=list)
    found: bool = True
    digest: str = ""


def take_in(path: Path, source: NotebookNode, name: str) -> Intake:
    """Read the submission of lab `name` at `path`, a folder or a file, into a clean copy of `source`.

    source   the lab's notebook with stubs for solutions, with or without its hidden tests

    Never raises for what a submission holds or is: the remarks tell.
    """
    assert not any(nbgrader(c).get("solution") and "BEGIN SOLUTION" in c.source for c in source.cells)
    try:
        raw, found = read_submission(Path(path), name), True
    except RefusedError as error:
        raw, found = RawNotebook(remarks=[str(error)]), False
    except OSError as error:  # a file that went away, a disk that fails
        raw, found = RawNotebook(remarks=[f"the submission cannot be read ({error.strerror})"]), False
    rebuilt = _Rebuild(source, raw)
    notebook = rebuilt.notebook()
    remarks = raw.remarks + (rebuilt.remarks if found else [])
    if len(remarks) > MAX_REMARKS:
        remarks = [*remarks[:MAX_REMARKS], f"and {len(remarks) - MAX_REMARKS} more remarks"]
    return Intake(notebook, remarks, found, digest(notebook))


def digest(notebook: NotebookNode) -> str:
    """SHA-256 over what the cells hold: kinds, sources, pictures. Outputs and metadata do not count."""
    parts = [[c.id, c.cell_type, c.source, c.get("attachments", {})] for c in notebook.cells]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class _Slot:
    """A cell of the lab, and the learner's cells that stand for it."""

    cell: NotebookNode
    name: str
    visible: str  # the source that learners got
    copies: list[int] = field(default_factory=list)
    taken: str | None = None  # the learner's source, where it counts
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def is_solution(self) -> bool:
        return bool(nbgrader(self.cell).get("solution"))

    @property
    def is_locked(self) -> bool:
        own = nbgrader(self.cell)
        return not self.is_solution and bool(own.get("locked") or own.get("grade"))

    @property
    def is_graded(self) -> bool:
        return bool(nbgrader(self.cell).get("grade"))


class _Rebuild:
    """The matching of a submission's cells with the lab's."""

    def __init__(self, source: NotebookNode, raw: RawNotebook) -> None:
        self.source, self.cells = source, raw.cells
        self.remarks: list[str] = []
        self.slots = [_slot(cell) for cell in source.cells]
        self.used: set[int] = set()
        wanted = source.metadata.get("kernelspec", {}).get("name")
        if raw.kernel and raw.kernel != wanted:
            self.remarks.append(
                f"the notebook asks for the kernel {shown(raw.kernel)}; it was graded with {wanted}"
            )

    def notebook(self) -> NotebookNode:
        self._match_by_name()
        self._match_by_text()
        self._match_by_function()
        self._match_by_place()
        for slot in self.slots:
            self._take(slot)
        self._tell_about_locked()
        cells = [_cell_of(slot) for slot in self.slots]
        own = self._own_cells()
        result: list[dict[str, Any]] = own.get(-1, [])
        for place, cell in enumerate(cells):
            result += [cell, *own.get(place, [])]
        metadata = {
            k: v for k, v in self.source.metadata.items() if k in ("kernelspec", "language_info", "llmcourse")
        }
        return from_dict({"cells": result, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})

    # ── which cell is which ──

    def _match_by_name(self) -> None:
        marked = {slot.name: slot for slot in self.slots if nbgrader(slot.cell)}
        for i, cell in enumerate(self.cells):
            if cell.grade_id in marked:
                self._use(marked[cell.grade_id], i)
        if self.cells and marked and not self.used:
            self.remarks.append("the cells had lost nbgrader's metadata; they were found by other signs")
        by_id = {str(slot.cell.get("id")): slot for slot in self.slots if not slot.copies}
        for i, cell in enumerate(self.cells):
            slot = by_id.get(cell.id)
            if i not in self.used and slot is not None and self._may_stand_for(cell, slot):
                self._use(slot, i)

    def _match_by_text(self) -> None:
        """A locked or open cell without its id is known by its text, and so are copies of a locked one."""
        texts: dict[tuple[str, str], list[_Slot]] = {}
        for slot in self.slots:
            if not slot.is_solution:
                texts.setdefault((slot.cell.cell_type, slot.visible), []).append(slot)
        for i, cell in enumerate(self.cells):
            alike = texts.get((cell.kind, _bare(cell.source)), [])
            for slot in [s for s in alike if not s.copies] or alike[-1:]:
                if i not in self.used and self._may_stand_for(cell, slot):
                    self._use(slot, i)

    def _may_stand_for(self, cell: RawCell, slot: _Slot) -> bool:
        """All copies of a solution or a locked cell are its own; of an open cell, only the first."""
        return slot.is_solution or slot.is_locked or (cell.kind == slot.cell.cell_type and not slot.copies)

    def _match_by_function(self) -> None:
        for slot in self.slots:
            if not slot.is_solution or slot.copies or slot.cell.cell_type != "code":
                continue
            names = set(_DEFINES.findall(slot.visible))
            defining = [
                i
                for i, c in enumerate(self.cells)
                if c.kind == "code" and names & set(_DEFINES.findall(c.source))
            ]
            for i in defining:
                if i not in self.used:
                    self._use(slot, i)
            if slot.copies:
                self.remarks.append(f"the cell {slot.name} was found by the function that it defines")
            elif defining:  # with another solution, in one cell: the stub must not replace it
                slot.taken = f"# {slot.name}: in another cell of this submission"
                self.remarks.append(f"{slot.name} stands in the cell of another exercise")

    def _match_by_place(self) -> None:
        """An answer in words without its id is the first free Markdown between its neighbours."""
        for place, slot in enumerate(self.slots):
            if not slot.is_solution or slot.copies or slot.cell.cell_type != "markdown":
                continue
            before = max((max(s.copies) for s in self.slots[:place] if s.copies), default=-1)
            after = min((min(s.copies) for s in self.slots[place + 1 :] if s.copies), default=len(self.cells))
            free = (
                i for i in range(before + 1, after) if i not in self.used and self.cells[i].kind == "markdown"
            )
            if (i := next(free, None)) is not None:
                self._use(slot, i)
                self.remarks.append(f"the answer {slot.name} was found by its place")

    def _use(self, slot: _Slot, i: int) -> None:
        slot.copies.append(i)
        self.used.add(i)

    # ── what counts ──

    def _take(self, slot: _Slot) -> None:
        if slot.is_locked or slot.taken is not None:
            return
        mine = [
            i
            for i in slot.copies
            if self.cells[i].source.strip() and _bare(self.cells[i].source) != slot.visible
        ]
        if slot.is_solution:
            self._tell_about_solution(slot, mine)
        if mine:
            cell = self.cells[mine[-1]]
            slot.taken, slot.pictures = cell.source, cell.pictures
            earlier = {i for i in mine if self.cells[i].source != cell.source}
            slot.copies = [i for i in slot.copies if i not in earlier]
            self.used -= earlier

    def _tell_about_solution(self, slot: _Slot, mine: Sequence[int]) -> None:
        if len({self.cells[i].source for i in mine}) > 1:
            self.remarks.append(
                f"{len(mine)} cells are called {slot.name}; all were run, and the last one counts"
            )
        if self.cells and not slot.copies:
            self.remarks.append(f"the cell {slot.name} was deleted; it counts as not done")
        elif mine and self.cells[mine[-1]].kind != slot.cell.cell_type:
            kinds = f"{self.cells[mine[-1]].kind}, not {slot.cell.cell_type}"
            self.remarks.append(f"the cell {slot.name} had become {kinds}; it was changed back")

    def _tell_about_locked(self) -> None:
        deleted, edited, copied = [], [], []
        for slot in self.slots:
            if not (slot.is_locked and slot.is_graded):
                continue
            sources = {_bare(self.cells[i].source) for i in slot.copies}
            if not sources:
                deleted.append(slot.name)
            elif sources != {slot.visible}:
                edited.append(slot.name)
            elif len(slot.copies) > 1:
                copied.append(slot.name)
        for names, what in ((deleted, "deleted"), (edited, "edited"), (copied, "copied")):
            if names and self.cells:
                cells = "cells" if len(names) > 1 else "cell"
                was = "were" if len(names) > 1 else "was"
                self.remarks.append(
                    f"the check {cells} {', '.join(names)} {was} {what}; the course's own was used"
                )

    # ── what else the learner wrote ──

    def _own_cells(self) -> dict[int, list[dict[str, Any]]]:
        """The learner's own cells as nbformat has them, by the place of the lab's cell that they follow."""
        place_of = {i: place for place, slot in enumerate(self.slots) for i in slot.copies}
        taken = {str(slot.cell.get("id")) for slot in self.slots}
        names = (name for n in range(1, 10**6) if (name := f"own-{n}") not in taken)
        own: dict[int, list[dict[str, Any]]] = {}
        place, count, kept, left = -1, 0, 0, MAX_OWN_TEXT
        for i, cell in enumerate(self.cells):
            if i in self.used:
                place = place_of[i]
            elif cell.source.strip():
                count += 1
                left -= len(cell.source)
                if left >= 0 and kept < MAX_OWN_CELLS:
                    kept += 1
                    own.setdefault(place, []).append(_own_cell(cell, next(names)))
        if kept < count:
            self.remarks.append(f"of {count} added cells the first {kept} were kept")
        return own


def _slot(cell: NotebookNode) -> _Slot:
    name = str(nbgrader(cell).get("grade_id") or cell.get("id", ""))
    return _Slot(cell, name, _bare("\n".join(line for line, hidden in regions(cell.source) if not hidden)))


def _cell_of(slot: _Slot) -> dict[str, Any]:
    """The lab's cell with the learner's source, where that counts."""
    cell = slot.cell
    out: dict[str, Any] = {
        "cell_type": cell.cell_type,
        "id": cell.id,
        "metadata": json.loads(json.dumps(cell.metadata)),
    }
    is_code = cell.cell_type == "code"
    out["source"] = cell.source if slot.taken is None else slot.taken if is_code else inert(slot.taken)
    if is_code:
        out |= {"outputs": [], "execution_count": None}
    elif slot.pictures:
        out["attachments"] = _attachments(slot.pictures)
    return out


def _own_cell(cell: RawCell, name: str) -> dict[str, Any]:
    out: dict[str, Any] = {"id": name, "metadata": {}}
    if cell.kind == "code":
        return out | {"cell_type": "code", "source": cell.source, "outputs": [], "execution_count": None}
    if cell.pictures:
        out["attachments"] = _attachments(cell.pictures)
    return out | {"cell_type": "markdown", "source": inert(cell.source)}  # also what was raw


def _attachments(pictures: dict[str, str]) -> dict[str, dict[str, str]]:
    return {name: {"image/png": data} for name, data in pictures.items()}


def _bare(source: str) -> str:
    """A source without what editors change by themselves: trailing blanks, blank lines at the ends."""
    return "\n".join(line.rstrip() for line in source.strip().splitlines())
