"""Comparisons and choices."""

from __future__ import annotations

import numpy as np
import pytest
from alu_reference import F32, F64, Format, as_signed, compare, compiled, execute, floats, grid, integers

LETTERS = {"16": "%rs", "32": "%r", "64": "%rd"}
ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("type_", ["s16", "u16", "b16", "s32", "u32", "b32", "s64", "u64", "b64"])
def test_integers_compare_by_their_sign(type_):
    bits = int(type_[1:])
    r = LETTERS[type_[1:]]
    two = grid(integers(bits, 20), integers(bits, 20), most=1500)

    def read(value: int) -> int:
        return as_signed(value, bits) if type_[0] == "s" else value

    for name, holds in ORDERED.items():
        if type_[0] == "b" and name not in ("eq", "ne"):
            continue
        compare(
            f"setp.{name}.{type_} %p0, {r}1, {r}2",
            two,
            lambda a, b, holds=holds: int(holds(read(a), read(b))),
        )
    if type_[0] == "u":
        for name, same in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            compare(f"setp.{name}.{type_} %p0, {r}1, {r}2", two, lambda a, b, h=ORDERED[same]: int(h(a, b)))


def float_holds(f: Format, name: str, a: int, b: int) -> bool:
    """A comparison by the book: unordered if either is NaN; −0 equals +0."""
    nan = f.is_nan(a) or f.is_nan(b)
    if name == "num":
        return not nan
    if name == "nan":
        return nan
    if nan:
        return name.endswith("u")

    def key(bits: int) -> int:
        size = bits & ~f.sign
        return -size if f.negative(bits) else size

    return ORDERED[name.removesuffix("u")](key(a), key(b))


FLOAT_NAMES = [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"]


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_float_comparisons_are_ordered_or_not(name):
    for letter, f in (("%f", F32), ("%fd", F64)):
        two = grid(floats(f, 10), floats(f, 10), most=800)
        compare(
            f"setp.{name}.{f.name} %p0, {letter}1, {letter}2",
            two,
            lambda a, b, f=f: int(float_holds(f, name, a, b)),
        )
    two = grid(floats(F32, 10), floats(F32, 10), most=800)
    compare(
        f"setp.{name}.ftz.f32 %p0, %f1, %f2",
        two,
        lambda a, b: int(float_holds(F32, name, F32.flush(a), F32.flush(b))),
    )


def test_setp_combines_with_a_predicate_and_gives_the_opposite_too():
    sources = grid(integers(32, 6), integers(32, 6), [0, 1], most=2000)

    def combined(operation):
        return lambda a, b, c: (int(operation(a < b, bool(c))), int(operation(a >= b, bool(c))))

    compare("setp.lt.and.u32 %p0|%p1, %r1, %r2, %p2", sources, combined(lambda t, c: t and c))
    compare("setp.lt.or.u32 %p0|%p1, %r1, %r2, %p2", sources, combined(lambda t, c: t or c))
    compare("setp.lt.xor.u32 %p0|%p1, %r1, %r2, !%p2", sources, combined(lambda t, c: t != (not c)))
    compare("setp.lt.and.u32 %p0, %r1, %r2, !%p2", sources, lambda a, b, c: int(a < b and not c))
    two = grid(integers(32, 6), integers(32, 6))
    compare("setp.lt.u32 %p0|%p1, %r1, %r2", two, lambda a, b: (int(a < b), int(a >= b)))
    assert compiled("setp.lt.u32 _|%p1, %r1, %r2").destinations[0] is None


def test_set_gives_ones_or_one():
    two = grid(floats(F32, 10), floats(F32, 10), most=600)
    compare("set.lt.u32.f32 %r0, %f1, %f2", two, lambda a, b: 0xFFFFFFFF * float_holds(F32, "lt", a, b))
    compare("set.nan.f32.f32 %f0, %f1, %f2", two, lambda a, b: 0x3F800000 * float_holds(F32, "nan", a, b))
    compare("set.gtu.f32.f32 %r0, %f1, %f2", two, lambda a, b: 0x3F800000 * float_holds(F32, "gtu", a, b))
    pairs = grid(integers(32, 8), integers(32, 8), [0, 1], most=800)
    compare(
        "set.lt.and.s32.s32 %r0, %r1, %r2, %p1",
        pairs,
        lambda a, b, c: 0xFFFFFFFF * (as_signed(a, 32) < as_signed(b, 32) and c),
    )


@pytest.mark.parametrize("type_", ["b16", "u16", "s32", "b32", "f32", "u64", "f64"])
def test_selp_picks_by_a_predicate(type_):
    r = {"f32": "%f", "f64": "%fd"}.get(type_) or LETTERS[type_[1:]]
    bits = int(type_[1:])
    sources = grid(integers(bits, 10), integers(bits, 10), [0, 1], most=500)
    compare(f"selp.{type_} {r}0, {r}1, {r}2, %p1", sources, lambda a, b, p: a if p else b)


def test_selp_of_two_constants_follows_the_predicate():
    compare("selp.u32 %r0, 1, 0, %p1", [[0, 1, 1, 0]], lambda p: p)
    compare("selp.b16 %rs0, -1, 0, %p1", [[0, 1]], lambda p: 0xFFFF * p)


def test_slct_picks_by_a_sign():
    sources = grid(integers(32, 5), integers(32, 5), integers(32, 5), most=500)
    compare("slct.b32.s32 %r0, %r1, %r2, %r3", sources, lambda a, b, c: a if as_signed(c, 32) >= 0 else b)
    nan, minus_zero = 0x7FC00000, 0x80000000
    rows = execute("slct.u32.f32 %r0, %r1, %r2, %f3", [1] * 4, [2] * 4, [nan, minus_zero, 0xBF800000, 0])
    assert rows == [(2,), (1,), (2,), (1,)]


def test_select_takes_any_mask():
    random = np.random.default_rng(0)
    from llmcourse.vgpu.vector import select

    for dtype in (np.float32, np.float64, np.uint16, np.int64, np.bool_):
        a, b = (random.integers(0, 2, 1000).astype(dtype) for _ in range(2))
        p = random.integers(0, 2, 1000).astype(bool)
        assert np.array_equal(select(p, a, b), np.where(p, a, b))
