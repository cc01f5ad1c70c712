"""Helpers for tests that drive the course from outside, as its user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from outside import ROOT, Run


@pytest.fixture
def run_python(tmp_path: Path) -> Run:
    """Run this Python on arguments: the course importable, an empty cache, no display, no proxy."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        env = {**inherited, "PYTHONPATH": str(ROOT), "LLMCOURSE_CACHE": str(tmp_path / "cache")}
        env |= {"NO_PROXY": "*", "COLUMNS": "120"} | environment
        return subprocess.run(
            [sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def llmcourse(run_python: Run) -> Run:
    """Run the real command line, `llmcourse ARGUMENTS`."""
    return lambda *arguments, **environment: run_python("-m", "llmcourse.cli", *arguments, **environment)
