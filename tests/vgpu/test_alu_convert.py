"""cvt between all number types, against exact arithmetic by definition."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from alu_reference import (
    BF16,
    F16,
    F32,
    F64,
    Format,
    as_signed,
    compare,
    compare_floats,
    execute,
    floats,
    grid,
    integers,
)

INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
LETTERS = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}
FLOAT_LETTERS = {"f16": "%rs", "bf16": "%rs", "f32": "%f", "f64": "%fd"}
WIDTHS = {"%rs": 16, "%r": 32, "%rd": 64}


def width(type_: str) -> int:
    return int(type_[1:])


def limits(type_: str) -> tuple[int, int]:
    bits = width(type_)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if type_[0] == "s" else (0, (1 << bits) - 1)


def read(bits: int, type_: str) -> int:
    bits &= (1 << width(type_)) - 1
    return as_signed(bits, width(type_)) if type_[0] == "s" else bits


def in_register(value: int, type_: str) -> int:
    """An integer result as its register holds it: narrower than 16 bits it is extended by its sign."""
    return value & ((1 << WIDTHS[LETTERS[width(type_)]]) - 1)


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers_are_cut_extended_or_saturated(target, source):
    a, d = LETTERS[width(source)], LETTERS[width(target)]
    column = [integers(WIDTHS[a], 30)]
    least, most = limits(target)

    def cut(bits: int) -> int:
        return in_register(read(read(bits, source), target), target)

    def saturated(bits: int) -> int:
        return in_register(max(least, min(most, read(bits, source))), target)

    compare(f"cvt.{target}.{source} {d}0, {a}1", column, cut)
    compare(f"cvt.sat.{target}.{source} {d}0, {a}1", column, saturated)


def test_a_wider_register_is_read_and_written_by_its_low_bits():
    compare("cvt.u16.u32 %r0, %r1", [integers(32)], lambda a: a & 0xFFFF)
    compare("cvt.s8.s32 %r0, %rd1", [integers(64)], lambda a: as_signed(a, 8) & 0xFFFFFFFF)
    compare("cvt.u32.u8 %r0, %rd1", [integers(64)], lambda a: a & 0xFF)


ROUND = {
    "rni": lambda x: round(x),
    "rzi": lambda x: math.trunc(x),
    "rmi": lambda x: math.floor(x),
    "rpi": lambda x: math.ceil(x),
}


def near_integers(f: Format) -> list[int]:
    values = [Fraction(n, 2) for n in range(-9, 10)]
    for power in (7, 8, 15, 16, 31, 32, 63, 64):
        for sign in (1, -1):
            values += [sign * (Fraction(2) ** power + d) for d in (-1, Fraction(-1, 2), 0, Fraction(1, 2), 1)]
    return sorted({f.round(v, mode) for v in values for mode in ("rm", "rp")})


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("how", ROUND)
def test_floats_to_integers_round_and_stick_at_the_ends(how, source):
    f, a = FORMATS[source], FLOAT_LETTERS[source]
    column = floats(f, 15) + near_integers(f)
    for target in INTEGERS:
        least, most = limits(target)

        def expected(bits: int, target=target, least=least, most=most) -> int:
            if f.is_nan(bits):
                simple = source != "f64" and width(target) < 64
                return 0 if simple else in_register(read(1 << width(target) - 1, target), target)
            if f.is_infinite(bits):
                return in_register(least if f.negative(bits) else most, target)
            return in_register(max(least, min(most, ROUND[how](f.value(bits)))), target)

        compare(f"cvt.{how}.{target}.{source} {LETTERS[width(target)]}0, {a}1", [column], expected)


def test_ftz_makes_a_subnormal_float_the_integer_zero():
    compare("cvt.rpi.ftz.s32.f32 %r0, %f1", [[1, 0x80000001, 0x00800000]], lambda a: int(a == 0x00800000))
    compare("cvt.rpi.s32.f32 %r0, %f1", [[1, 0x80000001]], lambda a: int(a == 1))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("target", FORMATS)
def test_integers_to_floats_round_once(target, mode):
    f, d = FORMATS[target], FLOAT_LETTERS[target]
    for source in INTEGERS:
        a = LETTERS[width(source)]
        column = integers(WIDTHS[a], 40)
        # Half way between neighbours, and one more or less.
        for power in range(f.precision, width(source)):
            tie = (1 << power) + (1 << power - f.precision)
            column += [tie - 1, tie, tie + 1, tie + (1 << power - f.precision + 1)]

        def expected(bits: int, source=source) -> int:
            return f.round(Fraction(read(bits, source)), mode)

        compare_floats(f"cvt.{mode}.{target}.{source} {d}0, {a}1", [column], expected, f)


def ties(f: Format, into: Format) -> list[int]:
    """Numbers of `f` half way between two of `into`, and their neighbours."""
    out = []
    for base in floats(into, 25):
        if into.is_nan(base) or into.is_infinite(base) or into.is_infinite(base + 1):
            continue
        middle = f.round((into.value(base) + into.value(base + 1)) / 2)
        out += [middle, middle + 1, max(middle - 1, 0)]
    limit = f.round(Fraction(2) ** (into.bias + 1) * (1 - Fraction(1, 1 << into.precision + 1)))
    return [*out, limit, limit - 1, limit | f.sign]


def convert(f: Format, into: Format, bits: int, mode: str) -> int:
    if f.is_nan(bits):
        return into.nan
    if f.is_infinite(bits):
        return into.infinity | (into.sign if f.negative(bits) else 0)
    return into.round(f.value(bits), mode, negative_zero=f.negative(bits))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("f16", "f32"),
        ("bf16", "f32"),
        ("f32", "f64"),
        ("f16", "f64"),
        ("bf16", "f64"),
        ("bf16", "f16"),
        ("f16", "bf16"),
    ],
)
def test_floats_to_narrower_floats_round_once(target, source, mode):
    f, into = FORMATS[source], FORMATS[target]
    d, a = FLOAT_LETTERS[target], FLOAT_LETTERS[source]
    column = floats(f, 60) + ties(f, into)
    compare_floats(
        f"cvt.{mode}.{target}.{source} {d}0, {a}1", [column], lambda bits: convert(f, into, bits, mode), into
    )


@pytest.mark.parametrize(
    ("target", "source"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16"), ("f64", "bf16")]
)
def test_floats_to_wider_floats_are_exact(target, source):
    f, into = FORMATS[source], FORMATS[target]
    d, a = FLOAT_LETTERS[target], FLOAT_LETTERS[source]
    compare_floats(
        f"cvt.{target}.{source} {d}0, {a}1", [floats(f, 60)], lambda bits: convert(f, into, bits, "rn"), into
    )


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize("how", ROUND)
def test_rounding_to_a_whole_float_keeps_the_sign_of_zero(how, type_):
    f, r = FORMATS[type_], FLOAT_LETTERS[type_]

    def expected(bits: int) -> int:
        if f.is_nan(bits) or f.is_infinite(bits):
            return bits
        return f.round(Fraction(ROUND[how](f.value(bits))), negative_zero=f.negative(bits))

    compare_floats(f"cvt.{how}.{type_}.{type_} {r}0, {r}1", [floats(f, 40) + near_integers(f)], expected, f)


def test_saturating_and_flushing_floats():
    one = F32.round(Fraction(1))

    def clamp(bits: int) -> int:
        return 0 if F32.is_nan(bits) or F32.negative(bits) else min(bits, one)

    compare("cvt.sat.f32.f32 %f0, %f1", [floats(F32)], clamp)
    compare("cvt.ftz.sat.f32.f32 %f0, %f1", [floats(F32)], lambda a: clamp(F32.flush(a)))
    compare_floats("cvt.ftz.f32.f32 %f0, %f1", [floats(F32)], F32.flush, F32)
    compare_floats(
        "cvt.ftz.f64.f32 %fd0, %f1", [floats(F32)], lambda a: convert(F32, F64, F32.flush(a), "rn"), F64
    )
    compare_floats(
        "cvt.rn.ftz.f32.f64 %f0, %fd1", [floats(F64)], lambda a: F32.flush(convert(F64, F32, a, "rn")), F32
    )


def test_relu_and_satfinite():
    def expected(bits: int) -> int:
        out = convert(F32, F16, bits, "rn")
        if F16.is_nan(out):
            return F16.nan
        return 0 if F16.negative(out) else min(out, F16.infinity - 1)

    compare_floats("cvt.rn.relu.satfinite.f16.f32 %rs0, %f1", [floats(F32)], expected, F16)
    compare_floats(
        "cvt.rn.relu.bf16.f32 %rs0, %f1",
        [floats(F32)],
        lambda a: 0 if F32.negative(a) and not F32.is_nan(a) else convert(F32, BF16, a, "rn"),
        BF16,
    )


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_two_floats_are_packed_the_first_above_the_second(type_):
    f = FORMATS[type_]
    two = grid(floats(F32, 20), floats(F32, 20), most=600)
    for mode in ("rn", "rz"):
        rows = execute(f"cvt.{mode}.{type_}x2.f32 %r0, %f1, %f2", *two)
        for a, b, (got,) in zip(*two, rows, strict=True):
            for bits, value in ((got >> 16, a), (got & 0xFFFF, b)):
                want = convert(F32, f, value, mode)
                assert bits == want or (f.is_nan(bits) and f.is_nan(want))


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32_keeps_ten_bits(mode):
    narrow = Format("tf32", 19, 11)

    def expected(bits: int) -> int:
        if F32.is_nan(bits):
            return 0x7FFFFFFF
        if F32.is_infinite(bits):
            return bits
        return narrow.round(F32.value(bits), mode, negative_zero=F32.negative(bits)) << 13

    column = [*floats(F32, 60), 0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0xBF801000]
    compare_floats(f"cvt.{mode}.tf32.f32 %r0, %f1", [column], expected, F32)


FLOAT8 = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}


@cache
def numbers_of(kind: torch.dtype) -> list[tuple[int, Fraction]]:
    """The finite numbers of a format of 8 bits, sign aside, with their bits."""
    table = torch.arange(0x80, dtype=torch.uint8).view(kind).to(torch.float64).tolist()
    return [(i, Fraction(x)) for i, x in enumerate(table) if math.isfinite(x)]


def nearest_float8(x: float, kind: torch.dtype) -> int:
    """The nearest of all numbers of the format, ties to the even one: by looking at every one."""
    if math.isnan(x):
        return 0x7F
    size = Fraction(min(abs(x), 1e6))
    best, _ = min(numbers_of(kind), key=lambda n: (abs(n[1] - size), n[0] % 2))
    return best | (0x80 if math.copysign(1, x) < 0 else 0)


@pytest.mark.parametrize("type_", FLOAT8)
def test_float8_is_the_nearest_of_all_and_sticks_at_the_largest(type_):
    kind = FLOAT8[type_]
    table = torch.arange(0x7C, dtype=torch.uint8).view(kind).to(torch.float32).numpy()
    middles = (table[1:] + table[:-1]) / 2
    values = np.concatenate(
        [table, middles, np.nextafter(middles, np.float32(9)), np.nextafter(middles, np.float32(0))]
    )
    values = np.concatenate(
        [values, -values[::7], np.array([1e9, np.inf, -np.inf, np.nan, 449, 57345, 65000], np.float32)]
    )
    values = values.astype(np.float32)
    bits = values.view(np.uint32).tolist()
    rows = execute(f"cvt.rn.satfinite.{type_}.f32 %rs0, %f1, %f2", bits, bits[::-1])
    for x, y, (got,) in zip(values.tolist(), values[::-1].tolist(), rows, strict=True):
        for part, value in ((got >> 8, x), (got & 0xFF, y)):
            want = nearest_float8(value, kind)
            assert part == want, (value, hex(part), hex(want))


@pytest.mark.parametrize("type_", FLOAT8)
def test_float8_to_f16_is_exact_and_back_from_f16_pairs(type_):
    kind = FLOAT8[type_]
    every = list(range(256))
    truth = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(kind).to(torch.float16)
    bits = truth.view(torch.int16).numpy().view(np.uint16).tolist()
    rows = execute(f"cvt.rn.f16x2.{type_} %r0, %rs1", [a | (255 - a) << 8 for a in every])
    for a, (got,) in zip(every, rows, strict=True):
        for part, want in ((got & 0xFFFF, bits[a]), (got >> 16, bits[255 - a])):
            assert part == want or (F16.is_nan(part) and F16.is_nan(want))
    finite = [a for a in every if not F16.is_nan(bits[a]) and not F16.is_infinite(bits[a])]
    rows = execute(
        f"cvt.rn.satfinite.{type_}.f16x2 %rs0, %r1", [bits[a] | bits[a ^ 0x80] << 16 for a in finite]
    )
    assert [r[0] for r in rows] == [a | (a ^ 0x80) << 8 for a in finite]
    compare(
        f"cvt.rn.relu.f16x2.{type_} %r0, %rs1", [[0x80B8, 0x38]], lambda a: bits[0x38] if a == 0x38 else 0
    )


def test_pack_clamps_and_shifts_in():
    def clamp(value: int, type_: str) -> int:
        least, most = limits(type_)
        return max(least, min(most, as_signed(value, 32))) & ((1 << width(type_)) - 1)

    two = grid(integers(32, 20), integers(32, 20), most=400)
    for type_ in ("s16", "u16"):
        compare(
            f"cvt.pack.sat.{type_}.s32 %r0, %r1, %r2",
            two,
            lambda a, b, t=type_: clamp(a, t) << 16 | clamp(b, t),
        )
    three = grid(integers(32, 20), integers(32, 20), integers(32, 5), most=400)
    for type_ in ("s8", "u8", "s4", "u4", "s2", "u2"):
        n = width(type_)
        compare(
            f"cvt.pack.sat.{type_}.s32.b32 %r0, %r1, %r2, %r3",
            three,
            lambda a, b, c, t=type_, n=n: clamp(b, t) | clamp(a, t) << n | c << 2 * n & 0xFFFFFFFF,
        )
