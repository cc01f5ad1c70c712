"""Integer arithmetic: sums, products, quotients, carries and dot products.

Two's complement makes sums and low products the same for signed and unsigned numbers, so these work on
unsigned arrays, as registers hold them. Division truncates toward zero; division by zero gives all ones, as
the routine that ptxas puts there does (PTX leaves it open). The carry flag after a subtraction is the carry
of a + (not b) + 1, so it is set where nothing was borrowed: PTX calls the flag a borrow then, but on an H100
`subc` after `add.cc` takes one away where the sum did not carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.vgpu.forms import PACKED_INTEGERS, Form, Modifiers, form, signed, unsigned, width
from llmcourse.vgpu.isa import DTYPES
from llmcourse.vgpu.vector import Value, is_scalar, packed, parts, select

MACHINE_TYPES = ("s16", "s32", "s64", "u16", "u32", "u64")


def wide_type(type_: str) -> str:
    return f"{type_[0]}{2 * width(type_)}"


def saturated(value: Value, type_: str) -> Value:
    """Integers of a wider type clamped to the range of `type_`, in its dtype."""
    limits = np.iinfo(DTYPES[type_])
    return np.clip(value, value.dtype.type(limits.min), value.dtype.type(limits.max)).astype(DTYPES[type_])


# ---- sums and differences, with a carry or without


@form("add", "sub", types=MACHINE_TYPES)
def _add(m: Modifiers) -> Form | None:
    opcode, type_ = m.instruction.opcode, m.type()
    if m.flag("cc"):
        with_carry = _add_carry_out if opcode == "add" else _sub_carry_out
        return Form(with_carry, (unsigned(type_),) * 2, (unsigned(type_),), writes_carry=True)
    if m.flag("sat"):
        if type_ != "s32":
            return None
        exact = np.add if opcode == "add" else np.subtract
        return Form(lambda a, b: saturated(exact(a, b, dtype=np.int64), "s32"), ("s32", "s32"), ("s32",))
    function = np.add if opcode == "add" else np.subtract
    return Form(function, (unsigned(type_),) * 2, (unsigned(type_),))


def _add_carry_out(a: Value, b: Value) -> tuple[Value, Value]:
    total = a + b
    return total, total < a


def _sub_carry_out(a: Value, b: Value) -> tuple[Value, Value]:
    return a - b, a >= b


@form("addc", "subc", types=MACHINE_TYPES)
def _addc(m: Modifiers) -> Form:
    function = _add_with_carry if m.instruction.opcode == "addc" else _sub_with_carry
    return _carried(function, m.flag("cc"), (unsigned(m.type()),) * 2)


def _carried(function: Callable[..., tuple[Value, Value]], writes: bool, takes: tuple[str, ...]) -> Form:
    if writes:
        return Form(function, takes, (unsigned(takes[0]),), reads_carry=True, writes_carry=True)
    return Form(lambda *values: function(*values)[0], takes, (unsigned(takes[0]),), reads_carry=True)


def _add_with_carry(a: Value, b: Value, carry: Value) -> tuple[Value, Value]:
    first = a + b
    total = first + carry.astype(a.dtype)
    return total, (first < a) | (total < first)


def _sub_with_carry(a: Value, b: Value, carry: Value) -> tuple[Value, Value]:
    """a − b − 1 + carry, which is a + (not b) + carry: what the hardware adds up, and the carry of that."""
    return _add_with_carry(a, ~b, carry)


# ---- products


def low_product(a: Value, b: Value) -> Value:
    return a * b


def high_product(type_: str) -> Callable[[Value, Value], Value]:
    """The upper half of a product twice as wide."""
    if width(type_) < 64:
        wide, shift = DTYPES[wide_type(type_)], DTYPES[wide_type(type_)].type(width(type_))
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> shift).astype(DTYPES[type_])
    return _high_u64 if type_ == "u64" else _high_s64


def _high_u64(a: Value, b: Value) -> Value:
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (other >> half)


def _high_s64(a: Value, b: Value) -> Value:
    high = _high_u64(a.view(np.uint64), b.view(np.uint64)).view(np.int64)
    return high - (b & (a >> np.int64(63))) - (a & (b >> np.int64(63)))


def wide_product(type_: str) -> Callable[[Value, Value], Value]:
    wide = DTYPES[wide_type(type_)]
    return lambda a, b: np.multiply(a, b, dtype=wide)


@form("mul", types=MACHINE_TYPES)
def _mul(m: Modifiers) -> Form | None:
    part, type_ = m.take("lo", "hi", "wide"), m.type()
    if part == "lo":
        return Form(low_product, (unsigned(type_),) * 2, (unsigned(type_),))
    if part == "hi":
        return Form(high_product(type_), (type_, type_), (type_,))
    if part == "wide" and width(type_) < 64:
        return Form(wide_product(type_), (type_, type_), (wide_type(type_),))
    return None


@form("mad", types=MACHINE_TYPES)
def _mad(m: Modifiers) -> Form | None:
    part, type_ = m.take("lo", "hi", "wide"), m.type()
    if part == "wide" and width(type_) < 64:
        wide = wide_type(type_)
        return Form(_then_add(wide_product(type_)), (type_, type_, wide), (wide,))
    if part not in ("lo", "hi"):
        return None
    takes = (unsigned(type_) if part == "lo" else type_,) * 3
    product = low_product if part == "lo" else high_product(type_)
    if m.flag("cc"):
        return Form(_product_carry_out(product, type_), takes, (unsigned(type_),), writes_carry=True)
    if m.flag("sat"):
        if part != "hi" or type_ != "s32":
            return None
        return Form(lambda a, b, c: _sum_saturated(product(a, b), c), takes, ("s32",))
    return Form(_then_add(product), takes, takes[:1])


def _then_add(product: Callable[[Value, Value], Value]) -> Callable[[Value, Value, Value], Value]:
    def apply(a: Value, b: Value, c: Value) -> Value:
        total = product(a, b)  # a fresh array (or a scalar, which += replaces)
        total += c
        return total

    return apply


def _sum_saturated(a: Value, b: Value) -> Value:
    return saturated(np.add(a, b, dtype=np.int64), "s32")


@form("madc", types=MACHINE_TYPES)
def _madc(m: Modifiers) -> Form | None:
    part, type_ = m.take("lo", "hi"), m.type()
    if not part:
        return None
    product = low_product if part == "lo" else high_product(type_)
    bits = DTYPES[unsigned(type_)]

    def apply(a: Value, b: Value, c: Value, carry: Value) -> tuple[Value, Value]:
        return _add_with_carry(product(a, b).view(bits), c.view(bits), carry)

    return _carried(apply, m.flag("cc"), (unsigned(type_) if part == "lo" else type_,) * 3)


def _product_carry_out(product: Callable[[Value, Value], Value], type_: str) -> Callable[..., Any]:
    bits = DTYPES[unsigned(type_)]
    return lambda a, b, c: _add_carry_out(product(a, b).view(bits), c.view(bits))


@form("mul24", "mad24", types=("s32", "u32"))
def _mul24(m: Modifiers) -> Form | None:
    """Products of the low 24 bits, 48 bits wide: .lo gives bits 0–31, .hi bits 16–47."""
    part, type_ = m.take("lo", "hi"), m.type()
    wide = DTYPES[wide_type(type_)]

    def low24(value: Value) -> Value:
        eight = value.dtype.type(8)
        return (value << eight) >> eight  # signed types extend bit 23

    def product(a: Value, b: Value) -> Value:
        full = np.multiply(low24(a), low24(b), dtype=wide)
        return (full if part == "lo" else full >> wide.type(16)).astype(DTYPES[type_])

    if not part:
        return None
    if m.instruction.opcode == "mul24":
        return Form(product, (type_, type_), (type_,))
    if m.flag("sat"):
        if part != "hi" or type_ != "s32":
            return None
        return Form(lambda a, b, c: _sum_saturated(product(a, b), c), (type_,) * 3, (type_,))
    return Form(_then_add(product), (type_,) * 3, (type_,))


# ---- quotients


@form("div", types=MACHINE_TYPES)
def _div(m: Modifiers) -> Form:
    type_ = m.type()
    return Form(_all_ones_for_zero(quotient), (type_, type_), (type_,))


@form("rem", types=MACHINE_TYPES)
def _rem(m: Modifiers) -> Form:
    """The sign is that of the dividend, as in C."""
    type_ = m.type()
    return Form(_all_ones_for_zero(lambda a, b: a - quotient(a, b) * b), (type_, type_), (type_,))


def quotient(a: Value, b: Value) -> Value:
    """a / b truncated toward zero; b has no zeros."""
    if is_scalar(b):  # NumPy multiplies by a reciprocal then, a tenth of the time; but it rounds down
        down = a // b
        return down if b.dtype.kind == "u" else down + (((a ^ b) < 0) & (down * b != a))
    if b.dtype.itemsize < 8:
        # 53 bits are enough that a quotient of 32-bit numbers never rounds up to the next whole number.
        exact = np.true_divide(a, b, dtype=np.float64)
        return exact.astype(np.int64).astype(b.dtype)
    if b.dtype.kind == "u":
        return a // b
    size = np.abs(a).view(np.uint64) // np.abs(b).view(np.uint64)
    return select((a ^ b) < 0, -size.view(np.int64), size.view(np.int64))


def _all_ones_for_zero(divide: Callable[[Value, Value], Value]) -> Callable[[Value, Value], Value]:
    def apply(a: Value, b: Value) -> Value:
        zero = b == 0
        if not zero.any():
            return divide(a, b)
        ones = ~b.dtype.type(0)
        if is_scalar(b):
            return ones if is_scalar(a) else np.full_like(a, ones)
        return select(zero, ones, divide(a, select(zero, b.dtype.type(1), b)))

    return apply


# ---- size, sign, distance


@form("neg", types=MACHINE_TYPES)
def _neg(m: Modifiers) -> Form:
    type_ = unsigned(m.type())
    return Form(np.negative, (type_,), (type_,))


@form("abs", types=MACHINE_TYPES)
def _abs(m: Modifiers) -> Form:
    type_ = signed(m.type())
    return Form(np.abs, (type_,), (type_,))


@form("sad", types=MACHINE_TYPES)
def _sad(m: Modifiers) -> Form:
    type_ = m.type()
    bits = DTYPES[unsigned(type_)]

    def apply(a: Value, b: Value, c: Value) -> Value:
        # The distance of two signed numbers may need the sign bit: it wraps into the unsigned type.
        return (np.maximum(a, b) - np.minimum(a, b)).view(bits) + c.view(bits)

    return Form(apply, (type_,) * 3, (unsigned(type_),))


@form("min", "max", types=MACHINE_TYPES)
def _min(m: Modifiers) -> Form | None:
    type_ = m.type()
    function = np.minimum if m.instruction.opcode == "min" else np.maximum
    if m.flag("relu"):
        if type_ != "s32":
            return None
        return Form(_not_negative(function, np.int32(0)), (type_, type_), (type_,))
    return Form(function, (type_, type_), (type_,))


def _not_negative(function: Callable[..., Value], zero: Any) -> Callable[..., Value]:
    return lambda a, b: np.maximum(function(a, b), zero)


# ---- packed integers


@form("add", "min", "max", types=PACKED_INTEGERS)
def _packed(m: Modifiers) -> Form | None:
    """Two 16-bit operations on the halves of 32-bit registers."""
    opcode, type_ = m.instruction.opcode, m.type()
    half = np.dtype(np.int16 if type_[0] == "s" else np.uint16)
    function: Callable[..., Value] = {"add": np.add, "min": np.minimum, "max": np.maximum}[opcode]
    if m.flag("relu"):
        if opcode == "add" or type_ != "s16x2":
            return None
        function = _not_negative(function, np.int16(0))
    return Form(packed(function, half), ("u32", "u32"), ("u32",))


@form("dp4a", types=("s32", "u32"))
def _dp4a(m: Modifiers) -> Form:
    """c plus the dot product of four bytes with four bytes; each operand's bytes signed or not."""
    first, second = m.type(), m.type()
    pairs = [(_part(first, 8, i), _part(second, 8, i)) for i in range(4)]
    return Form(_dot(pairs), (first, second, "u32"), ("u32",))


@form("dp2a", types=("s32", "u32"))
def _dp2a(m: Modifiers) -> Form | None:
    """c plus the dot product of a's two halves with the two low (.lo) or high (.hi) bytes of b."""
    part, first, second = m.take("lo", "hi"), m.type(), m.type()
    if not part:
        return None
    start = 0 if part == "lo" else 2
    pairs = [(_part(first, 16, i), _part(second, 8, start + i)) for i in range(2)]
    return Form(_dot(pairs), (first, second, "u32"), ("u32",))


def _part(type_: str, bits: int, place: int) -> Callable[[Value], Value]:
    """The byte or half at a place, extended to 32 bits by the type's sign: shifted up, then down."""
    kind = DTYPES[type_].type
    up, down = kind(32 - bits * (place + 1)), kind(32 - bits)
    return lambda value: ((value << up) >> down).view(np.uint32)


def _dot(pairs: list[tuple[Callable[[Value], Value], Callable[[Value], Value]]]) -> Callable[..., Value]:
    def apply(a: Value, b: Value, c: Value) -> Value:
        total = c
        for x, y in pairs:
            total = total + x(a) * y(b)
        return total

    return apply


def _kind(type_: str) -> str:
    return "i" if type_[0] == "s" else "u"


def _register_video(lanes: int) -> None:
    """vadd2 … vmax4: one operation on each half or byte, clamped with .sat; .add sums the results onto c."""

    @form(
        *(f"v{name}{lanes}" for name in ("add", "sub", "avrg", "absdiff", "min", "max")), types=("s32", "u32")
    )
    def build(m: Modifiers) -> Form | None:
        result, first, second = m.type(), m.type(), m.type()
        x, y = (np.dtype(f"{_kind(t)}{4 // lanes}") for t in (first, second))
        out = np.dtype(f"{_kind(result)}{4 // lanes}")
        operation = _VIDEO[m.instruction.opcode[1:-1]]
        accumulate, clamp = m.flag("add"), m.flag("sat")
        limits = np.iinfo(out)

        def apply(a: Value, b: Value, c: Value) -> Value:
            each = operation(parts(a, x).astype(np.int32), parts(b, y).astype(np.int32))
            if accumulate:
                return each.sum(axis=-1, dtype=np.int32).view(np.uint32) + c
            if clamp:
                each = np.clip(each, limits.min, limits.max)
            return np.ascontiguousarray(each.astype(out)).view(np.uint32)[..., 0][()]

        if not (first and second) or (accumulate and clamp):
            return None
        return Form(apply, ("u32", "u32", "u32"), ("u32",))


_VIDEO: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "avrg": lambda a, b: (a + b + (a + b >= 0)) >> 1,
    "absdiff": lambda a, b: np.abs(a - b),
    "min": np.minimum,
    "max": np.maximum,
}

for _lanes in (2, 4):
    _register_video(_lanes)
