"""Fused multiply-add: a·b + c rounded once.

`fma.rn.f32` is what most kernels spend their time on. NumPy has no fused multiply-add, and multiplying then
adding rounds twice: a quarter of random results differ in the last bit. Three ways here, each exact:

- PyTorch's `addcmul`. Its x86 builds compile to the processor's own instruction: 23 µs for 65,536 lanes,
  where multiply and add take 16. Nothing promises that, so it is used only if it passes `_is_fused` here; and
  only where somebody has imported torch: that takes longer than most kernels.
- float64 for float32: the product is exact, the sum's one rounding is harmless unless it lands half way
  between two float32 numbers; those lanes are found and rounded to odd (130 µs).
- error-free transformations for float64 (Boldo and Melquiond 2008), 1 ms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from llmcourse.vgpu.rounding import narrowed, odd_sum, two_sum
from llmcourse.vgpu.vector import PIECE, Value, is_scalar, spread


def fma_f32(a: Value, b: Value, c: Value) -> Value:
    """a·b + c in float32, rounded once."""
    if is_scalar(a) and is_scalar(b) and is_scalar(c):
        return narrowed(odd_sum(np.float64(a) * np.float64(b), np.float64(c)), "f32")
    addcmul = _addcmul("float32") if _worth_it(a, b, c) else None
    return fma_f32_by_float64(a, b, c) if addcmul is None else addcmul(a, b, c)


def fma_f64(a: Value, b: Value, c: Value) -> Value:
    """a·b + c in float64, rounded once."""
    addcmul = _addcmul("float64") if _worth_it(a, b, c) else None
    return fma_f64_by_parts(a, b, c) if addcmul is None else addcmul(a, b, c)


def fma_f32_by_float64(a: Value, b: Value, c: Value) -> Value:
    a, b, c = spread((a, b, c))
    total = np.multiply(a, b, dtype=np.float64)
    total += c
    result = total.astype(np.float32)
    doubtful = total.view(np.uint64) & np.uint64(0x1FFFFFFF) == np.uint64(0x10000000)
    small = np.abs(total) < np.finfo(np.float32).smallest_normal
    small &= total != 0
    doubtful |= small
    if doubtful.any():
        at = np.flatnonzero(doubtful)
        product = np.multiply(a[at], b[at], dtype=np.float64)
        result[at] = narrowed(odd_sum(product, c[at].astype(np.float64)), "f32")
    return result


def fma_f64_by_parts(a: Value, b: Value, c: Value) -> Value:
    """The product and its error as two numbers, then the sum of three with one rounding.

    Exact where nothing on the way over- or underflows; lanes where it could are done in rational arithmetic.
    """
    naive = a * b + c
    if is_scalar(naive):
        return _rational_fma(a, b, c, naive)
    a, b, c = spread((a, b, c))
    high, low = two_product(a, b)
    inner, inner_low = two_sum(c, low)
    outer, outer_low = two_sum(high, inner)
    result = outer + odd_sum(inner_low, outer_low)
    nothing = (a == 0) | (b == 0)
    result[nothing] = naive[nothing]
    size = np.abs(high)
    safe = (size > 1e-250) & (size < 1e250)
    for x in (a, b, c):
        safe &= np.abs(x) < 1e250
    for at in np.flatnonzero(~safe & ~nothing):
        result[at] = _rational_fma(a[at], b[at], c[at], naive[at])
    return result


def two_product(a: Value, b: Value) -> tuple[Value, Value]:
    """a·b rounded, and the error of that (Dekker, with Veltkamp's splitting)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: Value) -> tuple[Value, Value]:
    shifted = a * np.float64((1 << 27) + 1)
    high = shifted - (shifted - a)
    return high, a - high


def _rational_fma(a: Value, b: Value, c: Value, naive: Value) -> np.float64:
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)):
        # An overflow of a·b alone must not make inf − inf; with an infinite c the result is c.
        return np.float64(c) if np.isfinite(a) and np.isfinite(b) else np.float64(naive)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return np.float64(a * b + c) if a == 0 or b == 0 else np.float64(0)
    try:
        nearest = exact.numerator / exact.denominator  # Python rounds the quotient of two integers once
    except OverflowError:
        nearest = float("inf")
    return np.copysign(np.float64(nearest), np.float64(1 if exact > 0 else -1))


# ---- PyTorch's addcmul, where it is fused


def _worth_it(*values: Value) -> bool:
    return "torch" in sys.modules and any(isinstance(v, np.ndarray) for v in values)


@cache
def _addcmul(dtype: str) -> Callable[[Value, Value, Value], np.ndarray] | None:
    run = _addcmul_of(sys.modules["torch"])
    return run if _is_fused(run, np.dtype(dtype)) else None


def _addcmul_of(torch: Any) -> Callable[[Value, Value, Value], np.ndarray]:
    tensor = torch.from_numpy

    def run(a: Value, b: Value, c: Value) -> np.ndarray:
        a, b, c = (x if x.flags.writeable else x.copy() for x in spread((a, b, c)))
        if len(a) <= PIECE:
            return torch.addcmul(tensor(c), tensor(a), tensor(b)).numpy()
        out = np.empty(len(a), a.dtype)
        for start in range(0, len(a), PIECE):
            piece = slice(start, start + PIECE)
            torch.addcmul(tensor(c[piece]), tensor(a[piece]), tensor(b[piece]), out=tensor(out[piece]))
        return out

    return run


def _is_fused(run: Callable[[Value, Value, Value], np.ndarray], dtype: np.dtype) -> bool:
    """Whether it agrees with the exact ways here on random and hard cases, whole vectors and remainders."""
    random = np.random.default_rng(0)
    reference = fma_f32_by_float64 if dtype == np.float32 else fma_f64_by_parts
    with np.errstate(all="ignore"):
        for count in (1, 3, 7, 16, 31, 257, 1024):
            a, b = (random.standard_normal(count).astype(dtype) for _ in range(2))
            c = -(a * b) * (1 + random.integers(0, 3, count) * np.finfo(dtype).eps)
            c = c.astype(dtype)  # cancels all but the product's rounding error
            tiny = np.finfo(dtype).smallest_normal
            for x, y, z in ((a, b, c), (a * tiny, b, c * tiny), (a, b, b)):
                if not np.array_equal(run(x, y, z), reference(x, y, z)):
                    return False
    return True
