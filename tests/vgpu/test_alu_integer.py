"""Integer arithmetic against Python's integers."""

from __future__ import annotations

import pytest
from alu_reference import as_signed, compare, compiled, execute, grid, integers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.vgpu.alu import CARRY

TYPES = ("s16", "s32", "s64", "u16", "u32", "u64")
LETTERS = {16: "%rs", 32: "%r", 64: "%rd"}


def registers(*bits: int) -> str:
    return ", ".join(f"{LETTERS[b]}{i}" for i, b in enumerate(bits))


def columns(*bits: int) -> list[list[int]]:
    return grid(*(integers(b, 40, seed=i) for i, b in enumerate(bits)), most=1200)


def check(opcode: str, type_: str, value, count: int = 2, *, result: int = 0, sources: tuple[int, ...] = ()):
    """`value` on Python integers, signed as the type says; the result is cut to the result's width."""
    bits = int(type_[1:])
    result, sources = result or bits, sources or (bits,) * count

    def read(number: int, width: int) -> int:
        return as_signed(number, width) if type_[0] == "s" else number

    def expected(*numbers: int) -> int:
        return int(value(*(read(n, w) for n, w in zip(numbers, sources, strict=True)))) & ((1 << result) - 1)

    compare(f"{opcode}.{type_} {registers(result, *sources)}", columns(*sources), expected)


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return -quotient if (a < 0) != (b < 0) else quotient


@pytest.mark.parametrize("type_", TYPES)
def test_sums_products_and_extremes_wrap_around(type_):
    bits = int(type_[1:])
    check("add", type_, lambda a, b: a + b)
    check("sub", type_, lambda a, b: a - b)
    check("mul.lo", type_, lambda a, b: a * b)
    check("mul.hi", type_, lambda a, b: a * b >> bits)
    check("mad.lo", type_, lambda a, b, c: a * b + c, 3)
    check("mad.hi", type_, lambda a, b, c: (a * b >> bits) + c, 3)
    check("min", type_, min)
    check("max", type_, max)
    check("sad", type_, lambda a, b, c: c + abs(a - b), 3)
    if type_[0] == "s":
        check("neg", type_, lambda a: -a, 1)
        check("abs", type_, abs, 1)


@pytest.mark.parametrize("type_", ["s16", "s32", "u16", "u32"])
def test_wide_products_keep_every_bit(type_):
    bits = int(type_[1:])
    check("mul.wide", type_, lambda a, b: a * b, result=2 * bits)

    def mad(a: int, b: int, c: int) -> int:
        return a * b + c

    check("mad.wide", type_, mad, 3, result=2 * bits, sources=(bits, bits, 2 * bits))


@pytest.mark.parametrize("type_", TYPES)
def test_division_truncates_and_by_zero_gives_all_ones(type_):
    check("div", type_, lambda a, b: truncated(a, b) if b else -1)
    check("rem", type_, lambda a, b: a - b * truncated(a, b) if b else -1)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_quotient_times_divisor_plus_remainder_is_the_dividend(a, b):
    for type_ in ("s32", "u32"):
        ((quotient,),) = execute(f"div.{type_} %r0, %r1, %r2", [a], [b])
        ((remainder,),) = execute(f"rem.{type_} %r0, %r1, %r2", [a], [b])
        if b:
            assert (quotient * b + remainder - a) % 2**32 == 0


def test_saturating_sums_stick_at_the_ends():
    def clamp(value: int) -> int:
        return max(-(2**31), min(2**31 - 1, value))

    check("add.sat", "s32", lambda a, b: clamp(a + b))
    check("sub.sat", "s32", lambda a, b: clamp(a - b))
    check("mad.hi.sat", "s32", lambda a, b, c: clamp((a * b >> 32) + c), 3)


@pytest.mark.parametrize("type_", ["s32", "u32"])
def test_24_bit_products_use_the_low_24_bits(type_):
    def low(value: int) -> int:
        return as_signed(value, 24) if type_ == "s32" else value & 0xFFFFFF

    check("mul24.lo", type_, lambda a, b: low(a) * low(b))
    check("mul24.hi", type_, lambda a, b: low(a) * low(b) >> 16)
    check("mad24.lo", type_, lambda a, b, c: low(a) * low(b) + c, 3)
    check("mad24.hi", type_, lambda a, b, c: (low(a) * low(b) >> 16) + c, 3)


@pytest.mark.parametrize("bits", [32, 64])
def test_carries_chain_into_sums_of_any_width(bits):
    r = LETTERS[bits]
    modulus = 1 << bits
    two = columns(bits, bits)
    compare(f"add.cc.u{bits} {r}0, {r}1, {r}2", two, lambda a, b: ((a + b) % modulus, a + b >> bits))
    compare(f"sub.cc.u{bits} {r}0, {r}1, {r}2", two, lambda a, b: ((a - b) % modulus, int(a >= b)))
    three = grid(integers(bits, 20), integers(bits, 20, 1), [0, 1])
    compare(
        f"addc.cc.u{bits} {r}0, {r}1, {r}2",
        three,
        lambda a, b, c: ((a + b + c) % modulus, a + b + c >> bits),
    )
    compare(
        f"subc.cc.u{bits} {r}0, {r}1, {r}2",
        three,
        lambda a, b, c: ((a - b - 1 + c) % modulus, int(a - b - 1 + c >= 0)),
    )
    compare(f"addc.u{bits} {r}0, {r}1, {r}2", three, lambda a, b, c: (a + b + c) % modulus)
    compare(f"subc.s{bits} {r}0, {r}1, {r}2", three, lambda a, b, c: (a - b - 1 + c) % modulus)


def test_carrying_multiply_adds_build_a_128_bit_product():
    cc = compiled("mad.lo.cc.u32 %r0, %r1, %r2, %r3")
    assert cc.destinations[1] == CARRY
    assert compiled("madc.hi.u32 %r0, %r1, %r2, %r3").sources[3] == CARRY
    compare(
        "mad.lo.cc.u32 %r0, %r1, %r2, %r3",
        columns(32, 32, 32),
        lambda a, b, c: ((a * b + c) % 2**32, (a * b) % 2**32 + c >> 32),
    )
    four = grid(integers(32, 20), integers(32, 20, 1), integers(32, 20, 2), [0, 1])
    compare(
        "madc.hi.cc.u32 %r0, %r1, %r2, %r3",
        four,
        lambda a, b, c, f: (((a * b >> 32) + c + f) % 2**32, (a * b >> 32) + c + f >> 32),
    )
    compare("madc.lo.u32 %r0, %r1, %r2, %r3", four, lambda a, b, c, f: (a * b + c + f) % 2**32)
    compare(
        "madc.hi.s32 %r0, %r1, %r2, %r3",
        four,
        lambda a, b, c, f: ((as_signed(a, 32) * as_signed(b, 32) >> 32) + c + f) % 2**32,
    )


def halves(value: int, signed: bool) -> list[int]:
    return [as_signed(value >> s, 16) if signed else value >> s & 0xFFFF for s in (0, 16)]


def joined(values: list[int]) -> int:
    return (values[0] & 0xFFFF) | (values[1] & 0xFFFF) << 16


def test_packed_integers_work_on_each_half():
    def each(operation, signed):
        return lambda a, b: joined(
            [operation(x, y) for x, y in zip(halves(a, signed), halves(b, signed), strict=True)]
        )

    two = columns(32, 32)
    compare("add.u16x2 %r0, %r1, %r2", two, each(lambda a, b: a + b, False))
    compare("add.s16x2 %r0, %r1, %r2", two, each(lambda a, b: a + b, True))
    compare("min.s16x2 %r0, %r1, %r2", two, each(min, True))
    compare("max.u16x2 %r0, %r1, %r2", two, each(max, False))
    compare("max.s16x2.relu %r0, %r1, %r2", two, each(lambda a, b: max(a, b, 0), True))
    check("min.relu", "s32", lambda a, b: max(min(a, b), 0))


def bytes_of(value: int, signed: bool) -> list[int]:
    return [as_signed(value >> s, 8) if signed else value >> s & 0xFF for s in (0, 8, 16, 24)]


@pytest.mark.parametrize("first", ["s32", "u32"])
@pytest.mark.parametrize("second", ["s32", "u32"])
def test_dot_products_of_bytes(first, second):
    three = columns(32, 32, 32)

    def dp4a(a: int, b: int, c: int) -> int:
        pairs = zip(bytes_of(a, first == "s32"), bytes_of(b, second == "s32"), strict=True)
        return (c + sum(x * y for x, y in pairs)) % 2**32

    compare(f"dp4a.{first}.{second} %r0, %r1, %r2, %r3", three, dp4a)
    for part, start in (("lo", 0), ("hi", 2)):

        def dp2a(a: int, b: int, c: int, start: int = start) -> int:
            chosen = bytes_of(b, second == "s32")[start : start + 2]
            return (c + sum(x * y for x, y in zip(halves(a, first == "s32"), chosen, strict=True))) % 2**32

        compare(f"dp2a.{part}.{first}.{second} %r0, %r1, %r2, %r3", three, dp2a)


def test_video_instructions_work_on_bytes_and_can_add_up():
    three = columns(32, 32, 32)

    def differences(a: int, b: int) -> list[int]:
        return [abs(x - y) for x, y in zip(bytes_of(a, False), bytes_of(b, False), strict=True)]

    compare(
        "vabsdiff4.u32.u32.u32 %r0, %r1, %r2, %r3",
        three,
        lambda a, b, c: sum(d << 8 * i for i, d in enumerate(differences(a, b))),
    )
    compare(
        "vabsdiff4.u32.u32.u32.add %r0, %r1, %r2, %r3",
        three,
        lambda a, b, c: (c + sum(differences(a, b))) % 2**32,
    )

    def clamped_sums(a: int, b: int, c: int) -> int:
        sums = [x + y for x, y in zip(bytes_of(a, True), bytes_of(b, True), strict=True)]
        return sum((max(-128, min(127, s)) & 0xFF) << 8 * i for i, s in enumerate(sums))

    compare("vadd4.s32.s32.s32.sat %r0, %r1, %r2, %r3", three, clamped_sums)
