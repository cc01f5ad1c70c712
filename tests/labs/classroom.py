"""A class for tests: a lab's solved notebook (01's unless told), and submissions made from it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAB = "lab01_backprop"


def read(folder: str, lab: str = LAB) -> dict[str, Any]:
    """The lab's notebook in `solutions` or `labs`, each cell's source one string."""
    nb = json.loads((ROOT / folder / lab / f"{lab}.ipynb").read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def solutions(lab: str = LAB) -> dict[str, str]:
    """Exercise → the course's own solution, as a learner would have typed it."""
    return {
        cell["metadata"]["nbgrader"]["grade_id"]: "\n".join(
            line for line in cell["source"].splitlines() if "### " not in line
        )
        for cell in read("solutions", lab)["cells"]
        if cell["metadata"].get("nbgrader", {}).get("solution")
    }


def solved(lab: str = LAB) -> dict[str, Any]:
    """The students' notebook with every exercise solved."""
    nb, right = read("labs", lab), solutions(lab)
    for cell in nb["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        cell["source"] = right.get(name, cell["source"])
    return nb


def hand_in(folder: Path, student: str, *, lab: str = LAB, **sources: str) -> None:
    """Put a student's solved notebook into `folder`, the named cells' sources replaced."""
    nb = deepcopy(solved(lab))
    for cell in nb["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        cell["source"] = sources.get(name, cell["source"])
    path = folder / student / lab / f"{lab}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb), encoding="utf-8")
