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
from typing import Literal

import llmcourse
from llmcourse.errors import UnknownNameError
from llmcourse.files import write_whole
from llmcourse.grading import sandbox
from llmcourse.grading.gradebook import Course
from llmcourse.grading.intake import Intake, Submission, find_submissions, take_in
from llmcourse.grading.pool import judge_here
from llmcourse.grading.stage import Job, Judged, is_run
from llmcourse.labs.catalog import LABS, Lab, find_lab
from llmcourse.runner.pool import places_for

Event = Literal["taken in", "kept", "judged", "failed"]
Tell = Callable[[Event, "Row", int], None]  # what happened, to whom, of how many students


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
        """Those whose submission could not be judged: their marks are as they were before."""
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

    workers   submissions judged at once (default: one for each core, here or of the cluster)
    cluster   address of a Ray cluster that judges in place of this machine
    unsafe    run submissions without a sandbox
    again     judge anew what an earlier run has judged
    limits    of the sandbox, by name (see `limits.Limits`)

    Raises SandboxError where submissions cannot be sandboxed and `unsafe` was not asked for,
    UnknownNameError where there is no submission, and GradebookError or DiskError (see `Course`).
    """
    if not unsafe and cluster is None:
        sandbox.require()
    began = perf_counter()
    submissions = find_submissions(folder, lab.name)
    if not submissions:
        raise _no_submission(folder)
    places_for(workers, len(submissions), "submission")  # refuses what is no number of places
    course.prepare(lab)
    assignment = Assignment(course, lab, unsafe, dict(limits or {}), hide=(course.folder, folder.resolve()))
    rows: dict[str, Row] = {}
    for submission in submissions:
        row = rows[submission.student] = assignment.row(submission)
        tell("taken in", row, len(submissions))
    todo: list[Job] = []
    for row in rows.values():
        row.judged = None if again else assignment.kept(row)
        row.kept = row.judged is not None
        if row.judged is None:
            todo.append(assignment.job(row))
        else:
            assignment.finish(row)
            tell("kept", row, len(rows))
    for judged in _judge(todo, workers, cluster):
        row = rows[judged.student]
        row.judged = judged
        if not judged.error:
            assignment.keep(row)
            assignment.finish(row)
        tell("failed" if judged.error else "judged", row, len(rows))
    course.write_marks(lab)
    return Run(lab, list(rows.values()), perf_counter() - began)


def _judge(jobs: Sequence[Job], workers: int | None, cluster: str | None) -> Iterator[Judged]:
    if not jobs:
        return iter(())
    if cluster is None:
        return judge_here(jobs, places_for(workers, len(jobs), "submission"))
    from llmcourse.grading.cluster import judge_on

    return judge_on(cluster, jobs, workers)


class Assignment:
    """One lab in one course: which jobs there are, which verdicts are kept, what is recorded."""

    def __init__(
        self, course: Course, lab: Lab, unsafe: bool, limits: dict[str, float], hide: Sequence[Path] = ()
    ) -> None:
        self.course, self.lab, self.unsafe, self.limits = course, lab, unsafe, limits
        self.hide = tuple(map(str, hide))
        self.source = course.source(lab)
        self.graded = tuple(
            {"id": cell.metadata["nbgrader"]["grade_id"], "source": cell.source}
            for cell in self.source.cells
            if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade")
        )
        self.folder = course.folder / "verdicts" / lab.name
        self.key = key_of(course.folder)
        self.checks = _digest_of_checks(lab)

    def row(self, submission: Submission) -> Row:
        intake = take_in(submission.path, self.source, self.lab.name)
        intake.remarks[:0] = submission.remarks
        return Row(submission, intake)

    def job(self, row: Row) -> Job:
        cells = tuple(
            {"id": cell.id, "source": cell.source} for cell in row.intake.notebook.cells if is_run(cell)
        )
        return Job(
            student=row.student,
            lab=self.lab.name,
            cells=cells,
            graded=self.graded,
            seed=self.seed(row),
            sandbox=not self.unsafe,
            limits=self.limits,
            hide=self.hide,
        )

    def seed(self, row: Row) -> int:
        """Of a submission's random inputs: nobody outside can know it, and it changes with the submission,
        so that what a feedback page tells of the inputs is of no use to the next one."""
        about = f"{self.lab.name}\0{row.student}\0{row.intake.digest}"
        digest = hmac.new(self.key, about.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
        return int.from_bytes(digest[:6], "big")

    def digest(self, row: Row) -> str:
        """Changes with anything that could change the verdict."""
        parts = [
            llmcourse.__version__,
            self.checks,
            str(self.seed(row)),
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
        write_whole(self._file(row), text)

    def finish(self, row: Row) -> None:
        """Enter the verdict in the gradebook, unless it is there, and write the feedback page."""
        assert row.judged is not None
        row.points = self.course.record(self.lab, row.student, row.intake, row.judged)

    def _file(self, row: Row) -> Path:
        return self.folder / f"{row.student}.json"


def key_of(folder: Path) -> bytes:
    """The random key of a course, kept in its folder: all seeds come from it."""
    path = folder / "secret.key"
    if not path.is_file():  # nobody else makes one: `Course.prepare` has locked the folder
        write_whole(path, secrets.token_hex(32), mode=0o600)
    return path.read_bytes().strip()


def _digest_of_checks(lab: Lab) -> str:
    """Changes when an exercise of the lab, with its checks, does."""
    files = sorted(Path(llmcourse.__file__).parent.glob(f"labs/{lab.name}/*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def which_lab(name: str | None, folder: Path) -> Lab:
    """The lab called `name`; without a name, the one whose notebooks lie in `folder`.

    Raises UnknownNameError when the folder does not exist, is empty, or its files leave the lab open.
    """
    if not folder.is_dir():
        raise UnknownNameError(
            f"there is no folder {folder}.",
            "Its entries are the submissions, one for each student.",
            "the folder that your learning platform gave you, unpacked.",
        )
    if name:
        return find_lab(name)
    if not find_submissions(folder, ""):
        raise _no_submission(folder)
    seen = {path.name for path in folder.glob("*/*")} | {path.name for path in folder.glob("*")}
    found = [lab for lab in LABS if any(entry.startswith(lab.name) for entry in seen)]
    if len(found) == 1:
        return found[0]
    raise UnknownNameError(
        f"the files in {folder} do not say which lab they are.",
        f"Names of {len(found)} labs were found." if found else "No file is named after a lab.",
        f"--lab with one of {', '.join(lab.name for lab in LABS)}.",
    )


def _no_submission(folder: Path) -> UnknownNameError:
    if not os.access(folder, os.R_OK | os.X_OK):
        return UnknownNameError(
            f"the folder {folder} cannot be read.",
            "Its permissions do not let you in.",
            f"chmod -R u+rX {folder}, or a copy of your own.",
        )
    return UnknownNameError(
        f"there is no submission in {folder}.",
        "A submission is STUDENT/LAB/LAB.ipynb, STUDENT/ANY.ipynb or STUDENT.ipynb.",
        "the folder that holds one file or folder for each student.",
    )
