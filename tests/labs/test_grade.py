"""The grade command: many submissions, killed and gone on with, refused where it is unsafe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from classroom import LAB, ROOT, hand_in, read

from llmcourse import cli
from llmcourse.errors import SandboxError, UnknownNameError
from llmcourse.grading import sandbox
from llmcourse.grading.grade import Assignment, grade, which_lab
from llmcourse.grading.gradebook import Course
from llmcourse.grading.intake import find_submissions
from llmcourse.grading.pool import judge_here
from llmcourse.grading.stage import Job, judge_submission
from llmcourse.labs.catalog import find_lab

LAB_01 = find_lab("01")
FULL = LAB_01.points
WRONG = "def sum_to(grad, shape):\n    return grad"


def command(folder: Path, course: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "llmcourse.cli", "grade", str(folder), "--course", str(course), *options]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def a_class(folder: Path, count: int) -> None:
    for i in range(count):
        hand_in(folder, f"student{i:02d}", **({"sum_to": WRONG} if i % 3 == 2 else {}))


def right_marks(count: int) -> dict[str, float]:
    lost = sum(e.points for e in LAB_01.exercises if e.name in ("sum_to", "matmul_backward"))
    return {f"student{i:02d}": float(FULL - (lost if i % 3 == 2 else 0)) for i in range(count)}


def marks(course: Path) -> dict[str, float]:
    with Course(course) as book:
        return {score.student: score.points for score in book.scores(LAB_01)}


# ── a run ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", ["12", "13"])
def test_a_solved_notebook_gets_all_points_and_a_fresh_one_none(number, tmp_path):
    """Hidden tests included: what they call runs in the sandbox, and only plain data comes back."""
    lab = find_lab(number)
    hand_in(tmp_path / "submissions", "right", lab=lab.name)
    cells = [c for c in read("labs", lab.name)["cells"] if c["metadata"].get("nbgrader", {}).get("solution")]
    stubs = {cell["metadata"]["nbgrader"]["grade_id"]: cell["source"] for cell in cells}
    hand_in(tmp_path / "submissions", "fresh", lab=lab.name, **stubs)
    assert cli.main(["grade", str(tmp_path / "submissions"), "--course", str(tmp_path / "course")]) == 0
    with Course(tmp_path / "course") as book:
        found = {score.student: score.points for score in book.scores(lab)}
    assert found == {"right": lab.points, "fresh": 0}


def test_a_killed_run_goes_on_and_loses_nobody(tmp_path):
    folder, course = tmp_path / "submissions", tmp_path / "course"
    count = 8
    a_class(folder, count)
    for students in (2, 5):  # killed once in the middle of judging, and once more later
        run = subprocess.Popen(
            command(folder, course), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        family = psutil.Process(run.pid)
        wait_for(lambda n=students: len(list((course / "verdicts" / LAB).glob("s*.json"))) >= n, run)
        started = family.children(recursive=True)
        run.send_signal(signal.SIGKILL)
        run.wait()
        gone, alive = psutil.wait_procs(started, timeout=20)
        assert alive == []
        assert gone
    before = {path.name: path.stat().st_mtime_ns for path in (course / "verdicts" / LAB).glob("s*.json")}
    done = subprocess.run(command(folder, course), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert marks(course) == right_marks(count)
    after = {path.name: path.stat().st_mtime_ns for path in (course / "verdicts" / LAB).glob("s*.json")}
    assert {name: after[name] for name in before} == before, "what was judged is not judged again"
    assert "were judged before" in done.stdout


def wait_for(condition, run, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, "the run ended by itself"
        assert time.monotonic() < end, "the run makes no progress"
        time.sleep(0.02)


def test_a_submission_handed_in_anew_is_judged_anew_and_others_are_not(tmp_path):
    folder, course = tmp_path / "submissions", tmp_path / "course"
    a_class(folder, 3)
    with Course(course) as book:
        first = grade(folder, LAB_01, book, workers=2)
        assert {row.student: row.points for row in first.rows} == right_marks(3)
        hand_in(folder, "student02")
        second = grade(folder, LAB_01, book, workers=2)
        assert [row.kept for row in second.rows] == [True, True, False]
        assert second.rows[2].points == FULL
        third = grade(folder, LAB_01, book, workers=2, again=True)
        assert [row.kept for row in third.rows] == [False, False, False]


def test_a_gradebook_that_was_lost_is_filled_from_the_verdicts(tmp_path):
    folder, course = tmp_path / "submissions", tmp_path / "course"
    a_class(folder, 3)
    with Course(course) as book:
        grade(folder, LAB_01, book, workers=2)
    (course / "gradebook.db").unlink()
    with Course(course) as book:
        run = grade(folder, LAB_01, book, workers=2)
    assert all(row.kept for row in run.rows)
    assert marks(course) == right_marks(3)


def test_a_worker_that_dies_costs_nobody_their_marks(tmp_path, monkeypatch):
    """The first judge of one submission kills its own process, as the kernel does when memory runs out."""
    marker = tmp_path / "died"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import llmcourse.grading.stage as stage\n"
        "right = stage.judge_submission\n"
        "def judge(job, slot=0):\n"
        f"    if job.student == 'b' and not os.path.exists({str(marker)!r}):\n"
        f"        open({str(marker)!r}, 'w').close()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return right(job, slot)\n"
        "stage.judge_submission = judge\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    jobs = [job(name) for name in "abcd"]
    judged = {j.student: j for j in judge_here(jobs, 2)}
    assert marker.exists()
    assert {name: j.error for name, j in judged.items()} == dict.fromkeys("abcd", "")
    assert all(j.marks["check-one"]["ok"] for j in judged.values())


def job(student: str) -> Job:
    cells = ({"id": "one", "source": "def one():\n    return 1"},)
    graded = ({"id": "check-one", "source": "assert one() == 1"},)
    return Job(student, LAB, cells, graded, seed=1)


# ── the graded cells ─────────────────────────────────────────────────────────────────────────────


def test_a_graded_cell_calls_the_learners_functions_and_knows_nothing_else_of_the_notebook():
    cells = ({"id": "a", "source": "secret = 7\ndef one(x): return x + 1\ndef bad(): raise KeyError('no')"},)
    graded = (
        {"id": "right", "source": "assert one(np.arange(3)).tolist() == [1, 2, 3]"},
        {"id": "wrong", "source": "assert one(1) == 3, f'one(1) is {one(1)}'"},
        {"id": "raises", "source": "bad()"},
        {"id": "missing", "source": "two(1)"},
        {"id": "value", "source": "assert secret == 7"},
        {"id": "inner", "source": "def twice(x):\n    return one(one(x))\nassert twice(1) == 3"},
    )
    judged = judge_submission(Job("a", LAB, cells, graded, seed=1))
    states = {name: mark["ok"] for name, mark in judged.marks.items()}
    assert states == {
        "right": True,
        "wrong": False,
        "raises": False,
        "missing": False,
        "value": False,
        "inner": True,
    }
    assert judged.marks["wrong"]["text"] == "✗ one(1) is 2"
    assert "KeyError: 'no'" in judged.marks["raises"]["text"]
    assert "two" in judged.marks["missing"]["text"]


def test_the_same_job_gives_the_same_marks(tmp_path):
    hand_in(tmp_path, "a", sum_to=WRONG)
    with Course(tmp_path / "course") as book:
        first = grade(tmp_path, LAB_01, book, workers=1).rows[0].judged
        second = grade(tmp_path, LAB_01, book, workers=1, again=True).rows[0].judged
    assert first is not None
    assert second is not None
    assert first.marks == second.marks


def test_the_seed_belongs_to_the_course_and_the_submission_and_stays(tmp_path):
    hand_in(tmp_path / "class", "ada")
    hand_in(tmp_path / "class", "emmy")
    seeds = []
    for name in ("one", "one", "two"):
        with Course(tmp_path / name) as course:
            course.prepare(LAB_01)
            assignment = Assignment(course, LAB_01, unsafe=False, limits={})
            rows = [assignment.row(s) for s in find_submissions(tmp_path / "class", LAB)]
            seeds.append([assignment.seed(row) for row in rows])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4
    assert (tmp_path / "one" / "secret.key").stat().st_mode & 0o077 == 0


def test_inputs_that_a_feedback_page_told_of_do_not_come_again(tmp_path):
    tell = "def sum_to(grad, shape):\n    raise ValueError(grad.tobytes().hex()[:64])"
    said = []
    for extra in ("", "\n# again"):
        hand_in(tmp_path / "class", "ada", sum_to=tell + extra)
        with Course(tmp_path / "course") as course:
            (row,) = grade(tmp_path / "class", LAB_01, course, workers=1).rows
        assert row.judged is not None
        said.append(row.judged.marks["check-sum_to"]["text"].splitlines()[1])
    assert said[0] != said[1]


def test_an_edited_check_is_a_reason_to_judge_anew(tmp_path, monkeypatch):
    hand_in(tmp_path / "class", "ada")
    with Course(tmp_path / "course") as course:
        grade(tmp_path / "class", LAB_01, course, workers=1)
        assert grade(tmp_path / "class", LAB_01, course, workers=1).rows[0].kept
        monkeypatch.setattr("llmcourse.grading.grade._digest_of_checks", lambda lab: "other")
        assert not grade(tmp_path / "class", LAB_01, course, workers=1).rows[0].kept


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


def test_without_a_sandbox_grading_refuses_and_says_how_to_get_one(tmp_path, monkeypatch):
    a_class(tmp_path / "submissions", 1)
    monkeypatch.setattr(sandbox, "available", lambda: "bubblewrap is not installed")
    with (
        Course(tmp_path / "course") as book,
        pytest.raises(SandboxError, match="apt install bubblewrap") as error,
    ):
        grade(tmp_path / "submissions", LAB_01, book)
    assert "--unsafe" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


def test_unsafe_grades_without_a_sandbox(tmp_path, monkeypatch):
    a_class(tmp_path / "submissions", 1)
    monkeypatch.setenv("PATH", str(tmp_path))  # no bwrap
    with Course(tmp_path / "course") as book:
        run = grade(tmp_path / "submissions", LAB_01, book, workers=1, unsafe=True)
    assert run.rows[0].points == FULL


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "there is no submission"),
        (lambda folder: (folder / "somebody").mkdir(parents=True), "do not say which lab"),
    ],
)
def test_a_folder_that_says_nothing_is_an_error_in_three_parts(prepare, says, tmp_path, capsys):
    prepare(tmp_path / "submissions")
    assert cli.main(["grade", str(tmp_path / "submissions"), "--course", str(tmp_path / "course")]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Try " in said


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_no_places_to_judge_in_is_an_error_in_three_parts(jobs, tmp_path, capsys):
    a_class(tmp_path / "submissions", 1)
    options = ["--course", str(tmp_path / "course"), "--jobs", jobs]
    assert cli.main(["grade", str(tmp_path / "submissions"), *options]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert f"--jobs {jobs} leaves no submission" in said[0]
    assert len(said) == 3
    assert not (tmp_path / "course").exists()


def test_the_lab_is_read_off_the_files(tmp_path):
    a_class(tmp_path / "nested", 1)
    assert which_lab(None, tmp_path / "nested") is LAB_01
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "ada.ipynb").write_text("{}")
    with pytest.raises(UnknownNameError, match="--lab with one of lab01_backprop"):
        which_lab(None, tmp_path / "flat")
    assert which_lab("1", tmp_path / "flat") is LAB_01


def test_what_is_printed_is_meant_for_people(tmp_path):
    folder, course = tmp_path / "submissions", tmp_path / "course"
    a_class(folder, 3)
    (folder / "student01" / LAB / f"{LAB}.ipynb").write_text(json.dumps([]))
    done = subprocess.run(command(folder, course), capture_output=True, text=True, env=environment())
    assert done.returncode == 0
    assert "student00  26 points" in done.stdout
    assert "student01  0 points" in done.stdout
    assert "not_summed" in done.stdout, "the mistakes of the class, by name"
    assert str(course / f"marks-{LAB}.csv") in done.stdout
