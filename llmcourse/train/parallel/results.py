"""What a run of workers gives back."""

from __future__ import annotations

from typing import Any


class Results(list[Any]):
    """What each rank returned, in order of rank; `logs[rank]` are its lines, `seconds` the time taken."""

    logs: list[list[str]]
    seconds: float
