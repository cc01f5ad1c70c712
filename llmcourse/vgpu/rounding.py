"""Rounding once: results of narrow types from arithmetic in float64, in any rounding mode.

Rounding twice is not rounding once. Half way between two float32 numbers lies a float64 number; a result a
hair above it may first be rounded down onto it, and then from there to the even neighbour, the wrong one.
Two ways around it are used here.

*Round to odd.* A float64 result that is not exact is given an odd last bit, whichever neighbour that is. It
then is never half way between two narrower numbers, and lies on the same side of each as the exact result:
rounding it again, in whatever mode, gives what rounding the exact result gives (Boldo and Melquiond 2008,
*Emulation of FMA and correctly rounded sums*). It takes the rounding error of the sum, which `two_sum` finds.

*Step.* A result that was rounded to nearest is compared with the exact one, and moved to its neighbour
where the mode wants the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from llmcourse.vgpu.vector import Value

MODES = ("rn", "rz", "rm", "rp")
"""To nearest (ties to even), toward zero, down (minus infinity), up."""


def _bits(value: Value) -> np.dtype:
    return np.dtype(f"u{value.dtype.itemsize}")


def two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """a + b rounded to nearest, and the error of that: they add up to a + b exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def odd_sum(a: Value, b: Value) -> Value:
    """a + b in float64, rounded to odd."""
    total, error = two_sum(a, b)
    bits = total.view(np.uint64)
    inexact = (error != 0) & np.isfinite(error)
    even = (bits & np.uint64(1)) == 0
    outward = (error < 0) == (total < 0)
    move = (inexact & even).astype(np.uint64)
    return np.where(outward, bits + move, bits - move).view(np.float64)[()]


def stepped(rounded: Value, excess: Value, negative: Value, mode: str) -> Value:
    """Move results that were rounded to nearest to where the mode wants them.

    excess     > 0 where |rounded| > |exact|, < 0 where it is less, 0 where equal
    negative   where the exact result is below zero
    """
    bits = rounded.view(_bits(rounded))
    shrink, grow = excess > 0, excess < 0
    if mode == "rz":
        grow = grow & False
    elif mode == "rm":
        shrink, grow = shrink & ~negative, grow & negative
    elif mode == "rp":
        shrink, grow = shrink & negative, grow & ~negative
    one = bits.dtype.type(1)
    return (bits - shrink * one + grow * one).view(rounded.dtype)


def narrowed(value: Value, type_: str, mode: str = "rn") -> Value:
    """float64 to f32 (as float32), f16 or bf16 (as their bits), rounded once.

    The value is exact, or was rounded to odd.
    """
    if type_ == "bf16":
        return bf16_from_odd(_float32_odd(value), mode)
    dtype = np.dtype(np.float32 if type_ == "f32" else np.float16)
    result = np.asarray(value).astype(dtype)[()]
    if mode != "rn":
        back = result.astype(np.float64)
        excess = np.abs(back) - np.abs(value)
        excess = np.where(np.isinf(back) & np.isfinite(value), np.float64(1), excess)[()]
        result = stepped(result, excess, np.signbit(value), mode)
    return result if type_ == "f32" else quiet_bits(result.view(np.uint16), "f16")


def _float32_odd(value: Value) -> Value:
    """float64 → float32, rounded to odd."""
    result = np.asarray(value).astype(np.float32)[()]
    back = result.astype(np.float64)
    inexact = (back != value) & ~np.isnan(value)
    toward_zero = result.view(np.uint32) - (np.abs(back) > np.abs(value)).astype(np.uint32)
    return (toward_zero | inexact.astype(np.uint32)).view(np.float32)


def bf16_from_odd(value: Value, mode: str = "rn") -> Value:
    """float32, exact or rounded to odd, to the bits of bf16: the upper half, rounded."""
    bits = value.view(np.uint32)
    sixteen, one = np.uint32(16), np.uint32(1)
    if mode == "rz":
        out = bits >> sixteen
    elif mode == "rn":
        out = (bits + np.uint32(0x7FFF) + ((bits >> sixteen) & one)) >> sixteen
    else:
        away = (value < 0) if mode == "rm" else (value > 0)
        out = (bits + away * np.uint32(0xFFFF)) >> sixteen
        out = np.where(np.isinf(value), bits >> sixteen, out)[()]
    nan = value != value
    return _with_nan(out.astype(np.uint16), nan)


def quiet_bits(bits: Value, type_: str) -> Value:
    """NaNs of f16 or bf16 as the one that the hardware makes, 0x7FFF."""
    infinity = np.uint16(0x7C00 if type_ == "f16" else 0x7F80)
    return _with_nan(bits, (bits & np.uint16(0x7FFF)) > infinity)


def _with_nan(bits: Value, nan: Value) -> Value:
    if not nan.any():
        return bits
    if not isinstance(bits, np.ndarray):
        return np.uint16(0x7FFF)
    bits = bits.copy()
    bits[nan] = 0x7FFF
    return bits


def sum_excess(total: Value, error: Value) -> Value:
    """`excess` for `stepped` of a sum and its error, both from `two_sum` on finite numbers."""
    return np.where(np.isinf(total), np.float64(1), np.where(total < 0, error, -error))[()]


_INFINITY = Fraction(2) ** 5000
"""Larger than any result of one operation on finite float64 numbers."""


def rational_excess(rounded: Value, difference: Callable[..., Fraction], *operands: Value) -> Value:
    """`excess` for `stepped`, lane by lane in rational arithmetic: exact, and slow (10 µs a lane).

    difference   (|rounded|, operands) → any number with the sign of |rounded| − |exact|, on Fractions
    """
    lanes = np.broadcast_arrays(rounded, *operands)
    excess = np.zeros(lanes[0].shape)
    for at in np.ndindex(excess.shape):
        result, *numbers = (float(lane[at]) for lane in lanes)
        if np.isnan(result) or not all(map(np.isfinite, numbers)):
            continue
        size = _INFINITY if np.isinf(result) else abs(Fraction(result))
        sign = difference(size, *map(Fraction, numbers))
        excess[at] = (sign > 0) - (sign < 0)
    return excess[()]
