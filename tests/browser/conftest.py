"""One browser for all tests of a file, and a JupyterLab on a copy of the notebooks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyterlab_page import ROOT, chromium, jupyterlab
from playwright.sync_api import Browser

FOLDER = Path(os.environ.get("LLMCOURSE_NOTEBOOKS") or ROOT / "notebooks")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab on a copy of the notebooks."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(FOLDER, home / "notebooks")
    with jupyterlab(home, home / "notebooks") as address:
        yield address
