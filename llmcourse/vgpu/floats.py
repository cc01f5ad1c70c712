"""float32 and float64 arithmetic: the operations that IEEE 754 defines, in its four rounding modes.

NumPy rounds to nearest, so the common forms are its own operations. Directed modes go through `rounding`.
`.ftz` flushes subnormal numbers (below 1.2·10⁻³⁸) to zero, on the way in and on the way out; `.sat` clamps
to [0, 1]. The payload of a NaN is not modelled.

ptxas may still contract a `mul.f32` and an `add.f32` without a rounding mode into one fused multiply-add;
NVRTC has mostly done so before, and the machine does as PTX says.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from llmcourse.vgpu import rounding
from llmcourse.vgpu.forms import FLOATS, Form, Modifiers, form
from llmcourse.vgpu.fused import fma_f32, fma_f64
from llmcourse.vgpu.rounding import narrowed, odd_sum, rational_excess, stepped, sum_excess, two_sum
from llmcourse.vgpu.vector import Value, is_scalar, packed, select

Function = Callable[..., Value]
ZERO, ONE = np.float32(0), np.float32(1)
_SIGN = np.uint32(0x80000000)
_TWICE_NORMAL = np.uint32(0x00FFFFFF)


def flushed(value: Value) -> Value:
    """float32 with subnormal numbers replaced by zeros of their sign; `value` itself if it has none."""
    twice = value.view(np.uint32) << np.uint32(1)
    twice -= np.uint32(1)  # zeros wrap around to the largest number
    if twice.min(initial=_TWICE_NORMAL) == _TWICE_NORMAL:
        return value
    bits = value.view(np.uint32)
    if is_scalar(bits):
        return (bits & _SIGN).view(np.float32)
    return select(twice < _TWICE_NORMAL, bits & _SIGN, bits).view(np.float32)


def clamped(value: Value) -> Value:
    """To [0, 1]; NaN becomes 0."""
    zero, one = value.dtype.type(0), value.dtype.type(1)
    return np.fmin(np.fmax(value, zero) + zero, one)


def finished(m: Modifiers, type_: str, function: Function) -> Function:
    """`function` with the .ftz and .sat that the instruction asks for."""
    if type_ == "f32" and m.flag("ftz"):
        plain = function

        def function(*values: Value) -> Value:
            return flushed(plain(*map(flushed, values)))

    if type_ == "f32" and m.flag("sat"):
        wide = function

        def function(*values: Value) -> Value:
            return clamped(wide(*values))

    return function


def operations(type_: str, count: int) -> tuple[str, int]:
    return {"f32": "flops_fp32", "f64": "flops_fp64", "f32x2": "flops_fp32"}[type_], count


# ---- sums, products, fused


def _sum(type_: str, mode: str) -> Function:
    if mode == "rn":
        return np.add
    if type_ == "f32":
        return lambda a, b: narrowed(odd_sum(a.astype(np.float64), b.astype(np.float64)), "f32", mode)

    def add(a: Value, b: Value) -> Value:
        total, error = two_sum(a, b)
        error = np.where(np.isfinite(a) & np.isfinite(b), error, 0)[()]
        excess = np.where(np.isfinite(a) & np.isfinite(b), sum_excess(total, error), 0)[()]
        return stepped(total, excess, np.signbit(total), mode)

    return add


def _down_as_up(function: Callable[[str], Function], mode: str, negate: tuple[int, ...]) -> Function:
    """Rounding down is rounding up of the negative: that also gives x − x its sign then, minus zero."""
    if mode != "rm":
        return function(mode)
    up = function("rp")

    def down(*values: Value) -> Value:
        return -up(*(-v if i in negate else v for i, v in enumerate(values)))

    return down


@form("add", "sub", types=FLOATS)
def _add(m: Modifiers) -> Form:
    type_, mode = m.type(), m.take(*rounding.MODES) or "rn"
    if m.instruction.opcode == "sub" and mode == "rn":
        function: Function = np.subtract
    else:
        function = _down_as_up(lambda mode: _sum(type_, mode), mode, (0, 1))
        if m.instruction.opcode == "sub":
            add = function

            def function(a: Value, b: Value) -> Value:
                return add(a, -b)

    return Form(finished(m, type_, function), (type_, type_), (type_,), operations(type_, 1))


@form("mul", types=FLOATS)
def _mul(m: Modifiers) -> Form:
    type_, mode = m.type(), m.take(*rounding.MODES) or "rn"
    function: Function
    if mode == "rn":
        function = np.multiply
    elif type_ == "f32":

        def function(a: Value, b: Value) -> Value:
            return narrowed(np.multiply(a, b, dtype=np.float64), "f32", mode)  # 48 bits: exact
    else:
        function = _by_rationals(np.multiply, lambda r, a, b: r - abs(a * b), mode)
    return Form(finished(m, type_, function), (type_, type_), (type_,), operations(type_, 1))


def _by_rationals(nearest: Function, difference: Callable, mode: str) -> Function:
    def apply(*values: Value) -> Value:
        result = nearest(*values)
        return stepped(result, rational_excess(result, difference, *values), np.signbit(result), mode)

    return apply


def fused(type_: str, mode: str) -> Function:
    if mode == "rn":
        return fma_f32 if type_ == "f32" else fma_f64
    if type_ == "f32":

        def exact(a: Value, b: Value, c: Value) -> Value:
            return odd_sum(np.multiply(a, b, dtype=np.float64), c.astype(np.float64))

        return lambda a, b, c: narrowed(exact(a, b, c), "f32", mode)
    return _by_rationals(fma_f64, lambda r, a, b, c: r - abs(a * b + c), mode)


@form("fma", "mad", types=FLOATS)
def _fma(m: Modifiers) -> Form:
    """mad of floats is fused too, on everything since sm_20."""
    type_, mode = m.type(), m.take(*rounding.MODES) or "rn"
    function = _down_as_up(lambda mode: fused(type_, mode), mode, (0, 2))
    return Form(finished(m, type_, function), (type_,) * 3, (type_,), operations(type_, 2))


@form("add", "sub", "mul", "fma", types=("f32x2",))
def _pairs(m: Modifiers) -> Form | None:
    """Two float32 operations on the words of 64-bit registers (sm_100)."""
    opcode = m.instruction.opcode
    m.type()
    mode = m.take(*rounding.MODES) or "rn"
    if mode != "rn":
        return None
    table: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma_f32}
    function = table[opcode]
    function = packed(finished(m, "f32", function), np.float32, np.uint64)
    count = 3 if opcode == "fma" else 2
    return Form(function, ("u64",) * count, ("u64",), operations("f32", 4 if opcode == "fma" else 2))


# ---- quotients and roots


@form("div", types=FLOATS)
def _div(m: Modifiers) -> Form | None:
    """div.full and div.approx may be 2 units off on hardware; here they are rounded to nearest.

    div.approx gives 0 for a divisor beyond 2¹²⁶, where hardware's reciprocal underflows (PTX says so).
    """
    type_, how = m.type(), m.take("approx", "full", *rounding.MODES) or "rn"
    function: Function
    if how == "approx":
        function = _div_approx
    elif how in ("rn", "full"):
        function = np.divide
    elif type_ == "f32":

        def function(a: Value, b: Value) -> Value:
            # A quotient of float32 numbers is a float32 number or at least 2⁻⁴⁹ away from any, relatively.
            return narrowed(np.true_divide(a, b, dtype=np.float64), "f32", how)
    else:
        function = _by_rationals(np.divide, _quotient_difference, how)
    return Form(finished(m, type_, function), (type_, type_), (type_,))


def _quotient_difference(rounded: Fraction, a: Fraction, b: Fraction) -> Fraction:
    return rounded * abs(b) - abs(a) if b else b  # infinity is exact then


def _div_approx(a: Value, b: Value) -> Value:
    quotient = a / b
    size = np.abs(b)
    huge = (size > np.float32(2.0**126)) & np.isfinite(b)
    if not huge.any():
        return quotient
    return np.where(
        huge, np.where(np.isfinite(a), np.copysign(ZERO, quotient), np.float32(np.nan)), quotient
    )[()]


@form("rcp", types=FLOATS)
def _rcp(m: Modifiers) -> Form | None:
    """1/x. rcp.approx.f32 may be 1 unit off on hardware; here it is rounded to nearest."""
    type_, how = m.type(), m.take("approx", *rounding.MODES)
    function: Function
    if type_ == "f64" and how == "approx":
        return _coarse(m, lambda a: np.float64(1) / a)
    if how in ("approx", "rn"):
        one = np.float32(1) if type_ == "f32" else np.float64(1)

        def function(a: Value) -> Value:
            return one / a
    elif not how:
        return None
    elif type_ == "f32":

        def function(a: Value) -> Value:
            return narrowed(np.true_divide(ONE, a, dtype=np.float64), "f32", how)
    else:
        function = _by_rationals(lambda a: 1 / a, lambda r, a: r * abs(a) - 1 if a else 0, how)
    return Form(finished(m, type_, function), (type_,), (type_,))


@form("sqrt", types=FLOATS)
def _sqrt(m: Modifiers) -> Form | None:
    """sqrt.approx.f32 may be 1 unit off on hardware; here it is rounded to nearest."""
    type_, how = m.type(), m.take("approx", *rounding.MODES)
    function: Function
    if not how:
        return None
    if how in ("approx", "rn"):
        function = np.sqrt
    elif type_ == "f32":

        def function(a: Value) -> Value:
            return narrowed(np.sqrt(a, dtype=np.float64), "f32", how)
    else:
        function = _by_rationals(np.sqrt, lambda r, a: r * r - a, how)
    return Form(finished(m, type_, function), (type_,), (type_,))


@form("rsqrt", types=FLOATS)
def _rsqrt(m: Modifiers) -> Form | None:
    """1/√x. rsqrt.approx.f32 may be 2 units off on hardware; here √x and its reciprocal are each rounded."""
    type_ = m.type()
    if not m.flag("approx"):
        return None
    if type_ == "f64":
        return _coarse(m, lambda a: np.float64(1) / np.sqrt(a))
    return Form(finished(m, type_, lambda a: ONE / np.sqrt(a)), (type_,), (type_,))


def _coarse(m: Modifiers, function: Function) -> Form:
    """The first guess of float64 division and roots: the upper word of the argument in, of the result out.

    With .ftz subnormal numbers count as zeros. Without it (rsqrt.approx.f64) all 64 bits are used.
    """
    if not m.flag("ftz"):
        return Form(function, ("f64",), ("f64",))
    upper = np.uint64(0xFFFFFFFF00000000)
    exponent, sign = np.uint64(0x7FF0000000000000), np.uint64(0x8000000000000000)

    def normal(bits: Value) -> Value:
        return np.where(bits & exponent == 0, bits & sign, bits & upper)[()].view(np.float64)

    return Form(lambda a: normal(function(normal(a.view(np.uint64))).view(np.uint64)), ("f64",), ("f64",))


# ---- sign and order


@form("abs", "neg", types=FLOATS)
def _abs(m: Modifiers) -> Form:
    type_ = m.type()
    function = np.abs if m.instruction.opcode == "abs" else np.negative
    if type_ == "f32" and m.flag("ftz"):
        plain = function
        return Form(lambda a: plain(flushed(a)), (type_,), (type_,))
    return Form(function, (type_,), (type_,))


@form("copysign", types=FLOATS)
def _copysign(m: Modifiers) -> Form:
    """The size of the second operand with the sign of the first."""
    type_ = m.type()
    bits = np.dtype(f"u{4 if type_ == 'f32' else 8}")
    sign = bits.type(1 << (8 * bits.itemsize - 1))

    def function(a: Value, b: Value) -> Value:
        return ((a.view(bits) & sign) | (b.view(bits) & ~sign)).view(a.dtype)

    return Form(function, (type_, type_), (type_,))


@form("min", "max", types=FLOATS)
def _min(m: Modifiers) -> Form | None:
    """Of a number and a NaN the number, or with .NaN the NaN; −0 counts as less than +0."""
    type_, opcode = m.type(), m.instruction.opcode
    function = extremum(opcode, nan=m.flag("NaN"))
    if m.flag("xorsign"):
        if not m.flag("abs"):
            return None
        function = _xor_signed(function)
    count = len(m.instruction.operands) - 1
    if count == 3:
        two = function

        def function(a: Value, b: Value, c: Value) -> Value:
            return two(two(a, b), c)

    return Form(finished(m, type_, function), (type_,) * count, (type_,))


def extremum(opcode: str, nan: bool) -> Function:
    choose = {
        ("max", True): np.maximum,
        ("max", False): np.fmax,
        ("min", True): np.minimum,
        ("min", False): np.fmin,
    }[opcode, nan]

    def apply(a: Value, b: Value) -> Value:
        result = choose(a, b)
        if not (result == 0).any():
            return result
        zeros = (a == 0).view(np.uint8) & (b == 0).view(np.uint8)  # as bytes: see bits.BOOLEAN
        if not zeros.any():
            return result
        # Of two zeros NumPy returns either. −0 + +0 = +0 is their maximum; the minimum mirrors it.
        return select(zeros.view(np.bool_), (a + b) if opcode == "max" else -((-a) + (-b)), result)

    return apply


def _xor_signed(function: Function) -> Function:
    """.xorsign.abs: of the absolute values, with the product's sign."""

    def apply(a: Value, b: Value) -> Value:
        sign = np.where(np.signbit(a) ^ np.signbit(b), a.dtype.type(-1), a.dtype.type(1))
        return np.copysign(function(np.abs(a), np.abs(b)), sign)[()]

    return apply
