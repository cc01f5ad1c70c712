"""A lab from the terminal: a copy of one's own, the same checks, and progress that is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from classroom import LAB, read, solutions, solved

from llmcourse import cli
from llmcourse.labs import command
from llmcourse.labs.catalog import find_lab
from llmcourse.labs.desk import JUDGED_ELSEWHERE, Desk, open_lab

LAB_01 = find_lab("01")


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch) -> Path:
    """A learner's folder, with progress of its own."""
    monkeypatch.setenv("LLMCOURSE_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mylabs" / LAB / f"{LAB}.ipynb"


def write(file: Path, **sources: str) -> None:
    nb = json.loads(file.read_text())
    for cell in nb["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        cell["source"] = sources.get(name, cell["source"])
    file.write_text(json.dumps(nb))


# ── start ────────────────────────────────────────────────────────────────────────────────────────


def test_start_makes_a_copy_and_never_overwrites_it(desk, capsys):
    assert cli.main(["lab", "start", "01"]) == 0
    assert "A new copy for you" in capsys.readouterr().out
    assert desk.read_bytes() == (command.labs_folder() / LAB / f"{LAB}.ipynb").read_bytes()
    desk.write_text("my work")
    assert cli.main(["lab", "start", "1"]) == 0
    assert "Yours is kept as it is" in capsys.readouterr().out
    assert desk.read_text() == "my work"
    assert [path.name for path in desk.parent.iterdir()] == [desk.name]


def test_a_place_that_cannot_be_written_is_an_error_in_three_parts(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["lab", "start", "01", "--folder", "file"]) == 1
    said = capsys.readouterr().err
    assert "DiskError" in said
    assert "--folder" in said


def test_a_lab_that_is_none_is_named_with_those_there_are(capsys):
    assert cli.main(["lab", "start", "99"]) == 1
    assert "one of lab01_backprop" in capsys.readouterr().err


# ── check ────────────────────────────────────────────────────────────────────────────────────────


def test_a_fresh_copy_fails_with_nothing_but_not_implemented_yet(desk, capsys):
    cli.main(["lab", "start", "01"])
    capsys.readouterr()
    assert cli.main(["lab", "check", "01"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[:-1] == [f"○ {e.name} is not implemented yet." for e in LAB_01.exercises]
    assert lines[-1].startswith("0 of 6 pass")


def test_the_solutions_pass_and_are_remembered(desk, capsys):
    cli.main(["lab", "start", "01"])
    write(desk, **solutions())
    assert cli.main(["lab", "check", "01"]) == 0
    assert cli.main(["lab", "status", "01"]) == 0
    assert f"6 of 6 passed · {LAB_01.points} of {LAB_01.points} points" in capsys.readouterr().out
    assert cli.main(["lab", "list"]) == 0
    assert LAB in capsys.readouterr().out


def test_one_exercise_is_checked_with_the_inputs_of_a_seed(desk, capsys):
    cli.main(["lab", "start", "01"])
    write(desk, sum_to="def sum_to(grad, shape):\n    return grad.mean()")
    said = []
    for _ in range(2):
        capsys.readouterr()
        assert cli.main(["lab", "check", "01", "sum_to", "--seed", "5"]) == 1
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "check(sum_to, seed=5)" in said[0]
    assert "backward_pass" not in said[0]


def test_a_mistake_in_a_cell_is_said_and_the_other_exercises_are_judged(desk, capsys):
    cli.main(["lab", "start", "01"])
    right = solutions()
    write(desk, sum_to="def sum_to(grad, shape)\n    return grad", cross_entropy=right["cross_entropy"])
    capsys.readouterr()
    assert cli.main(["lab", "check", "01", "cross_entropy", "sum_to"]) == 1
    said = capsys.readouterr().out
    assert "SyntaxError" in said
    assert "✓ cross_entropy" in said


def test_a_file_is_checked_wherever_it_lies(tmp_path, capsys):
    (tmp_path / "elsewhere.ipynb").write_text(json.dumps(solved()))
    assert cli.main(["lab", "check", "01", "--file", "elsewhere.ipynb"]) == 0
    assert cli.main(["lab", "check", "01", "--file", "nowhere.ipynb"]) == 1
    assert cli.main(["lab", "check", "--file", "elsewhere.ipynb", "--seed", "-3"]) == 0
    assert cli.main(["lab", "check", "01", "--file", "."]) == 1
    (tmp_path / "broken.ipynb").write_text("{")
    assert cli.main(["lab", "check", "01", "--file", "broken.ipynb"]) == 1
    said = capsys.readouterr().err
    assert "there is no file nowhere.ipynb" in said
    assert ". cannot be read: " in said
    assert "broken.ipynb cannot be read as a notebook" in said


def test_without_a_copy_check_says_how_to_get_one(capsys):
    assert cli.main(["lab", "check", "01"]) == 1
    assert "llmcourse lab start 01" in capsys.readouterr().err


def test_hints_come_one_after_another_and_are_counted(capsys):
    said = []
    for _ in range(4):
        assert cli.main(["lab", "hint", "01", "sum_to"]) == 0
        said.append(capsys.readouterr().out)
    assert [text.splitlines()[0] for text in said] == [f"sum_to · hint {n} of 3" for n in (1, 2, 3, 3)]
    assert cli.main(["lab", "hint", "01"]) == 0
    assert "topological_order · hint 1" in capsys.readouterr().out


# ── the notebook's own check ─────────────────────────────────────────────────────────────────────


def test_check_in_a_notebook_gives_the_verdict_of_the_terminal(desk, capsys):
    lab = open_lab("01")
    assert isinstance(lab, Desk)
    scope: dict = {}
    exec("import numpy as np\n" + solutions()["sum_to"], scope)
    assert str(lab.check(scope["sum_to"], seed=3)).startswith("✓ sum_to · 6 of 6 properties hold")
    from llmcourse.grading.verdict import CheckFailed, NotImplementedYet

    def sum_to(grad, shape):
        return grad.mean()

    with pytest.raises(CheckFailed) as failed:
        lab.check(sum_to, seed=3)
    cli.main(["lab", "start", "01"])
    write(desk, sum_to="def sum_to(grad, shape):\n    return grad.mean()")
    capsys.readouterr()
    cli.main(["lab", "check", "01", "sum_to", "--seed", "3"])
    assert str(failed.value) in capsys.readouterr().out

    def stub(grad, shape):
        raise NotImplementedError("not implemented yet")

    stub.__name__ = "sum_to"
    with pytest.raises(NotImplementedYet, match="sum_to is not implemented yet"):
        lab.check(stub)


@pytest.mark.parametrize("thing", [3, None, "no_such", len, lambda: 0])
def test_check_of_something_else_is_an_error_in_three_parts(thing):
    with pytest.raises(Exception, match="Try ") as error:
        open_lab("01").check(thing)
    assert len(str(error.value).splitlines()) == 3


def test_where_a_notebook_is_graded_its_own_checks_do_nothing(monkeypatch):
    monkeypatch.setenv(JUDGED_ELSEWHERE, "1")
    lab = open_lab("01")
    verdict = lab.check(3)
    assert verdict.ok
    for given in (verdict, lab.hint("anything"), lab.progress()):
        assert given._ipython_display_() is None, "shows nothing"


# ── the pages ────────────────────────────────────────────────────────────────────────────────────


def test_the_students_notebook_holds_no_solution_and_no_hidden_test():
    text = "\n".join(cell["source"] for cell in read("labs")["cells"])
    regions = [
        region.partition("### END")[0]
        for cell in read("solutions")["cells"]
        for region in re.split(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)", cell["source"])[1:]
    ]
    assert len(regions) == 2 * len(LAB_01.exercises)
    secret = {line.strip() for region in regions for line in region.splitlines() if len(line.strip()) > 12}
    assert not [line for line in secret if line in text]
    assert "### " not in text
