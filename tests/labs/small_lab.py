"""A small lab for tests: two exercises of NumPy and an answer in words, as an author would write it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llmcourse.grading import authoring
from llmcourse.grading.exercise import Exercise
from llmcourse.runner import canonical

NAME = "lab91_small"

DOUBLE = """\
def double(x):
    \"\"\"Twice x.  Shapes  x [N]; returns [N].\"\"\"
    ### BEGIN SOLUTION
    twice_as_much = 2 * x
    return twice_as_much
    ### END SOLUTION"""

SHIFT = """\
def shift(x, by):
    \"\"\"x moved up by `by`.  Shapes  x [N]; returns [N].\"\"\"
    ### BEGIN SOLUTION
    moved_upwards = x + by
    return moved_upwards
    ### END SOLUTION"""

WHY = """\
**Why is doubling linear?**

### BEGIN SOLUTION
Because f(a + b) = f(a) + f(b), and scaling passes through.
### END SOLUTION"""


def exercise(name: str, points: int) -> Exercise:
    return Exercise(
        name,
        title=f"Write {name}",
        arguments=("x",),
        shapes=("x [N], N elements",),
        formula=f"y = {name}(x)",
        difficulty=1,
        importance=2,
        minutes=5,
        points=points,
        hints=("What is two of it?", "Add it to itself.", "x + x"),
    )


EXERCISES = (exercise("double", 3), exercise("shift", 4))
ANSWER_POINTS = 5


def mark(cell: NotebookNode, name: str, *, points: float | None = None, **flags: bool) -> NotebookNode:
    """`cell` with nbgrader's metadata, and the id `name`."""
    own: dict[str, Any] = {"grade": False, "locked": False, "solution": False, "task": False}
    own |= flags | {"grade_id": name, "schema_version": 3}
    cell.metadata["nbgrader"] = own if points is None else own | {"points": points}
    cell["id"] = name
    return cell


def cells_of(e: Exercise, code: str, hidden: str) -> list[NotebookNode]:
    head = f"## {e.title}\n\n{e.header()}\n\n```\n{e.shapes[0]}\n```\n\n`{e.formula}`"
    check = f"check({e.name})\n### BEGIN HIDDEN TESTS\n{hidden}\n### END HIDDEN TESTS"
    return [
        mark(new_markdown_cell(head), f"head-{e.name}", locked=True),
        mark(new_code_cell(code), e.name, solution=True),
        mark(new_code_cell(check), f"check-{e.name}", grade=True, locked=True, points=e.points),
    ]


def source_notebook() -> NotebookNode:
    """The lab as its author has it, before `labs build` adds the set-up cell and the Colab line."""
    demo = new_code_cell("print(double(3))", id="demo", metadata={"tags": ["demo"]})
    cells = [
        new_markdown_cell("# Lab 91 · Small\n\nTwo functions.", id="title"),
        mark(new_code_cell("import numpy as np\n\ncheck = print"), "open-the-lab", locked=True),
        *cells_of(EXERCISES[0], DOUBLE, "assert double(21) == 42, 'the hidden test of double'"),
        demo,
        *cells_of(EXERCISES[1], SHIFT, "assert shift(40, 2) == 42, 'the hidden test of shift'"),
        mark(new_markdown_cell(WHY), "why-linear", grade=True, solution=True, points=ANSWER_POINTS),
        new_markdown_cell("That is all.", id="end"),
    ]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": spec})


def write_source(root: Path, nb: NotebookNode | None = None) -> Path:
    """Put the lab into `root/solutions`, as its author would; returns the notebook's path."""
    path = root / "solutions" / NAME / f"{NAME}.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(nbformat.writes(nb or source_notebook()))
    (path.parent / "numbers.csv").write_text("1,2\n3,4\n")
    return path


def built(root: Path) -> NotebookNode:
    """Build the lab in `root` and give its students' version."""
    write_source(root)
    authoring.build(root, [NAME])
    return canonical.read(root / "labs" / NAME / f"{NAME}.ipynb")


def find(nb: NotebookNode, name: str) -> NotebookNode:
    """The cell with this grade_id or id."""
    return next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name or c.id == name)


def solved(released: NotebookNode, answer: str = "It adds up, and scales.") -> NotebookNode:
    """A right submission."""
    nb = copy.deepcopy(released)
    find(nb, "double").source = "def double(x):\n    return x + x"
    find(nb, "shift").source = "def shift(x, by):\n    return by + x"
    find(nb, "why-linear").source = f"**Why is doubling linear?**\n\n{answer}"
    return nb
