"""Exercise `sparse_gemv`: a matrix times a vector that reads what stays and where it was, no more."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import TRAFFIC, at_minimum, run, tensor
from llmcourse.kernels.language import tl, triton
from llmcourse.labs import late_torch as torch

sparse_gemv = Exercise(
    "sparse_gemv",
    title="A 2:4 matrix times a vector, in Triton",
    arguments=("values", "places", "x"),
    shapes=(
        "values   tensor [N, K/2] in float32 or float16, contiguous: the weights that stay",
        "places   uint8 tensor [N, K/8], contiguous: bits 0–1 and 2–3 of byte b are the places of the two",
        "         values of group 2b, bits 4–5 and 6–7 those of group 2b + 1; 1 ≤ K/8 ≤ 1,024",
        "x        contiguous tensor [K] of the same format",
        "returns  tensor [N] of the same format, accumulated in float32",
        "cost     values and places are read once, of x one element for each value; y is written once",
    ),
    formula="y[n] = Σ_i values[n, i] · x[4·(i // 2) + place of i]",
    difficulty=4,
    importance=5,
    minutes=35,
    points=8,
    hints=(
        "Four values share a byte. If a program handles a row, and lanes [BLOCK, 4] its values, what shape "
        "must the bytes have so that each is loaded once?",
        "Load bytes [BLOCK, 1] and shift them by 2 · slot, slots being [1, 4]: & 3 gives all places, without "
        "another load. The column of value (b, slot) is 8·b + 4·(slot // 2) + place, and x there is one "
        "element for each value. A uint8 must be widened before it is shifted.",
        "b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]; byte = tl.load(places + n * WORDS "
        "+ b, mask=b < WORDS, other=0).to(tl.int32); column = 8 * b + 4 * (slot // 2) + ((byte >> (2 * slot))"
        " & 3); v = tl.load(values + n * 4 * WORDS + 4 * b + slot, mask=b < WORDS, other=0.0); u = tl.load(x "
        "+ column, mask=b < WORDS, other=0.0); then the sum of their product in float32.",
    ),
)


def expected(values: Any, places: Any, x: Any) -> np.ndarray:
    """By the dense matrix, in float64."""
    v, p = values.double().numpy(), places.numpy().astype(np.int64)
    place = (p[:, :, None] >> np.array([0, 2, 4, 6]) & 3).reshape(v.shape)
    dense = np.zeros((len(v), 2 * v.shape[1]))
    columns = 4 * (np.arange(v.shape[1]) // 2) + place
    np.put_along_axis(dense, columns, v, axis=1)
    return dense @ x.double().numpy()


def draw(t: Trial, rows: int, words: int, dtype: str = "float32") -> tuple[Any, Any, Any]:
    order = np.sort(t.rng.random((rows, words, 2, 4)).argsort(-1)[..., :2], axis=-1).reshape(rows, words, 4)
    places = (order * np.array([1, 4, 16, 64])).sum(-1).astype(np.uint8)
    values = tensor(t, rows, 4 * words, dtype=dtype)
    return values, torch.from_numpy(places), tensor(t, 8 * words, dtype=dtype)


def _agree(t: Trial, values: Any, places: Any, x: Any, what: str = "", rtol: float | None = None) -> None:
    t.close(run(t, values, places, x).value, expected(values, places, x), what, rtol=rtol)


@sparse_gemv.check("the first two of every four stay")
def first_two(t: Trial) -> None:
    values, places, x = draw(t, t.odd(3, 7), 8)
    places[:] = 0b01000100
    _agree(t, values, places, x)


@sparse_gemv.check("any two of every four stay")
def any_two(t: Trial) -> None:
    _agree(t, *draw(t, t.odd(3, 7), 16))


@sparse_gemv.check("rows of any length, a single byte too")
def odd(t: Trial) -> None:
    _agree(t, *draw(t, t.odd(3, 7), t.odd(17, 31)))
    _agree(t, *draw(t, 1, 1))
    _agree(t, *draw(t, 3, t.odd(3, 7)))


@sparse_gemv.check("float16 comes and goes, float32 accumulates")
def formats(t: Trial) -> None:
    values, places, x = draw(t, 5, t.odd(17, 31), "float16")
    got = run(t, values, places, x).value
    t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), "float16", "number format")
    t.close(got, expected(values, places, x), rtol=2e-3)
    # Products beyond 65,504, of which little is left at the end.
    values, places, x = (a.clone() for a in draw(t, 3, 32, "float16"))
    values[:], x[:] = values.abs() + 300, x.abs() + 300
    values[:, ::2] *= -1
    _agree(t, values, places, x, "with products of 90,000 and more", rtol=5e-3)


@sparse_gemv.check("values, places and y are moved once")
def traffic(t: Trial) -> None:
    values, places, x = draw(t, t.odd(5, 9), t.odd(17, 31))
    call = run(t, values, places, x, watch=TRAFFIC)
    t.close(call.value, expected(values, places, x))
    at_minimum(
        call,
        loads=values.nbytes + places.nbytes + values.numel() * x.itemsize,
        stores=len(values) * x.itemsize,
        reads=f"values ({values.nbytes:,}) and places ({places.nbytes:,}) once, x once for each value",
        writes="y once",
    )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def launched(kernel: Any, values: Any, places: Any, x: Any, *, dtype: Any = None) -> Any:
    """The wrapper that most solutions have: one program a row."""
    (rows, words) = places.shape
    y = torch.empty(rows, dtype=dtype or x.dtype)
    kernel[(rows,)](values, places, x, y, words, BLOCK=1 << max(words - 1, 0).bit_length())
    return y


@triton.jit
def right_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b, mask=b < words, other=0).to(tl.int32)
    column = 8 * b + 4 * (slot // 2) + ((byte >> (2 * slot)) & 3)
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0).to(tl.float32)
    u = tl.load(x + column, mask=b < words, other=0.0).to(tl.float32)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@triton.jit
def no_places_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    column = 8 * b + 4 * (slot // 2) + slot % 2
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0).to(tl.float32)
    u = tl.load(x + column, mask=b < words, other=0.0).to(tl.float32)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@sparse_gemv.mistake(
    says="places are not read: the first two columns of each group are taken",
    tries="(byte >> (2 * slot)) & 3.",
    caught_by="any_two",
)
def no_places(values: Any, places: Any, x: Any) -> Any:
    return launched(no_places_kernel, values, places, x)


@triton.jit
def high_first_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b, mask=b < words, other=0).to(tl.int32)
    column = 8 * b + 4 * (slot // 2) + ((byte >> (6 - 2 * slot)) & 3)
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0).to(tl.float32)
    u = tl.load(x + column, mask=b < words, other=0.0).to(tl.float32)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@sparse_gemv.mistake(
    says="the byte is read from its highest bits",
    tries="byte >> (2 * slot): the first place is in the lowest two bits.",
    caught_by="first_two",
)
def high_first(values: Any, places: Any, x: Any) -> Any:
    return launched(high_first_kernel, values, places, x)


@triton.jit
def one_group_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b, mask=b < words, other=0).to(tl.int32)
    column = 8 * b + ((byte >> (2 * slot)) & 3)
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0).to(tl.float32)
    u = tl.load(x + column, mask=b < words, other=0.0).to(tl.float32)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@sparse_gemv.mistake(
    says="the second group of a byte is looked for in the columns of the first",
    tries="8 * b + 4 * (slot // 2) + place.",
    caught_by="first_two",
)
def one_group(values: Any, places: Any, x: Any) -> Any:
    return launched(one_group_kernel, values, places, x)


@triton.jit
def one_bit_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b, mask=b < words, other=0).to(tl.int32)
    column = 8 * b + 4 * (slot // 2) + ((byte >> (2 * slot)) & 1)
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0).to(tl.float32)
    u = tl.load(x + column, mask=b < words, other=0.0).to(tl.float32)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@sparse_gemv.mistake(
    says="one bit of each place is read, of two",
    tries="& 3.",
    caught_by="any_two",
)
def one_bit(values: Any, places: Any, x: Any) -> Any:
    return launched(one_bit_kernel, values, places, x)


@triton.jit
def unmasked_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b).to(tl.int32)
    column = 8 * b + 4 * (slot // 2) + ((byte >> (2 * slot)) & 3)
    v = tl.load(values + n * 4 * words + 4 * b + slot).to(tl.float32)
    u = tl.load(x + column).to(tl.float32)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@sparse_gemv.mistake(
    says="the loads have no mask: a block reads into the next row, and past the end",
    tries="mask=b < words in every tl.load.",
    caught_by="odd",
)
def unmasked(values: Any, places: Any, x: Any) -> Any:
    return launched(unmasked_kernel, values, places, x)


@triton.jit
def byte_each_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b + 0 * slot, mask=(b < words) & (slot < 4), other=0).to(tl.int32)
    column = 8 * b + 4 * (slot // 2) + ((byte >> (2 * slot)) & 3)
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0).to(tl.float32)
    u = tl.load(x + column, mask=b < words, other=0.0).to(tl.float32)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@sparse_gemv.mistake(
    says="each byte is loaded four times, once for each of its values",
    tries="a load of shape [BLOCK, 1], which is shifted by [1, 4] in registers.",
    caught_by="traffic",
)
def byte_for_each_value(values: Any, places: Any, x: Any) -> Any:
    return launched(byte_each_kernel, values, places, x)


@triton.jit
def all_of_x_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b, mask=b < words, other=0).to(tl.int32)
    place = (byte >> (2 * slot)) & 3
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK, 4), tl.float32)
    for k in range(4):
        u = tl.load(x + 8 * b + 4 * (slot // 2) + k, mask=b < words, other=0.0).to(tl.float32)
        acc += tl.where(place == k, v * u, 0.0)
    tl.store(y + n, tl.sum(tl.sum(acc, axis=1), axis=0))


@sparse_gemv.mistake(
    says="all four inputs of a group are read for each value, and three thrown away",
    tries="the column first, then one load of x at that column.",
    caught_by="traffic",
)
def all_of_x(values: Any, places: Any, x: Any) -> Any:
    return launched(all_of_x_kernel, values, places, x)


@sparse_gemv.mistake(
    says="the matrix is unpacked into memory by torch, zeros and all, before it is multiplied",
    tries="a kernel that finds the columns in registers.",
    caught_by="traffic",
)
def unpacked(values: Any, places: Any, x: Any) -> Any:
    place = (places[:, :, None].int() >> torch.tensor([0, 2, 4, 6])) & 3
    columns = place.flatten(1).long() + 4 * (torch.arange(values.shape[1]) // 2)
    dense = torch.zeros(values.shape[0], 2 * values.shape[1]).scatter_(1, columns, values.float())
    return (dense @ x.float()).to(x.dtype)


@triton.jit
def narrow_kernel(values, places, x, y, words, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, slot = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    byte = tl.load(places + n * words + b, mask=b < words, other=0).to(tl.int32)
    column = 8 * b + 4 * (slot // 2) + ((byte >> (2 * slot)) & 3)
    v = tl.load(values + n * 4 * words + 4 * b + slot, mask=b < words, other=0.0)
    u = tl.load(x + column, mask=b < words, other=0.0)
    tl.store(y + n, tl.sum(tl.sum(v * u, axis=1), axis=0))


@sparse_gemv.mistake(
    says="products and sums are float16, which has three digits",
    tries=".to(tl.float32) behind the loads of values and x.",
    caught_by="formats",
)
def summed_in_sixteen_bits(values: Any, places: Any, x: Any) -> Any:
    return launched(narrow_kernel, values, places, x)


@sparse_gemv.mistake(
    says="the result is float32, whatever came in",
    tries="dtype=x.dtype for y.",
    caught_by="formats",
)
def wide_result(values: Any, places: Any, x: Any) -> Any:
    return launched(right_kernel, values, places, x, dtype=torch.float32)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@sparse_gemv.alternative("one program a row, bytes [BLOCK, 1] against slots [1, 4]")
def row_by_row(values: Any, places: Any, x: Any) -> Any:
    return launched(right_kernel, values, places, x)


@triton.jit
def four_slots_kernel(values, places, x, y, rows, words, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, words, BLOCK):
        b = start + tl.arange(0, BLOCK)[None, :]
        inside = (n < rows) & (b < words)
        byte = tl.load(places + n * words + b, mask=inside, other=0).to(tl.int32)
        for slot in tl.static_range(4):
            v = tl.load(values + (n * words + b) * 4 + slot, mask=inside, other=0.0).to(tl.float32)
            column = 8 * b + 4 * (slot // 2) + (byte // (4**slot)) % 4
            acc += v * tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + r, tl.sum(acc, axis=1).to(y.dtype.element_ty), mask=r < rows)


@sparse_gemv.alternative("blocks of rows, a loop over K, slot after slot")
def blocks_of_rows(values: Any, places: Any, x: Any) -> Any:
    rows, words = places.shape
    y = torch.empty(rows, dtype=x.dtype)
    four_slots_kernel[(-(-rows // 2),)](values, places, x, y, rows, words, ROWS=2, BLOCK=8)
    return y
