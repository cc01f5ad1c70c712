"""Number formats bit by bit, against torch, NumPy and ml_dtypes: every value where a format has few."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from llmcourse.compress.formats import (
    BF16,
    CODEBOOKS,
    FORMATS,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FP32,
    INT4,
    INT8,
    NF4,
    FloatFormat,
)
from llmcourse.errors import ShapeError

BYTES = torch.arange(256, dtype=torch.uint8)
TORCH = [(FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)]
OTHERS = [
    (FP8_E4M3, ml_dtypes.float8_e4m3fn),
    (FP8_E5M2, ml_dtypes.float8_e5m2),
    (FP4_E2M1, ml_dtypes.float4_e2m1fn),
    (BF16, ml_dtypes.bfloat16),
    (FP16, np.float16),
]


def assert_same(mine, theirs):
    """Equal numbers, zeros with equal signs, NaN where the other has NaN."""
    theirs = torch.as_tensor(np.asarray(theirs, dtype=np.float64))
    same = (mine == theirs) & (torch.signbit(mine) == torch.signbit(theirs))
    wrong = ~(same | (mine.isnan() & theirs.isnan()))
    assert not wrong.any(), (wrong.nonzero()[:3], mine[wrong][:3], theirs[wrong][:3])


def ugly(fmt: FloatFormat, seed: int = 0) -> torch.Tensor:
    """float32 numbers over the whole range of a format, halfway points and their neighbours, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, fmt.last, (4000,), generator=generator)
    low, high = fmt.decode(codes), fmt.decode(codes + 1)
    middle = ((low + high) / 2).float()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat((middle, torch.nextafter(middle, up), torch.nextafter(middle, down)))
    spread = low.float() * (1 + torch.rand(4000, generator=generator))
    special = torch.tensor([0.0, fmt.smallest / 2, fmt.smallest / 4, fmt.smallest * 0.51, fmt.largest])
    x = torch.cat((near, spread, special.float()))
    x = x[x.abs() <= fmt.largest]
    return torch.cat((x, -x))


@pytest.mark.parametrize(("fmt", "dtype"), TORCH, ids=lambda v: getattr(v, "name", ""))
def test_every_byte_is_the_number_that_torch_reads_in_it(fmt, dtype):
    assert_same(fmt.table(), BYTES.view(dtype).double().numpy())


@pytest.mark.parametrize(("fmt", "dtype"), OTHERS, ids=lambda v: getattr(v, "name", ""))
def test_every_code_is_the_number_that_others_read_in_it(fmt, dtype):
    codes = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # ml_dtypes says that a NaN is one
        assert_same(fmt.table(), codes.view(dtype).astype(np.float64))


def test_single_precision_codes_are_the_numbers_of_numpy():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32)
    codes = np.concatenate(
        (codes, np.array([0, 1, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x007FFFFF], "u4"))
    )
    mine = torch.from_numpy(codes.astype(np.int64))
    with np.errstate(invalid="ignore"):
        assert_same(FP32.decode(mine), codes.view(np.float32).astype(np.float64))
    numbers = codes.view(np.float32)
    finite = ~np.isnan(numbers)
    assert torch.equal(FP32.encode(torch.from_numpy(numbers[finite])), mine[torch.from_numpy(finite)])


@pytest.mark.parametrize(("fmt", "dtype"), OTHERS, ids=lambda v: getattr(v, "name", ""))
def test_rounding_is_to_the_nearest_and_halves_go_to_the_even_code(fmt, dtype):
    x = ugly(fmt)
    assert_same(fmt.round(x), x.numpy().astype(dtype).astype(np.float64))


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.bits <= 16], ids=lambda f: f.name)
def test_every_number_is_stored_as_itself(fmt):
    numbers = fmt.table()
    kept = numbers[~numbers.isnan()]
    assert_same(fmt.round(kept), kept.numpy())


@pytest.mark.parametrize("fmt", [FP16, BF16, FP8_E5M2, FP8_E4M3], ids=lambda f: f.name)
def test_too_large_a_number_overflows_as_the_format_says(fmt):
    dtype = dict((f.name, d) for f, d in OTHERS)[fmt.name]
    step = fmt.largest - fmt.value(fmt.last - 1)
    x = torch.tensor([fmt.largest + step * 0.49, fmt.largest + step * 0.51, fmt.largest * 1.9, torch.inf])
    x = torch.cat((x, -x)).float()
    with np.errstate(over="ignore"):
        assert_same(fmt.round(x), x.numpy().astype(dtype).astype(np.float64))
    assert torch.equal(fmt.round(x, saturate=True).abs(), torch.full((8,), fmt.largest, dtype=torch.float64))


def test_nan_stays_nan_where_there_is_one_and_is_refused_where_there_is_none():
    nan = torch.tensor([torch.nan])
    for fmt in (FP32, FP16, BF16, FP8_E4M3, FP8_E5M2):
        assert fmt.round(nan).isnan().all()
    for fmt in (FP4_E2M1, INT8, INT4, NF4):
        with pytest.raises(ShapeError, match="NaN"):
            fmt.encode(nan)


def test_the_limits_are_those_of_torch():
    pairs = [*TORCH, (FP16, torch.float16), (BF16, torch.bfloat16), (FP32, torch.float32)]
    for fmt, dtype in pairs:
        info = torch.finfo(dtype)
        assert (fmt.largest, fmt.smallest_normal, fmt.epsilon) == (info.max, info.tiny, info.eps), fmt.name


def test_fields_are_sign_exponent_and_mantissa():
    assert [int(f) for f in FP8_E4M3.fields(torch.tensor(0b1_0110_101))] == [1, 0b0110, 0b101]
    assert FP8_E4M3.value(0b1_0110_101) == -(2.0 ** (6 - 7)) * (1 + 5 / 8)


def test_a_code_counts_the_numbers_upwards():
    for fmt in (FP32, FP16, BF16, FP8_E4M3, FP8_E5M2, FP4_E2M1):
        codes = torch.arange(min(fmt.last + 1, 1 << 16))
        assert (fmt.decode(codes).diff() > 0).all()


def test_integers_are_those_of_twos_complement():
    assert_same(INT8.table(), BYTES.view(torch.int8).double().numpy())
    x = torch.linspace(-7.5, 7, 30)  # halves among them
    assert_same(INT4.round(x), np.rint(x.numpy()).astype(ml_dtypes.int4).astype(np.float64))
    beyond = torch.tensor([9.0, -9.0, 128.0])
    assert INT4.round(beyond).tolist() == [7, -8, 7]
    wrapped = beyond.numpy().astype(np.int64).astype(np.int8).astype(ml_dtypes.int4).astype(np.float64)
    assert INT4.decode(INT4.encode(beyond, saturate=False)).tolist() == wrapped.tolist()


def test_nf4_is_the_table_that_its_authors_print():
    printed = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    printed += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    printed += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    printed += [0.7229568362236023, 1.0]
    torch.testing.assert_close(NF4.table(), torch.tensor(printed, dtype=torch.float64), atol=2e-7, rtol=0)


def test_codebooks_give_the_nearest_of_all_their_numbers():
    x = torch.randn(5000, dtype=torch.float64) * 2
    for fmt in CODEBOOKS.values():
        table = fmt.table()
        table = table[table.isfinite()]
        nearest = (x[:, None] - table).abs().amin(1)
        chosen = (fmt.decode(fmt.nearest(x)) - x).abs()
        assert torch.equal(chosen, nearest), fmt.name
