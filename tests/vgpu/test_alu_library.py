"""CUDA's own math library, which NVRTC compiles to PTX, run on this arithmetic: as accurate as documented.

Its functions are long chains of fused multiply-adds, conversions, bit tricks and approximate instructions:
one of them wrong by a bit shows as many units in the last place.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc")

import torch

from llmcourse.vgpu.machine import execute
from llmcourse.vgpu.nvrtc import compile_source
from llmcourse.vgpu.ptx import parse

FUNCTIONS = {
    # name: (reference in float64, range, units in the last place that the CUDA C++ guide allows + ours)
    "exp": (torch.exp, (-80, 80), 3),
    "exp2": (torch.exp2, (-100, 100), 3),
    "expm1": (torch.expm1, (-5, 5), 2),
    "log": (torch.log, (1e-3, 1e3), 2),
    "log2": (torch.log2, (1e-3, 1e3), 2),
    "log1p": (torch.log1p, (-0.9, 100), 2),
    "sin": (torch.sin, (-1000, 1000), 3),
    "cos": (torch.cos, (-1000, 1000), 3),
    "tan": (torch.tan, (-1.5, 1.5), 5),
    "tanh": (torch.tanh, (-9, 9), 3),
    "sinh": (torch.sinh, (-20, 20), 4),
    "asin": (torch.asin, (-1, 1), 3),
    "atan": (torch.atan, (-100, 100), 3),
    "erf": (torch.erf, (-4, 4), 3),
    "erfc": (torch.erfc, (-4, 9), 6),
    "lgamma": (torch.lgamma, (3, 100), 7),
    "sqrt": (torch.sqrt, (0, 1e6), 0.5),
    "rsqrt": (torch.rsqrt, (1e-3, 1e6), 3),
    "cbrt": (lambda x: torch.from_numpy(np.cbrt(x.numpy())), (-1e4, 1e4), 2),
    "round": (lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5), (-50, 50), 0),
    "rint": (torch.round, (-50, 50), 0),
    "floor": (torch.floor, (-50, 50), 0),
}
PAIRS = {
    "pow": (torch.pow, (0.1, 20), (-9, 9), 9),
    "fmod": (torch.fmod, (-100, 100), (-3, 3), 0),
    "atan2": (torch.atan2, (-9, 9), (-9, 9), 3),
    "hypot": (torch.hypot, (-9, 9), (-9, 9), 3),
    "divide": (torch.div, (-9, 9), (-9, 9), 0.5),
}
LANES = 4000


def source(type_: str) -> str:
    calls = [f"{name}(a)" for name in FUNCTIONS]
    calls += ["a / b" if name == "divide" else f"{name}(a, b)" for name in PAIRS]
    stores = "\n".join(f"    case {i}: y = {call}; break;" for i, call in enumerate(calls))
    return (
        f"__global__ void k(const {type_}* x, const {type_}* z, {type_}* o, int n, int which) {{\n"
        f"  int i = blockIdx.x * blockDim.x + threadIdx.x;\n  if (i >= n) return;\n"
        f"  {type_} a = x[i], b = z[i], y = 0;\n  switch (which) {{\n{stores}\n  }}\n  o[i] = y;\n}}\n"
    )


def units(got: np.ndarray, truth: np.ndarray) -> float:
    """The largest error in units in the last place of the result's type."""
    unit = np.spacing(np.abs(truth).astype(got.dtype)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - truth) / np.maximum(unit, np.finfo(got.dtype).tiny)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_math_library_is_as_accurate_as_documented(dtype):
    random = np.random.default_rng(0)
    module = parse(compile_source(source("float" if dtype == np.float32 else "double")).ptx)
    (kernel,) = module.kernels.values()
    names = [*FUNCTIONS, *PAIRS]
    wrong = {}
    for which, name in enumerate(names):
        reference, *ranges, limit = FUNCTIONS.get(name) or PAIRS[name]
        inputs = [random.uniform(*r, LANES).astype(dtype) for r in ranges]
        out = np.zeros(LANES, dtype)
        arguments = [inputs[0], inputs[-1], out, LANES, which]
        execute(kernel, module, (-(-LANES // 256), 1, 1), (256, 1, 1), arguments)
        truth = reference(*(torch.from_numpy(x.astype(np.float64)) for x in inputs)).numpy()
        if dtype == np.float64:
            limit += 2  # the reference is a float64 result itself
        if (error := units(out, truth)) > limit + 1e-6:
            wrong[name] = error
    assert not wrong
