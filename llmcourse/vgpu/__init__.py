"""A GPU that runs anywhere: CUDA C++ compiled to PTX, executed in NumPy, with a real GPU's memory counters.

    from llmcourse.vgpu import cuda
    saxpy = cuda.compile(source).kernel
    result = saxpy[blocks, 256](x, y, 2.0, n)
    result.annotated()

`cuda` compiles and launches (on a GPU where there is one), `ptx` reads PTX, `machine` runs it, `counters`
holds what was counted. Nothing is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("annotate", "counters", "cuda", "faults", "isa", "machine", "magic", "native", "nvrtc", "ptx")
_NAMES = {
    "CompileError": "compile_error",
    "Counters": "counters",
    "KernelFault": "faults",
    "Result": "result",
}

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
