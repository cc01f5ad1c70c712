"""The comparison itself: against plain nbval, and through the suite as CI runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from nbformat.v4 import new_markdown_cell, new_output
from sample_notebook import NAME, PIXEL, code, good_notebook

from llmcourse.errors import NotebookError
from llmcourse.runner import canonical
from llmcourse.runner.compare import compare

HERE = Path(__file__).parent


def at(nb, name):
    return next(cell for cell in nb.cells if cell.id == name)


def stream(text):
    return [new_output("stream", name="stdout", text=text)]


def data(**bundle):
    return [new_output("display_data", data={k.replace("_", "/"): v for k, v in bundle.items()})]


def test_a_notebook_agrees_with_itself(good):
    assert compare(good, deepcopy(good)) == []


def test_a_difference_shows_the_stored_line_and_the_new_one(good):
    fresh = deepcopy(good)
    at(fresh, "square-3").outputs = stream("square of 3 is 10\n")
    (difference,) = compare(good, fresh)
    assert (
        str(difference) == "cell square-3 · stdout\n  stored  square of 3 is 9\n  now     square of 3 is 10"
    )


def test_a_long_difference_is_cut(good):
    fresh = deepcopy(good)
    at(fresh, "square-3").outputs = stream("".join(f"{n}\n" for n in range(100)))
    (difference,) = compare(good, fresh)
    assert len(str(difference).splitlines()) == 14
    assert str(difference).endswith("… and 89 more lines")


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        stream("square of 3 is 9\n") + data(text_plain="9"),
        stream("square of 3 is  9\n"),
        data(text_plain="x"),
    ],
    ids=["silence", "more", "a space", "another kind"],
)
def test_any_other_text_is_a_difference(good, outputs):
    fresh = deepcopy(good)
    at(fresh, "square-3").outputs = outputs
    assert [d.cell for d in compare(good, fresh)] == ["square-3"]


def test_a_table_is_compared_in_its_html_too(good):
    fresh = deepcopy(good)
    for nb, n in ((good, 1), (fresh, 2)):
        at(nb, "value").outputs = data(text_plain="table", text_html=f"<td>{n}</td>")
    assert [(d.cell, d.field) for d in compare(good, fresh)] == [("value", "text/html")]


def test_pictures_and_run_numbers_and_the_split_of_a_stream_are_no_difference(good):
    fresh = deepcopy(good)
    at(fresh, "plot").outputs[0].data["image/png"] = PIXEL[::-1]
    at(fresh, "plot").outputs[0].data[canonical.WIDGET_VIEW] = {"model_id": "f00"}
    at(fresh, "value").execution_count = 99
    at(fresh, "square-3").outputs = stream("square of ") + stream("3 is 9\n")
    before = deepcopy(fresh)
    assert compare(good, fresh) == []
    assert fresh == before


def test_cells_that_are_not_checked_may_say_anything_but_must_not_fail(good):
    fresh = deepcopy(good)
    at(fresh, "time").outputs = data(text_plain="13.5")
    assert compare(good, fresh) == []
    at(fresh, "time").outputs = [new_output("error", ename="ValueError", evalue="no clock", traceback=[])]
    assert [(d.cell, d.found) for d in compare(good, fresh)] == [("time", "ValueError: no clock")]


def test_a_cell_that_is_meant_to_fail_may(good):
    for nb in (good, fresh := deepcopy(good)):
        at(nb, "value").metadata.tags = ["raises-exception"]
        at(nb, "value").outputs = [new_output("error", ename="ValueError", evalue="no", traceback=["…"])]
    assert compare(good, fresh) == []


def test_a_notebook_that_was_never_run_does_not_pass(good):
    stored = deepcopy(good)
    at(stored, "square-3").update(outputs=[], execution_count=None)
    assert [(d.cell, d.stored) for d in compare(stored, good)] == [("square-3", "never run")]


def test_the_cell_that_papermill_injects_is_left_out(good):
    fresh = deepcopy(good)
    fresh.cells.insert(3, code("injected", 'scale = "ci"', "noise", tags=["injected-parameters"]))
    fresh.cells.insert(0, new_markdown_cell("An error occurred in cell 3."))
    assert compare(good, fresh) == []


@pytest.mark.parametrize("change", [lambda nb: nb.cells.pop(), lambda nb: at(nb, "value").update(source="0")])
def test_a_copy_of_another_notebook_is_refused(good, change):
    fresh = deepcopy(good)
    fresh.cells = fresh.cells[:-3]
    change(fresh)
    with pytest.raises(NotebookError, match="executed copy"):
        compare(good, fresh)


# ── end to end ───────────────────────────────────────────────────────────────────────────────────────


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, with notebooks taken from `folder`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--color=no",
        *arguments,
    ]
    return subprocess.run(
        command,
        env=environment | {"LLMCOURSE_NOTEBOOKS": str(folder)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )


def plain_nbval(path: Path) -> tuple[int, set[int]]:
    """nbval's own run of a notebook: its exit status, and the code cells (from 0) that it says differ."""
    done = pytest_in(path.parent, "--nbval", "--nbval-current-env", "--nbval-cell-timeout=60", str(path))
    return done.returncode, {int(n) for n in re.findall(r"^FAILED .*::Cell (\d+)", done.stdout, re.MULTILINE)}


def our_suite(folder: Path) -> subprocess.CompletedProcess[str]:
    return pytest_in(folder, str(HERE / "test_verdicts.py"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / f"{NAME}.ipynb"
    canonical.write(path, good_notebook())
    return path


@pytest.fixture(scope="module")
def tampered(tmp_path_factory) -> Path:
    """The same notebook with one digit of one verdict changed, and another in a cell that is not checked."""
    nb = good_notebook()
    at(nb, "square-7").outputs = stream("square of 7 is 48\n")
    at(nb, "time").outputs[0].data["text/plain"] = "12.6"
    path = tmp_path_factory.mktemp("tampered") / f"{NAME}.ipynb"
    canonical.write(path, nb)
    return path


def test_the_suite_passes_on_a_sound_notebook_and_plain_nbval_agrees(sound):
    done = our_suite(sound.parent)
    assert done.returncode == 0, done.stdout
    assert plain_nbval(sound) == (0, set())


def test_the_suite_fails_on_one_changed_digit_and_plain_nbval_agrees(tampered):
    done = our_suite(tampered.parent)
    assert done.returncode == 1, done.stdout
    assert "cell square-7 · stdout" in done.stdout
    assert re.findall(r"stored +(.*)\n.*now +(.*)", done.stdout)[0] == (
        "square of 7 is 48",
        "square of 7 is 49",
    )
    assert set(re.findall(r"cell ([\w-]+) ·", done.stdout)) == {"square-7"}
    code_cells = [cell.id for cell in canonical.read(tampered).cells if cell.cell_type == "code"]
    assert plain_nbval(tampered) == (1, {code_cells.index("square-7")})
