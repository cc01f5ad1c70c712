"""What the notebook tests share: one run of all notebooks, and one small notebook without a fault.

`LLMCOURSE_NOTEBOOKS` points these tests at another folder of notebooks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode
from sample_notebook import NAME, good_notebook

from llmcourse.runner import canonical
from llmcourse.runner.page import Page

FOLDER = Path(os.environ.get("LLMCOURSE_NOTEBOOKS") or Path(__file__).parents[2] / "notebooks")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `notebook` runs once for each notebook of the folder."""
    if "notebook" in metafunc.fixturenames:
        metafunc.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of one run of every notebook, at scale ci on the CPU, by the notebook's name."""
    from llmcourse.runner import maintain, pool

    scratch = tmp_path_factory.mktemp("executed")
    # A busy machine may make a cell slow; how long one may take is a test's business.
    outcomes = pool.execute_all(NOTEBOOKS, parameters=maintain.STORED, cell_timeout=300, out=scratch)
    return {outcome.name: outcome for outcome in outcomes}


@pytest.fixture(scope="session")
def folder() -> Path:
    return FOLDER


@pytest.fixture
def good() -> NotebookNode:
    return good_notebook()


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Page]:
    """`page_of(nb)`: the notebook as it would lie on disk, in a folder with the neighbours it links to."""

    def make(nb: NotebookNode, text: str | None = None) -> Page:
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        path = tmp_path / "notebooks" / f"{NAME}.ipynb"
        text = canonical.dumps(canonical.canonicalise(nb)) if text is None else text
        path.write_text(text, encoding="utf-8")
        return Page(path, nb, text)

    return make
