"""`llmcourse grade FOLDER`: a class's submissions of one lab, judged and entered in the gradebook.

    FOLDER ── take in ──▶ clean notebooks ── judge (many at once) ──▶ verdicts ── record ──▶ gradebook
              untrusted                      sandboxes               kept as files           marks, feedback

Judging is spread over processes or machines; only this process writes the gradebook. Every verdict is
a file before it is recorded, and recording the same verdict twice changes nothing. So a run may be
killed at any moment: the next one judges what has no verdict yet and records what is not in the book.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import llmcourse
from llmcourse.errors import UnknownNameError
from llmcourse.grading import sandbox
from llmcourse.grading.gradebook import Course
from llmcourse.grading.intake import Intake, Submission, find_submissions, take_in
from llmcourse.grading.pool import judge_here
from llmcourse.grading.stage import DEMO, Job, Judged
from llmcourse.labs.catalog import LABS, Lab, find_lab

Tell = Callable[[str, "Row", int], None]  # what happened, to whom, of how many students


@dataclass
class Row:
    """One student of a run: what came, what was judged, and whether it is in the book."""

    submission: Submission
    intake: Intake
    judged: Judged | None = None
    kept: bool = False  # judged by an earlier run
    points: float = 0.0

    @property
    def student(self) -> str:
        return self.submission.student


@dataclass
class Run:
    """The result of grading: a row for each student, in the order of their names."""

    lab: Lab
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Row]:
        """Students who have no marks, because their submission could not be judged."""
        return [row for row in self.rows if row.judged is None or row.judged.error]


def grade(
    folder: Path,
    lab: Lab,
    course: Course,
    *,
    workers: int | None = None,
    cluster: str | None = None,
    unsafe: bool = False,
    again: bool = False,
    limits: Mapping[str, float] | None = None,
    tell: Tell = lambda what, row, total: None,
) -> Run:
    """Grade every submission of `lab` in `folder` into `course`.

    workers   submissions judged at once (default: one for each core)
    unsafe    run submissions without a sandbox
    again     judge anew what an earlier run has judged
    limits    of the sandbox, by name (see `sandbox.Limits`)

    Raises SandboxError where submissions cannot be sandboxed and `unsafe` was not asked for.
    """
    if not unsafe and cluster is None:
        sandbox.require()
    began = perf_counter()
    course.prepare(lab)
    desk = Desk(course, lab, unsafe, dict(limits or {}))
    run = Run(lab, [desk.row(s) for s in find_submissions(folder, lab)])
    if not run.rows:
        raise UnknownNameError(
            f"there is no submission in {folder}.",
            "A submission is STUDENT/LAB/LAB.ipynb, STUDENT/ANY.ipynb or STUDENT.ipynb.",
            "the folder that holds one file or folder for each student.",
        )
    rows = {row.student: row for row in run.rows}
    todo: list[Job] = []
    for row in run.rows:
        row.judged = None if again else desk.kept(row)
        row.kept = row.judged is not None
        if row.judged is None:
            todo.append(desk.job(row))
        else:
            desk.finish(row)
            tell("kept", row, len(rows))
    for judged in _judge(todo, workers or os.cpu_count() or 1, cluster):
        row = rows[judged.student]
        row.judged = judged
        if judged.error:
            tell("failed", row, len(rows))
            continue
        desk.keep(row)
        desk.finish(row)
        tell("judged", row, len(rows))
    course.write_marks(lab)
    run.seconds = perf_counter() - began
    return run


def _judge(jobs: Sequence[Job], workers: int, cluster: str | None) -> Iterator[Judged]:
    if not jobs:
        return iter(())
    if cluster is None:
        return judge_here(jobs, min(workers, len(jobs)))
    from llmcourse.grading.cluster import judge_on

    return judge_on(cluster, jobs)


class Desk:
    """The instructor's side of a run: which jobs there are, which verdicts are kept, what is recorded."""

    def __init__(self, course: Course, lab: Lab, unsafe: bool, limits: dict[str, float]) -> None:
        self.course, self.lab, self.unsafe, self.limits = course, lab, unsafe, limits
        self.source = course.source(lab)
        self.graded = tuple(
            {"id": cell.metadata["nbgrader"]["grade_id"], "source": cell.source}
            for cell in self.source.cells
            if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade")
        )
        self.folder = course.folder / "verdicts" / lab.name
        self.seed = seed_of(course.folder, lab.name)

    def row(self, submission: Submission) -> Row:
        intake = take_in(submission.path, self.source, self.lab.name)
        intake.remarks[:0] = submission.remarks
        return Row(submission, intake)

    def job(self, row: Row) -> Job:
        cells = tuple(
            {"id": cell.id, "source": cell.source}
            for cell in row.intake.notebook.cells
            if cell.cell_type == "code" and _runs(cell)
        )
        return Job(row.student, self.lab.name, cells, self.graded, self.seed, not self.unsafe, self.limits)

    def digest(self, row: Row) -> str:
        """Changes with anything that could change the verdict."""
        parts = [
            llmcourse.__version__,
            str(self.seed),
            str(self.unsafe),
            json.dumps(self.limits, sort_keys=True),
        ]
        parts += [row.intake.digest, *(cell["source"] for cell in self.graded)]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def kept(self, row: Row) -> Judged | None:
        """The verdict of an earlier run on the same submission, if there is one."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self._file(row).read_text(encoding="utf-8"))
            if found["digest"] == self.digest(row):
                return Judged(**found["judged"])
        return None

    def keep(self, row: Row) -> None:
        assert row.judged is not None
        text = json.dumps({"digest": self.digest(row), "judged": row.judged.as_plain()}, ensure_ascii=True)
        path = self._file(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.part")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)

    def finish(self, row: Row) -> None:
        """Enter the verdict in the gradebook, unless it is there, and write the feedback page."""
        assert row.judged is not None
        row.points = self.course.record(self.lab, row.student, row.intake, row.judged)

    def _file(self, row: Row) -> Path:
        return self.folder / f"{row.student}.json"


def _runs(cell: Any) -> bool:
    graded = cell.metadata.get("nbgrader", {}).get("grade", False)
    return not graded and DEMO not in cell.metadata.get("tags", []) and bool(cell.source.strip())


def seed_of(folder: Path, lab: str) -> int:
    """The seed of a lab's random inputs in this course: the same for everyone, and known to nobody outside.

    It is derived from a random key that the course's folder keeps.
    """
    path = folder / "secret.key"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as out:
            out.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(scratch, path)
        scratch.unlink()
    digest = hmac.new(path.read_bytes().strip(), lab.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:6], "big")


def which_lab(name: str | None, folder: Path) -> Lab:
    """The lab called `name`; without a name, the one whose notebooks lie in `folder`.

    Raises UnknownNameError when the folder does not exist or its files leave the lab open.
    """
    if not folder.is_dir():
        raise UnknownNameError(
            f"there is no folder {folder}.",
            "Its entries are the submissions, one for each student.",
            "the folder that your learning platform gave you, unpacked.",
        )
    if name:
        return find_lab(name)
    seen = {path.name for path in folder.glob("*/*")} | {path.name for path in folder.glob("*")}
    found = [lab for lab in LABS if any(entry.startswith(lab.name) for entry in seen)]
    if len(found) == 1:
        return found[0]
    raise UnknownNameError(
        f"the files in {folder} do not say which lab they are.",
        f"Names of {len(found)} labs were found." if found else "No file is named after a lab.",
        f"--lab with one of {', '.join(lab.name for lab in LABS)}.",
    )
