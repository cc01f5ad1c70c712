"""A class for tests: the solved notebook of lab 01, and folders of submissions made from it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAB = "lab01_backprop"


def read(folder: str) -> dict[str, Any]:
    """The lab's notebook in `solutions` or `labs`, each cell's source one string."""
    nb = json.loads((ROOT / folder / LAB / f"{LAB}.ipynb").read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def solutions() -> dict[str, str]:
    """Exercise → the course's own solution, as a learner would have typed it."""
    return {
        cell["metadata"]["nbgrader"]["grade_id"]: "\n".join(
            line for line in cell["source"].splitlines() if "### " not in line
        )
        for cell in read("solutions")["cells"]
        if cell["metadata"].get("nbgrader", {}).get("solution")
    }


def solved() -> dict[str, Any]:
    """The students' notebook with every exercise solved."""
    nb, right = read("labs"), solutions()
    for cell in nb["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        cell["source"] = right.get(name, cell["source"])
    return nb


def hand_in(folder: Path, student: str, **sources: str) -> None:
    """Put a student's solved notebook into `folder`, the named cells' sources replaced."""
    nb = deepcopy(solved())
    for cell in nb["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        cell["source"] = sources.get(name, cell["source"])
    path = folder / student / LAB / f"{LAB}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb), encoding="utf-8")
