"""Marks in nbgrader's gradebook: right, kept, and the same whenever the process is killed."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import postgres
import pytest
import small_lab
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from small_lab import NAME, find, solved

from llmcourse.grading import converting, database
from llmcourse.grading.gradebook import Course, GradebookError
from llmcourse.grading.intake import Intake, take_in
from llmcourse.grading.marks import harmless
from llmcourse.grading.record import judged_notebook, outputs

LAB = SimpleNamespace(name=NAME, title="A small lab", exercises=small_lab.EXERCISES)

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the lab's source and its students' version."""
    root = tmp_path_factory.mktemp("sources")
    small_lab.built(root)
    return root


@pytest.fixture(scope="module")
def released(sources: Path) -> NotebookNode:
    return nbformat.read(sources / "labs" / NAME / f"{NAME}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres.server() as url:
        yield url


@pytest.fixture
def make_course(tmp_path: Path, sources: Path) -> Iterator[Callable[..., Course]]:
    """`make_course(db_url)`: a course folder, ready for the small lab."""
    made: list[Course] = []

    def make(db_url: str | None = None, name: str = "course") -> Course:
        course = Course(tmp_path / name, db_url)
        made.append(course)
        course.prepare(LAB, sources / "solutions" / NAME)
        return course

    yield make
    for course in made:
        course.close()


@pytest.fixture
def course(make_course: Callable[..., Course]) -> Course:
    return make_course()


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, make_course: Callable[..., Course]) -> Course:
    """A course with its gradebook in a file, then in a PostgreSQL database that was empty before."""
    if request.param == "sqlite":
        return make_course()
    url = request.getfixturevalue("postgres_url")
    engine = database.open_database(database.normal_url(Path("/"), url))
    from nbgrader.api import Base
    from sqlalchemy import text

    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    engine.dispose()
    return make_course(url)


def came(course: Course, nb: NotebookNode | None, folder: Path) -> Intake:
    folder.mkdir(parents=True, exist_ok=True)
    if nb is not None:
        (folder / f"{NAME}.ipynb").write_text(json.dumps(nb))
    return take_in(folder, course.source(LAB), NAME)


def judged(double: bool = True, shift: bool = True, shown: Any = None) -> Any:
    """What the judge would say."""
    marks = {
        f"check-{name}": {
            "ok": ok,
            "state": "passed" if ok else "failed",
            "text": f"✓ {name} · all hold" if ok else f"✗ {name} · wrong\n  expected 4",
        }
        for name, ok in (("double", double), ("shift", shift))
    }
    return SimpleNamespace(outputs=shown or {}, marks=marks, remarks=[])


def gradebook(course: Course) -> Gradebook:
    return Gradebook(course.db_url, converting.COURSE_ID)


def mark_by_hand(
    course: Course, student: str, cell: str, points: float, comment: str = "", extra: float | None = None
):
    """What Formgrader does when a person types a mark and a comment."""
    with gradebook(course) as book:
        grade = book.find_grade(cell, NAME, NAME, student)
        grade.manual_score, grade.extra_credit, grade.needs_manual_grade = points, extra, False
        if comment:
            book.find_comment(cell, NAME, NAME, student).manual_comment = comment
        book.db.commit()


def rows(course: Course) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(course.write_marks(LAB).read_text())))


# ── marks ────────────────────────────────────────────────────────────────────────────────────────


def test_marks_are_entered_marked_by_hand_and_read_back(either: Course, released, tmp_path) -> None:
    right = came(either, solved(released), tmp_path / "in" / "ada")
    silent = copy.deepcopy(solved(released))
    find(silent, "why-linear").source = find(released, "why-linear").source
    assert either.record(LAB, "ada", right, judged()) == 7
    assert either.record(LAB, "bob", came(either, silent, tmp_path / "in" / "bob"), judged(shift=False)) == 3
    mark_by_hand(either, "ada", "why-linear", 4.5, "Good, but say why.")
    assert either.record(LAB, "ada", right, judged()) == 11.5
    assert [
        (r["student"], r["double"], r["shift"], r["manual"], r["total"], r["max"]) for r in rows(either)
    ] == [
        ("ada", "3", "4", "4.5", "11.5", "12"),
        ("bob", "3", "0", "0", "3", "12"),
    ]
    (ada, bob) = either.scores(LAB)
    assert ada.marks["why-linear"].comment == "Good, but say why."
    assert list(bob.marks) == ["double", "shift", "why-linear"]
    with gradebook(either) as book:  # nbgrader's own sums
        theirs = {row["student"]: (row["score"], row["max_score"]) for row in book.submission_dicts(NAME)}
    assert theirs == {"ada": (11.5, 12.0), "bob": (3.0, 12.0)}


def test_an_answer_waits_until_a_person_marks_it_and_an_empty_one_does_not(
    course, released, tmp_path
) -> None:
    course.record(LAB, "ada", came(course, solved(released), tmp_path / "ada"), judged())
    course.record(LAB, "bob", came(course, released, tmp_path / "bob"), judged(False, False))
    ada, bob = rows(course)
    assert (ada["manual"], "waits" in ada["remarks"]) == ("", True)
    assert (bob["manual"], bob["total"], bob["remarks"]) == ("0", "0", "")


def test_who_handed_in_nothing_has_no_points_and_is_told(course, released, tmp_path) -> None:
    intake = came(course, None, tmp_path / "ada")
    assert course.record(LAB, "ada", intake, SimpleNamespace(outputs={}, marks={}, remarks=[])) == 0
    with gradebook(course) as book:
        book.add_student("zoe")
    ada, zoe = rows(course)
    assert (ada["total"], ada["max"]) == (zoe["total"], zoe["max"]) == ("0", "12")
    assert "no notebook was handed in" in ada["remarks"]
    assert zoe["remarks"] == "nothing was handed in"


def test_recording_the_same_again_changes_nothing(course, released, tmp_path) -> None:
    intake = came(course, solved(released), tmp_path / "ada")
    course.record(LAB, "ada", intake, judged())
    course.write_marks(LAB)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in course.folder.rglob("*") if p.is_file()}
    course.record(LAB, "ada", intake, judged())
    course.prepare(LAB, course.folder / "solutions" / NAME)
    course.write_marks(LAB)
    assert {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in course.folder.rglob("*") if p.is_file()
    } == before


def test_marks_by_hand_outlive_a_new_judgement_of_the_same_submission(course, released, tmp_path) -> None:
    intake = came(course, solved(released), tmp_path / "ada")
    course.record(LAB, "ada", intake, judged(shift=False))
    mark_by_hand(course, "ada", "why-linear", 5, "Right.", extra=1)
    mark_by_hand(course, "ada", "check-shift", 2)
    assert course.record(LAB, "ada", intake, judged(shift=True)) == 3 + 2 + 6
    (score,) = course.scores(LAB)
    assert [m.needs_review for m in score.marks.values()] == [False, False, False]
    assert score.marks["shift"].auto == 4
    assert score.marks["why-linear"].comment == "Right."


def test_a_changed_submission_keeps_its_mark_by_hand_and_asks_for_a_look(course, released, tmp_path) -> None:
    course.record(LAB, "ada", came(course, solved(released), tmp_path / "ada"), judged())
    mark_by_hand(course, "ada", "why-linear", 5)
    changed = came(course, solved(released, answer="Something else."), tmp_path / "ada")
    assert course.record(LAB, "ada", changed, judged(double=False)) == 9
    (score,) = course.scores(LAB)
    assert score.marks["why-linear"].needs_review
    assert "waits" in rows(course)[0]["remarks"]


def test_a_lost_gradebook_is_filled_again(course, released, tmp_path, sources) -> None:
    intake = came(course, solved(released), tmp_path / "ada")
    course.record(LAB, "ada", intake, judged())
    course.close()
    (course.folder / "gradebook.db").unlink()
    course.prepare(LAB, sources / "solutions" / NAME)
    assert course.record(LAB, "ada", intake, judged()) == 7


def test_the_work_for_a_submission_does_not_grow_with_the_class(course, released, tmp_path) -> None:
    from sqlalchemy import event

    intake = came(course, solved(released), tmp_path / "ada")
    statements: list[str] = []
    event.listen(course.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    counts = []
    for i in range(12):
        statements.clear()
        course.record(LAB, f"student{i}", intake, judged())
        counts.append(len(statements))
    assert len(set(counts[1:])) == 1, counts


# ── what a page that shows these notebooks gets ──────────────────────────────────────────────────


def test_outputs_are_text_and_whole_pictures_and_nothing_else(course, released, tmp_path) -> None:
    evil = [
        {"output_type": "display_data", "data": {"text/html": "<script>boom()</script>"}, "metadata": {}},
        {"output_type": "display_data", "data": {"application/javascript": "boom()", "text/plain": "kept"}},
        {"output_type": "display_data", "data": {"image/svg+xml": "<svg onload=boom()>"}},
        {
            "output_type": "display_data",
            "data": {"image/png": PNG, "text/plain": "pic"},
            "metadata": {"image/png": 1},
        },
        {"output_type": "display_data", "data": {"image/png": "PHNjcmlwdD4="}},
        {"output_type": "execute_result", "data": {"text/plain": "3"}, "execution_count": 1},
        {"output_type": "stream", "name": "<b>", "text": "\x1b[31mred\x07"},
        {"output_type": "error", "ename": "E\0", "evalue": "v", "traceback": ["\x1b[0mtrace", 3]},
        {"output_type": "update_display_data", "data": {"text/plain": "no"}},
    ]
    intake = came(course, solved(released), tmp_path / "ada")
    course.record(LAB, "ada", intake, judged(shown={"double": evil, "check-double": evil}))
    path = course.folder / "autograded" / "ada" / NAME / f"{NAME}.ipynb"
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert "boom" not in path.read_text()
    shown = find(nb, "double").outputs
    assert [o.output_type for o in shown] == [
        "display_data",
        "display_data",
        "display_data",
        "stream",
        "error",
    ]
    assert shown[1].data["image/png"] == PNG
    assert (shown[3].name, shown[3].text) == ("stdout", "red")
    assert find(nb, "check-double").outputs == [
        {"output_type": "stream", "name": "stdout", "text": "✓ double · all hold\n"}
    ]


def test_a_flood_of_outputs_is_cut() -> None:
    flood = [{"output_type": "stream", "name": "stdout", "text": "x" * 1000}] * 100_000
    kept = outputs(flood)
    assert sum(len(o["text"]) for o in kept) < 60_000
    assert "more was not kept" in kept[-1]["text"]


def test_hidden_tests_are_in_the_gradebook_and_not_in_what_learners_get(course, released, tmp_path) -> None:
    course.record(LAB, "ada", came(course, solved(released), tmp_path / "ada"), judged())
    with gradebook(course) as book:
        assert "hidden test of double" in book.find_source_cell("check-double", NAME, NAME).source
        assert "twice_as_much" not in book.find_source_cell("double", NAME, NAME).source
    source = course.source(LAB)
    assert "hidden test of double" in find(source, "check-double").source
    assert "NotImplementedError" in find(source, "double").source
    assert "hidden test" not in (course.folder / "labs" / NAME / f"{NAME}.ipynb").read_text()


def test_nbgraders_own_autograde_enters_the_same_marks_and_runs_nothing(course, released, tmp_path) -> None:
    """Formgrader's button, with the settings that the folder holds."""
    from nbgrader.converters import Autograde, GenerateFeedback
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config.loader import PyFileConfigLoader

    nb = solved(released)
    find(nb, "double").source += f"\nopen({str(tmp_path / 'ran')!r}, 'w')"
    course.record(LAB, "ada", came(course, nb, tmp_path / "ada"), judged(shift=False))
    config = PyFileConfigLoader("nbgrader_config.py", path=str(course.folder)).load_config()
    folder = CourseDirectory(config=config)
    folder.assignment_id, folder.student_id = NAME, "ada"
    assert folder.root == str(course.folder)
    button = Autograde(coursedir=folder, config=config)
    button.force = True
    with converting.quiet():
        button.start()
    assert not (tmp_path / "ran").exists()
    assert [s.points for s in course.scores(LAB)] == [3]
    with pytest.raises(Exception, match="error"), converting.quiet() as said:
        GenerateFeedback(coursedir=folder, config=config).start()
    assert any("feedback pages are not made" in text for text in said)


# ── killed ───────────────────────────────────────────────────────────────────────────────────────


def killed_at(step: int, work: Callable[[Callable[[], None]], None]) -> bool:
    """Do `work` in a process that kills itself at its step number `step`; whether it came to its end.

    A step is a file opened, renamed or removed, or a transaction that is about to be committed.
    """
    pid = os.fork()
    if pid == 0:
        left = [step]

        def count() -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(
                lambda name, args: count() if name in ("open", "os.rename", "os.remove") else None
            )
            work(count)
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return not os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_at_any_step_and_started_again_everyone_has_their_marks(released, tmp_path, sources) -> None:
    from sqlalchemy import event

    class_of = {"ada": judged(), "bob": judged(shift=False)}
    intakes: dict[str, Intake] = {}

    def grade(folder: Path, count: Callable[[], None] = lambda: None) -> Course:
        course = Course(folder)
        course.prepare(LAB, sources / "solutions" / NAME)
        event.listen(course.engine, "commit", lambda connection: count())
        for student, verdict in class_of.items():
            course.record(LAB, student, intakes[student], verdict)
        course.write_marks(LAB)
        return course

    with Course(tmp_path / "first") as first:
        first.prepare(LAB, sources / "solutions" / NAME)
        for student in class_of:
            intakes[student] = came(first, solved(released), tmp_path / "in" / student)
    with grade(tmp_path / "first") as first:
        wanted = [(s.student, s.points) for s in first.scores(LAB)]
        csv_text = first.marks_path(LAB).read_text()
    assert wanted == [("ada", 7), ("bob", 3)]
    step, ended = 3, False
    while not ended:
        folder = tmp_path / f"killed{step}"
        ended = killed_at(step, lambda count, folder=folder: grade(folder, count).close())
        with grade(folder) as again:
            assert [(s.student, s.points) for s in again.scores(LAB)] == wanted, f"killed at step {step}"
            assert again.marks_path(LAB).read_text() == csv_text
            for student in class_of:
                nb = json.loads((folder / "autograded" / student / NAME / f"{NAME}.ipynb").read_bytes())
                assert any(cell.get("outputs") for cell in nb["cells"])
        step = int(step * 1.5) + 1
    assert step > 150, "the work has fewer steps than this test thinks"


# ── what goes wrong is said ──────────────────────────────────────────────────────────────────────


def three_parts(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 3
    assert text.splitlines()[2].startswith("  Try ")
    return text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_do_not_write_one_course(tmp_path, sources) -> None:
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        other = Course(tmp_path / "course")
        other.prepare(LAB, sources / "solutions" / NAME)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        course = Course(tmp_path / "course")
        course.patience = 0.2
        with pytest.raises(GradebookError, match="another process is grading") as error:
            course.prepare(LAB, sources / "solutions" / NAME)
        three_parts(error)
    finally:
        os.write(done[1], b"x")
        os.waitpid(pid, 0)
    course.prepare(LAB, sources / "solutions" / NAME)
    course.close()


def test_another_courses_settings_are_not_overwritten(tmp_path, sources) -> None:
    (tmp_path / "nbgrader_config.py").write_text("c = get_config()\n")
    with Course(tmp_path) as course, pytest.raises(GradebookError, match="another course's") as error:
        course.prepare(LAB, sources / "solutions" / NAME)
    three_parts(error)
    assert (tmp_path / "nbgrader_config.py").read_text() == "c = get_config()\n"


def test_a_lab_that_lost_a_cell_after_submissions_is_refused(course, released, tmp_path, sources) -> None:
    course.record(LAB, "ada", came(course, solved(released), tmp_path / "ada"), judged())
    nb = nbformat.read(sources / "solutions" / NAME / f"{NAME}.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if "shift" not in c.id]
    changed = small_lab.write_source(tmp_path / "changed", nb).parent
    with pytest.raises(GradebookError, match="has submissions") as error:
        course.prepare(LAB, changed)
    three_parts(error)
    course.prepare(LAB, sources / "solutions" / NAME)
    assert [s.points for s in course.scores(LAB)] == [7]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "not the URL of a database"),
        ("postgresql://ada:secret@/x?host=/nowhere", "cannot be opened"),
        ("oracle://ada:secret@host/x", "cannot be kept in oracle"),
        ("postgresql+none://ada:secret@host/x", "cannot be opened"),
        ("sqlite:////nowhere/at/all/gradebook.db", "cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_opened_is_said_to_be_and_no_password_is_shown(
    url, says, tmp_path, sources
) -> None:
    with pytest.raises(GradebookError, match=says) as error, Course(tmp_path / "c", url) as course:
        course.prepare(LAB, sources / "solutions" / NAME)
    assert "secret" not in three_parts(error)


def test_a_gradebook_of_another_nbgrader_is_not_touched(course, sources) -> None:
    from sqlalchemy import text

    with course.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'ancient'"))
    course.close()
    with pytest.raises(GradebookError, match="another version of nbgrader") as error:
        course.prepare(LAB, sources / "solutions" / NAME)
    three_parts(error)


def test_a_folder_that_nbgrader_would_take_for_a_pattern_is_refused(tmp_path) -> None:
    with pytest.raises(GradebookError, match="in its path"):
        Course(tmp_path / "course [2026]")


def test_the_folder_and_its_settings_are_their_owners_only(tmp_path, sources) -> None:
    with Course(tmp_path / "c", f"sqlite:///{tmp_path}/other.db") as course:
        course.prepare(LAB, sources / "solutions" / NAME)
    path = tmp_path / "c" / "nbgrader_config.py"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "other.db" in path.read_text()
    assert not (tmp_path / "c" / "gradebook.db").exists()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0"])
def test_a_spreadsheet_takes_no_text_for_a_formula(text) -> None:
    assert harmless(text) == f"'{text}"
    assert harmless(f"a{text}") == f"a{text}"


def test_remarks_cannot_start_a_formula_in_the_table(course, released, tmp_path) -> None:
    nb = solved(released)
    nb.metadata["kernelspec"]["name"] = "x;=1+1"
    intake = came(course, nb, tmp_path / "ada")
    intake.remarks.insert(0, "=HYPERLINK(1)")
    course.record(LAB, "ada", intake, judged())
    (row,) = rows(course)
    assert row["remarks"].startswith("'=HYPERLINK(1)")
    assert ";" not in row["remarks"]


def test_results_are_plain_json_and_their_digest_is_stable(course, released, tmp_path) -> None:
    intake = came(course, solved(released), tmp_path / "ada")
    first, again = (judged_notebook(intake, judged()) for _ in range(2))
    assert json.dumps(first, sort_keys=True) == json.dumps(again, sort_keys=True)
    other = judged_notebook(intake, judged(double=False))
    assert other.metadata.llmcourse.results.record != first.metadata.llmcourse.results.record
