"""Triton, or where it is not installed, something in its place.

Triton has wheels for Linux only. A kernel file must still import elsewhere, since its reference and its
wrapper run on any machine; only a launch needs the compiler. So the files that hold kernel and wrapper
together take `triton` and `tl` from here.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from llmcourse.errors import MissingPackageError

INSTALLED = importlib.util.find_spec("triton") is not None


class MissingKernel:
    """What `@triton.jit` returns without Triton: a kernel that can be named and shown, not launched."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __getitem__(self, grid: Any) -> Any:
        raise MissingPackageError(
            f"the Triton kernel {self.__name__} cannot be launched: Triton is not installed.",
            "Triton compiles and interprets kernels; its wheels are for Linux.",
            "a Linux machine, WSL 2 or Colab, or backend='reference'.",
        )


class _Absent:
    """Stands for `triton` and `triton.language`, as far as a kernel file touches them on import."""

    constexpr = object
    jit = MissingKernel


triton: Any = importlib.import_module("triton") if INSTALLED else _Absent()
tl: Any = importlib.import_module("triton.language") if INSTALLED else triton
