"""A class of honest students and of every kind of hostile submission, graded together once."""

from __future__ import annotations

import csv
import re
import socket
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from classroom import LAB, hand_in, solved
from hostile import EXERCISES, KINDS, Hostile, Workshop

from llmcourse.grading.grade import Row, Run, grade
from llmcourse.grading.gradebook import Course
from llmcourse.grading.sandbox import FIRST_UID, SLOTS
from llmcourse.labs.catalog import find_lab

HONEST = ("ada", "emmy", "grace")
LIMITS = {"cell_seconds": 6.0, "call_seconds": 6.0, "memory_mb": 700}
POINTS = {e.name: e.points for e in find_lab("01").exercises}


@dataclass
class Aftermath:
    run: Run
    course: Course
    outside: Path
    connections: list[Any]
    seen: list[psutil.Process]

    def row(self, student: str) -> Row:
        return next(row for row in self.run.rows if row.student == student)


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    home = tmp_path_factory.mktemp("class")
    folder, outside = home / "submissions", home / "outside"
    outside.mkdir()
    hand_in(outside, "secret")
    (outside / "secret" / LAB / f"{LAB}.ipynb").rename(outside / "secret.ipynb")
    sqlite3.connect(outside / "gradebook.db").execute("create table grade (manual_score, auto_score)")
    connections: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        (outside / "port").write_text(str(server.getsockname()[1]))
        threading.Thread(target=_accept, args=(server, connections), daemon=True).start()
        for student in HONEST:
            hand_in(folder, student)
        notebook = solved()
        for kind in KINDS:
            kind.spoil(Workshop(folder / kind.name, notebook, outside))
        course = Course(home / "course")
        run = grade(folder, find_lab("01"), course, limits=LIMITS)
    return Aftermath(run, course, outside, connections, _of_submissions())


def _accept(server: socket.socket, connections: list[Any]) -> None:
    while True:
        try:
            connections.append(server.accept())
        except OSError:
            return


def _of_submissions() -> list[psutil.Process]:
    """Processes of the users that sandboxes run as."""
    users = range(FIRST_UID, FIRST_UID + SLOTS)
    return [p for p in psutil.process_iter(["uids"]) if p.info["uids"] and p.info["uids"].real in users]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_hostile_submission_gets_the_marks_that_are_right_and_a_clear_verdict(kind: Hostile, aftermath):
    row = aftermath.row(kind.name)
    assert row.judged is not None
    assert not row.judged.error
    lost = {name for name in EXERCISES if not row.judged.marks[f"check-{name}"]["ok"]}
    said = "\n".join(
        [*row.intake.remarks, *row.judged.remarks, *(m["text"] for m in row.judged.marks.values())]
    )
    assert lost == set(kind.loses), said
    assert row.points == sum(points for name, points in POINTS.items() if name not in kind.loses)
    assert re.search(kind.says, said), said


@pytest.mark.parametrize("student", HONEST)
def test_a_hostile_class_does_no_harm_to_honest_students(student, aftermath):
    row = aftermath.row(student)
    assert row.points == sum(POINTS.values())
    assert not row.intake.remarks


def test_there_are_at_least_thirty_kinds_and_each_has_its_own_name():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 30


def test_the_gradebook_and_the_csv_hold_what_was_decided(aftermath):
    points = {row.student: row.points for row in aftermath.run.rows}
    assert {s.student: s.points for s in aftermath.course.scores(aftermath.run.lab)} == points
    with open(aftermath.course.marks_path(aftermath.run.lab), newline="", encoding="utf-8") as file:
        table = {line["student"]: float(line["total"]) for line in csv.DictReader(file)}
    assert table == points


def test_nothing_outside_was_touched(aftermath):
    assert not (aftermath.outside / "owned").exists()
    assert sqlite3.connect(aftermath.outside / "gradebook.db").execute("select * from grade").fetchall() == []
    assert aftermath.connections == []


def test_nothing_that_a_submission_started_is_still_alive(aftermath):
    _, alive = psutil.wait_procs(aftermath.seen, timeout=60)  # other tests' sandboxes end by themselves
    assert [p.cmdline() for p in alive] == []


def test_feedback_pages_run_nothing_and_show_no_hidden_test(aftermath):
    hidden = ["bias [3] added to x [2, 3]", "four equal logits", "HIDDEN TESTS"]
    pages = list(aftermath.course.feedback_folder(aftermath.run.lab).glob("*.html"))
    assert len(pages) == len(aftermath.run.rows)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.search(r"<(script|iframe|object|embed|link|svg)\b", html, re.IGNORECASE), page.name
        assert not re.search(r"<[^>]+\son\w+\s*=", html), page.name
        assert not re.search(r"""(src|href)\s*=\s*["']?\s*(javascript|https?):""", html), page.name
        assert re.search(r"Content-Security-Policy\"[^>]+default-src (&#39;|')none", html)
        assert not [text for text in hidden if text in html], page.name
        assert "window.owned = 5" not in html, "an output that came with the file"


def test_what_nbgrader_shows_an_instructor_holds_no_html_of_a_submissions(aftermath):
    for path in aftermath.course.folder.glob(f"autograded/*/{LAB}/{LAB}.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert "text/html" not in text
        assert "image/svg" not in text
        assert "application/javascript" not in text
