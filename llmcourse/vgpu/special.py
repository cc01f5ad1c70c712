"""What a GPU's special-function unit computes: exponentials, logarithms, sines and tanh, approximately.

Here they are computed in float64 and rounded to float32, the same on every machine. Hardware differs from
that within the error that PTX states:

    ex2.approx.f32    2 units in the last place       sin, cos.approx.f32   2^-20.5 absolute in [−π, π]
    lg2.approx.f32    2^-22 (absolute near 1)         tanh.approx.f32       2^-11 relative
    rsqrt, rcp, sqrt  1 to 2 units (in `floats`)

so a kernel built on `__expf` or `__sinf` gives results that are close to a GPU's and not the same bits.

A sine takes two instructions there: the angle is turned into turns, x·(1/2π) in float32 rounded toward zero,
and the unit takes the sine of what is left of the whole turns. So a large angle has lost most of its digits
before the sine is taken, and a tiny one is 0: the unit flushes subnormal inputs. Both are done here too; an
H100's worst difference from the sine of x itself, over 1,632 values, is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmcourse.vgpu.floats import finished, flushed
from llmcourse.vgpu.forms import Form, Modifiers, form
from llmcourse.vgpu.rounding import narrowed
from llmcourse.vgpu.vector import Value

TURN = np.float64(np.float32(0.15915494))
"""1/2π as float32."""


def turns(x: Value) -> Value:
    """x as a fraction of a turn, in float64: what the unit gets of x (float32)."""
    exact = x.astype(np.float64) * TURN  # 48 bits: nothing is lost
    return np.fmod(flushed(narrowed(exact, "f32", "rz")).astype(np.float64), np.float64(1))


FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "ex2": lambda x: np.exp2(x, dtype=np.float64),
    "lg2": lambda x: np.log2(x, dtype=np.float64),
    "sin": lambda x: np.sin(2 * np.pi * turns(x)),
    "cos": lambda x: np.cos(2 * np.pi * turns(x)),
    "tanh": lambda x: np.tanh(x, dtype=np.float64),
}
"""In float64, of float32."""


@form(*FUNCTIONS, types=("f32",))
def _special(m: Modifiers) -> Form | None:
    m.type()
    if not m.flag("approx"):
        return None
    exact = FUNCTIONS[m.instruction.opcode]

    def function(a: Value) -> Value:
        return exact(a).astype(np.float32)

    return Form(finished(m, "f32", function), ("f32",), ("f32",))
