"""One source for a lab: what learners get is made from it, and a gate finds each fault."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import small_lab
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from small_lab import NAME, find

from llmcourse.errors import NotebookError, UnknownNameError
from llmcourse.grading import authoring, gates
from llmcourse.grading.converting import NOT_YET
from llmcourse.runner import canonical
from llmcourse.runner.gates import Problem

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("authoring")
    small_lab.built(root)
    return root


@pytest.fixture
def source(shipped: Path) -> NotebookNode:
    return canonical.read(authoring.source_path(shipped, NAME))


@pytest.fixture
def released(shipped: Path) -> NotebookNode:
    return canonical.read(shipped / "labs" / NAME / f"{NAME}.ipynb")


@pytest.fixture
def problems(shipped: Path, source: NotebookNode, released: NotebookNode) -> Callable[..., list[Problem]]:
    """The gates' findings on the lab after `change(source, released)`."""

    def find_problems(
        change: Callable[[NotebookNode, NotebookNode], Any] = lambda s, r: None,
    ) -> list[Problem]:
        change(source, released)
        return gates.check(NAME, source, released, small_lab.EXERCISES, shipped / "labs" / NAME)

    return find_problems


# ── what is made ─────────────────────────────────────────────────────────────────────────────────


def test_learners_get_stubs_and_no_solution_no_hidden_test_and_no_output(released) -> None:
    text = nbformat.writes(released)
    for secret in ("twice_as_much", "moved_upwards", "hidden test of", "Because f(a", "BEGIN", "HIDDEN"):
        assert secret not in text
    assert find(released, "double").source.startswith('def double(x):\n    """Twice x.')
    assert find(released, "check-double").source == "check(double)"
    assert find(released, "why-linear").source.endswith("\n\n*Your answer here.*")
    assert all(not c.outputs and c.execution_count is None for c in released.cells if c.cell_type == "code")


def test_a_fresh_lab_fails_only_with_not_implemented_yet_cell_by_cell(released) -> None:
    from llmcourse.runner.setup_cell import setup_cell

    names: dict[str, Any] = {"double": None}
    failures = []
    for cell in released.cells:
        if cell.cell_type != "code" or cell.source == setup_cell():
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(
                    cell.source.replace("check(double)", "double(1)").replace("check(shift)", "shift(1, 2)"),
                    names,
                )
        except NotImplementedError as error:
            failures.append((cell.id, str(error)))
    assert failures == [(name, NOT_YET) for name in ("check-double", "demo", "check-shift")]


def test_locked_cells_are_read_only_and_points_stay(released) -> None:
    check, solution = find(released, "check-shift"), find(released, "shift")
    assert (check.metadata.deletable, check.metadata.editable) == (False, False)
    assert check.metadata.nbgrader.points == 4
    assert "editable" not in solution.metadata
    assert find(released, "demo").metadata == {"tags": ["demo"]}


def test_ids_and_checksums_are_those_that_nbgrader_computes(source, released) -> None:
    from nbgrader.utils import compute_checksum

    assert [c.id for c in released.cells] == [c.id for c in source.cells]
    marked = [c for c in released.cells if "nbgrader" in c.metadata]
    assert [c.metadata.nbgrader.checksum for c in marked] == [compute_checksum(c) for c in marked]


def test_building_again_makes_the_same_bytes(shipped, tmp_path, capsys) -> None:
    small_lab.built(tmp_path)
    for name in (f"{NAME}.ipynb", "numbers.csv"):
        assert (tmp_path / "labs" / NAME / name).read_bytes() == (shipped / "labs" / NAME / name).read_bytes()
    capsys.readouterr()
    authoring.build(tmp_path, [NAME])
    assert "nothing to build" in capsys.readouterr().out


def test_an_author_may_save_the_source_from_jupyter_and_nothing_else_changes(tmp_path, shipped) -> None:
    small_lab.built(tmp_path)
    path = authoring.source_path(tmp_path, NAME)
    nb = canonical.read(path)
    for cell in nb.cells:
        cell.metadata["collapsed"] = False
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [new_output("stream", text="42")], 7
    nb.metadata["kernelspec"]["name"] = "my_env"
    path.write_text(nbformat.writes(nb))
    authoring.build(tmp_path, [NAME])
    assert path.read_bytes() == authoring.source_path(shipped, NAME).read_bytes()
    assert authoring.differences(authoring.made(tmp_path, NAME), tmp_path / "labs" / NAME) == []


def test_build_removes_what_the_source_no_longer_has(tmp_path) -> None:
    small_lab.built(tmp_path)
    folder = tmp_path / "labs" / NAME
    (folder / "old").mkdir()
    for name in ("answers.txt", "old/data.csv", f".{NAME}.ipynb.x.part"):
        (folder / name).write_text("left over")
    assert len(authoring.differences(authoring.made(tmp_path, NAME), folder)) == 3
    authoring.build(tmp_path, [NAME])
    assert sorted(p.name for p in folder.iterdir()) == [f"{NAME}.ipynb", "numbers.csv"]


def test_a_difference_is_shown_with_its_lines(tmp_path) -> None:
    small_lab.built(tmp_path)
    path = tmp_path / "labs" / NAME / f"{NAME}.ipynb"
    path.write_text(path.read_text().replace("That is all.", "That was all."))
    (problem,) = authoring.differences(authoring.made(tmp_path, NAME), path.parent)
    assert "is not what the source makes now" in problem.what
    assert '-    "That was all."' in problem.what
    assert '+    "That is all."' in problem.what
    path.unlink()
    (problem,) = authoring.differences(authoring.made(tmp_path, NAME), path.parent)
    assert problem.what == f"{NAME}.ipynb is missing"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("### END SOLUTION", "### FINI", "no end solution"),
        ("### END HIDDEN TESTS", "", "No end hidden tests"),
        ("### BEGIN HIDDEN TESTS", "### BEGIN SOLUTION", "solution"),
    ],
)
def test_a_source_that_nbgrader_cannot_use_is_an_error_in_three_parts(old, new, what, tmp_path) -> None:
    path = small_lab.write_source(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(NotebookError, match=what) as error:
        authoring.made(tmp_path, NAME)
    assert len(str(error.value).splitlines()) == 3
    assert not (tmp_path / "labs").exists()


def test_labs_are_found_by_number_and_name(tmp_path) -> None:
    small_lab.write_source(tmp_path)
    for name in ("91", "lab91", "small", NAME, f"{NAME}.ipynb"):
        assert authoring.find_sources(tmp_path, [name]) == [NAME]
    assert authoring.find_sources(tmp_path, []) == [NAME]
    with pytest.raises(UnknownNameError, match="lab92"):
        authoring.find_sources(tmp_path, ["lab92"])


def test_the_command_builds_and_checks(tmp_path, monkeypatch, capsys) -> None:
    from types import SimpleNamespace

    import llmcourse.labs
    from llmcourse.cli import main

    small_lab.write_source(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        llmcourse.labs, "find_lab", lambda name: SimpleNamespace(exercises=small_lab.EXERCISES)
    )
    assert main(["labs", "check"]) == 1
    assert f"{NAME}.ipynb is missing" in capsys.readouterr().out
    assert main(["labs", "build", "91"]) == 0
    assert main(["labs", "check"]) == 0
    assert capsys.readouterr().out.endswith("1 labs, 0 problems\n")
    assert main(["labs", "build", "nonesuch"]) == 1
    assert "there is no lab called 'nonesuch'" in capsys.readouterr().err


def test_nothing_half_written_is_left_by_a_build_that_fails(tmp_path, monkeypatch) -> None:
    small_lab.built(tmp_path)
    path = authoring.source_path(tmp_path, NAME)
    path.write_text(path.read_text().replace("That is all.", "That is new."))
    before = (tmp_path / "labs" / NAME / f"{NAME}.ipynb").read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("llmcourse.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        authoring.build(tmp_path, [NAME])
    assert (tmp_path / "labs" / NAME / f"{NAME}.ipynb").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_of_somebody_elses_solutions_is_not_taken_for_the_courses(tmp_path, monkeypatch) -> None:
    (tmp_path / "solutions" / "homework").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert authoring.course_root() == ROOT


@pytest.mark.parametrize("lab", authoring.find_sources(ROOT, []))
def test_each_lab_of_the_course_is_what_its_source_makes_and_passes_every_gate(lab) -> None:
    assert [p.render(Path("labs") / lab) for p in authoring.problems_of(ROOT, lab)] == []


def test_no_lab_lies_in_labs_without_a_source() -> None:
    there = sorted(p.name for p in (ROOT / "labs").iterdir() if p.is_dir())
    assert there == authoring.find_sources(ROOT, [])


# ── gates ────────────────────────────────────────────────────────────────────────────────────────


def test_the_small_lab_passes_every_gate(problems) -> None:
    assert problems() == []


def replace(name: str, old: str, new: str) -> Callable[[NotebookNode, NotebookNode], None]:
    """A change of one cell's source, in the source and in what learners get."""

    def change(*notebooks: NotebookNode) -> None:
        for nb in notebooks:
            cell = find(nb, name)
            cell.source = cell.source.replace(old, new)

    return change


def meta(name: str, **values: Any) -> Callable[[NotebookNode, NotebookNode], None]:
    def change(source: NotebookNode, released: NotebookNode) -> None:
        find(source, name).metadata.nbgrader.update(values)

    return change


def drop(name: str) -> Callable[[NotebookNode, NotebookNode], None]:
    return lambda source, released: source.cells.remove(find(source, name))


def leak(source: NotebookNode, released: NotebookNode) -> None:
    find(released, "double").source += "\n    twice_as_much = 2 * x"


def leak_test(source: NotebookNode, released: NotebookNode) -> None:
    find(released, "check-double").source = find(source, "check-double").source


def run_it(source: NotebookNode, released: NotebookNode) -> None:
    find(released, "double").outputs = [new_output("stream", text="42")]


def no_region(source: NotebookNode, released: NotebookNode) -> None:
    cell = find(source, "double")
    cell.source = "\n".join(line for line, _ in gates.regions(cell.source))


def swap(source: NotebookNode, released: NotebookNode) -> None:
    at = source.cells.index(find(source, "check-double"))
    source.cells[at - 1], source.cells[at] = source.cells[at], source.cells[at - 1]


def other_kernel(source: NotebookNode, released: NotebookNode) -> None:
    released.metadata.kernelspec.name = "my_env"


def no_setup(source: NotebookNode, released: NotebookNode) -> None:
    released.cells.remove(find(released, "setup"))


def unmarked(source: NotebookNode, released: NotebookNode) -> None:
    del find(source, "head-double").metadata["nbgrader"]


def twice(source: NotebookNode, released: NotebookNode) -> None:
    source.cells.append(copy.deepcopy(find(source, "double")))


FAULTS: dict[str, tuple[Callable[[NotebookNode, NotebookNode], Any], str]] = {
    "a metadata key missing": (
        lambda s, r: find(s, "double").metadata.nbgrader.pop("locked"),
        "rejects the metadata",
    ),
    "an old schema": (meta("double", schema_version=2), "rejects the metadata of the source"),
    "no points": (lambda s, r: find(s, "check-double").metadata.nbgrader.pop("points"), "worth 3 points"),
    "a grade_id that selectors cannot use": (meta("double", grade_id="do.uble"), "do.uble"),
    "a cell twice": (twice, "'double' stands at 2 cells"),
    "no solution cell": (drop("double"), "has no cell with the grade_id double"),
    "no check cell": (drop("check-double"), "has no cell with the grade_id check-double"),
    "no header": (
        replace("head-double", "difficulty", "hardness"),
        "no locked Markdown cell with its header",
    ),
    "no shape block": (
        replace("head-double", "x [N]", "x"),
        "no locked Markdown cell with its header, shapes",
    ),
    "an unlocked header": (unmarked, "no locked Markdown cell"),
    "other points": (meta("check-double", points=30), "is worth 3 points and its check cell 30"),
    "a check before its solution": (swap, "is checked before it is solved"),
    "a check that learners can edit": (meta("check-double", locked=False), "not locked and graded code"),
    "another function": (replace("double", "def double(", "def twice("), "no `def double(`"),
    "a check of nothing": (meta("check-shift", grade_id="check-turn"), "check-turn checks no exercise"),
    "code marked by hand": (meta("shift", grade=True, points=1), "not a Markdown answer with points"),
    "a solution given away": (leak, "the line of a solution or hidden test: twice_as_much = 2 * x"),
    "a hidden test given away": (leak_test, "the line of a solution or hidden test"),
    "no solution region": (no_region, "has no solution region"),
    "another stub": (replace("double", f'Error("{NOT_YET}")', "Error()"), "the stub is not"),
    "a stub that does not parse": (replace("double", "def double(x):", "def double(x:"), "the stub is not"),
    "a long check": (replace("check-double", "check(double)", "check(double)\n" * 16), "lines of code"),
    "a long solution": (replace("double", "    return", "    x\n" * 30 + "    return"), "lines of code"),
    "a stored output": (run_it, "the students' version stores an output"),
    "another kernel": (other_kernel, "the kernel is 'my_env'"),
    "no set-up cell": (no_setup, "the first code cell is not the course's set-up cell"),
    "no Colab link": (replace("title", "[Open in Colab]", "[Open]"), "no link that opens this lab in Colab"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gate_finds(fault, problems) -> None:
    change, what = FAULTS[fault]
    assert any(what in problem.what for problem in problems(change)), [p.what for p in problems()]


def test_a_solution_in_a_file_beside_the_notebook_is_found(shipped, source, released, tmp_path) -> None:
    (tmp_path / "helper.py").write_text("def f(x):\n    twice_as_much = 2 * x\n")
    found = gates.check(NAME, source, released, small_lab.EXERCISES, tmp_path)
    assert [p.what for p in found] == [
        "helper.py holds the line of a solution or hidden test: twice_as_much = 2 * x"
    ]


def test_lines_that_learners_see_anyway_are_no_leak(problems) -> None:
    """A solution may repeat what the author shows elsewhere."""

    def show(source: NotebookNode, released: NotebookNode) -> None:
        for nb in (source, released):
            nb.cells.append(new_code_cell("def g(x):\n    return twice_as_much", id="shown"))
            nb.cells.append(new_markdown_cell("return moved_upwards", id="told"))

    assert problems(show) == []


def test_every_stub_is_python(released) -> None:
    for cell in released.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
    assert json.loads(nbformat.writes(released))["nbformat_minor"] == 5


# ── CUDA C++ ─────────────────────────────────────────────────────────────────────────────────────

KERNEL = """\
%%cuda
__global__ void double(float* x, int n) {
    // ### BEGIN SOLUTION
    int number_of_the_thread = threadIdx.x;
    x[number_of_the_thread] *= 2;
    // ### END SOLUTION
}"""


@pytest.fixture
def with_kernel(tmp_path: Path) -> tuple[NotebookNode, NotebookNode]:
    """The small lab with a kernel as its first exercise: the source, and what learners get."""
    nb = small_lab.source_notebook()
    find(nb, "double").source = KERNEL
    small_lab.write_source(tmp_path, nb)
    authoring.build(tmp_path, [NAME])
    page = tmp_path / "labs" / NAME / f"{NAME}.ipynb"
    return canonical.read(authoring.source_path(tmp_path, NAME)), canonical.read(page)


def test_a_cell_of_cuda_gets_a_stub_of_cuda_and_the_others_one_of_python(with_kernel, tmp_path) -> None:
    source, released = with_kernel
    assert find(released, "double").source == (
        "%%cuda\n__global__ void double(float* x, int n) {\n"
        "    // YOUR CODE HERE\n    #error not implemented yet\n}"
    )
    assert 'raise NotImplementedError("not implemented yet")' in find(released, "shift").source
    assert gates.check(NAME, source, released, small_lab.EXERCISES, tmp_path / "labs" / NAME) == []


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("#error not implemented yet", "", "the stub is not `#error not implemented yet`"),
        ("#error not", "#error really not", "the stub is not"),
        ("void double(", "void twice(", "no `__global__ void double(`"),
        ("    #error", "    int number_of_the_thread = threadIdx.x;\n    #error", "the line of a solution"),
    ],
)
def test_a_gate_finds_a_fault_in_a_cell_of_cuda(old, new, what, with_kernel, tmp_path) -> None:
    replace("double", old, new)(*with_kernel)
    found = gates.check(NAME, *with_kernel, small_lab.EXERCISES, tmp_path / "labs" / NAME)
    assert any(what in problem.what for problem in found), [p.what for p in found]
