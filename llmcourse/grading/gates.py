"""What a lab must be before it is shipped, each rule a function that finds what breaks it.

The form that the gates hold a lab to, for its author, who writes `solutions/NAME/NAME.ipynb`:

    first cell     Markdown with the title and the line that opens the lab in Colab
    first code     the course's set-up cell, unchanged
    an exercise    three cells in this order, as `lab.exercises` has them:
                   a locked Markdown cell    with `exercise.header()`, the shape block, the formula
                   a solution cell           grade_id = the function's name; what a learner writes stands
                                             between ### BEGIN SOLUTION and ### END SOLUTION
                   a locked, graded cell     grade_id = check-NAME, the exercise's points; hidden tests
                                             between ### BEGIN HIDDEN TESTS and ### END HIDDEN TESTS
    an answer      a graded solution cell of Markdown, marked by hand
    CUDA C++       a solution cell that begins with %%cuda and holds `__global__ void NAME(`; the markers
                   of its solution region stand behind //
    code           at most 15 lines a cell, 30 in a solution cell; no output is stored

A grade_id is made of letters, digits, `-` and `_`: Formgrader finds its cells by CSS selectors.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from llmcourse.grading.converting import CODE_STUB, CUDA_STUB, NOT_YET
from llmcourse.grading.exercise import Exercise
from llmcourse.runner.gates import Problem
from llmcourse.runner.page import label
from llmcourse.runner.setup_cell import badge, setup_cell
from llmcourse.vgpu.unwritten import MAGIC

MAX_CODE_LINES, MAX_SOLUTION_LINES = 15, 30
SCHEMA = 3
CHECK_PREFIX = "check-"

_GRADE_ID = re.compile(r"[A-Za-z0-9_-]+")
_REGION = re.compile(r"(BEGIN|END) (SOLUTION|HIDDEN TESTS|MARK SCHEME)")
_RAISES = re.compile(r"^\s*raise NotImplementedError.*", re.MULTILINE)
_ERROR = re.compile(r"^\s*#\s*error.*", re.MULTILINE)


@dataclass(frozen=True)
class LabPage:
    """A lab as its gates read it: the source, what learners get, its exercises, and the learners' folder."""

    name: str
    source: NotebookNode
    released: NotebookNode
    exercises: Sequence[Exercise]
    folder: Path


Gate = Callable[[LabPage], Iterator[Problem]]


def check(
    name: str,
    source: NotebookNode,
    released: NotebookNode,
    exercises: Sequence[Exercise],
    folder: Path,
) -> list[Problem]:
    """All that keeps a lab from being shipped."""
    page = LabPage(name, source, released, exercises, folder)
    return [problem for gate in GATES for problem in gate(page)]


def metadata_is_valid(page: LabPage) -> Iterator[Problem]:
    from nbgrader.nbgraderformat import MetadataValidator, ValidationError
    from nbgrader.nbgraderformat.common import SchemaMismatchError

    for where, nb in (("the source", page.source), ("the students' version", page.released)):
        try:
            MetadataValidator().validate_nb(nb)
        except (ValidationError, SchemaMismatchError, KeyError) as error:
            said = str(error).partition("\n")[0]
            yield Problem(
                f"nbgrader rejects the metadata of {where}: {said}",
                "Which cells are graded, and for how much, is read from there.",
                "grade, grade_id, locked, schema_version, solution and task in each marked cell.",
            )
    for cell in page.source.cells:
        own = nbgrader(cell)
        if own and not _GRADE_ID.fullmatch(str(own.get("grade_id", ""))):
            yield Problem(
                f"the grade_id {own.get('grade_id')!r} cannot be used",
                "Formgrader finds its cells by selectors: letters, digits, - and _ are safe.",
                "an exercise's name, or check- with that name.",
                label(cell),
            )


def ids_are_unique(page: LabPage) -> Iterator[Problem]:
    kinds: tuple[tuple[str, list[str]], ...] = (
        ("cell id", [str(cell.get("id", "")) for cell in page.source.cells]),
        (
            "grade_id",
            [str(own["grade_id"]) for cell in page.source.cells if (own := nbgrader(cell)).get("grade_id")],
        ),
    )
    for kind, names in kinds:
        for name, count in Counter(names).items():
            if count > 1 or not name:
                yield Problem(
                    f"the {kind} {name!r} stands at {count} cells",
                    "A submission's cells are found by their ids.",
                    "a name for each cell that says what it is for.",
                    name,
                )


def exercises_are_whole(page: LabPage) -> Iterator[Problem]:
    cells = {
        str(own["grade_id"]): i
        for i, c in enumerate(page.source.cells)
        if (own := nbgrader(c)).get("grade_id")
    }
    for exercise in page.exercises:
        solution, verdict = cells.get(exercise.name), cells.get(CHECK_PREFIX + exercise.name)
        if solution is None or verdict is None:
            missing = exercise.name if solution is None else CHECK_PREFIX + exercise.name
            yield _broken(exercise, f"has no cell with the grade_id {missing}", missing)
            continue
        yield from _solution_cell(exercise, page.source.cells[solution])
        yield from _check_cell(exercise, page.source.cells[verdict])
        heads = [i for i in range(solution) if _is_head(page.source.cells[i], exercise)]
        if not heads or verdict < solution:
            yield _broken(
                exercise,
                "has no locked Markdown cell with its header, shapes and formula before the solution cell"
                if not heads
                else "is checked before it is solved",
                exercise.name,
            )
    known = {e.name for e in page.exercises}
    for name in cells:
        if name.startswith(CHECK_PREFIX) and name.removeprefix(CHECK_PREFIX) not in known:
            yield Problem(
                f"{name} checks no exercise of the lab",
                "A graded cell that no exercise stands behind cannot be judged.",
                f"one of {', '.join(CHECK_PREFIX + e.name for e in page.exercises)}.",
                name,
            )


def answers_are_marked_by_hand(page: LabPage) -> Iterator[Problem]:
    for cell in page.source.cells:
        own = nbgrader(cell)
        by_hand = own.get("grade") and (own.get("solution") or own.get("task"))
        if by_hand and (cell.cell_type != "markdown" or own.get("task") or not own.get("points")):
            yield Problem(
                "a cell that is marked by hand is not a Markdown answer with points",
                "Formgrader shows an answer beside a field for its marks.",
                "cell type Markdown, grade and solution true, task false, and points.",
                label(cell),
            )


def nothing_is_given_away(page: LabPage) -> Iterator[Problem]:
    hidden, visible = set[str](), set[str]()
    for cell in page.source.cells:
        for line, inside in regions(cell.source):
            (hidden if inside else visible).add(line.strip())
    secrets = {line for line in hidden - visible if len(line) > 3}
    for name, text in _texts(page):
        lines = {line.strip() for line in text.splitlines()}
        if leaked := sorted(secrets & lines, key=len):
            yield Problem(
                f"{name} holds the line of a solution or hidden test: {leaked[-1][:80]}",
                "Learners get this folder.",
                "llmcourse labs build, or taking the line out of the files beside the notebook.",
            )
        elif mark := _REGION.search(text):
            yield Problem(
                f"{name} holds “{mark[0]}”",
                "It marks what learners must not get.",
                "llmcourse labs build.",
            )


def stubs_say_so(page: LabPage) -> Iterator[Problem]:
    for cell in page.released.cells:
        if cell.cell_type != "code" or not nbgrader(cell).get("solution"):
            continue
        cuda = cell.source.startswith(MAGIC)
        stub = (CUDA_STUB if cuda else CODE_STUB).splitlines()
        lines = [line.strip() for line in cell.source.splitlines()]
        raised = {line.strip() for line in (_ERROR if cuda else _RAISES).findall(cell.source)}
        if stub[0] not in lines or raised != {stub[1]} or not (cuda or _parses(cell.source)):
            yield Problem(
                f"the stub is not `{stub[1]}`",
                f"A fresh lab fails with “{NOT_YET}” and with nothing else.",
                "solution regions inside the functions, below their docstrings.",
                label(cell),
            )


def code_is_short(page: LabPage) -> Iterator[Problem]:
    for cell in page.source.cells:
        if cell.cell_type != "code" or cell.source == setup_cell():
            continue
        solution = nbgrader(cell).get("solution")
        limit = MAX_SOLUTION_LINES if solution else MAX_CODE_LINES
        if (lines := len(cell.source.splitlines())) > limit:
            yield Problem(
                f"{lines} lines of code",
                f"A cell holds at most {limit} lines, blank lines and comments included.",
                "splitting the exercise, or moving code into the package.",
                label(cell),
            )


def nothing_was_run(page: LabPage) -> Iterator[Problem]:
    for where, nb in (("the source", page.source), ("the students' version", page.released)):
        for cell in nb.cells:
            if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
                yield Problem(
                    f"{where} stores an output",
                    "A lab's outputs are its learner's, and a source's would give answers away.",
                    "llmcourse labs build.",
                    label(cell),
                )


def kernel_is_python3(page: LabPage) -> Iterator[Problem]:
    name = page.released.metadata.get("kernelspec", {}).get("name")
    if name != "python3":
        yield Problem(
            f"the kernel is {name!r}",
            "A lab must open wherever there is a Python.",
            "llmcourse labs build.",
        )


def setup_cell_first(page: LabPage) -> Iterator[Problem]:
    cells = page.released.cells
    first = next((cell for cell in cells if cell.cell_type == "code"), None)
    if first is None or first.source != setup_cell():
        yield Problem(
            "the first code cell is not the course's set-up cell",
            "The same cell opens every notebook, and installs the package in Colab.",
            "llmcourse labs build.",
            label(first) if first else "",
        )
    line = badge(page.name, folder=f"labs/{page.name}")
    if not cells or cells[0].cell_type != "markdown" or line not in cells[0].source.splitlines():
        yield Problem(
            "the first cell has no link that opens this lab in Colab",
            f"It should hold the line {line}",
            "a first cell of Markdown, then llmcourse labs build.",
        )


GATES: tuple[Gate, ...] = (
    metadata_is_valid,
    ids_are_unique,
    exercises_are_whole,
    answers_are_marked_by_hand,
    nothing_is_given_away,
    stubs_say_so,
    code_is_short,
    nothing_was_run,
    kernel_is_python3,
    setup_cell_first,
)


def nbgrader(cell: Any) -> dict[str, Any]:
    """A cell's nbgrader metadata; empty where there is none."""
    own = cell.metadata.get("nbgrader")
    return own if isinstance(own, dict) else {}


def regions(source: str) -> Iterator[tuple[str, bool]]:
    """Each line of a cell but the markers, and whether it lies in a region that learners do not get."""
    inside = False
    for line in source.splitlines():
        if mark := _REGION.search(line):
            inside = mark[1] == "BEGIN"
        else:
            yield line, inside


def _solution_cell(exercise: Exercise, cell: NotebookNode) -> Iterator[Problem]:
    own = nbgrader(cell)
    if cell.cell_type != "code" or not own.get("solution") or own.get("grade"):
        yield _broken(exercise, "has a solution cell that is not one in nbgrader's metadata", exercise.name)
    if "BEGIN SOLUTION" not in cell.source:
        yield _broken(exercise, "has no solution region: learners would lose the signature", exercise.name)
    wanted = [f"def {exercise.name}(", f"class {exercise.name}"]
    if cell.source.startswith(MAGIC):
        wanted = [f"__global__ void {exercise.name}("]
    if not any(text in cell.source for text in wanted):
        yield _broken(exercise, f"is not defined in its solution cell: no `{wanted[0]}`", exercise.name)


def _check_cell(exercise: Exercise, cell: NotebookNode) -> Iterator[Problem]:
    own, name = nbgrader(cell), CHECK_PREFIX + exercise.name
    if cell.cell_type != "code" or not own.get("grade") or own.get("solution") or not own.get("locked"):
        yield _broken(exercise, "has a check cell that is not locked and graded code", name)
    if own.get("points") != exercise.points:
        yield _broken(
            exercise, f"is worth {exercise.points} points and its check cell {own.get('points')}", name
        )


def _is_head(cell: NotebookNode, exercise: Exercise) -> bool:
    wanted: Iterable[str] = (exercise.header(), exercise.formula, *exercise.shapes)
    locked = cell.cell_type == "markdown" and nbgrader(cell).get("locked")
    return bool(locked) and all(text in cell.source for text in wanted)


def _broken(exercise: Exercise, what: str, cell: str) -> Problem:
    return Problem(
        f"the exercise {exercise.name} {what}",
        "An exercise is a header cell, a solution cell and a check cell, known by nbgrader's metadata.",
        "the layout described in llmcourse/grading/gates.py.",
        cell,
    )


def _texts(page: LabPage) -> Iterator[tuple[str, str]]:
    yield f"{page.name}.ipynb", "\n".join(cell.source for cell in page.released.cells)
    for path in sorted(page.folder.rglob("*")):
        if path.is_file() and path.suffix != ".ipynb":
            yield path.relative_to(page.folder).as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
