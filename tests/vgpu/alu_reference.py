"""Arithmetic by definition, for the tests of the PTX machine's: Python integers and fractions, lane by lane.

Nothing here uses the package's own arithmetic; only the parser, to make instructions from text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np

from llmcourse.vgpu import ptx
from llmcourse.vgpu.alu import Alu, compile_alu
from llmcourse.vgpu.isa import DTYPES, Instruction

HEADER = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k()
{
    .reg .pred %p<9>;  .reg .b16 %rs<9>;  .reg .b32 %r<9>;  .reg .b64 %rd<9>;
    .reg .f32 %f<9>;   .reg .f64 %fd<9>;
"""


@cache
def instruction(text: str) -> Instruction:
    """`add.s32 %r0, %r1, %r2` as the parser gives it; %p, %rs, %r, %rd, %f and %fd are declared."""
    module = ptx.parse(f"{HEADER}    {text};\n    ret;\n}}\n")
    return module.kernels["k"].code[0]


def compiled(text: str) -> Alu:
    alu = compile_alu(instruction(text))
    assert alu is not None, text
    return alu


def bits_of(value) -> list[int]:
    """A result's bits, one integer a lane."""
    array = np.atleast_1d(np.asarray(value))
    if array.dtype.kind == "b":
        return [int(x) for x in array]
    return [int(x) for x in np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")]


def from_bits(bits: Sequence[int], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        return np.array([bool(b) for b in bits])
    return np.array([b & ((1 << 8 * dtype.itemsize) - 1) for b in bits], f"u{dtype.itemsize}").view(dtype)


def execute(text: str, *operands: Sequence[int]) -> list[tuple[int, ...]]:
    """The bits of every result in every lane, given the bits of every source register.

    Also checks the contract: arrays, scalars and mixtures give the same; no argument is written to; results
    have their registers' dtype, and are scalars only where all sources are.
    """
    alu = compiled(text)
    dtypes = [np.dtype("?") if s.name == "%cc" else DTYPES[s.type] for s in alu.sources]  # type: ignore[union-attr]
    assert len(operands) == len(dtypes), (text, alu.sources)
    values = [from_bits(b, d) for b, d in zip(operands, dtypes, strict=True)]
    for value in values:
        value.flags.writeable = False
    results = _apply(alu, *values)
    count = len(operands[0]) if operands else 1
    for result, register in zip(results, alu.destinations, strict=True):
        if register is None:
            continue
        assert result.dtype == DTYPES[register.type], (text, result.dtype, register)
        if operands:
            assert isinstance(result, np.ndarray), text
            assert result.shape == (count,), (text, result.shape)
    rows = list(zip(*map(bits_of, results), strict=True))
    for lane in range(0, count, max(1, count // 12)):
        _check_scalars(text, alu, values, lane, results)
    if len(values) > 1:
        _check_mixture(text, alu, values, count // 2)
    return rows


def _apply(alu: Alu, *values) -> tuple:
    with np.errstate(all="ignore"):
        results = alu.apply(*values)
    return results if isinstance(results, tuple) else (results,)


def _check_scalars(text: str, alu: Alu, values: list, lane: int, results: tuple) -> None:
    scalars = _apply(alu, *(v[lane] for v in values))
    for scalar, result, register in zip(scalars, results, alu.destinations, strict=True):
        if register is None:
            continue
        assert not isinstance(scalar, np.ndarray), (text, "an array from scalars")
        assert scalar.dtype == result.dtype, text
        if values:
            same = bits_of(scalar)[0] == bits_of(result)[lane]
            assert same or (scalar != scalar and result[lane] != result[lane]), (
                f"{text}: scalar {scalar!r}, lane {lane} of the array {result[lane]!r}"
            )


def _check_mixture(text: str, alu: Alu, values: list, lane: int) -> None:
    for scalar_at in range(len(values)):
        mixed = [v[lane] if i == scalar_at else v for i, v in enumerate(values)]
        spread = [np.full(len(v), v[lane]) if i == scalar_at else v for i, v in enumerate(values)]
        for a, b in zip(_apply(alu, *mixed), _apply(alu, *spread), strict=True):
            assert isinstance(a, np.ndarray), (text, scalar_at)
            assert a.shape == b.shape, (text, scalar_at)
            same = (a == b) | ((a != a) & (b != b))
            assert same.all(), (text, scalar_at)


# ---- numbers to try


def integers(bits: int, count: int = 60, seed: int = 0) -> list[int]:
    """Edges of signed and unsigned types, and random patterns."""
    top = 1 << (bits - 1)
    edges = [0, 1, 2, 3, 5, 7, 31, 32, 33, 63, 64, 255, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2]
    random = np.random.default_rng(seed)
    edges += [int(random.integers(0, 2**63)) >> int(random.integers(0, 63)) for _ in range(count)]
    edges += [(-e) & (2 * top - 1) for e in edges[-count // 2 :]]
    return [e & (2 * top - 1) for e in edges]


def grid(*columns: Sequence[int], most: int = 1500, seed: int = 1) -> list[list[int]]:
    """Every combination of the columns' entries, or a random choice of them if there are too many."""
    total = math.prod(map(len, columns))
    if total <= most:
        return [list(column) for column in zip(*itertools.product(*columns), strict=True)]
    random = np.random.default_rng(seed)
    return [[column[i] for i in random.integers(0, len(column), most)] for column in columns]


def as_signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def compare(
    text: str, columns: Sequence[Sequence[int]], expected: Callable[..., int | tuple[int, ...]]
) -> None:
    """Every lane's results equal what `expected` says of its sources' bits."""
    for lane, row in enumerate(execute(text, *columns)):
        source = tuple(c[lane] for c in columns)
        want = expected(*source)
        want = want if isinstance(want, tuple) else (want,)
        assert row == want, (
            f"{text}: {[hex(s) for s in source]} → {list(map(hex, row))}, not {list(map(hex, want))}"
        )


# ---- floating-point formats


@dataclass(frozen=True)
class Format:
    """A binary format of IEEE 754: `precision` counts the implicit bit."""

    name: str
    bits: int
    precision: int

    @property
    def exponent_bits(self) -> int:
        return self.bits - self.precision

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << (self.precision - 1)

    @property
    def nan(self) -> int:
        return self.infinity | 1 << (self.precision - 2)

    def is_nan(self, bits: int) -> bool:
        return bits & ~self.sign > self.infinity

    def is_infinite(self, bits: int) -> bool:
        return bits & ~self.sign == self.infinity

    def negative(self, bits: int) -> bool:
        return bool(bits & self.sign)

    def value(self, bits: int) -> Fraction:
        """The exact value of a finite number."""
        field = bits >> (self.precision - 1) & ((1 << self.exponent_bits) - 1)
        fraction = bits & ((1 << (self.precision - 1)) - 1)
        if field:
            fraction |= 1 << (self.precision - 1)
        scale = max(field, 1) - self.bias - (self.precision - 1)
        magnitude = Fraction(fraction) * Fraction(2) ** scale
        return -magnitude if self.negative(bits) else magnitude

    def round(self, exact: Fraction, mode: str = "rn", *, negative_zero: bool = False) -> int:
        """The bits of the number that `exact` is rounded to."""
        if exact == 0:
            return self.sign if negative_zero else 0
        negative, size = exact < 0, abs(exact)
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        if Fraction(2) ** exponent > size:
            exponent -= 1
        exponent = max(exponent, 1 - self.bias)
        quantum = Fraction(2) ** (exponent - self.precision + 1)
        count, rest = divmod(size, quantum)
        if mode == "rn":
            up = rest * 2 > quantum or (rest * 2 == quantum and count % 2 == 1)
        elif mode == "rna":
            up = rest * 2 >= quantum
        else:
            up = rest != 0 and {"rz": False, "rm": negative, "rp": not negative}[mode]
        rounded = (count + up) * quantum
        sign = self.sign if negative else 0
        if rounded >= Fraction(2) ** (self.bias + 1):
            away = (
                mode in ("rn", "rna") or up or (mode == "rp" and not negative) or (mode == "rm" and negative)
            )
            return sign | (self.infinity if away else self.infinity - 1)
        whole = int(rounded / quantum)
        if whole >> self.precision:
            whole, exponent = whole >> 1, exponent + 1
        if whole >> (self.precision - 1):
            field = exponent + self.bias
            return sign | field << (self.precision - 1) | (whole & ((1 << (self.precision - 1)) - 1))
        return sign | whole

    def flush(self, bits: int) -> int:
        """Subnormal numbers become zero."""
        subnormal = not bits & self.infinity
        return bits & self.sign if subnormal else bits


F16, BF16 = Format("f16", 16, 11), Format("bf16", 16, 8)
F32, F64 = Format("f32", 32, 24), Format("f64", 64, 53)


def floats(format_: Format, count: int = 60, seed: int = 0) -> list[int]:
    """Zeros, subnormal numbers, neighbours of powers of two, the largest, infinity, NaN; random ones."""
    f = format_
    one = f.bias << (f.precision - 1)
    least_normal = 1 << (f.precision - 1)
    half_bits = 1 << (f.precision - 2)
    edges = [
        0,
        1,
        2,
        3,
        least_normal - 1,
        least_normal,
        least_normal + 1,
        one - 1,
        one,
        one + 1,
        one + half_bits,
    ]
    edges += [
        one - (1 << (f.precision - 1)),
        one + (1 << (f.precision - 1)),
        f.infinity - 1,
        f.infinity,
        f.nan,
    ]
    random = np.random.default_rng(seed)
    span = min(12, (1 << (f.exponent_bits - 2)))
    for _ in range(count):
        near = f.bias + int(random.integers(-span, span))
        edges.append(near << (f.precision - 1) | int(random.integers(0, 2**62)) & (least_normal - 1))
        edges.append(int(random.integers(0, 2**62)) & (f.infinity - 1))
    return edges + [e | f.sign for e in edges]


Operation = Callable[..., Fraction]


def ieee(
    f: Format,
    name: str,
    operands: Sequence[int],
    mode: str = "rn",
    *,
    ftz: bool = False,
    into: Format | None = None,
) -> int:
    """add, sub, mul, div, sqrt, fma by the book: the bits of the one right answer (f.nan for any NaN)."""
    into = into or f
    if ftz:
        operands = [f.flush(b) for b in operands]
    if name == "sub":
        a, b = operands
        name, operands = "add", [a, b if f.is_nan(b) else b ^ f.sign]
    if any(f.is_nan(b) for b in operands):
        return into.nan
    out = _special(f, name, operands, into)
    if out is None:
        values = [f.value(b) for b in operands]
        signs = [f.negative(b) for b in operands]
        if name == "sqrt":
            out = _square_root(f, operands[0], mode)
        else:
            exact = {
                "add": lambda a, b: a + b,
                "mul": lambda a, b: a * b,
                "div": lambda a, b: a / b,
                "fma": lambda a, b, c: a * b + c,
            }[name](*values)
            if name == "add":
                negative_zero = signs[0] if signs[0] == signs[1] else mode == "rm"
            elif name == "fma":
                product = signs[0] ^ signs[1]
                negative_zero = product if product == signs[2] else mode == "rm"
            else:
                negative_zero = signs[0] ^ signs[1]
            out = into.round(exact, mode, negative_zero=negative_zero)
    return into.flush(out) if ftz else out


def _special(f: Format, name: str, operands: Sequence[int], into: Format) -> int | None:
    """Answers that involve infinity, or dividing by zero."""
    infinite = [f.is_infinite(b) for b in operands]
    negative = [f.negative(b) for b in operands]
    zero = [not b & ~f.sign for b in operands]

    def infinity(sign: bool) -> int:
        return into.infinity | (into.sign if sign else 0)

    if name == "sqrt":
        if negative[0] and not zero[0]:
            return into.nan
        return infinity(False) if infinite[0] else None
    if name == "add":
        if infinite[0] and infinite[1]:
            return infinity(negative[0]) if negative[0] == negative[1] else into.nan
        return next((infinity(n) for i, n in zip(infinite, negative, strict=True) if i), None)
    sign = negative[0] ^ negative[1]
    if name == "div":
        if (infinite[0] and infinite[1]) or (zero[0] and zero[1]):
            return into.nan
        if infinite[0] or zero[1]:
            return infinity(sign)
        return (into.sign if sign else 0) if infinite[1] else None
    if (infinite[0] and zero[1]) or (zero[0] and infinite[1]):
        return into.nan
    product = infinite[0] or infinite[1]
    if name == "mul":
        return infinity(sign) if product else None
    if product and infinite[2]:
        return infinity(sign) if sign == negative[2] else into.nan
    if product or infinite[2]:
        return infinity(sign if product else negative[2])
    return None


def _square_root(f: Format, bits: int, mode: str) -> int:
    exact = f.value(bits)
    if exact == 0:
        return bits
    # Hundreds of bits of the root, and a last one that says whether anything is left.
    scaled, rest = divmod(exact.numerator << 2400, exact.denominator)
    root = math.isqrt(scaled)
    left = root * root != scaled or rest
    return f.round(Fraction(2 * root + bool(left), 1 << 1201), mode)


def same_number(f: Format, got: int, want: int) -> bool:
    return got == want or (f.is_nan(got) and f.is_nan(want))


def compare_floats(
    text: str, columns: Sequence[Sequence[int]], expected: Callable[..., int], format_: Format
) -> None:
    """Like `compare`, for one float result: any NaN equals any NaN."""
    for lane, (got,) in enumerate(execute(text, *columns)):
        source = tuple(c[lane] for c in columns)
        want = expected(*source)
        assert same_number(format_, got, want), (
            f"{text}: {[hex(s) for s in source]} → {got:#x}, not {want:#x}"
        )
