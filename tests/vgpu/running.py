"""Compile one kernel and run it on the machine, for tests."""

from __future__ import annotations

import numpy as np

from llmcourse.vgpu.machine import Run, execute
from llmcourse.vgpu.nvrtc import compile_source
from llmcourse.vgpu.ptx import parse


def run(source: str, grid, block, *arguments, shared: int = 0, arch: str = "sm_80", **options) -> Run:
    """Run the only kernel of a source; arrays are written in place."""
    module = parse(compile_source(source, arch, name="kernel.cu").ptx)
    (kernel,) = module.kernels.values()
    return execute(kernel, module, three(grid), three(block), arguments, dynamic_shared=shared, **options)


def three(size) -> tuple[int, int, int]:
    return (*size, 1, 1)[:3] if isinstance(size, tuple) else (size, 1, 1)


def zeros(*shape, dtype="f4") -> np.ndarray:
    return np.zeros(shape, dtype)
