"""`llmcourse notebooks check | fix | store`: what an author of notebooks does before a commit.

check   run the gates and print what they find
fix     write the canonical form, the set-up cell and the Colab line; outputs stay as they are
store   run the notebooks at scale `ci` on the CPU and keep the outputs; nothing is written unless
        every one of them ran to its end
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from llmcourse.errors import NotebookError
from llmcourse.runner import canonical, gates
from llmcourse.runner.discover import find
from llmcourse.runner.page import Page
from llmcourse.runner.setup_cell import TEMPLATE, badge, setup_cell

STORED = {"device": "cpu", "scale": "ci"}


def command(action: str, names: Sequence[str]) -> int:
    """Do `action` to the notebooks called `names` (all when there are none); returns the exit status.

    Raises UnknownNameError for a name that means nothing, NotebookError for a notebook that cannot be
    read, or (store) that does not run.
    """
    actions: Mapping[str, Callable[[list[Path]], int]] = {"check": check, "fix": fix, "store": store}
    return actions[action](find(names))


def check(paths: Sequence[Path]) -> int:
    found = {path: gates.check(Page.open(path)) for path in paths}
    for path, problems in found.items():
        for problem in problems:
            print(problem.render(_shown(path)), end="\n\n")
    total = sum(map(len, found.values()))
    print(f"{len(paths)} notebooks, {total} problems")
    return 1 if total else 0


def fix(paths: Sequence[Path]) -> int:
    notebooks = [(path, with_head(canonical.read(path), path.stem)) for path in paths]
    for path, nb in notebooks:
        print(f"{_shown(path)}: {'fixed' if canonical.write(path, nb) else 'nothing to fix'}")
    return 0


def store(paths: Sequence[Path]) -> int:
    from llmcourse.runner.pool import execute_all

    stored = {path: canonical.read(path) for path in paths}
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = execute_all(paths, parameters=STORED, out=Path(scratch) / "run")
        failed = [outcome for outcome in outcomes if not outcome.ok or outcome.executed_path is None]
        if failed:
            raise NotebookError(
                f"{len(failed)} of {len(paths)} notebooks did not run, so no output was stored.",
                "\n  ".join(f"{outcome.name}: {outcome.error}" for outcome in failed),
                f"llmcourse run {failed[0].name} to see the failure in place.",
            )
        fresh = {
            path: with_outputs(stored[path], canonical.read(outcome.executed_path))
            for path, outcome in zip(paths, outcomes, strict=True)
            if outcome.executed_path is not None
        }
    for path, nb in fresh.items():
        print(f"{_shown(path)}: {'stored' if canonical.write(path, nb) else 'the outputs are as they were'}")
    return 0


def with_head(nb: NotebookNode, name: str, folder: str = "notebooks") -> NotebookNode:
    """`nb` with this version's set-up cell as its first code cell and its Colab line in the first cell."""
    nb = deepcopy(nb)
    setup = next((cell for cell in nb.cells if cell.cell_type == "code"), None)
    if setup is None or not _is_setup(setup):
        setup = new_code_cell(id="setup", metadata={"tags": []})
        nb.cells.insert(1, setup)
    setup.source = setup_cell()
    if nb.cells[0].cell_type == "markdown":
        nb.cells[0].source = _with_badge(nb.cells[0].source, badge(name, folder=folder))
    return nb


def with_outputs(stored: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """`stored` with the outputs of `executed`, a run of it; whatever else the run changed stays behind."""
    nb = deepcopy(stored)
    ran = [cell for cell in canonical.canonicalise(executed).cells if cell.cell_type == "code"]
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell, fresh in zip(code, ran, strict=True):
        cell.outputs, cell.execution_count = fresh.outputs, fresh.execution_count
    return nb


def _is_setup(cell: NotebookNode) -> bool:
    return cell.source.splitlines()[:1] == TEMPLATE.splitlines()[:1] or "google.colab" in cell.source


def _with_badge(source: str, line: str) -> str:
    kept = [
        old for old in source.splitlines() if not old.startswith(("[Open in Colab]", "[![Open in Colab]"))
    ]
    title = next((i for i, old in enumerate(kept) if old.startswith("# ")), -1)
    after = kept[title + 1 :]
    while after and not after[0].strip():
        after.pop(0)
    return "\n".join([*kept[: title + 1], "", line, "", *after]).strip("\n")


def _shown(path: Path) -> Path:
    """Relative to where the author is, when the notebook lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
