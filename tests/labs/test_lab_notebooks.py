"""Each lab's two notebooks, run as Jupyter runs them: the fresh one, and the solved one to its last cell."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from llmcourse.labs.catalog import LABS, Lab
from llmcourse.labs.desk import JUDGED_ELSEWHERE

ROOT = Path(__file__).parents[2]


def run(lab: Lab, folder: str, home: Path) -> NotebookNode:
    """The notebook in solutions/ or labs/, run in a fresh kernel; a failing cell does not stop it."""
    nb = nbformat.read(ROOT / folder / lab.name / f"{lab.name}.ipynb", as_version=4)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"LLMCOURSE_PROGRESS": str(home / "progress.json"), "PYTHONPATH": path}
    env.pop(JUDGED_ELSEWHERE, None)
    client = NotebookClient(nb, timeout=120, allow_errors=True, resources={"metadata": {"path": str(home)}})
    client.execute(env=env)
    return nb


def errors(nb: NotebookNode) -> dict[str, tuple[str, str]]:
    """Cell id → kind and message of what it raised."""
    return {
        cell.id: (output.ename, output.evalue)
        for cell in nb.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }


def printed(cell: NotebookNode) -> str:
    """What a cell printed and showed, as text."""
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_a_fresh_notebook_fails_with_nothing_but_not_implemented_yet(lab, tmp_path):
    nb = run(lab, "labs", tmp_path)
    found = errors(nb)
    for exercise in lab.exercises:
        assert found.pop(f"check-{exercise.name}") == (
            "NotImplementedYet",
            f"○ {exercise.name} is not implemented yet.",
        )
    demos = {cell.id for cell in nb.cells if "demo" in cell.metadata.get("tags", [])}
    assert set(found) <= demos
    assert all(message == "not implemented yet" for _, message in found.values()), found


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_the_solved_notebook_passes_every_check_and_runs_in_the_package(lab, tmp_path):
    nb = run(lab, "solutions", tmp_path)
    assert errors(nb) == {}
    kept = json.loads((tmp_path / "labs.json").read_text())[lab.name]
    assert {name for name, entry in kept.items() if entry["passed"]} == {e.name for e in lab.exercises}
    demos = [cell for cell in nb.cells if "demo" in cell.metadata.get("tags", [])]
    source, shown = "\n".join(cell.source for cell in demos), "\n".join(map(printed, demos))
    # What ran in the package is named there; what fits nowhere in it is called by name.
    unused = [e.name for e in lab.exercises if e.name not in shown and f"{e.name}(" not in source]
    assert unused == []
    runs = [cell for cell in demos if cell.id.endswith("-run")]
    assert any(e.name in printed(cell) for cell in runs for e in lab.exercises)
