"""float32 and float64 arithmetic against exact rational arithmetic, in every rounding mode."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from alu_reference import F32, F64, Format, compare_floats, compiled, execute, floats, grid, ieee

from llmcourse.vgpu import fused
from llmcourse.vgpu.vector import PIECE

MODES = ("rn", "rz", "rm", "rp")
FORMATS = {"f32": ("%f", F32), "f64": ("%fd", F64)}


def columns(f: Format, count: int, seed: int = 0, most: int = 700) -> list[list[int]]:
    return grid(*(floats(f, 40, seed + i) for i in range(count)), most=most, seed=seed)


def check(
    opcode: str, name: str, type_: str, mode: str, count: int, *, ftz: bool = False, most: int = 700
) -> None:
    letter, f = FORMATS[type_]
    text = f"{opcode}.{type_} " + ", ".join(f"{letter}{i}" for i in range(count + 1))

    def expected(*bits: int) -> int:
        return ieee(f, name, bits, mode, ftz=ftz)

    compare_floats(text, columns(f, count, most=most), expected, f)


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_binary_operations_round_once_in_every_mode(name, mode, type_):
    check(f"{name}.{mode}", name, type_, mode, 2)


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_fused_multiply_add_rounds_once_in_every_mode(mode, type_):
    check(f"fma.{mode}", "fma", type_, mode, 3, most=1500)


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_square_roots_and_reciprocals_round_once_in_every_mode(mode, type_):
    check(f"sqrt.{mode}", "sqrt", type_, mode, 1)
    letter, f = FORMATS[type_]
    one = f.round(Fraction(1))
    compare_floats(
        f"rcp.{mode}.{type_} {letter}0, {letter}1", columns(f, 1), lambda a: ieee(f, "div", (one, a), mode), f
    )


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_without_a_mode_they_round_to_nearest(name, type_):
    check(name, name, type_, "rn", 2)


@pytest.mark.parametrize("mode", MODES)
def test_ftz_flushes_what_goes_in_and_what_comes_out(mode):
    for name, count in (("add", 2), ("sub", 2), ("mul", 2), ("div", 2), ("fma", 3), ("sqrt", 1)):
        check(f"{name}.{mode}.ftz", name, "f32", mode, count, ftz=True, most=500)


@pytest.mark.parametrize("way", [fused.fma_f32, fused.fma_f32_by_float64])
def test_fma_is_right_where_float64_lands_half_way(way):
    # (1 + 2^-23) · 2^-24 (1 ∓ 2^-23) is a hair below or above half a unit of 1; float64 does not see which.
    factor, one = np.float32(1 + 2**-23), np.float32(1)
    below, above = (np.float32(2**-24 * (1 + sign * 2**-23)) for sign in (-1, 1))
    for other, want in ((below, one), (np.float32(2**-24), factor), (above, factor)):
        lanes = [np.full(5, x) for x in (factor, other, one)]
        assert (way(*lanes) == want).all(), (way, other)
    row = [int(x.view(np.uint32)) for x in (factor, below, one)]
    assert np.float64(factor) * np.float64(below) + 1 == 1 + 2.0**-24  # half way: rounded twice it is luck
    assert ieee(F32, "fma", row) == int(one.view(np.uint32))


@pytest.mark.parametrize("way", [fused.fma_f32, fused.fma_f32_by_float64])
def test_fma_is_right_half_way_between_subnormal_numbers(way):
    # 2^-150 (1 − 2^-46) is a hair below half the distance of subnormal numbers.
    factors = np.float32(2.0**-75 * (1 + 2.0**-23)), np.float32(2.0**-75 * (1 - 2.0**-23))
    odd = np.float32(2.0**-127 + 2.0**-149)
    lanes = [np.full(5, x) for x in (*factors, odd)]
    assert (way(*lanes) == odd).all()


@pytest.mark.parametrize("way", [fused.fma_f32, fused.fma_f32_by_float64])
def test_every_way_to_fuse_float32_agrees_with_rationals(way):
    random = np.random.default_rng(5)
    n = 400
    a, b = (random.standard_normal(n).astype(np.float32) for _ in range(2))
    half_unit = np.float32(2.0**-24) * (1 + random.integers(-2, 3, n) * np.float32(2.0**-23))
    sets = [
        (a, b, random.standard_normal(n).astype(np.float32)),
        (a, b, -(a * b)),
        (half_unit.astype(np.float32), np.full(n, 1 + 2**-23, np.float32), np.float32(1) + 0 * a),
        (a * np.float32(2.0**-70), b * np.float32(2.0**-70), a * np.float32(2.0**-130)),
        (a * np.float32(2.0**-74), b * np.float32(2.0**-74), a * np.float32(2.0**-148)),
    ]
    for lanes in sets:
        with np.errstate(all="ignore"):
            got = way(*lanes).view(np.uint32)
        rows = zip(*(x.view(np.uint32).tolist() for x in lanes), strict=True)
        want = [ieee(F32, "fma", row) for row in rows]
        assert got.tolist() == want


@pytest.mark.parametrize("way", [fused.fma_f64, fused.fma_f64_by_parts])
def test_every_way_to_fuse_float64_agrees_with_rationals(way):
    random = np.random.default_rng(6)
    n = 300
    a, b, c = (random.standard_normal(n) for _ in range(3))
    scale = 2.0 ** random.integers(-1000, 1000, n)
    tiny = a * 2.0**-1000
    sets = [
        (a, b, c),
        (a, b, -(a * b)),
        (a * scale, b, c * scale),
        (a * scale, b * scale, c),
        (a, b, c * scale),
        (tiny, b, -(tiny * b)),
    ]
    for lanes in sets:
        with np.errstate(all="ignore"):
            got = way(*lanes).view(np.uint64)
        rows = zip(*(x.view(np.uint64).tolist() for x in lanes), strict=True)
        want = [ieee(F64, "fma", row) for row in rows]
        assert all(
            g == w or (F64.is_nan(g) and F64.is_nan(w)) for g, w in zip(got.tolist(), want, strict=True)
        )


def test_a_library_that_rounds_twice_is_not_taken_for_fused():
    def twice(a, b, c):
        return a * b + c

    assert not fused._is_fused(twice, np.dtype(np.float32))
    assert not fused._is_fused(twice, np.dtype(np.float64))
    assert fused._is_fused(fused.fma_f32_by_float64, np.dtype(np.float32))


def test_fma_of_many_lanes_goes_through_every_piece():
    n = 2 * PIECE + 17
    random = np.random.default_rng(7)
    a, b, c = (random.standard_normal(n).astype(np.float32) for _ in range(3))
    got = compiled("fma.rn.f32 %f0, %f1, %f2, %f3").apply(a, b, c)
    assert np.array_equal(got, fused.fma_f32_by_float64(a, b, c))


def test_saturation_clamps_to_zero_and_one_and_makes_nan_zero():
    def expected(a: int, b: int) -> int:
        out = ieee(F32, "add", (a, b))
        if F32.is_nan(out) or F32.negative(out):
            return 0
        return min(out, F32.round(Fraction(1)))

    compare_floats("add.sat.f32 %f0, %f1, %f2", columns(F32, 2), expected, F32)


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize("opcode", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_minimum_and_maximum_order_zeros_and_treat_nan_as_asked(opcode, type_, nan):
    letter, f = FORMATS[type_]

    def expected(a: int, b: int) -> int:
        if f.is_nan(a) or f.is_nan(b):
            return f.nan if nan or (f.is_nan(a) and f.is_nan(b)) else (b if f.is_nan(a) else a)

        def key(bits: int) -> int:
            return -(bits & ~f.sign) - 1 if f.negative(bits) else bits

        return (min if opcode == "min" else max)(a, b, key=key)

    text = f"{opcode}{nan}.{type_} {letter}0, {letter}1, {letter}2"
    zeros = grid([0, f.sign, f.nan, 1], [0, f.sign, f.nan, 1 | f.sign])
    compare_floats(text, zeros, expected, f)
    compare_floats(text, columns(f, 2), expected, f)


@pytest.mark.parametrize("type_", FORMATS)
def test_sign_operations_change_the_sign_bit_alone(type_):
    letter, f = FORMATS[type_]
    one = columns(f, 1)
    compare_floats(f"neg.{type_} {letter}0, {letter}1", one, lambda a: a ^ f.sign, f)
    compare_floats(f"abs.{type_} {letter}0, {letter}1", one, lambda a: a & ~f.sign, f)
    compare_floats(
        f"copysign.{type_} {letter}0, {letter}1, {letter}2",
        columns(f, 2),
        lambda a, b: (a & f.sign) | (b & ~f.sign),
        f,
    )


@pytest.mark.parametrize("type_", FORMATS)
def test_testp_tells_the_classes_of_numbers_apart(type_):
    letter, f = FORMATS[type_]
    classes = {
        "finite": lambda a: not f.is_nan(a) and not f.is_infinite(a),
        "infinite": f.is_infinite,
        "number": lambda a: not f.is_nan(a),
        "notanumber": f.is_nan,
        # Zero is normal on an H100: neither subnormal nor infinite nor NaN.
        "normal": lambda a: (bool(a & f.infinity) or not a & ~f.sign) and (a & f.infinity) != f.infinity,
        "subnormal": lambda a: not a & f.infinity and bool(a & ~f.sign),
    }
    for name, holds in classes.items():
        rows = execute(f"testp.{name}.{type_} %p0, {letter}1", *columns(f, 1))
        assert [bool(r[0]) for r in rows] == [bool(holds(a)) for a in columns(f, 1)[0]]


APPROXIMATE = {
    "ex2.approx.f32": np.exp2,
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "tanh.approx.f32": np.tanh,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "rcp.approx.ftz.f32": lambda x: 1 / x,
    "sqrt.approx.f32": np.sqrt,
}


@pytest.mark.parametrize("text", APPROXIMATE)
def test_approximations_are_within_a_unit_of_the_truth(text):
    a = columns(F32, 1)[0]
    x = np.array(a, np.uint32).view(np.float32)
    if ".ftz" in text:
        x = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
    with np.errstate(all="ignore"):
        want = APPROXIMATE[text](x.astype(np.longdouble)).astype(np.float64)
    got = np.array([r[0] for r in execute(f"{text} %f0, %f1", a)], np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        narrow = want.astype(np.float32)
        if ".ftz" in text:
            narrow = np.where(np.abs(narrow) < 2.0**-126, np.copysign(np.float32(0), narrow), narrow)
        unit = np.spacing(np.abs(narrow))
        close = np.abs(got.astype(np.float64) - narrow) <= unit
    same = (got == narrow) | (np.isnan(got) & np.isnan(narrow))
    assert (same | close).all(), x[~(same | close)]


@pytest.mark.parametrize(("name", "exact"), [("sin", np.sin), ("cos", np.cos)])
def test_sines_are_as_near_as_ptx_states_within_a_turn(name, exact):
    x = np.linspace(-np.pi, np.pi, 5001).astype(np.float32)
    got = compiled(f"{name}.approx.f32 %f0, %f1").apply(x)
    assert np.abs(got - exact(x.astype(np.float64))).max() <= 2.0**-20.5


def test_sines_are_taken_of_turns_in_float32():
    """As on an H100: the angle over 2π is rounded toward zero and flushed before the sine is taken."""
    tiny, least = np.float32(2.0**-149), np.float32(2.0**-126)
    sine, cosine = (compiled(f"{name}.approx.f32 %f0, %f1") for name in ("sin", "cos"))
    with np.errstate(all="ignore"):
        small = sine.apply(np.array([tiny, -tiny, least, np.float32(6.5) * least]))
        assert small.tolist() == [0, 0, 0, pytest.approx(float(6.5 * least), rel=1e-6)]
        assert np.signbit(small).tolist() == [False, True, False, False]
        x = columns(F32, 1)[0]
        values = np.array(x, np.uint32).view(np.float32)
        got = sine.apply(values), cosine.apply(values)
        for angle, s, c in zip(values, *got, strict=True):
            if not np.isfinite(angle):
                assert np.isnan(s)
                assert np.isnan(c)
                continue
            exact = Fraction(float(angle)) * Fraction(float(np.float32(0.15915494)))
            turns = Fraction(float(np.array(F32.round(exact, "rz"), np.uint32).view(np.float32)))
            part = float(turns - math.floor(turns)) * 2 * math.pi
            assert abs(s - math.sin(part)) < 1e-7
            assert abs(c - math.cos(part)) < 1e-7


def test_coarse_reciprocals_keep_the_upper_word_and_newton_makes_them_exact():
    random = np.random.default_rng(8)
    x = np.abs(random.standard_normal(500)) + 0.1
    guess = compiled("rcp.approx.ftz.f64 %fd0, %fd1").apply(x)
    assert (guess.view(np.uint64) & 0xFFFFFFFF == 0).all()
    assert np.abs(guess * x - 1).max() < 2.0**-19
    root = compiled("rsqrt.approx.ftz.f64 %fd0, %fd1").apply(x)
    assert np.abs(root * root * x - 1).max() < 2.0**-18
    with np.errstate(divide="ignore"):
        assert np.isinf(compiled("rcp.approx.ftz.f64 %fd0, %fd1").apply(np.array([1e-310]))).all()


def test_approximate_division_by_a_huge_number_is_zero():
    a = np.array([1, -1, np.inf, np.nan, 3e38, 1], np.float32)
    b = np.array([2.0**127, 2.0**127, 2.0**127, 2.0**127, np.inf, 2.0**126], np.float32)
    got = compiled("div.approx.f32 %f0, %f1, %f2").apply(a, b)
    assert np.array_equal(got, np.array([0, 0, np.nan, np.nan, 0, 2.0**-126], np.float32), equal_nan=True)
    full = compiled("div.full.f32 %f0, %f1, %f2").apply(a, b)
    assert full[0] == np.float32(2.0**-127)


def test_pairs_of_float32_work_on_both_words():
    a, b, c = (np.array([x, y], np.float32).view(np.uint64) for x, y in ((1, 2), (3, 4), (5, 6)))
    got = compiled("fma.rn.f32x2 %rd0, %rd1, %rd2, %rd3").apply(a, b, c)
    assert got.view(np.float32).tolist() == [8, 14]


def test_flops_count_as_nsight_compute_does():
    expected = {
        "add.f32 %f0, %f1, %f2": ("flops_fp32", 1),
        "mul.rn.ftz.f32 %f0, %f1, %f2": ("flops_fp32", 1),
        "fma.rn.f32 %f0, %f1, %f2, %f3": ("flops_fp32", 2),
        "fma.rn.f64 %fd0, %fd1, %fd2, %fd3": ("flops_fp64", 2),
        "sub.f64 %fd0, %fd1, %fd2": ("flops_fp64", 1),
        "div.rn.f32 %f0, %f1, %f2": None,
        "ex2.approx.f32 %f0, %f1": None,
        "add.s32 %r0, %r1, %r2": None,
        "fma.rn.f16x2 %r0, %r1, %r2, %r3": ("flops_fp16", 4),
        "add.f16 %rs0, %rs1, %rs2": ("flops_fp16", 1),
        "mul.bf16x2 %r0, %r1, %r2": ("flops_fp16", 2),
    }
    assert {text: compiled(text).flops for text in expected} == expected
