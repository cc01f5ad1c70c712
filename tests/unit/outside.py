"""What tests that drive the course from outside, as its user would, share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


def assert_three_parts(text: str, error: str) -> None:
    """The error is printed as its name and what, why, what to try, without a traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith(f"{error}: ")), None)
    assert first is not None, text
    assert lines[first + 1].startswith("  "), text
    assert any(line.startswith("  Try ") for line in lines[first + 2 :]), text
    assert "Traceback" not in text
