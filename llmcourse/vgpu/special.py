"""What a GPU's special-function unit computes: exponentials, logarithms, sines and tanh, approximately.

Here they are computed in float64 and rounded to float32, the same on every machine. Hardware differs from
that within the error that PTX states:

    ex2.approx.f32    2 units in the last place       sin, cos.approx.f32   2^-20.5 absolute in [−π, π]
    lg2.approx.f32    2^-22 (absolute near 1)         tanh.approx.f32       2^-11 relative
    rsqrt, rcp, sqrt  1 to 2 units (in `floats`)

so a kernel built on `__expf` or `__sinf` gives results that are close to a GPU's and not the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmcourse.vgpu.floats import finished
from llmcourse.vgpu.forms import Form, Modifiers, form
from llmcourse.vgpu.vector import Value

FUNCTIONS: dict[str, Callable[..., Value]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@form(*FUNCTIONS, types=("f32",))
def _special(m: Modifiers) -> Form | None:
    m.type()
    if not m.flag("approx"):
        return None
    exact = FUNCTIONS[m.instruction.opcode]

    def function(a: Value) -> Value:
        return exact(a, dtype=np.float64).astype(np.float32)

    return Form(finished(m, "f32", function), ("f32",), ("f32",))
