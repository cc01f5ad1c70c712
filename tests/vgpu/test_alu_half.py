"""f16 and bf16, alone and in pairs, against exact rational arithmetic and PyTorch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from alu_reference import BF16, F16, Format, compare, compare_floats, execute, floats, grid, ieee, same_number

from llmcourse.vgpu import half

FORMATS = {"f16": F16, "bf16": BF16}


def columns(f: Format, count: int, most: int = 900) -> list[list[int]]:
    return grid(*(floats(f, 40, i) for i in range(count)), most=most)


def operands(count: int, letter: str = "%rs") -> str:
    return ", ".join(f"{letter}{i}" for i in range(count))


def check_pair(text: str, f: Format, count: int, expected) -> None:
    """The packed form does to both halves what the single one does to one."""
    lower, upper = columns(f, count, 400), columns(f, count, 400)[::-1]
    size = min(len(lower[0]), len(upper[0]))
    packed = [
        [lo | hi << 16 for lo, hi in zip(a[:size], b[:size], strict=True)]
        for a, b in zip(lower, upper, strict=True)
    ]
    for lane, (got,) in enumerate(execute(f"{text} {operands(count + 1, '%r')}", *packed)):
        for shift, side in ((0, lower), (16, upper)):
            want = expected(*(column[lane] for column in side))
            assert same_number(f, got >> shift & 0xFFFF, want), (
                text,
                [hex(c[lane]) for c in side],
                hex(got),
                hex(want),
            )


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize(("name", "count"), [("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)])
def test_arithmetic_rounds_once(name, count, type_):
    f = FORMATS[type_]
    opcode = "fma.rn" if name == "fma" else name

    def expected(*bits: int) -> int:
        return ieee(f, name, bits)

    most = 3000 if name == "fma" else 900
    compare_floats(f"{opcode}.{type_} {operands(count + 1)}", columns(f, count, most), expected, f)
    check_pair(f"{opcode}.{type_}x2", f, count, expected)


@pytest.mark.parametrize("type_", FORMATS)
def test_fused_multiply_add_is_right_where_float32_lands_half_way(type_):
    f = FORMATS[type_]
    one = f.round(Fraction(1))
    p = f.precision
    half_unit, above = Fraction(2) ** -p, 1 + Fraction(2) ** (1 - p)
    rows = []
    for sign in (-1, 1):
        for least in range(1, 2 ** (p - 1), max(1, 2 ** (p - 5))):
            factor = f.round(half_unit * (1 + sign * least * Fraction(2) ** (1 - p)))
            rows.append((factor, f.round(above), one))
            rows.append((factor, f.round(above), f.round(above)))
    # Beyond float32's 24 bits below c: c ± half a unit ± something that float32 cannot see beside it.
    big = f.round(Fraction(2) ** (7 if type_ == "f16" else 60))
    for scale in (-6, -7, -20):
        rows.append((f.round(Fraction(2) ** scale * above), f.round(above), big))
    if type_ == "f16":  # half way between subnormal numbers
        rows.append(
            tuple(
                f.round(Fraction(x)) for x in (2**-12 * (1 + 2**-10), 2**-13 * (1 - 2**-10), 2**-15 + 2**-24)
            )
        )
    lanes = [list(column) for column in zip(*rows, strict=True)]
    compare_floats(f"fma.rn.{type_} {operands(4)}", lanes, lambda *s: ieee(f, "fma", s), f)


@pytest.mark.parametrize("type_", FORMATS)
def test_random_fused_multiply_adds(type_):
    f = FORMATS[type_]
    random = np.random.default_rng(11)
    lanes = [random.integers(0, 1 << 16, 6000).tolist() for _ in range(3)]
    compare_floats(f"fma.rn.{type_} {operands(4)}", lanes, lambda *s: ieee(f, "fma", s), f)


def clamp(f: Format, bits: int) -> int:
    if f.is_nan(bits) or f.negative(bits):
        return 0
    return min(bits, f.round(Fraction(1)))


def relu(f: Format, bits: int) -> int:
    return bits if f.is_nan(bits) or not f.negative(bits) else 0


@pytest.mark.parametrize("type_", FORMATS)
def test_relu_and_saturation(type_):
    f = FORMATS[type_]
    three = columns(f, 3)
    compare_floats(f"fma.rn.relu.{type_} {operands(4)}", three, lambda *s: relu(f, ieee(f, "fma", s)), f)
    check_pair(f"fma.rn.relu.{type_}x2", f, 3, lambda *s: relu(f, ieee(f, "fma", s)))
    if type_ == "f16":
        compare_floats(f"fma.rn.sat.f16 {operands(4)}", three, lambda *s: clamp(f, ieee(f, "fma", s)), f)
        compare_floats(f"add.sat.f16 {operands(3)}", columns(f, 2), lambda *s: clamp(f, ieee(f, "add", s)), f)


def test_ftz_flushes_subnormal_halves():
    compare("setp.eq.ftz.f16 %p0, %rs0, %rs1", [[1, 1, 0x400], [2, 0x8000, 0x401]], lambda a, b: int(a == 1))
    compare("ex2.approx.ftz.bf16 %rs0, %rs1", [[0xC2FC, 0xC2FE]], lambda a: 0x0080 * (a == 0xC2FC))
    for name in ("add", "sub", "mul"):
        compare_floats(
            f"{name}.ftz.f16 {operands(3)}",
            columns(F16, 2),
            lambda *s, n=name: ieee(F16, n, s, ftz=True),
            F16,
        )


@pytest.mark.parametrize("type_", FORMATS)
def test_signs_change_one_bit(type_):
    f = FORMATS[type_]
    one = columns(f, 1)
    compare(f"neg.{type_} %rs0, %rs1", one, lambda a: a ^ 0x8000)
    compare(f"abs.{type_} %rs0, %rs1", one, lambda a: a & 0x7FFF)
    both = [[a | b << 16 for a, b in zip(one[0], one[0][::-1], strict=True)]]
    compare(f"neg.{type_}x2 %r0, %r1", both, lambda a: a ^ 0x80008000)
    compare(f"abs.{type_}x2 %r0, %r1", both, lambda a: a & 0x7FFF7FFF)


@pytest.mark.parametrize("type_", FORMATS)
@pytest.mark.parametrize("opcode", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_extremes(opcode, type_, nan):
    f = FORMATS[type_]

    def expected(a: int, b: int) -> int:
        if f.is_nan(a) or f.is_nan(b):
            return f.nan if nan or (f.is_nan(a) and f.is_nan(b)) else (b if f.is_nan(a) else a)

        def key(bits: int) -> int:
            return -(bits & 0x7FFF) - 1 if f.negative(bits) else bits

        return (min if opcode == "min" else max)(a, b, key=key)

    zeros = grid([0, f.sign, f.nan, 1], [0, f.sign, f.nan, 1 | f.sign])
    compare_floats(f"{opcode}{nan}.{type_} {operands(3)}", zeros, expected, f)
    compare_floats(f"{opcode}{nan}.{type_} {operands(3)}", columns(f, 2), expected, f)
    check_pair(f"{opcode}{nan}.{type_}x2", f, 2, expected)


@pytest.mark.parametrize("type_", FORMATS)
def test_comparisons_of_halves(type_):
    f = FORMATS[type_]
    one = f.round(Fraction(1))
    two = columns(f, 2)

    def less(a: int, b: int) -> bool:
        return not f.is_nan(a) and not f.is_nan(b) and _number(f, a) < _number(f, b)

    compare(f"setp.lt.{type_} %p0, %rs0, %rs1", two, lambda a, b: int(less(a, b)))
    compare(f"setp.geu.{type_} %p0, %rs0, %rs1", two, lambda a, b: int(not less(a, b)))
    compare(f"set.lt.{type_}.{type_} {operands(3)}", two, lambda a, b: one * less(a, b))
    compare(f"set.lt.u32.{type_} %r0, %rs0, %rs1", two, lambda a, b: 0xFFFFFFFF * less(a, b))
    check_pair(f"set.lt.{type_}x2.{type_}x2", f, 2, lambda a, b: one * less(a, b))
    packed = [[x | y << 16 for x, y in zip(c, c[::-1], strict=True)] for c in two]

    def both(a: int, b: int) -> tuple[int, int]:
        return int(less(a & 0xFFFF, b & 0xFFFF)), int(less(a >> 16, b >> 16))

    compare(f"setp.lt.{type_}x2 %p0|%p1, %r0, %r1", packed, both)
    compare(
        f"set.lt.u32.{type_}x2 {operands(3, '%r')}",
        packed,
        lambda a, b: sum(0xFFFF * t << 16 * i for i, t in enumerate(both(a, b))),
    )


def _number(f: Format, bits: int) -> Fraction:
    if f.is_infinite(bits):
        return Fraction(-(10**60) if f.negative(bits) else 10**60)
    return f.value(bits)


@pytest.mark.parametrize(
    "text", ["ex2.approx.f16", "tanh.approx.f16", "ex2.approx.ftz.bf16", "tanh.approx.bf16"]
)
def test_special_functions_are_rounded_from_the_truth(text):
    type_ = text.rpartition(".")[2]
    kind = torch.float16 if type_ == "f16" else torch.bfloat16
    every = np.arange(1 << 16, dtype=np.uint16)
    x = torch.from_numpy(every.view(np.int16).copy()).view(kind).to(torch.float64)
    want = torch.exp2(x) if text.startswith("ex2") else torch.tanh(x)
    got = np.array([r[0] for r in execute(f"{text} %rs0, %rs1", every.tolist())], np.uint16)
    value = torch.from_numpy(got.view(np.int16)).view(kind).to(torch.float64)
    same = (value == want.to(torch.float32).to(kind).to(torch.float64)) | (value.isnan() & want.isnan())
    unit = torch.clamp(want.abs(), min=2.0**-14) * (2.0**-10 if type_ == "f16" else 2.0**-7)
    close = (value - want).abs() <= unit * 0.51
    assert (same | close).all()
    packed = execute(f"{text}x2 %r0, %r1", (every.astype(np.uint32) | every.astype(np.uint32) << 16).tolist())
    assert [p[0] for p in packed] == [int(g) | int(g) << 16 for g in got]


@pytest.mark.parametrize("type_", FORMATS)
def test_every_half_survives_the_way_to_float32_and_back(type_):
    f = FORMATS[type_]
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = half.widened(every, type_)
    kind = torch.float16 if type_ == "f16" else torch.bfloat16
    truth = torch.from_numpy(every.view(np.int16).copy()).view(kind).float().numpy()
    assert np.array_equal(wide, truth, equal_nan=True)
    back = half.rounded(wide, type_)
    want = [f.nan if f.is_nan(b) else b for b in every.tolist()]
    assert all(same_number(f, g, w) for g, w in zip(back.tolist(), want, strict=True))


@pytest.mark.parametrize("type_", FORMATS)
def test_without_pytorch_conversions_give_the_same(type_, monkeypatch):
    random = np.random.default_rng(2)
    x = random.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    bits = random.integers(0, 1 << 16, 5000, dtype=np.uint16)
    with np.errstate(all="ignore"):
        fast = half.rounded(x, type_), half.widened(bits, type_)
        monkeypatch.setattr(half, "_torch", lambda: None)
        slow = half.rounded(x, type_), half.widened(bits, type_)
    assert np.array_equal(fast[0], slow[0])
    assert np.array_equal(fast[1], slow[1], equal_nan=True)
