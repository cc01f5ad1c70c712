"""What a learner has passed: one small JSON file beside the chapters' progress.

    {"lab01_backprop": {"sum_to": {"passed": "2026-11-23", "attempts": 3, "hints": 1, "now": "passed"}}}

Several notebooks, and the command line, may write at once: a change reads, alters and replaces the file
under a lock. An exercise that has passed stays passed; if it fails later, its `now` says so. Keeping
progress must never stand between a learner and a verdict: a file that cannot be read is put aside, one
that cannot be written is a warning.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from filelock import FileLock

from llmcourse.course import progress_path
from llmcourse.files import write_whole
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.verdict import Verdict
from llmcourse.labs.catalog import Lab
from llmcourse.notebook import Table

SECONDS_FOR_THE_LOCK = 5.0
SYMBOLS = {"passed": "✓", "tried": "●", "open": "○"}

Entry = dict[str, Any]
Labs = dict[str, dict[str, Entry]]


class Watcher(Protocol):
    """Something that shows a lab's progress, in the process that changes it."""

    def refresh(self) -> None: ...


_watchers: WeakSet[Watcher] = WeakSet()


@dataclass(frozen=True)
class Row:
    """Where a learner is with one exercise.

    passed_on   the day on which it first passed, "" if it has not
    attempts    checks of something more than the stub
    hints       how many hints were shown, of the exercise's own
    fails_now   it has passed, and the last check failed
    """

    about: Exercise
    passed_on: str
    attempts: int
    hints: int
    fails_now: bool

    @property
    def exercise(self) -> str:
        return self.about.name

    @property
    def passed(self) -> bool:
        return bool(self.passed_on)

    @property
    def state(self) -> str:
        """`passed`, `tried` or `open`."""
        return "passed" if self.passed else "tried" if self.attempts else "open"

    @property
    def note(self) -> str:
        """The state in words."""
        if self.fails_now:
            return f"passed on {self.passed_on}, fails now"
        if self.passed:
            return f"passed on {self.passed_on}"
        return f"tried {self.attempts} ×" if self.attempts else "open"

    @property
    def points(self) -> int:
        return self.about.points if self.passed else 0


# ── what is written ──────────────────────────────────────────────────────────────────────────────


def record(verdict: Verdict) -> None:
    """Keep the outcome of a check. One of a stub, or of no lab, changes nothing."""
    if verdict.not_yet or not verdict.lab:
        return

    def change(entry: Entry) -> None:
        entry["attempts"] = entry.get("attempts", 0) + 1
        entry["now"] = verdict.state
        if verdict.ok:
            entry.setdefault("passed", date.today().isoformat())

    _change(verdict.lab, verdict.exercise.name, change)


def hint_shown(lab: str, exercise: str, layer: int) -> None:
    """Keep that hint number `layer` of an exercise was shown (and with it those before)."""
    _change(lab, exercise, lambda entry: entry.update(hints=max(layer, entry.get("hints", 0))))


# ── what is read ─────────────────────────────────────────────────────────────────────────────────


def hints_shown(lab: str, exercise: str) -> int:
    """The number of the last hint that was shown, 0 if none was."""
    return _read(path()).get(lab, {}).get(exercise, {}).get("hints", 0)


def lab_status(lab: Lab) -> list[Row]:
    """Where the learner is with each exercise of a lab, in its order."""
    entries = _read(path()).get(lab.name, {})
    return [_row(e, entries.get(e.name, {})) for e in lab.exercises]


def _row(exercise: Exercise, entry: Entry) -> Row:
    passed_on = entry.get("passed", "")
    return Row(
        about=exercise,
        passed_on=passed_on,
        attempts=entry.get("attempts", 0),
        hints=min(entry.get("hints", 0), len(exercise.hints)),
        fails_now=bool(passed_on) and entry.get("now") == "failed",
    )


def summary(rows: list[Row]) -> str:
    """`2 of 6 passed · 8 of 25 points`."""
    points, of = sum(r.points for r in rows), sum(r.about.points for r in rows)
    return f"{sum(r.passed for r in rows)} of {len(rows)} passed · {points} of {of} points"


def table(lab: Lab) -> Table:
    """A lab's progress as a table, for a page and for the terminal."""
    rows = lab_status(lab)
    columns = ["", "exercise", "what it is", "difficulty", "minutes", "points", "hints", "state"]
    cells = [
        (
            *(SYMBOLS[r.state], r.exercise, r.about.title, f"{r.about.difficulty} of 5"),
            *(r.about.minutes, r.about.points, f"{r.hints} of {len(r.about.hints)}", r.note),
        )
        for r in rows
    ]
    return Table(columns, cells, note=f"{lab.name}: {summary(rows)}")


def watch(watcher: Watcher) -> None:
    """Call `watcher.refresh()` whenever this process changes a lab's progress, while it exists."""
    _watchers.add(watcher)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


def path() -> Path:
    """`labs.json`, in the folder of the chapters' progress (`LLMCOURSE_PROGRESS` moves both)."""
    return progress_path().with_name("labs.json")


def _change(lab: str, exercise: str, change: Callable[[Entry], object]) -> None:
    """Apply `change` to one entry of the file: no other writer comes between reading and replacing."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=SECONDS_FOR_THE_LOCK):
            try:
                labs = _parse(file)
            except FileNotFoundError:
                labs = {}
            except ValueError:
                file.replace(f"{file}.broken")
                labs = {}
            change(labs.setdefault(lab, {}).setdefault(exercise, {}))
            write_whole(file, json.dumps(labs, indent=1))
    except OSError as error:
        warnings.warn(f"Progress is not kept: {file} could not be written ({error}).", stacklevel=3)
    for watcher in list(_watchers):
        watcher.refresh()


def _read(file: Path) -> Labs:
    """The file's content; nothing where it is missing or broken."""
    try:
        return _parse(file)
    except (OSError, ValueError):
        return {}


def _parse(file: Path) -> Labs:
    """The file's content. Raises ValueError for what this module does not write."""
    labs = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(labs, dict):
        raise ValueError(f"{file} holds no labs")
    for exercises in labs.values():
        if not isinstance(exercises, dict):
            raise ValueError(f"{file} holds a lab without exercises")
        for entry in exercises.values():
            if not (isinstance(entry, dict) and all(_fits(name, value) for name, value in entry.items())):
                raise ValueError(f"{file} holds an entry that is none")
    return labs


def _fits(name: str, value: Any) -> bool:
    """Whether a field has its type; fields of a later version of the course pass."""
    return isinstance(value, {"attempts": int, "hints": int, "passed": str, "now": str}.get(name, object))
