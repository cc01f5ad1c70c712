"""An instructor's course folder: nbgrader's gradebook, the notebooks behind it, marks and feedback.

    COURSE/  nbgrader_config.py   so that `jupyter lab` in this folder has a working Formgrader
             gradebook.db         unless the gradebook is a PostgreSQL database
             solutions/ labs/     each lab's source, and what learners got
             judged/              every submission, clean, with its results
             autograded/          the same with the results in its cells; Formgrader shows these
             feedback/LAB/        a page for each student
             marks-LAB.csv

A submission is recorded in three steps: its notebook is put into `judged/` whole, nbgrader enters the
marks, and its notebook in `autograded/` gets its final form. Only then does it count as recorded, so a
run that is killed anywhere does the rest when it is started again. Marks and comments that a person gave
in Formgrader stay; a person is asked to look again only if the submission has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from nbformat import NotebookNode

from llmcourse.errors import DiskError, NotebookError, UnknownNameError
from llmcourse.files import write_whole
from llmcourse.grading import converting, database, feedback, marks
from llmcourse.grading.database import GradebookError, Score
from llmcourse.grading.gates import CHECK_PREFIX, nbgrader
from llmcourse.grading.handed_in import MARKER
from llmcourse.grading.intake import Intake
from llmcourse.grading.record import judged_notebook, results_of
from llmcourse.labs.catalog import Lab
from llmcourse.runner import canonical

if TYPE_CHECKING:
    from llmcourse.grading.stage import Judged

CONFIG_HEAD = "# Written by llmcourse grade, and written again by it: change nothing here.\n"

CONFIG = """\
# Start `jupyter lab` in this folder; Formgrader is in its menu Nbgrader.
from os.path import abspath, dirname

from nbgrader.server_extensions.formgrader.handlers import template_path

c = get_config()
c.CourseDirectory.course_id = "{course_id}"
c.CourseDirectory.root = dirname(abspath(__file__))
c.CourseDirectory.source_directory = "{source}"
c.CourseDirectory.release_directory = "{release}"
c.CourseDirectory.submitted_directory = "{judged}"
c.CourseDirectory.autograded_directory = "{marked}"
{db}c.ClearSolutions.code_stub = {{"python": {code_stub!r}}}
c.ClearSolutions.text_stub = {text_stub!r}

# nbgrader executes nothing here: "autograde" enters the marks that llmcourse grade has decided.
c.Autograde.sanitize_preprocessors = {sanitize!r}
c.Autograde.autograde_preprocessors = {autograde!r}
c.GenerateFeedback.preprocessors = ["llmcourse.grading.replay.NoFeedback"]

c.FormgradeExtension.debug = False  # it would show this file, and a password in it, on a page
c.HTMLExporter.extra_template_basedirs = [c.CourseDirectory.root + "/.formgrader", template_path]
"""

# Formgrader's keyboard waits for MathJax, which comes from the internet. Without it, formulas stay as typed.
MATHJAX = """\
{%- macro mathjax() -%}
<script type="text/x-mathjax-config">
MathJax.Hub.Config({
  tex2jax: {inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]], processEscapes: true}, messageStyle: "none"
});
</script>
<script>
function withoutMathJax() {
  const startup = {signal: {Interest: tell => tell("End")}};
  window.MathJax = {Hub: {Startup: startup, Queue: () => {}, Config: () => {}}};
}
</script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/mathjax/2.7.7/MathJax.js?config=TeX-AMS_CHTML,Safe"
        onerror="withoutMathJax()"></script>
{%- endmacro %}
"""


class Course:
    """The course folder `folder`, made when it is first used; one process at a time may write it.

    db_url   of the gradebook, such as postgresql://USER@HOST/DATABASE; default: a file in the folder
    """

    patience = 10.0  # seconds to wait for another process that ends

    def __init__(self, folder: Path, db_url: str | None = None) -> None:
        converting.require()
        self.folder = Path(folder).absolute()
        if set("*?[]") & set(str(self.folder)):
            raise GradebookError(
                f"the course folder {self.folder} has one of * ? [ ] in its path.",
                "nbgrader reads paths as patterns.",
                "another name for --course.",
            )
        self.db_url = database.normal_url(self.folder, db_url)
        self._own_database = db_url is not None
        self._lock: Any = None

    # ── where things are ──

    def marks_path(self, lab: Lab) -> Path:
        return self.folder / f"marks-{lab.name}.csv"

    def feedback_folder(self, lab: Lab) -> Path:
        return self.folder / "feedback" / lab.name

    def _notebook(self, step: str, lab: str, student: str = "") -> Path:
        return self.folder / step / student / lab / f"{lab}.ipynb"

    # ── making the folder ready ──

    def prepare(self, lab: Lab, source: Path | None = None) -> None:
        """Register a lab: its source, the students' version, and its cells and points in the gradebook.

        source   the lab's folder with its solutions (default: solutions/LAB of this clone)

        Does nothing where all is there. Raises GradebookError when another process is at work here, the
        database does not answer, or a lab with submissions has gained or lost cells.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # marks, and the labs' solutions
            self._take_lock()
            self._write_config()
            self._register(lab.name, source)
        except OSError as error:
            if isinstance(error, DiskError):
                raise
            raise DiskError(
                f"the course folder {self.folder} cannot be written: {error.strerror or error}.",
                "The gradebook, the judged notebooks and the feedback are kept there.",
                "freeing space, mending permissions, or --course with another folder.",
            ) from error

    def source(self, lab: Lab) -> NotebookNode:
        """The lab's notebook as it is graded: stubs for the solutions, hidden tests in the graded cells."""
        own = nbformat.read(self._notebook(converting.SOURCE, lab.name), as_version=4)
        released = nbformat.read(self._notebook(converting.RELEASE, lab.name), as_version=4)
        tests = {
            nbgrader(cell)["grade_id"]: cell.source
            for cell in own.cells
            if nbgrader(cell).get("grade") and not nbgrader(cell).get("solution")
        }
        for cell in released.cells:
            cell.source = tests.get(nbgrader(cell).get("grade_id"), cell.source)
        return released

    def close(self) -> None:
        """Let another process write this folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if "engine" in self.__dict__:
            self.__dict__.pop("engine").dispose()

    def __enter__(self) -> Course:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @cached_property
    def engine(self) -> Any:
        with converting.quiet():
            return database.open_database(self.db_url)

    # ── marks ──

    def record(self, lab: Lab, student: str, intake: Intake, judged: Judged) -> float:
        """Enter one judged submission in the gradebook, and write its feedback page; returns its points.

        Recording the same results again changes nothing. Raises GradebookError when nbgrader fails.
        """
        nb = judged_notebook(intake, judged)
        results = results_of(nb)
        assert results is not None
        before = results_of(self._read(converting.MARKED, lab.name, student)) or {}
        score = self._score(lab.name, student)
        # NOTE: nbgrader writes that notebook twice; only `replay`, after the marks, takes the outputs away.
        done = before.get("record") == results["record"] and "outputs" not in before
        if not done or score is None or not _agrees(score, results):
            # A person who has looked at this very submission need not look again.
            same = before.get("learner") == results["learner"]
            settled = [m.name for m in score.marks.values() if same and not m.needs_review] if score else []
            self._enter(lab.name, student, nb)
            database.settle(self.engine, lab.name, student, settled)
            score = self._score(lab.name, student)
        if score is None:
            raise GradebookError(
                f"{student} has no marks of {lab.name} in the gradebook.",
                "nbgrader entered the submission without an error, and without marks.",
                "the same command again; if that does not help, an empty --course folder.",
            )
        self._write_page(lab, score)
        return score.points

    def scores(self, lab: Lab) -> list[Score]:
        """Every student's marks, by student id; those without a submission have none of the points."""
        found = database.read_scores(self.engine, lab.name)
        names = self._order(lab.name)
        for score in found:
            score.marks = {name: score.marks[name] for name in names if name in score.marks}
        absent = database.other_students(self.engine, lab.name)
        points = {
            c.removeprefix(CHECK_PREFIX): p for c, p in database.registered(self.engine, lab.name).items()
        }
        for student in absent:
            none = {name: database.Mark(name, points[name], auto=0.0) for name in names if name in points}
            found.append(Score(student, none, handed_in=False))
        return sorted(found, key=lambda score: score.student)

    def write_marks(self, lab: Lab) -> Path:
        """Write the CSV file of a lab's marks, and every feedback page that a person's marks have changed."""
        scores = self.scores(lab)
        remarks = {s.student: self._write_page(lab, s) for s in scores if s.handed_in}
        path = self.marks_path(lab)
        write_whole(path, marks.table(lab.name, scores, remarks))
        return path

    # ── inside ──

    def _write_page(self, lab: Lab, score: Score) -> list[str]:
        """Bring a student's feedback page up to date; returns the remarks on the submission."""
        nb = self._read(converting.MARKED, lab.name, score.student)
        results = results_of(nb)
        remarks = list(results["remarks"]) if results else []
        path = self.feedback_folder(lab) / f"{score.student}.html"
        stamp = feedback.stamp(lab, score, results["record"] if results else "")
        if not path.is_file() or stamp not in path.read_text(encoding="utf-8")[:500]:
            write_whole(path, feedback.page(lab, score, nb, stamp))
        return remarks

    def _enter(self, lab: str, student: str, nb: NotebookNode) -> None:
        """Let nbgrader enter a judged notebook."""
        from nbgrader.converters import Autograde
        from nbgrader.coursedir import CourseDirectory

        from llmcourse.grading import replay

        path = self._notebook(converting.JUDGED, lab, student)
        write_whole(path, nbformat.writes(nb, version=4))
        config = converting.configuration(self.folder, self.db_url)
        course = CourseDirectory(config=config)
        course.assignment_id, course.student_id = lab, student
        autograde = Autograde(coursedir=course, config=config)
        autograde.force = True
        autograde.sanitize_preprocessors = list(replay.SANITIZE)
        autograde.autograde_preprocessors = list(replay.AUTOGRADE)
        with converting.one_engine(self.engine):
            converting.run(
                autograde,
                f"the marks of {student} in {lab} cannot be entered",
                "the same command again; what is recorded stays.",
            )

    def _read(self, step: str, lab: str, student: str = "") -> dict[str, Any]:
        """A student's notebook as plain JSON; empty if there is none, or only the beginning of one."""
        return _json(self._notebook(step, lab, student))

    def _score(self, lab: str, student: str) -> Score | None:
        found = database.read_scores(self.engine, lab, student)
        if not found:
            return None
        (score,) = found
        score.marks = {name: score.marks[name] for name in self._order(lab) if name in score.marks}
        return score

    def _order(self, lab: str) -> list[str]:
        """The names of a lab's graded cells in the order of its notebook."""
        if lab not in self._orders:
            released = self._read(converting.RELEASE, lab)
            own = [cell["metadata"].get("nbgrader", {}) for cell in released["cells"]]
            self._orders[lab] = [m["grade_id"].removeprefix(CHECK_PREFIX) for m in own if m.get("grade")]
        return self._orders[lab]

    @cached_property
    def _orders(self) -> dict[str, list[str]]:
        return {}

    def _take_lock(self) -> None:
        from filelock import FileLock, Timeout

        if self._lock is not None:
            return
        lock = FileLock(self.folder / ".lock", is_singleton=True)
        try:
            lock.acquire(timeout=self.patience)
        except Timeout as error:
            raise GradebookError(
                f"another process is grading into {self.folder}.",
                "Two at once would enter each other's marks.",
                "waiting for it to end, or --course with another folder.",
            ) from error
        self._lock = lock

    def _write_config(self) -> None:
        path = self.folder / MARKER
        there = path.read_text(encoding="utf-8") if path.is_file() else CONFIG_HEAD
        if not there.startswith(CONFIG_HEAD):
            raise GradebookError(
                f"{self.folder} holds another course's {MARKER}.",
                "This command keeps its own settings there, and does not overwrite anybody's.",
                "--course with an empty folder.",
            )
        from llmcourse.grading.replay import AUTOGRADE, SANITIZE

        text = CONFIG_HEAD + CONFIG.format(
            course_id=converting.COURSE_ID,
            source=converting.SOURCE,
            release=converting.RELEASE,
            judged=converting.JUDGED,
            marked=converting.MARKED,
            db=f"c.CourseDirectory.db_url = {self.db_url!r}\n" if self._own_database else "",
            code_stub=converting.CODE_STUB,
            text_stub=converting.TEXT_STUB,
            sanitize=list(SANITIZE),
            autograde=list(AUTOGRADE),
        )
        write_whole(self.folder / ".formgrader" / "formgrade" / "mathjax.html.j2", MATHJAX)
        write_whole(path, text, mode=0o600)  # the URL may hold a password

    def _register(self, lab: str, source: Path | None) -> None:
        from llmcourse.grading import authoring

        into = self.folder / converting.SOURCE / lab
        if source is None:
            try:
                source = authoring.course_root() / converting.SOURCE / lab
            except UnknownNameError:  # an installed course, in a folder that has been used before
                if not (into / f"{lab}.ipynb").is_file():
                    raise
                source = into
        notebook = authoring.clean(canonical.read(source / f"{lab}.ipynb"))
        state = self.folder / ".registered.json"
        done = _json(state)
        fingerprint = hashlib.sha256(json.dumps([notebook, self.db_url], sort_keys=True).encode()).hexdigest()
        if done.get(lab) == fingerprint and self._is_whole(lab, notebook):
            return
        if source != into:
            shutil.rmtree(into, ignore_errors=True)
            shutil.copytree(source, into, ignore=authoring.IGNORED)
        write_whole(into / f"{lab}.ipynb", canonical.dumps(notebook))
        assert self.engine is not None  # the tables, before nbgrader looks for them
        try:
            converting.generate(converting.configuration(self.folder, self.db_url), lab)
        except NotebookError as error:
            if "submissions associated" not in error.why:
                raise
            raise GradebookError(
                f"{lab} has submissions in this gradebook, and its marked cells are no longer the same.",
                "Their marks belong to cells that the lab no longer has, or lack cells that are new.",
                "--course with a new folder, or the version of the lab that was handed out.",
            ) from error
        self._orders.pop(lab, None)
        write_whole(state, json.dumps(done | {lab: fingerprint}, indent=1))

    def _is_whole(self, lab: str, notebook: NotebookNode) -> bool:
        graded = [nbgrader(cell) for cell in notebook.cells if nbgrader(cell).get("grade")]
        wanted = {own["grade_id"]: float(own["points"]) for own in graded}
        there = all(self._notebook(s, lab).is_file() for s in (converting.SOURCE, converting.RELEASE))
        return there and database.registered(self.engine, lab) == wanted


def _agrees(score: Score, results: Mapping[str, Any]) -> bool:
    """Whether the gradebook holds what the results say, for every exercise."""
    for mark in score.marks.values():
        if not mark.by_hand:
            ok = results["marks"].get(CHECK_PREFIX + mark.name, {}).get("ok", False)
            if mark.auto != (mark.max if ok else 0.0):
                return False
    return True


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
