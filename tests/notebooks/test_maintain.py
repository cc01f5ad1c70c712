"""`llmcourse notebooks check | fix | store`, as an author uses them."""

from __future__ import annotations

from copy import deepcopy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output
from sample_notebook import NAME, good_notebook

from llmcourse import cli
from llmcourse.runner import canonical, gates
from llmcourse.runner.page import Page
from llmcourse.runner.setup_cell import badge, setup_cell


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course folder with one good notebook, and the shell in it."""
    (tmp_path / "notebooks").mkdir()
    canonical.write(tmp_path / "notebooks" / f"{NAME}.ipynb", good_notebook())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "notebooks" / f"{NAME}.ipynb"


def at(nb, name):
    return next(cell for cell in nb.cells if cell.id == name)


def test_check_is_silent_about_a_good_notebook(course, capsys):
    assert cli.main(["notebooks", "check"]) == 0
    assert capsys.readouterr().out == "1 notebooks, 0 problems\n"


def test_check_names_file_and_cell_and_what_to_do_and_fails(course, capsys):
    nb = canonical.read(course)
    at(nb, "square-4").source += "\nx = 1" * 20
    canonical.write(course, nb)
    assert cli.main(["notebooks", "check", NAME]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"notebooks/{NAME}.ipynb · cell square-4: 21 lines of code\n")
    assert "Try splitting it" in out
    assert out.endswith("1 notebooks, 1 problems\n")


def test_check_leaves_the_file_alone(course):
    course.write_text(course.read_text() + "\n")
    before = course.read_bytes()
    cli.main(["notebooks", "check"])
    assert course.read_bytes() == before


def test_fix_mends_what_jupyter_leaves_behind(course, capsys):
    wanted = course.read_text()
    nb = canonical.read(course)
    nb.metadata.update(widgets={"state": {}}, language_info={"name": "python", "version": "3.12.1"})
    nb.cells.append(new_code_cell(""))
    at(nb, "setup").source = setup_cell().replace("@v", "@v9")
    at(nb, "head").source = at(nb, "head").source.replace(badge(NAME), badge("00_other"))
    nbformat.write(nb, course)
    assert cli.main(["notebooks", "fix", str(course)]) == 0
    assert course.read_text() == wanted
    assert cli.main(["notebooks", "fix"]) == 0
    assert (
        capsys.readouterr().out == f"notebooks/{NAME}.ipynb: fixed\nnotebooks/{NAME}.ipynb: nothing to fix\n"
    )


def test_fix_writes_the_set_up_cell_and_the_colab_line_where_there_is_none(course):
    nb = canonical.read(course)
    nb.cells.remove(at(nb, "setup"))
    head = at(nb, "head")
    head.source = head.source.replace(f"{badge(NAME)}\n\n", "")
    canonical.write(course, nb)
    cli.main(["notebooks", "fix"])
    page = Page.open(course)
    assert gates.setup_cell_first(page) == gates.canonical_form(page) == gates.head_is_complete(page) == []
    assert [cell.id for cell in page.nb.cells[:3]] == ["head", "setup", "parameters"]


def test_store_keeps_fresh_outputs_and_nothing_else_of_the_run(course, capsys):
    wanted = canonical.read(course)
    nb = deepcopy(wanted)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    canonical.write(course, nb)
    assert cli.main(["notebooks", "store"]) == 0
    assert capsys.readouterr().out.endswith(f"notebooks/{NAME}.ipynb: stored\n")
    page = Page.open(course)
    assert gates.check(page) == []
    for cell in (nb := page.nb).cells:
        assert cell.source == at(wanted, cell.id).source
    assert at(nb, "square-9").outputs == at(wanted, "square-9").outputs
    assert at(nb, "plot").outputs[0].data["image/png"] != at(wanted, "plot").outputs[0].data["image/png"]
    assert [path.name for path in course.parent.iterdir()] == [course.name]


def test_store_writes_nothing_when_one_notebook_fails(course, capsys):
    nb = canonical.read(course)
    at(nb, "square-9").source = "1 / 0"
    canonical.write(failing := course.with_name("43_failing.ipynb"), nb)
    stale = canonical.read(course)
    at(stale, "square-1").outputs = [new_output("stream", name="stdout", text="old\n")]
    canonical.write(course, stale)
    before = course.read_bytes(), failing.read_bytes()
    assert cli.main(["notebooks", "store"]) == 1
    said = capsys.readouterr().err
    assert "NotebookError: 1 of 2 notebooks did not run" in said
    assert "43_failing" in said
    assert "ZeroDivisionError" in said
    assert (course.read_bytes(), failing.read_bytes()) == before
    assert len(list(course.parent.iterdir())) == 2


@pytest.mark.parametrize("action", ["check", "fix", "store"])
@pytest.mark.parametrize("name", ["99", "no_such_page", "notebooks/none.ipynb"])
def test_an_unknown_name_is_an_error_in_three_parts(course, capsys, action, name):
    assert cli.main(["notebooks", action, name]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0].startswith("UnknownNameError: ")
    assert name in said[0]
    assert said[-1].startswith("  Try ")


@pytest.mark.parametrize("action", ["check", "fix", "store"])
def test_a_broken_file_is_named_and_left_as_it_is(course, capsys, action):
    course.write_text('{"cells": [')
    assert cli.main(["notebooks", action]) == 1
    assert f"{NAME}.ipynb" in capsys.readouterr().err
    assert course.read_text() == '{"cells": ['
