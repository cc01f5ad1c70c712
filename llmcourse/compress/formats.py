"""Number formats, bit by bit.

A float of E exponent bits and M mantissa bits is a sign, a power of two and a step number:

    sign | exponent e (E bits) | mantissa m (M bits)          bias = 2^(E−1) − 1
    e ≥ 1    (−1)^sign · 2^(e − bias) · (1 + m/2^M)           normal: the leading 1 is not stored
    e = 0    (−1)^sign · 2^(1 − bias) · (m/2^M)               subnormal: steps go on evenly down to zero

Between two powers of two lie 2^M evenly spaced numbers. So exponent bits buy range, mantissa bits buy
precision, and without its sign a code counts the numbers upwards: the code after the largest number below
2^k is 2^k. That is why rounding may carry from the mantissa into the exponent, and why one formula encodes:

    code = (p + bias − 1)·2^M + round(|x| / 2^(p − M))        p the exponent of |x|, not below 1 − bias

What the largest codes mean is a convention of each format. IEEE's floats keep the whole last exponent for
infinities and NaN. With 4 bits of exponent that would waste a sixteenth of all codes, so FP8 e4m3 (as GPUs
compute it, "fn": finite) has no infinities and one NaN a sign, and reaches 448 instead of 240 (Micikevicius
et al. 2022, arXiv:2209.05433); FP4 e2m1 has neither (OCP Microscaling, 2023).

Integers are evenly spaced everywhere; they need a scale from outside. NF4 is a table of 16 numbers between
−1 and 1, such that normally distributed weights use every one of them equally often (Dettmers et al. 2023,
arXiv:2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from llmcourse.errors import ShapeError


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format; codes are int64 tensors of `bits` bits.

    top   what the largest codes stand for: "ieee" (the last exponent: infinities and NaN), "nan" (the last
          code of each sign: NaN), or "finite" (numbers all)
    """

    name: str
    exponent: int
    mantissa: int
    top: Literal["ieee", "nan", "finite"] = "ieee"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def last(self) -> int:
        """The code of the largest finite number."""
        end = (1 << (self.bits - 1)) - 1
        return {"ieee": end - (1 << self.mantissa), "nan": end - 1, "finite": end}[self.top]

    @property
    def largest(self) -> float:
        return self.value(self.last)

    @property
    def smallest(self) -> float:
        """The smallest positive number (subnormal)."""
        return self.value(1)

    @property
    def smallest_normal(self) -> float:
        return self.value(1 << self.mantissa)

    @property
    def epsilon(self) -> float:
        """From 1 to the next number: a rounded result is off by at most half of this, relatively."""
        return 2.0**-self.mantissa

    def fields(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sign, exponent and mantissa of codes, as stored."""
        codes = codes.long()
        sign = (codes >> (self.bits - 1)) & 1
        return sign, (codes >> self.mantissa) & _ones(self.exponent), codes & _ones(self.mantissa)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers that codes stand for, float64 (exact)."""
        codes = codes.long()
        sign, exponent, mantissa = self.fields(codes)
        whole = torch.where(exponent > 0, mantissa + (1 << self.mantissa), mantissa)  # the hidden 1
        size = whole.double() * power_of_two(exponent.clamp(min=1) - self.bias - self.mantissa)
        beyond = (codes & _ones(self.bits - 1)) > self.last
        if self.top == "ieee":
            size = torch.where(beyond, torch.where(mantissa == 0, torch.inf, torch.nan), size)
        elif self.top == "nan":
            size = torch.where(beyond, torch.nan, size)
        return torch.where(sign == 1, -size, size)

    def encode(self, x: Tensor, *, saturate: bool = False) -> Tensor:
        """The codes of the numbers nearest to x, halves to the even code: int64.

        saturate   what lies beyond the largest number becomes it; otherwise infinity, or NaN where the
                   format has no infinity. Formats without either always saturate.

        Raises ShapeError for a NaN in a format that has none.
        """
        x = x.double()
        size = x.abs()
        exponent = (torch.frexp(size).exponent.long() - 1).clamp(min=1 - self.bias)
        exponent = torch.where(size.isfinite() & (size > 0), exponent, 1 - self.bias)
        steps = torch.where(size.isfinite(), size, 0) * power_of_two(self.mantissa - exponent)
        codes = ((exponent + self.bias - 1) << self.mantissa) + steps.round().long()  # round: half to even
        over = (codes > self.last) | size.isinf()
        end = _ones(self.exponent) << self.mantissa if self.top == "ieee" else _ones(self.bits - 1)
        codes = torch.where(over, self.last if saturate else end, codes)
        if self.top == "finite":
            _no_nan(x, self.name)
        else:
            not_a_number = end + (1 << (self.mantissa - 1)) if self.top == "ieee" else end
            codes = torch.where(x.isnan(), not_a_number, codes)
        return codes | (torch.signbit(x).long() << (self.bits - 1))

    def round(self, x: Tensor, *, saturate: bool = False) -> Tensor:
        """x as the format holds it, float64."""
        return self.decode(self.encode(x, saturate=saturate))

    def value(self, code: int) -> float:
        return self.decode(torch.tensor([code])).item()

    def table(self) -> Tensor:
        """The number of every code, float64 [2^bits]; for formats of up to 16 bits."""
        return self.decode(torch.arange(1 << self.bits))

    def nearest(self, x: Tensor) -> Tensor:
        """`encode` for weights: uint8 codes, saturated."""
        return self.encode(x, saturate=True).to(torch.uint8)


@dataclass(frozen=True)
class IntegerFormat:
    """Two's complement: the first bit counts −2^(bits−1), the others count upwards as usual."""

    name: str
    bits: int

    @property
    def smallest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def decode(self, codes: Tensor) -> Tensor:
        codes = codes.long() & _ones(self.bits)
        return (codes - ((codes >> (self.bits - 1)) << self.bits)).double()

    def encode(self, x: Tensor, *, saturate: bool = True) -> Tensor:
        """Codes of the nearest integers, halves to even. Beyond the ends: the end (saturate), or wrapped."""
        _no_nan(x, self.name)
        steps = x.double().round()
        if saturate:
            steps = steps.clamp(self.smallest, self.largest)
        return steps.long() & _ones(self.bits)

    def round(self, x: Tensor, *, saturate: bool = True) -> Tensor:
        return self.decode(self.encode(x, saturate=saturate))

    def value(self, code: int) -> float:
        return self.decode(torch.tensor([code])).item()

    def table(self) -> Tensor:
        return self.decode(torch.arange(1 << self.bits))


@dataclass(frozen=True)
class TableFormat:
    """Codes are places in a list of numbers, in ascending order."""

    name: str
    bits: int
    values: tuple[float, ...] = field(repr=False)

    @property
    def largest(self) -> float:
        return self.values[-1]

    @property
    def smallest(self) -> float:
        return self.values[0]

    def decode(self, codes: Tensor) -> Tensor:
        return self.table().to(codes.device)[codes.long()]

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest numbers (of two equally near, the lower), int64."""
        _no_nan(x, self.name)
        table = self.table().to(x.device)
        return torch.bucketize(x.double(), (table[1:] + table[:-1]) / 2)

    def round(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def value(self, code: int) -> float:
        return self.values[code]

    def table(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)

    def nearest(self, x: Tensor) -> Tensor:
        return self.encode(x).to(torch.uint8)


@cache
def normal_float(bits: int = 4) -> TableFormat:
    """NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of a normal distribution.

    Zero is one of the numbers, so the two sides are cut apart: 2^(b−1) steps above it and one fewer below.
    Quantiles run from 1/2 to an end short of 1 (there the normal distribution has no number), chosen midway
    between the ends that the two sides' numbers of steps would ask for alone.
    """
    half = 1 << (bits - 1)
    end = 1 - (1 / (2 * (2 * half - 1)) + 1 / (2 * 2 * half)) / 2
    above = torch.special.ndtri(torch.linspace(0.5, end, half + 1, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(0.5, end, half, dtype=torch.float64))
    values = torch.cat((below.flip(0), above[1:])) / above[-1] + 0.0  # + 0.0: a zero without a sign
    return TableFormat(f"NF{bits}", bits, tuple(values.tolist()))


FP32 = FloatFormat("FP32", 8, 23)
FP16 = FloatFormat("FP16", 5, 10)
BF16 = FloatFormat("BF16", 8, 7)
FP8_E4M3 = FloatFormat("FP8 e4m3", 4, 3, "nan")
FP8_E5M2 = FloatFormat("FP8 e5m2", 5, 2)
FP4_E2M1 = FloatFormat("FP4 e2m1", 2, 1, "finite")
INT8 = IntegerFormat("INT8", 8)
INT4 = IntegerFormat("INT4", 4)
NF4 = normal_float(4)

Format = FloatFormat | IntegerFormat | TableFormat
FORMATS: dict[str, Format] = {
    "fp32": FP32,
    "fp16": FP16,
    "bf16": BF16,
    "fp8_e4m3": FP8_E4M3,
    "fp8_e5m2": FP8_E5M2,
    "int8": INT8,
    "fp4_e2m1": FP4_E2M1,
    "nf4": NF4,
    "int4": INT4,
}

# The formats whose codes stand for unevenly spaced numbers, small enough for a table.
CODEBOOKS: dict[str, FloatFormat | TableFormat] = {
    "nf4": NF4,
    "fp4": FP4_E2M1,
    "fp8_e4m3": FP8_E4M3,
    "fp8_e5m2": FP8_E5M2,
}


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, for −1022 ≤ exponent ≤ 1023: a float64 made of its exponent field."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _ones(bits: int) -> int:
    return (1 << bits) - 1


def _no_nan(x: Tensor, name: str) -> None:
    if bool(x.isnan().any()):
        raise ShapeError(
            f"a NaN cannot be stored in {name}.",
            "Every code of this format is a number.",
            "looking for where the NaN came from: torch.isnan(x).nonzero().",
        )
