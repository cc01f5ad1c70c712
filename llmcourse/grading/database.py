"""nbgrader's database: SQLite in the course's folder, or PostgreSQL by URL.

nbgrader's own `Gradebook` object writes it. Here are the parts that it lacks: making the tables at once
and again after an interruption (it starts a program for it, and takes half-made ones for whole), errors
that say what to do, and all marks of a lab in one query.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcourse.errors import CourseError
from llmcourse.grading.gates import CHECK_PREFIX


class GradebookError(CourseError, RuntimeError):
    """A gradebook that cannot be opened or written."""


@dataclass
class Mark:
    """One graded cell of a submission, in points.

    name      the exercise's or the answer's
    auto      what the judge gave, None for an answer that waits for a person
    manual    what a person gave in its place; extra: what a person gave besides
    by_hand   whether a person marks it (an answer in words)
    """

    name: str
    max: float
    auto: float | None = None
    manual: float | None = None
    extra: float = 0.0
    by_hand: bool = False
    needs_review: bool = False
    comment: str = ""

    @property
    def points(self) -> float:
        """What counts: the manual points if there are any, else the judge's."""
        given = self.manual if self.manual is not None else self.auto
        return (given or 0.0) + self.extra


@dataclass
class Score:
    """One student's marks of a lab, by graded cell in the order of the notebook."""

    student: str
    marks: dict[str, Mark] = field(default_factory=dict)
    handed_in: bool = True

    @property
    def points(self) -> float:
        return sum(mark.points for mark in self.marks.values())

    @property
    def max(self) -> float:
        return sum(mark.max for mark in self.marks.values())


def normal_url(folder: Path, url: str | None) -> str:
    """The URL that nbgrader gets: SQLite in `folder` by default, psycopg for PostgreSQL.

    Raises GradebookError for what is no URL of one of these.
    """
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError

    if url is None:
        return URL.create("sqlite", database=str(folder / "gradebook.db")).render_as_string()
    try:
        parsed = make_url(url.strip())
    except (ArgumentError, ValueError) as error:
        raise GradebookError(
            f"{url!r} is not the URL of a database.",
            f"{error}".partition("\n")[0] + ".",
            "--db postgresql://USER@HOST/DATABASE, or no --db for a file in the course's folder.",
        ) from error
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise GradebookError(
            f"a gradebook cannot be kept in {parsed.get_backend_name()}.",
            "The course is tested with PostgreSQL and SQLite.",
            "--db postgresql://USER@HOST/DATABASE, or no --db for a file in the course's folder.",
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        parsed = parsed.set(database=str(Path(parsed.database).absolute()))
    return parsed.render_as_string(hide_password=False)


def open_database(url: str) -> Any:
    """A SQLAlchemy engine on nbgrader's tables, which are made if they are not there.

    Raises GradebookError when the database does not answer, or is of another version of nbgrader.
    """
    from nbgrader.api import Base
    from nbgrader.dbutil import ALEMBIC_DIR
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    where = make_url(url).render_as_string(hide_password=True)
    try:
        engine = create_engine(url)
        with engine.begin() as connection:
            version = None
            if "alembic_version" in inspect(connection).get_table_names():
                version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            head = _newest_schema(ALEMBIC_DIR)
            if version is None:
                Base.metadata.create_all(connection)
                connection.execute(
                    text("CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32))")
                )
                connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": head})
    except (SQLAlchemyError, ImportError, OSError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, ImportError):
            fix = "pip install -c constraints.txt -e '.[grade]', or a URL that names no driver."
        elif url.startswith("sqlite"):
            fix = "another file in --db, in a folder that you may write to, or no --db."
        else:
            fix = "starting the database, or checking user and password (~/.pgpass keeps passwords)."
        raise GradebookError(
            f"the gradebook {where} cannot be opened.", f"The database says: {said[:300]}", fix
        ) from error
    if version not in (None, head):
        raise GradebookError(
            f"the gradebook {where} is of another version of nbgrader ({version}, not {head}).",
            "Its tables have other columns.",
            "a copy of it, then nbgrader db upgrade; or an empty --course folder.",
        )
    return engine


def read_scores(engine: Any, lab: str, student: str | None = None) -> list[Score]:
    """The marks of every student (or of one) who is in the gradebook with this lab, by student id."""
    from nbgrader import api
    from sqlalchemy import select

    grades = (
        select(
            api.SubmittedAssignment.student_id,
            api.GradeCell.name,
            api.GradeCell.max_score,
            api.GradeCell.cell_type,
            api.Grade.auto_score,
            api.Grade.manual_score,
            api.Grade.extra_credit,
            api.Grade.needs_manual_grade,
        )
        .join(api.Grade, api.Grade.cell_id == api.GradeCell.id)
        .join(api.SubmittedNotebook, api.SubmittedNotebook.id == api.Grade.notebook_id)
    )
    comments = (
        select(api.SubmittedAssignment.student_id, api.BaseCell.name, api.Comment.manual_comment)
        .join(api.Comment, api.Comment.cell_id == api.BaseCell.id)
        .join(api.SubmittedNotebook, api.SubmittedNotebook.id == api.Comment.notebook_id)
        .where(api.Comment.manual_comment.is_not(None))
    )
    scores: dict[str, Score] = {}
    with engine.connect() as connection:
        for row in connection.execute(_of_lab(grades, lab, student)):
            name, by_hand = _exercise(row.name), row.cell_type != "code"
            mark = Mark(
                name, row.max_score, row.auto_score, row.manual_score, row.extra_credit or 0.0, by_hand
            )
            mark.needs_review = bool(row.needs_manual_grade)
            scores.setdefault(row.student_id, Score(row.student_id)).marks[name] = mark
        for who, cell, comment in connection.execute(_of_lab(comments, lab, student)):
            if who in scores and cell in scores[who].marks:
                scores[who].marks[cell].comment = comment
    return [scores[student] for student in sorted(scores)]


def other_students(engine: Any, lab: str) -> list[str]:
    """Students whom the gradebook knows and who have no submission of this lab."""
    from nbgrader import api
    from sqlalchemy import select

    there = (
        select(api.SubmittedAssignment.student_id)
        .join(api.Assignment, api.Assignment.id == api.SubmittedAssignment.assignment_id)
        .where(api.Assignment.name == lab)
    )
    with engine.connect() as connection:
        return sorted(
            connection.execute(select(api.Student.id).where(api.Student.id.not_in(there))).scalars()
        )


def settle(engine: Any, lab: str, student: str, names: Iterable[str]) -> None:
    """Say of these graded cells that a person need not look at them again."""
    from nbgrader import api
    from sqlalchemy import select, update

    cells = [cell for name in names for cell in (name, CHECK_PREFIX + name)]
    if not cells:
        return
    ids = (
        select(api.Grade.id)
        .join(api.BaseCell, api.BaseCell.id == api.Grade.cell_id)
        .join(api.SubmittedNotebook, api.SubmittedNotebook.id == api.Grade.notebook_id)
        .where(api.BaseCell.name.in_(cells))
    )
    with engine.begin() as connection:
        found = list(connection.execute(_of_lab(ids, lab, student)).scalars())
        connection.execute(update(api.Grade).where(api.Grade.id.in_(found)).values(needs_manual_grade=False))


def registered(engine: Any, lab: str) -> Mapping[str, float]:
    """The graded cells that the gradebook has for a lab, with their points."""
    from nbgrader import api
    from sqlalchemy import select

    query = (
        select(api.GradeCell.name, api.GradeCell.max_score)
        .join(api.Notebook, api.Notebook.id == api.GradeCell.notebook_id)
        .join(api.Assignment, api.Assignment.id == api.Notebook.assignment_id)
        .where(api.Assignment.name == lab)
    )
    with engine.connect() as connection:
        return {name: points for name, points in connection.execute(query)}


def _of_lab(query: Any, lab: str, student: str | None) -> Any:
    from nbgrader import api

    joined = (
        query.join(api.SubmittedAssignment, api.SubmittedAssignment.id == api.SubmittedNotebook.assignment_id)
        .join(api.Assignment, api.Assignment.id == api.SubmittedAssignment.assignment_id)
        .where(api.Assignment.name == lab)
    )
    return joined if student is None else joined.where(api.SubmittedAssignment.student_id == student)


def _exercise(cell: str) -> str:
    return cell.removeprefix(CHECK_PREFIX)


def _newest_schema(folder: str) -> str:
    from alembic.script import ScriptDirectory

    return str(ScriptDirectory(folder).get_current_head())
