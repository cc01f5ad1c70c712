"""What has passed is kept: across kernels, between writers at once, and whatever became of the file."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from datetime import date

import pytest
from filelock import FileLock

from llmcourse import course
from llmcourse.grading.exercise import Check, Exercise
from llmcourse.grading.verdict import Result, Verdict
from llmcourse.labs import progress
from llmcourse.labs.catalog import Lab
from llmcourse.widgets.lab_progress import LabProgress

TODAY = date.today().isoformat()


def exercise(name: str, points: int) -> Exercise:
    return Exercise(
        name=name,
        title=f"The title of {name} <&>",
        arguments=("x",),
        shapes=(),
        formula="",
        difficulty=2,
        importance=3,
        minutes=10,
        points=points,
        hints=(f"{name}: what is asked?", "An idea.", "Nearly <code>."),
    )


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_PROGRESS", str(tmp_path / "kept" / "progress.json"))
    return tmp_path / "kept" / "labs.json"


@pytest.fixture
def lab() -> Lab:
    made = Lab("77", "demo", "A lab of two exercises")
    made.__dict__["exercises"] = (exercise("first", 4), exercise("second", 6))
    return made


def verdict(lab: Lab, name: str, outcome: str) -> Verdict:
    """`outcome` is "passed", "failed" or "open"."""
    kind = {"passed": "", "failed": "Mismatch", "open": "NotImplementedError"}[outcome]
    about = next(e for e in lab.exercises if e.name == name)
    result = Result(Check("values", "it holds", lambda t: None), not kind, kind, "", kind)
    made = Verdict(about, [result], seed=0, seconds=0.0, lab=lab.name)
    assert made.state == outcome
    return made


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────


def test_at_first_everything_is_open_and_nothing_is_written(lab, file):
    rows = progress.lab_status(lab)
    assert [(r.exercise, r.state, r.attempts, r.hints, r.note) for r in rows] == [
        ("first", "open", 0, 0, "open"),
        ("second", "open", 0, 0, "open"),
    ]
    assert progress.summary(rows) == "0 of 2 passed · 0 of 10 points"
    assert not file.parent.exists()


def test_attempts_hints_and_the_day_of_the_first_pass_are_kept_in_one_file(lab, file):
    progress.record(verdict(lab, "first", "failed"))
    assert progress.lab_status(lab)[0].state == "tried"
    progress.hint_shown(lab.name, "first", 1)
    progress.record(verdict(lab, "first", "passed"))
    (first, second) = progress.lab_status(lab)
    assert (first.passed, first.passed_on, first.attempts, first.hints) == (True, TODAY, 2, 1)
    assert (first.points, second.points) == (4, 0)
    assert not second.passed
    kept = {"attempts": 2, "now": "passed", "hints": 1, "passed": TODAY}
    assert json.loads(file.read_text()) == {"lab77_demo": {"first": kept}}
    assert progress.path() == file


def test_it_lies_beside_the_chapters_progress_and_leaves_that_alone(lab, file):
    course.mark_read("01")
    progress.record(verdict(lab, "first", "passed"))
    assert course.progress() == {"01_backprop": TODAY}
    assert file.parent == course.progress_path().parent


def test_a_passed_exercise_that_fails_later_stays_passed_and_says_so(lab, file):
    progress.record(verdict(lab, "first", "passed"))
    kept = json.loads(file.read_text())
    kept["lab77_demo"]["first"]["passed"] = "2026-01-31"
    file.write_text(json.dumps(kept))

    progress.record(verdict(lab, "first", "failed"))
    first = progress.lab_status(lab)[0]
    assert (first.state, first.points, first.note) == ("passed", 4, "passed on 2026-01-31, fails now")
    progress.record(verdict(lab, "first", "passed"))
    assert progress.lab_status(lab)[0].note == "passed on 2026-01-31"


def test_checking_the_stub_is_no_attempt_and_takes_no_pass_away(lab, file):
    progress.record(verdict(lab, "first", "open"))
    assert not file.exists()
    progress.record(verdict(lab, "first", "passed"))
    progress.record(verdict(lab, "first", "open"))
    first = progress.lab_status(lab)[0]
    assert (first.attempts, first.note) == (1, f"passed on {TODAY}")


def test_a_verdict_of_no_lab_is_not_kept(lab, file):
    stray = verdict(lab, "first", "passed")
    stray.lab = ""
    progress.record(stray)
    assert not file.exists()


def test_a_hint_counts_with_those_before_it_and_once(lab):
    for layer in (1, 3, 2):
        progress.hint_shown(lab.name, "second", layer)
    assert progress.hints_shown(lab.name, "second") == 3
    assert progress.hints_shown(lab.name, "first") == 0
    progress.hint_shown(lab.name, "second", 9)
    assert progress.lab_status(lab)[1].hints == 3  # as many as the exercise has


def test_the_table_shows_state_points_and_total(lab):
    progress.record(verdict(lab, "first", "passed"))
    progress.record(verdict(lab, "second", "failed"))
    lines = repr(progress.table(lab)).splitlines()
    assert lines[2].split()[:2] == ["✓", "first"]
    assert lines[3].split()[:2] == ["●", "second"]
    assert lines[3].endswith("tried 1 ×")
    assert lines[-1] == "lab77_demo: 1 of 2 passed · 4 of 10 points"


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────

WRITER = """
import sys
from llmcourse.labs import progress
print("ready", flush=True)
sys.stdin.readline()
for n in range(40):
    progress._change("lab", f"{sys.argv[1]}-{n}", lambda e: e.update(attempts=1))
    progress._change("lab", "shared", lambda e: e.update(attempts=e.get("attempts", 0) + 1))
"""


def test_two_writers_at_once_lose_nothing(file):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    for w in writers:
        assert w.stdout is not None
        assert w.stdout.readline() == "ready\n"
    for w in writers:
        w.communicate("go\n", timeout=60)
        assert w.returncode == 0
    kept = json.loads(file.read_text())["lab"]
    assert kept["shared"] == {"attempts": 80}
    assert len(kept) == 81


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'{"lab77_demo": {"first"',
        b"[]",
        b'{"lab77_demo": 3}',
        b'{"lab77_demo": {"first": []}}',
        b'{"lab77_demo": {"first": {"attempts": "many"}}}',
        b"\xe9\xff",
    ],
)
def test_a_broken_file_is_put_aside_and_the_next_check_is_kept(raw, lab, file):
    file.parent.mkdir()
    file.write_bytes(raw)
    assert [r.state for r in progress.lab_status(lab)] == ["open", "open"]
    assert file.read_bytes() == raw  # reading moves nothing
    progress.record(verdict(lab, "first", "passed"))
    assert progress.lab_status(lab)[0].passed
    assert file.with_name("labs.json.broken").read_bytes() == raw


def test_fields_and_exercises_of_another_version_are_kept(lab, file):
    file.parent.mkdir()
    other = {"lab88_later": {"x": {"stars": 5}}, lab.name: {"gone": {"attempts": 1}}}
    file.write_text(json.dumps(other))
    progress.record(verdict(lab, "first", "passed"))
    kept = json.loads(file.read_text())
    assert kept["lab88_later"] == other["lab88_later"]
    assert kept[lab.name]["gone"] == {"attempts": 1}


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_verdict(lab, file):
    file.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="Progress is not kept"):
        progress.record(verdict(lab, "first", "passed"))
    assert progress.lab_status(lab)[0].state == "open"


def test_a_lock_that_is_never_released_costs_a_warning(lab, file, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_FOR_THE_LOCK", 0.05)
    file.parent.mkdir()
    with FileLock(f"{file}.lock"), pytest.warns(UserWarning, match="Progress is not kept"):
        progress.record(verdict(lab, "first", "passed"))


def test_a_writer_that_dies_midway_leaves_the_last_state(lab, file, monkeypatch):
    progress.record(verdict(lab, "first", "passed"))
    before = file.read_text()
    monkeypatch.setattr(progress.json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        progress.record(verdict(lab, "second", "passed"))
    monkeypatch.undo()
    assert file.read_text() == before


# ── the widget ───────────────────────────────────────────────────────────────────────────────────────


def test_the_widget_follows_checks_and_hints_of_its_kernel(lab):
    shown = LabProgress(lab)
    line = shown.rows["first"].line
    assert ">○</b>" in line.value
    progress.record(verdict(lab, "first", "failed"))
    assert ">●</b>" in line.value
    progress.record(verdict(lab, "first", "passed"))
    assert ">✓</b>" in line.value
    assert "1 of 2 passed · 4 of 10 points" in shown.total.value
    assert 'aria-valuenow="4"' in shown.total.value
    progress.hint_shown(lab.name, "second", 2)
    assert "2 of 3" in shown.rows["second"].line.value
    assert shown.rows["second"].button.description == "hint 3 of 3"


def test_the_button_shows_hint_after_hint_and_then_hides_and_shows_them(lab):
    row = LabProgress(lab).rows["first"]
    assert (row.button.description, row.hints.layout.display) == ("hint 1 of 3", "none")
    row.button.click()
    assert "first: what is asked?" in row.hints.value
    assert "An idea" not in row.hints.value
    assert row.hints.layout.display != "none"
    assert row.button.tooltip == "Show hint 2 of 3 for first"
    row.button.click()
    row.button.click()
    assert "Nearly &lt;code&gt;." in row.hints.value
    assert progress.hints_shown(lab.name, "first") == 3
    assert row.button.description == "hide hints"
    row.button.click()
    assert (row.hints.layout.display, row.button.description) == ("none", "show hints")
    row.button.click()
    assert "An idea." in row.hints.value


def test_a_later_kernel_goes_on_with_the_next_hint_and_shows_those_before(lab):
    progress.hint_shown(lab.name, "first", 1)
    row = LabProgress(lab).rows["first"]
    assert row.hints.value == ""
    row.button.click()
    assert "first: what is asked?" in row.hints.value
    assert "An idea." in row.hints.value


def test_hints_are_shown_also_where_nothing_can_be_kept(lab, file):
    file.parent.write_text("a file where the folder should be")
    row = LabProgress(lab).rows["first"]
    for _ in range(2):
        with pytest.warns(UserWarning, match="not kept"):
            row.button.click()
    assert "An idea." in row.hints.value


def test_text_from_the_exercise_is_escaped(lab):
    shown = LabProgress(lab)
    assert "The title of first &lt;&amp;&gt;" in shown.rows["first"].line.value


def test_stored_output_is_a_table_where_no_kernel_runs(lab):
    shown = LabProgress(lab)
    progress.record(verdict(lab, "first", "passed"))
    bundle = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == repr(progress.table(lab)) == repr(shown)
    assert bundle["text/html"].startswith("<table>")
    assert "The title of first &lt;&amp;&gt;" in bundle["text/html"]


def test_a_watcher_that_is_gone_is_forgotten(lab):
    class Watcher:
        def refresh(self) -> None:
            raise AssertionError("it is still called")

    watcher = Watcher()
    progress.watch(watcher)
    del watcher
    gc.collect()
    progress.record(verdict(lab, "first", "passed"))
