"""The 8-bit floats of `cvt`: e4m3 (4 exponent bits, 3 of fraction) and e5m2, as their bits.

e4m3 gives up infinity for range: its largest number is 448, and only the pattern of all ones is NaN. e5m2 is
the upper half of an f16, with infinity; its largest number is 57344. Conversions to either stick at the
largest number (`.satfinite`, the only form that PTX has).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmcourse.vgpu.vector import Value


@dataclass(frozen=True)
class Float8:
    fraction: int
    bias: int
    largest: float


FLOAT8 = {"e4m3x2": Float8(3, 7, 448.0), "e5m2x2": Float8(2, 15, 57344.0)}
NAN = np.uint8(0x7F)


def to_float8(value: Value, type_: str) -> Value:
    """float32 → bits (uint8), to nearest, ties to even."""
    f = FLOAT8[type_]
    size = np.minimum(np.abs(value), np.float32(f.largest))
    exponent = np.maximum(np.frexp(size)[1] - 1, 1 - f.bias)
    exponent = np.where(size == 0, 1 - f.bias, exponent)
    steps = np.rint(np.ldexp(size, f.fraction - exponent)).astype(np.int32)  # the last place counts one
    # A fraction that rounds up to the next power of two carries into the exponent, as it should.
    bits = ((exponent + f.bias) << f.fraction) + steps - (1 << f.fraction)
    bits |= np.signbit(value).astype(np.int32) << 7
    return np.where(np.isnan(value), NAN, bits.astype(np.uint8))[()]


def from_float8(bits: Value, type_: str) -> Value:
    """Bits (uint8) → the bits of an f16 (uint16): exact."""
    return _AS_F16[type_][bits]


def _table(f: Float8) -> np.ndarray:
    pattern = np.arange(256)
    field, rest = pattern >> f.fraction & (0x7F >> f.fraction), pattern & ((1 << f.fraction) - 1)
    steps = np.where(field > 0, rest + (1 << f.fraction), rest)
    size = np.ldexp(steps.astype(np.float64), np.maximum(field, 1) - f.bias - f.fraction)
    half = np.where(pattern & 0x80, -size, size).astype(np.float16).view(np.uint16)
    beyond = size > f.largest
    if f.fraction == 2:  # the largest exponent is infinity, or NaN
        infinity = np.uint16(0x7C00) | np.where(pattern & 0x80, 0x8000, 0).astype(np.uint16)
        half = np.where(beyond & (rest == 0), infinity, half)
        beyond &= rest != 0
    return np.where(beyond, np.uint16(0x7FFF), half)


with np.errstate(over="ignore"):
    _AS_F16 = {name: _table(f) for name, f in FLOAT8.items()}
