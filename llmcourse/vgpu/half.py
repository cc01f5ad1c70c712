"""f16 and bf16, one to a 16-bit register or two to a 32-bit one (f16x2, bf16x2).

Registers hold bits. An operation widens them to float32, computes, and rounds back. For +, −, × that second
rounding is harmless: float32's 24 bits are at least twice f16's 11 (bf16's 8) plus two, and then rounding
twice equals rounding once (Figueroa 1995). For a fused multiply-add it is not; there the lanes where the
float32 result lies half way between two halves are computed again, rounded to odd.

NumPy converts between float16 and float32 one number at a time (160 µs for 65,536); PyTorch's conversions
use the processor's instruction (6 µs), and are used where somebody has imported PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from llmcourse.vgpu.compare import FLOAT, predicates, truth
from llmcourse.vgpu.floats import clamped, extremum
from llmcourse.vgpu.forms import HALVES, PACKED_HALVES, Form, Modifiers, form
from llmcourse.vgpu.fused import fma_f32
from llmcourse.vgpu.isa import Pair
from llmcourse.vgpu.rounding import narrowed, odd_sum
from llmcourse.vgpu.special import FUNCTIONS
from llmcourse.vgpu.vector import Value, in_pieces, is_scalar, packed, select, spread

Function = Callable[..., Value]
NAN = np.uint16(0x7FFF)
"""The NaN that the hardware makes, in both formats."""

_TWICE_NORMAL = np.uint32(2 * 0x38800000 - 1)
"""2⁻¹⁴, the least normal f16, as the bits of a float32, twice, minus one: see `_fma`."""

# ---- to float32 and back


def widened(bits: Value, type_: str) -> Value:
    """The bits of f16 or bf16 (uint16) as float32: exact."""
    if type_ == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    halves = bits.view(np.float16)
    if is_scalar(bits) or (torch := _torch()) is None:
        return halves.astype(np.float32)
    return _on_tensors(lambda t: t.float(), torch)(halves)


def rounded(value: Value, type_: str) -> Value:
    """float32 to the bits of f16 or bf16, to nearest, ties to even."""
    if is_scalar(value) or (torch := _torch()) is None:
        return narrowed(value.astype(np.float64), type_)
    if type_ == "f16":
        bits = _on_tensors(lambda t: t.half(), torch)(value).view(np.uint16)
    else:
        bits = _on_tensors(lambda t: t.bfloat16().view(torch.int16), torch)(value).view(np.uint16)
    nan = value != value
    if nan.any():
        bits[nan] = NAN
    return bits


def _on_tensors(convert: Callable[[Any], Any], torch: Any) -> Function:
    def apply(values: np.ndarray) -> np.ndarray:
        return convert(torch.from_numpy(values if values.flags.writeable else values.copy())).numpy()

    return in_pieces(apply)


def _torch() -> ModuleType | None:
    return sys.modules.get("torch")


# ---- arithmetic


def _halves(m: Modifiers) -> tuple[str, bool]:
    """The type of one half, and whether two are packed."""
    type_ = m.type()
    return type_.removesuffix("x2"), type_ in PACKED_HALVES


def _form(m: Modifiers, function: Function, count: int, pair: bool, flops: int = 0) -> Form:
    register = "u32" if pair else "u16"
    function = in_pieces(function)
    if pair:
        function = packed(function, np.uint16)
    counted = ("flops_fp16", 2 * flops if pair else flops) if flops else None
    return Form(function, (register,) * count, (register,), counted)


def _through_float32(m: Modifiers, type_: str, operation: Function) -> Function:
    """Widen, compute, apply .sat or .relu, round; with .ftz subnormal halves are zeros."""
    flush = m.flag("ftz") and type_ == "f16"
    finish = {"sat": clamped, "relu": relu, "": None}[m.take("sat", "relu")]

    def function(*values: Value) -> Value:
        wide = [widened(v, type_) for v in values]
        if flush:
            wide = [flushed_half(w) for w in wide]
        result = operation(*wide)
        if finish is not None:
            result = finish(result)
        return rounded(flushed_half(result) if flush else result, type_)

    return function


def relu(value: Value) -> Value:
    """Negative numbers become +0, NaN stays."""
    return np.maximum(value, value.dtype.type(0)) + value.dtype.type(0)


def flushed_half(value: Value) -> Value:
    """float32 with what would be a subnormal f16 replaced by zero."""
    return select(np.abs(value) < np.float32(2.0**-14), np.copysign(np.float32(0), value), value)


@form("add", "sub", "mul", types=(*HALVES, *PACKED_HALVES))
def _add(m: Modifiers) -> Form:
    type_, pair = _halves(m)
    m.take("rn")
    operation: Function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[m.instruction.opcode]
    return _form(m, _through_float32(m, type_, operation), 2, pair, flops=1)


@form("fma", types=(*HALVES, *PACKED_HALVES))
def _fma(m: Modifiers) -> Form | None:
    type_, pair = _halves(m)
    m.take("rn")
    finish = {"sat": clamped, "relu": relu, "": None}[m.take("sat", "relu")]
    if m.take("ftz", "oob"):
        return None

    def function(a: Value, b: Value, c: Value) -> Value:
        a, b, c = (widened(v, type_) for v in (a, b, c))
        result = fma_f32(a, b, c)
        bits = result.view(np.uint32)
        if type_ == "bf16":
            doubtful = (bits & np.uint32(0xFFFF)) == np.uint32(0x8000)
        else:
            doubtful = (bits & np.uint32(0x1FFF)) == np.uint32(0x1000)
            # Subnormal halves have fewer bits: −1 turns zero, which is exact, into the largest number.
            twice = (bits << np.uint32(1)) - np.uint32(1)
            if twice.min(initial=_TWICE_NORMAL) < _TWICE_NORMAL:
                doubtful |= twice < _TWICE_NORMAL
        out = rounded(result if finish is None else finish(result), type_)
        if not doubtful.any():
            return out
        if is_scalar(out):
            return _exact_fma(a, b, c, type_, finish)
        at = np.flatnonzero(doubtful)
        a, b, c = spread((a, b, c))
        out[at] = _exact_fma(a[at], b[at], c[at], type_, finish)
        return out

    return _form(m, function, 3, pair, flops=2)


def _exact_fma(a: Value, b: Value, c: Value, type_: str, finish: Function | None) -> Value:
    exact = odd_sum(np.multiply(a, b, dtype=np.float64), c.astype(np.float64))
    return narrowed(exact if finish is None else finish(exact), type_)


@form("abs", "neg", types=(*HALVES, *PACKED_HALVES))
def _abs(m: Modifiers) -> Form | None:
    """The sign bit alone: no rounding, and no difference between the formats."""
    _, pair = _halves(m)
    if m.flag("ftz"):
        return None
    register, dtype = ("u32", np.uint32) if pair else ("u16", np.uint16)
    sign = dtype(0x80008000 if pair else 0x8000)
    if m.instruction.opcode == "abs":
        return Form(lambda a: a & ~sign, (register,), (register,))
    return Form(lambda a: a ^ sign, (register,), (register,))


@form("min", "max", types=(*HALVES, *PACKED_HALVES))
def _min(m: Modifiers) -> Form | None:
    type_, pair = _halves(m)
    if m.take("ftz", "xorsign"):
        return None
    operation = extremum(m.instruction.opcode, nan=m.flag("NaN"))
    return _form(m, _through_float32(m, type_, operation), 2, pair)


@form("ex2", "tanh", types=(*HALVES, *PACKED_HALVES))
def _special(m: Modifiers) -> Form | None:
    """Through float64, rounded to the half: hardware may be off by a unit or so."""
    type_, pair = _halves(m)
    flush = m.flag("ftz")
    if not m.flag("approx"):
        return None
    exact = FUNCTIONS[m.instruction.opcode]
    least = 2.0**-14 if type_ == "f16" else 2.0**-126

    def function(a: Value) -> Value:
        result = exact(widened(a, type_))
        if flush:
            result = select(np.abs(result) < least, np.copysign(np.float64(0), result), result)
        return narrowed(result, type_)

    return _form(m, function, 1, pair)


# ---- comparisons


@form("setp", types=(*HALVES, *PACKED_HALVES))
def _setp(m: Modifiers) -> Form | None:
    """Of packed halves p|q holds the low and the high result."""
    type_, pair = _halves(m)
    compare = _comparison(m, type_)
    if compare is None:
        return None
    if not pair:
        return predicates(m, compare, "u16")
    if not isinstance(m.instruction.operands[0], Pair) or m.take("and", "or", "xor"):
        return None

    def both(a: Value, b: Value) -> tuple[Value, Value]:
        half, sixteen = np.uint16, np.uint32(16)
        return (
            compare(a.astype(half), b.astype(half)),
            compare((a >> sixteen).astype(half), (b >> sixteen).astype(half)),
        )

    return Form(both, ("u32", "u32"), ("pred", "pred"))


def _comparison(m: Modifiers, type_: str) -> Function | None:
    """The comparison that the modifiers name, on the bits of halves."""
    flush = m.flag("ftz") and type_ == "f16"
    name = m.take(*FLOAT)
    if not name:
        return None
    compare = FLOAT[name]
    if flush:
        return lambda a, b: compare(*(flushed_half(widened(v, type_)) for v in (a, b)))
    return lambda a, b: compare(widened(a, type_), widened(b, type_))


@form("set", types=(*HALVES, *PACKED_HALVES))
def _set(m: Modifiers) -> Form | None:
    """Each comparison as a number: 1.0 for a float result, all ones (of the half) for an integer."""
    result, operand = m.type(), m.type()
    type_, pair = operand.removesuffix("x2"), operand in PACKED_HALVES
    compare = _comparison(m, type_)
    if compare is None:
        return None
    if result == operand:
        one = np.uint16(0x3C00 if type_ == "f16" else 0x3F80)

        def number(a: Value, b: Value) -> Value:
            return compare(a, b).astype(np.uint16) * one

        return _form(m, number, 2, pair)
    if pair:
        if result not in ("u32", "s32", "b32"):
            return None
        return _form(m, lambda a, b: np.negative(compare(a, b).astype(np.uint16)), 2, pair)
    if result not in ("u16", "s16", "u32", "s32"):
        return None
    return Form(lambda a, b: truth(compare(a, b), result), ("u16", "u16"), (result,))
