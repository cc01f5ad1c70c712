"""cvt: from any number type to any other.

    cvt.rzi.s32.f32   round to an integer (i), toward zero; out of range it sticks at the end of the range
    cvt.rn.f16.f32    round to a narrower float, to nearest
    cvt.rn.bf16x2.f32 %r1, %f1, %f2      two at a time: the first operand goes to the upper half

NaN to an integer is 0, but 1 << (bits − 1) if either side has 64 bits (PTX ISA 9.0). A conversion from
integers to integers cuts bits off or repeats the sign; with .sat it sticks at the end of the range.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmcourse.vgpu.float8 import FLOAT8, from_float8, to_float8
from llmcourse.vgpu.floats import clamped, flushed
from llmcourse.vgpu.forms import FLOATS, HALVES, SIGNED, UNSIGNED, Form, Modifiers, form, width
from llmcourse.vgpu.half import relu, rounded, widened
from llmcourse.vgpu.isa import DTYPES
from llmcourse.vgpu.rounding import MODES, narrowed, odd_sum, stepped, sum_excess, two_sum
from llmcourse.vgpu.vector import Value, high, joined, low, packed

Function = Callable[[Value], Value]
INTEGERS = (*SIGNED, *UNSIGNED)
ANY_FLOAT = (*FLOATS, *HALVES)
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
LARGEST = {"f16": 65504.0, "bf16": (2 - 2.0**-7) * 2.0**127}


def storage(type_: str) -> str:
    """The type of the values that hold it: halves are bits."""
    return "u16" if type_ in HALVES else type_


@form("cvt")
def _cvt(m: Modifiers) -> Form | None:
    if m.flag("pack"):
        return _pack(m)
    result, operand = m.type(), m.type()
    if result.endswith("x2") or operand.endswith("x2"):
        return _two(m, result, operand)
    if result == "tf32":
        return _tf32(m) if operand == "f32" else None
    if result in INTEGERS and operand in INTEGERS:
        return Form(_integer_to_integer(result, operand, m.flag("sat")), (operand,), (result,))
    if result in INTEGERS and operand in ANY_FLOAT:
        return _float_to_integer(m, result, operand)
    if result in ANY_FLOAT and operand in INTEGERS:
        return _integer_to_float(m, result, operand)
    if result in ANY_FLOAT and operand in ANY_FLOAT:
        return _float_to_float(m, result, operand)
    return None


# ---- integers


def _integer_to_integer(result: str, operand: str, saturate: bool) -> Function:
    dtype = DTYPES[result]
    if result == operand:
        return lambda a: a
    if not saturate:
        return lambda a: a.astype(dtype)
    have, want = np.iinfo(DTYPES[operand]), np.iinfo(dtype)
    # Both ends inside both types: comparing int64 with uint64 would go through float64.
    least, most = max(have.min, want.min), min(have.max, want.max)
    return lambda a: np.clip(a, a.dtype.type(least), a.dtype.type(most)).astype(dtype)


def _pack(m: Modifiers) -> Form | None:
    """cvt.pack.sat.u8.s32.b32 d, a, b, c: two clamped integers below the low bits of c shifted up."""
    part, operand, shifted = m.take(*_PACKED), m.type(), m.take("b32")
    if not m.flag("sat") or operand != "s32" or not part:
        return None
    bits = width(part)
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if part[0] == "s" else (0, (1 << bits) - 1)
    mask, step = np.uint32((1 << bits) - 1), np.uint32(bits)

    def two(a: Value, b: Value) -> Value:
        a, b = (np.clip(v, np.int32(least), np.int32(most)).view(np.uint32) & mask for v in (a, b))
        return (a << step) | b

    if bits == 16:
        return None if shifted else Form(two, ("s32", "s32"), ("u32",))
    if not shifted:
        return None
    twice = np.uint32(2 * bits)
    return Form(lambda a, b, c: two(a, b) | (c << twice), ("s32", "s32", "u32"), ("u32",))


_PACKED = ("u2", "s2", "u4", "s4", "u8", "s8", "u16", "s16")


# ---- floats to integers


def _float_to_integer(m: Modifiers, result: str, operand: str) -> Form | None:
    how = m.take(*TO_INTEGER)
    if not how:
        return None
    m.flag("sat")  # it always does
    flush = m.flag("ftz") and operand == "f32"
    convert = to_integer(result, operand, TO_INTEGER[how])
    widen = _widener(operand)

    def function(a: Value) -> Value:
        return convert(flushed(a) if flush else widen(a))

    return Form(function, (storage(operand),), (result,))


def _widener(type_: str) -> Function:
    """Halves as float32; float32 and float64 as they are."""
    return (lambda a: widened(a, type_)) if type_ in HALVES else (lambda a: a)


def to_integer(result: str, operand: str, to_whole: Callable[[Value], Value]) -> Function:
    dtype, limits = DTYPES[result], np.iinfo(DTYPES[result])
    invalid = 0 if operand != "f64" and width(result) < 64 else 1 << (width(result) - 1)
    if dtype.kind == "i" and invalid:
        invalid = limits.min

    def function(a: Value) -> Value:
        a = to_whole(a)
        # limits.max + 1 is a power of two, so exact in every float type; limits.max need not be.
        least, beyond = a.dtype.type(limits.min), a.dtype.type(float(limits.max + 1))
        fits = (a >= least) & (a < beyond)
        if fits.all():
            return a.astype(dtype)
        low, nan = a < least, a != a
        if not isinstance(a, np.ndarray):
            return (
                a.astype(dtype) if fits else dtype.type(invalid if nan else limits.min if low else limits.max)
            )
        out = np.where(fits, a, a.dtype.type(0)).astype(dtype)
        out[low], out[a >= beyond], out[nan] = limits.min, limits.max, invalid
        return out

    return function


# ---- integers to floats


def _integer_to_float(m: Modifiers, result: str, operand: str) -> Form | None:
    mode = m.take(*MODES)
    saturate = m.flag("sat")
    if not mode:
        return None
    convert = _from_integer(result, operand, mode)
    function = convert
    if saturate:
        if result not in FLOATS:
            return None

        def function(a: Value) -> Value:
            return clamped(convert(a))

    return Form(function, (operand,), (storage(result),))


def _from_integer(result: str, operand: str, mode: str) -> Function:
    if result in FLOATS and mode == "rn":
        return lambda a: a.astype(DTYPES[result])
    if width(operand) < 64:
        if result == "f64":
            return lambda a: a.astype(np.float64)
        return lambda a: narrowed(a.astype(np.float64), result, mode)
    if result != "f64":
        return lambda a: narrowed(odd_sum(*_words(a)), result, mode)

    def function(a: Value) -> Value:
        total, error = two_sum(*_words(a))
        return stepped(total, sum_excess(total, error), total < 0, mode)

    return function


def _words(a: Value) -> tuple[Value, Value]:
    """A 64-bit integer as the sum of two float64 numbers, both exact."""
    lower = a & a.dtype.type(0xFFFFFFFF)
    return (a - lower).astype(np.float64), lower.astype(np.float64)


# ---- floats to floats


def _float_to_float(m: Modifiers, result: str, operand: str) -> Form | None:
    whole = m.take(*TO_INTEGER)
    mode = m.take(*MODES)
    flush = m.flag("ftz")
    finish = m.take("sat", "relu", "satfinite")
    further = m.take("satfinite") if finish == "relu" else ""
    if whole:
        if result != operand or mode:
            return None
        convert = _same_type(result, TO_INTEGER[whole])
    elif result == operand:
        convert = _same_type(result, lambda a: a)
    else:
        narrowing = FLOAT_BITS[result] < FLOAT_BITS[operand] or result == "bf16"
        if not mode and narrowing:
            return None
        convert = _to_float(result, operand, mode or "rn")
    if "relu" in (finish, further):
        if result not in HALVES:
            return None
        convert = _after(convert, result, relu)
    if "satfinite" in (finish, further):
        if result not in HALVES:
            return None
        most = np.float32(LARGEST[result])
        convert = _after(convert, result, lambda a: np.clip(a, -most, most))
    if finish == "sat":
        convert = _after(convert, result, clamped)
    if flush:
        convert = _flushing(convert, result, operand)
    return Form(convert, (storage(operand),), (storage(result),))


FLOAT_BITS = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}


def _same_type(type_: str, function: Function) -> Function:
    if type_ not in HALVES:
        return function
    return lambda a: rounded(function(widened(a, type_)), type_)


def _to_float(result: str, operand: str, mode: str) -> Function:
    if operand == "f32" and result in HALVES and mode == "rn":
        return lambda a: rounded(a, result)
    if result in HALVES or (result, operand) == ("f32", "f64"):
        if operand in HALVES:
            return lambda a: narrowed(widened(a, operand).astype(np.float64), result, mode)
        if result == "f32" and mode == "rn":
            return lambda a: a.astype(np.float32)
        return lambda a: narrowed(a.astype(np.float64), result, mode)
    dtype = DTYPES[result]
    if operand in HALVES:
        return (
            (lambda a: widened(a, operand))
            if result == "f32"
            else lambda a: widened(a, operand).astype(dtype)
        )
    return lambda a: a.astype(dtype)


def _after(convert: Function, type_: str, finish: Function) -> Function:
    """A clamp after the rounding: no clamp's end needs rounding, so the order does not matter."""
    if type_ not in HALVES:
        return lambda a: finish(convert(a))
    return lambda a: rounded(finish(widened(convert(a), type_)), type_)


def _flushing(convert: Function, result: str, operand: str) -> Function:
    def function(a: Value) -> Value:
        out = convert(flushed(a) if operand == "f32" else a)
        return flushed(out) if result == "f32" else out

    return function


def _tf32(m: Modifiers) -> Form | None:
    """float32 with the 10 explicit bits that a tensor core multiplies: rna is to nearest, ties away."""
    mode, fold, finite = m.take("rna", "rn", "rz"), m.flag("relu"), m.flag("satfinite")
    if not mode:
        return None
    keep = np.uint32(0xFFFFE000)

    def function(a: Value) -> Value:
        if fold:
            a = relu(a)
        bits = a.view(np.uint32)
        if mode == "rna":
            bits = bits + np.uint32(0x1000)
        elif mode == "rn":
            bits = bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        bits = bits & keep
        special = ~np.isfinite(a)
        if special.any():
            bits = np.where(special, np.where(np.isnan(a), np.uint32(0x7FFFFFFF), a.view(np.uint32)), bits)[
                ()
            ]
        if finite:
            most = np.float32(np.uint32(0x7F7FE000).view(np.float32))
            bits = np.clip(bits.view(np.float32), -most, most).view(np.uint32)
        return bits

    return Form(function, ("f32",), ("u32",))


# ---- two at a time


def _two(m: Modifiers, result: str, operand: str) -> Form | None:
    if result in ("f16x2", "bf16x2") and operand == "f32":
        single = _float_to_float(m, result.removesuffix("x2"), "f32")
        if single is None:
            return None
        one = single.function
        return Form(lambda a, b: joined(one(b), one(a)), ("f32", "f32"), ("u32",))
    if not m.flag("rn"):
        return None
    fold = m.flag("relu")
    if result == "f16x2" and operand in FLOAT8:
        return Form(lambda a: _from_float8(a, operand, fold), ("u16",), ("u32",))
    if result not in FLOAT8 or not m.flag("satfinite"):
        return None
    if operand == "f32":
        return Form(lambda a, b: _to_float8(b, a, result, fold), ("f32", "f32"), ("u16",))
    if operand == "f16x2":

        def function(a: Value) -> Value:
            return _to_float8(
                widened(low(a, np.uint16), "f16"), widened(high(a, np.uint16), "f16"), result, fold
            )

        return Form(function, ("u32",), ("u16",))
    return None


def _to_float8(lower: Value, upper: Value, type_: str, fold: bool) -> Value:
    if fold:
        lower, upper = relu(lower), relu(upper)
    return joined(to_float8(lower, type_), to_float8(upper, type_))


def _from_float8(a: Value, type_: str, fold: bool) -> Value:
    both = joined(from_float8(low(a, np.uint8), type_), from_float8(high(a, np.uint8), type_))
    if not fold:
        return both
    return packed(lambda bits: rounded(relu(widened(bits, "f16")), "f16"), np.uint16)(both)
