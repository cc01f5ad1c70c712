"""Bits: logic, shifts, fields, permutations and counts.

Shift amounts are unsigned 32-bit numbers, and one that exceeds the width shifts everything out, as NumPy's
shifts do when the amount has the value's dtype. shf, bmsk and szext can also take the amount modulo 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.vgpu.forms import Form, Modifiers, form, unsigned, width
from llmcourse.vgpu.isa import DTYPES, Immediate, Pair
from llmcourse.vgpu.vector import Value, joined, select, spread

BITWISE: dict[str, Callable[[Value, Value], Value]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _on_bytes(operation: Callable[[Value, Value], Value]) -> Callable[[Value, Value], Value]:
    """NumPy combines an array of bool with one scalar bool forty times slower than as bytes."""

    def apply(p: Value, q: Value) -> Value:
        return operation(p.view(np.uint8), q.view(np.uint8)).view(np.bool_)

    return apply


BOOLEAN = {name: _on_bytes(operation) for name, operation in BITWISE.items()}
LOGIC = ("pred", "b16", "b32", "b64")
WORDS = ("b32", "b64")
FIELDS = ("u32", "s32", "u64", "s64")


def _storage(type_: str) -> str:
    return type_ if type_ == "pred" else unsigned(type_)


def _constant(m: Modifiers, place: int) -> int | None:
    """The operand at a place, if it is a constant known now."""
    operand = m.instruction.operands[place] if place < len(m.instruction.operands) else None
    return int(operand.value) if isinstance(operand, Immediate) else None


# ---- logic


@form("and", "or", "xor", types=LOGIC)
def _logic(m: Modifiers) -> Form:
    type_ = _storage(m.type())
    table = BOOLEAN if type_ == "pred" else BITWISE
    return Form(table[m.instruction.opcode], (type_, type_), (type_,))


@form("not", types=LOGIC)
def _not(m: Modifiers) -> Form:
    type_ = _storage(m.type())
    return Form(np.invert, (type_,), (type_,))


@form("cnot", types=("b16", "b32", "b64"))
def _cnot(m: Modifiers) -> Form:
    """1 for zero, 0 for anything else: C's `!`."""
    type_ = unsigned(m.type())
    return Form(lambda a: (a == 0).astype(a.dtype), (type_,), (type_,))


@form("lop3", types=("b32",))
def _lop3(m: Modifiers) -> Form | None:
    """Any function of three bits, by its truth table: bit (4·a + 2·b + c) of the constant is the result.

    With .and or .or it also gives whether the result is non-zero, combined with a predicate.
    """
    table = _constant(m, 4)
    combine = m.take("and", "or")
    m.type()
    if table is None:
        return None
    some = three_bits(table)

    def function(a: Value, b: Value, c: Value) -> Value:
        return spread((a, b, c, some(a, b, c)))[3]  # it may not depend on the one that is an array

    if not combine:
        return Form(lambda a, b, c, _: function(a, b, c), ("u32",) * 4, ("u32",))

    def with_predicate(a: Value, b: Value, c: Value, _: Value, q: Value) -> tuple[Value, Value]:
        result = function(a, b, c)
        return result, BOOLEAN[combine](result != 0, q)

    if not isinstance(m.instruction.operands[0], Pair):
        return None
    return Form(with_predicate, ("u32", "u32", "u32", "u32", "pred"), ("u32", "pred"))


_TWO_BITS: tuple[Callable[[Value, Value], Value], ...] = (
    lambda a, b: a & a.dtype.type(0),
    lambda a, b: ~(a | b),
    lambda a, b: ~a & b,
    lambda a, b: ~a,
    lambda a, b: a & ~b,
    lambda a, b: ~b,
    lambda a, b: a ^ b,
    lambda a, b: ~(a & b),
    lambda a, b: a & b,
    lambda a, b: ~(a ^ b),
    lambda a, b: b,
    lambda a, b: ~a | b,
    lambda a, b: a,
    lambda a, b: a | ~b,
    lambda a, b: a | b,
    lambda a, b: ~(a & a.dtype.type(0)),
)
"""All functions of two bits, by truth table: bit (2·a + b)."""


def three_bits(table: int) -> Callable[[Value, Value, Value], Value]:
    """The function of three bits with this truth table, from its two halves for c = 0 and c = 1."""
    without, with_ = (sum((table >> (2 * i + c) & 1) << i for i in range(4)) for c in (0, 1))
    zero, one = _TWO_BITS[without], _TWO_BITS[with_]
    if without == with_:
        return lambda a, b, c: zero(a, b) | (c & c.dtype.type(0))
    if without == 0:
        return lambda a, b, c: c & one(a, b)
    if with_ == 0:
        return lambda a, b, c: ~c & zero(a, b)
    if without == 15:
        return lambda a, b, c: ~c | one(a, b)
    if with_ == 15:
        return lambda a, b, c: c | zero(a, b)
    if without ^ with_ == 15:
        return lambda a, b, c: c ^ zero(a, b)
    return lambda a, b, c: (~c & zero(a, b)) | (c & one(a, b))


# ---- shifts


@form("shl", types=("b16", "b32", "b64"))
def _shl(m: Modifiers) -> Form:
    return _shift(m, unsigned(m.type()), np.left_shift)


@form("shr", types=("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"))
def _shr(m: Modifiers) -> Form:
    type_ = m.type()
    return _shift(m, type_ if type_[0] == "s" else unsigned(type_), np.right_shift)


def _shift(m: Modifiers, type_: str, shift: Callable[[Value, Value], Value]) -> Form:
    dtype = DTYPES[type_]
    amount = _constant(m, 2)
    if amount is not None:
        fixed = dtype.type(min(amount & 0xFFFFFFFF, width(type_)))
        return Form(lambda a, _: shift(a, fixed), (type_, "u32"), (type_,))
    return Form(lambda a, n: shift(a, amounts(n, dtype)), (type_, "u32"), (type_,))


def amounts(n: Value, dtype: np.dtype) -> Value:
    """Shift amounts in the dtype of what they shift, those beyond its width still beyond it."""
    if dtype.itemsize == 4:
        return n.view(dtype)
    return n.astype(dtype) if dtype.itemsize == 8 else np.minimum(n, np.uint32(16)).astype(dtype)


@form("shf", types=("b32",))
def _shf(m: Modifiers) -> Form | None:
    """32 bits out of the 64 of {b, a}, shifted left (the upper word) or right (the lower one)."""
    way, mode = m.take("l", "r"), m.take("clamp", "wrap")
    m.type()
    if not way or not mode:
        return None

    def apply(a: Value, b: Value, c: Value) -> Value:
        amount = c & np.uint32(31) if mode == "wrap" else np.minimum(c, np.uint32(32))
        both = joined(a, b)
        if way == "r":
            return (both >> amount.astype(np.uint64)).astype(np.uint32)
        return ((both << amount.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)

    return Form(apply, ("u32", "u32", "u32"), ("u32",))


# ---- fields


@form("bfe", types=FIELDS)
def _bfe(m: Modifiers) -> Form:
    """c bits of a from bit b up; signed types repeat the top one. b and c as `_amount` has them."""
    type_ = m.type()
    dtype, bits = DTYPES[type_], width(type_)
    fixed_start, fixed_length = _constant(m, 2), _constant(m, 3)
    if type_[0] == "u" and fixed_start is not None and fixed_length is not None:
        shift, mask = _amount(np.uint32(fixed_start), dtype), _ones(_amount(np.uint32(fixed_length), dtype))
        return Form(lambda a, _, __: (a >> shift) & mask, (type_, "u32", "u32"), (type_,))

    def unsigned_field(a: Value, start: Value, length: Value) -> Value:
        return (a >> _amount(start, dtype)) & _ones(_amount(length, dtype))

    def signed_field(a: Value, start: Value, length: Value) -> Value:
        rest = dtype.type(bits) - np.minimum(_amount(length, dtype), dtype.type(bits))
        return ((a >> _amount(start, dtype)) << rest) >> rest

    return Form(signed_field if type_[0] == "s" else unsigned_field, (type_, "u32", "u32"), (type_,))


@form("bfi", types=WORDS)
def _bfi(m: Modifiers) -> Form:
    """b with d bits from bit c up replaced by the low bits of a."""
    type_ = unsigned(m.type())
    dtype = DTYPES[type_]

    def apply(a: Value, b: Value, start: Value, length: Value) -> Value:
        place = _amount(start, dtype)
        mask = _ones(_amount(length, dtype)) << place
        return (b & ~mask) | ((a << place) & mask)

    return Form(apply, (type_, type_, "u32", "u32"), (type_,))


def _amount(amount: Value, dtype: np.dtype) -> Value:
    """A place or length of a field. PTX counts both modulo 256.

    So does the hardware for 32 bits; fields of 64 bits are put together from shifts there (seen on an
    H100), and 256 is beyond the end like any number above 63.
    """
    if dtype.itemsize == 4:
        return (amount & np.uint32(0xFF)).astype(dtype)
    return amount.astype(dtype)


def _ones(length: Value) -> Value:
    """The lowest `length` bits set; all of them from the width up."""
    one = length.dtype.type(1)
    return (one << length) - one


@form("bmsk", types=("b32",))
def _bmsk(m: Modifiers) -> Form | None:
    """b bits set from bit a up."""
    mode = m.take("clamp", "wrap")
    m.type()
    if not mode:
        return None

    def apply(a: Value, b: Value) -> Value:
        if mode == "wrap":
            a, b = a & np.uint32(31), b & np.uint32(31)
        return _ones(b) << a

    return Form(apply, ("u32", "u32"), ("u32",))


@form("szext", types=("u32", "s32"))
def _szext(m: Modifiers) -> Form | None:
    """The low b bits of a, with zeros or copies of the top one above them."""
    mode, type_ = m.take("clamp", "wrap"), m.type()
    if not mode:
        return None
    dtype = DTYPES[type_]

    def apply(a: Value, b: Value) -> Value:
        length = b & np.uint32(31) if mode == "wrap" else np.minimum(b, np.uint32(32))
        rest = (np.uint32(32) - length).view(dtype)
        return (a << rest) >> rest

    return Form(apply, (type_, "u32"), (type_,))


# ---- permutations


@form("brev", types=WORDS)
def _brev(m: Modifiers) -> Form:
    """Bit i becomes bit (width − 1 − i)."""
    type_ = unsigned(m.type())
    dtype, bits = DTYPES[type_], width(type_)

    def apply(a: Value) -> Value:
        step = bits // 2
        while step:
            low = dtype.type(sum(((1 << step) - 1) << i for i in range(0, bits, 2 * step)))
            shift = dtype.type(step)
            a = ((a >> shift) & low) | ((a & low) << shift)
            step //= 2
        return a

    return Form(apply, (type_,), (type_,))


_PRMT_MODES: dict[str, tuple[tuple[int, ...], ...]] = {
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}
"""prmt's fixed patterns: for each selector 0–3, the byte of {b, a} that goes to each byte, lowest first."""


@form("prmt", types=("b32",))
def _prmt(m: Modifiers) -> Form:
    """Four of the eight bytes of {b, a}, picked by a selector's four digits; digit + 8 repeats the sign."""
    pattern = m.take(*_PRMT_MODES)
    m.type()
    takes = ("u32", "u32", "u32")
    selector = _constant(m, 3)
    if pattern:
        selectors = [
            np.uint32(sum(byte << 4 * i for i, byte in enumerate(row))) for row in _PRMT_MODES[pattern]
        ]

        def by_pattern(a: Value, b: Value, c: Value) -> Value:
            digits = np.array(selectors, np.uint32)[c & np.uint32(3)]
            return permuted(joined(a, b), digits)

        return Form(by_pattern, takes, ("u32",))
    if selector is not None:
        permutation = fixed_permutation(selector)
        return Form(lambda a, b, _: permutation(a, b), takes, ("u32",))
    return Form(lambda a, b, c: permuted(joined(a, b), c), takes, ("u32",))


def permuted(both: Value, selector: Value) -> Value:
    """Bytes of 64-bit values picked by the digits of 32-bit selectors."""
    selector = selector.astype(np.uint64)
    out = np.uint64(0)
    for i in range(4):
        digit = selector >> np.uint64(4 * i)
        byte = (both >> ((digit & np.uint64(7)) << np.uint64(3))) & np.uint64(0xFF)
        sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
        repeat = (digit >> np.uint64(3)) & np.uint64(1)
        byte = byte + repeat * (sign - byte)  # modulo 2⁶⁴
        out = out | (byte << np.uint64(8 * i))
    return out.astype(np.uint32)


def fixed_permutation(selector: int) -> Callable[[Value, Value], Value]:
    """`permuted` for a selector known now: bytes that move equally far are shifted together."""
    digits = [selector >> 4 * i & 15 for i in range(4)]
    if any(digit & 8 for digit in digits):
        return lambda a, b: permuted(joined(a, b), np.uint32(selector))
    moves: dict[tuple[bool, int], int] = {}
    for i, digit in enumerate(digits):
        key = digit >= 4, digit % 4 - i
        moves[key] = moves.get(key, 0) | 0xFF << 8 * i
    steps = [
        (second, np.right_shift if down > 0 else np.left_shift, np.uint32(8 * abs(down)), np.uint32(mask))
        for (second, down), mask in moves.items()
    ]

    def apply(a: Value, b: Value) -> Value:
        out = np.uint32(0)
        for second, shift, amount, mask in steps:
            out = out | (shift(b if second else a, amount) & mask)
        return spread((a, b, out))[2]  # every byte may have come from the one that is a scalar

    return apply


# ---- counts


def bit_length(value: Value) -> Value:
    """The place of the highest set bit plus one, as uint32; 0 for 0. Of uint32 or uint64."""
    if value.dtype.itemsize == 4:
        # float64 holds 32 bits exactly, and its exponent counts them, from 1023 for one bit.
        exponent = value.astype(np.float64).view(np.int64) >> np.int64(52)
        return np.maximum(exponent - np.int64(1022), np.int64(0)).astype(np.uint32)
    for shift in (1, 2, 4, 8, 16, 32):
        value = value | (value >> np.uint64(shift))
    return np.bitwise_count(value).astype(np.uint32)


@form("popc", types=WORDS)
def _popc(m: Modifiers) -> Form:
    return Form(lambda a: np.bitwise_count(a).astype(np.uint32), (unsigned(m.type()),), ("u32",))


@form("clz", types=WORDS)
def _clz(m: Modifiers) -> Form:
    type_ = unsigned(m.type())
    bits = np.uint32(width(type_))
    return Form(lambda a: bits - bit_length(a), (type_,), ("u32",))


@form("bfind", types=FIELDS)
def _bfind(m: Modifiers) -> Form:
    """The place of the highest bit that is not a copy of the sign; all ones if there is none.

    With .shiftamt, how far left that bit would have to move to reach the top.
    """
    as_shift, type_ = m.flag("shiftamt"), m.type()
    top = np.uint32(width(type_) - 1)
    bits = DTYPES[unsigned(type_)]

    def apply(a: Value) -> Value:
        if type_[0] == "s":
            a = (a ^ (a >> a.dtype.type(int(top)))).view(bits)
        place = bit_length(a) - np.uint32(1)
        return select(a == 0, place, top - place) if as_shift else place

    return Form(apply, (type_,), ("u32",))


@form("fns", types=("b32",))
def _fns(m: Modifiers) -> Form:
    """The n-th set bit of a mask from bit `base` on, upward (n > 0) or downward (n < 0); all ones if none.

    n = 0 asks whether bit `base` itself is set. n = −2³¹ has no absolute value in 32 bits: an H100 gives 0.
    """
    m.type()

    def apply(mask: Value, base: Value, n: Value) -> Value:
        shape: Any = np.broadcast_shapes(np.shape(mask), np.shape(base), np.shape(n))
        place = np.broadcast_to(base, shape).astype(np.int64)
        wanted = np.maximum(np.abs(n.astype(np.int64)), 1)
        step = np.sign(n.astype(np.int64))
        step, wanted = np.broadcast_to(step, shape), np.broadcast_to(wanted, shape)
        found = np.full(shape, 0xFFFFFFFF, np.uint32)
        seen = np.zeros(shape, np.int64)
        for i in range(32):
            at = place + i * step
            inside = (at >= 0) & (at < 32) & (place < 32)
            hit = inside & ((mask >> np.where(inside, at, 0).astype(np.uint32)) & np.uint32(1) == 1)
            seen = seen + hit
            found = np.where(hit & (seen == wanted) & (found == 0xFFFFFFFF), at.astype(np.uint32), found)
        return np.where(n == np.iinfo(np.int32).min, np.uint32(0), found)[()]

    return Form(apply, ("u32", "u32", "s32"), ("u32",))
