"""Errors as a reader of a notebook should meet them: the cell's line, then the three parts.

A traceback through this package tells its authors something, and nobody else. Jupyter shows instead what an
exception's `_render_traceback_` returns, if it has one; outside of Jupyter nothing changes.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from llmcourse.errors import CourseError

PACKAGE = Path(__file__).parent.parent

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=CourseError)


def for_readers(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what readers call: a CourseError that leaves it is shown without the package's own frames."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except CourseError as error:
            raise concise(error) from None

    return called


def concise(error: E, *, calls: bool = True) -> E:
    """The same error; Jupyter then shows it with the reader's own lines (`calls`), or with none."""
    error._render_traceback_ = lambda: render(error, calls)  # type: ignore[attr-defined]
    return error


def render(error: CourseError, calls: bool) -> list[str]:
    """The lines that Jupyter shows."""
    out = []
    for frame in traceback.extract_tb(error.__traceback__) if calls else ():
        path = Path(frame.filename)
        if PACKAGE in path.parents or "IPython" in path.parts:
            continue
        cell = "ipykernel" in frame.filename or frame.filename.startswith("<ipython")
        where = f"line {frame.lineno}" if cell else f"{path.name}:{frame.lineno}"
        out.append(f"\x1b[32m{where}:\x1b[0m {frame.line}")
    first, *rest = str(error).splitlines()
    return [*out, f"\x1b[31m{type(error).__name__}\x1b[0m: {first}", *rest]
