"""Exercise `softmax`: a row stays in registers from its only read to its only write."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import TRAFFIC, at_minimum, result, run, tensor
from llmcourse.kernels.language import tl, triton

softmax = Exercise(
    "softmax",
    title="A row in registers: fused softmax",
    arguments=("x",),
    shapes=(
        "x        float32, float16 or bfloat16 tensor [M, N], 1 ≤ N ≤ 4,096; the elements of a row lie",
        "         side by side, rows are x.stride(0) apart; some elements may be −inf, no whole row is",
        "returns  contiguous tensor [M, N] of the same format, computed in float32",
        "cost     x is read once, the result is written once",
    ),
    formula="y[r, c] = exp(x[r, c] − m[r]) / Σ_c exp(x[r, c] − m[r]),  m[r] = max_c x[r, c]",
    difficulty=2,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "The largest element of a row is known only after all were read; exp(x − m) needs them again. If "
        "memory may be asked only once, where must the row be meanwhile? A block of Triton has a size that "
        "is a power of two: what must the lanes beyond the last column hold so that they change neither "
        "the maximum nor the sum?",
        "One program a row, BLOCK = the power of two that holds N. Loaded once with mask and other=−inf, the "
        "block stays in registers: tl.max(v, axis=0), tl.exp, tl.sum and the division all work on it, and "
        "exp(−inf) = 0 adds nothing. Rows of x start at row · x.stride(0), those of the result at row · N.",
        "v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float('inf')).to(tl.float32); "
        "e = tl.exp(v - tl.max(v, axis=0)); tl.store(y + row * columns + c, e / tl.sum(e, axis=0), "
        "mask=c < columns). BLOCK=triton.next_power_of_2(columns), grid (rows,).",
    ),
)


def expected(x: Any) -> np.ndarray:
    """Softmax of the rows in float64."""
    v = x.double().numpy()
    e = np.exp(v - v.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _agree(t: Trial, x: Any, what: str = "") -> None:
    t.close(result(t, x), expected(x), what)


@softmax.check("rows of 2ⁿ columns")
def powers(t: Trial) -> None:
    _agree(t, tensor(t, t.odd(3, 7), 64))
    _agree(t, tensor(t, 2, 256))


@softmax.check("any number of columns, one too")
def odd(t: Trial) -> None:
    _agree(t, tensor(t, 3, t.odd(33, 63)) - 3)  # below 0, so that a 0 from outside would be the maximum
    _agree(t, tensor(t, t.odd(3, 7), t.odd(129, 255)))
    _agree(t, tensor(t, 5, 1))
    _agree(t, tensor(t, 1, 3))


@softmax.check("large numbers and −inf")
def extreme(t: Trial) -> None:
    _agree(t, tensor(t, 3, t.odd(17, 31)) + 200)
    _agree(t, tensor(t, 3, t.odd(17, 31)) - 200)
    x = tensor(t, 4, 16)
    x[1, 3:], x[2, :9], x[3, 5] = float("-inf"), float("-inf"), float("-inf")
    _agree(t, x)


@softmax.check("rows that do not touch")
def strided(t: Trial) -> None:
    _agree(t, tensor(t, t.odd(3, 7), t.odd(17, 63), order="rows"), "x has 3 more elements between its rows")


@softmax.check("float16 and bfloat16 come and go, float32 computes")
def formats(t: Trial) -> None:
    for dtype, rtol, atol in (("float16", 2e-3, 1e-6), ("bfloat16", 8e-3, 1e-9)):
        x = tensor(t, 3, 2 * t.odd(301, 401), dtype=dtype, scale=2)
        got = result(t, x)
        t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), dtype, "number format")
        t.close(got, expected(x), rtol=rtol, atol=atol)


@softmax.check("x is read once, the result is written once, and nothing else moves")
def traffic(t: Trial) -> None:
    x = tensor(t, t.odd(3, 7), t.odd(65, 255), order="rows")
    call = run(t, x, watch=TRAFFIC)
    t.close(call.value, expected(x))
    n = x.numel() * x.itemsize
    at_minimum(call, loads=n, stores=n, reads="every element of x once", writes="every element once")


def _empty(x: Any, dtype: Any = None) -> Any:
    import torch

    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launched(kernel: Any, x: Any, dtype: Any = None, block: int = 0) -> Any:
    """The wrapper that most solutions have: one program a row."""
    y = _empty(x, dtype)
    rows, columns = x.shape
    kernel[(rows,)](x, y, x.stride(0), columns, BLOCK=block or _power(columns))
    return y


@triton.jit
def right_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


@triton.jit
def load_unmasked_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


@softmax.mistake(
    says="the load has no mask: a block reads into the next row, and the last one past the end",
    tries="mask=c < columns, other=-float('inf') in tl.load.",
    caught_by="odd",
)
def load_unmasked(x: Any) -> Any:
    return launched(load_unmasked_kernel, x)


@triton.jit
def store_unmasked_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0))


@softmax.mistake(
    says="the store has no mask: a block writes into the next row, and the last one past the end",
    tries="mask=c < columns in tl.store.",
    caught_by="odd",
)
def store_unmasked(x: Any) -> Any:
    return launched(store_unmasked_kernel, x)


@triton.jit
def zeros_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


@softmax.mistake(
    says="the lanes beyond the last column hold 0, and each adds exp(0 − m) to the sum",
    tries="other=-float('inf'): exp(−inf) is 0, and the maximum does not see it.",
    caught_by="odd",
)
def zeros_outside(x: Any) -> Any:
    return launched(zeros_kernel, x)


@triton.jit
def no_max_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    e = tl.exp(tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32))
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


@softmax.mistake(
    says="the maximum is not subtracted: exp overflows above 88, and all underflow below −104",
    tries="tl.exp(v - tl.max(v, axis=0)).",
    caught_by="extreme",
)
def no_max(x: Any) -> Any:
    return launched(no_max_kernel, x)


@triton.jit
def lowest_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-100.0).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


@softmax.mistake(
    says="the lanes beyond the last column hold a number that real elements can fall below",
    tries="other=-float('inf'), below which nothing is.",
    caught_by="extreme",
)
def some_number_outside(x: Any) -> Any:
    return launched(lowest_kernel, x)


@softmax.mistake(
    says="rows are taken to lie side by side: x.stride(0) is not asked",
    tries="x + row * x_stride, with x.stride(0) from the wrapper.",
    caught_by="strided",
)
def assumed_contiguous(x: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    right_kernel[(rows,)](x, y, columns, columns, BLOCK=_power(columns))
    return y


@triton.jit
def y_stride_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row * x_stride + c, e / tl.sum(e, axis=0), mask=c < columns)


@softmax.mistake(
    says="the result's rows are taken to lie as far apart as those of x",
    tries="y + row * columns, or y.stride(0) as an argument of its own.",
    caught_by="strided",
)
def x_stride_for_y(x: Any) -> Any:
    return launched(y_stride_kernel, x)


@triton.jit
def first_row_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(1), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


@softmax.mistake(
    says="the row is asked of the wrong axis of the grid: every program takes row 0",
    tries="tl.program_id(0): the grid (rows,) has rows along axis 0.",
    caught_by="powers",
)
def wrong_axis(x: Any) -> Any:
    return launched(first_row_kernel, x)


@triton.jit
def global_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
    tl.store(y + row * columns + c, tl.exp(v - tl.max(v, axis=0)), mask=c < columns)


@softmax.mistake(
    says="the division by the sum is missing: rows do not add up to 1",
    tries="e / tl.sum(e, axis=0).",
    caught_by="powers",
)
def not_normalised(x: Any) -> Any:
    return launched(global_kernel, x)


@softmax.mistake(
    says="the result is float32, whatever came in",
    tries="torch.empty(x.shape, dtype=x.dtype, device=x.device).",
    caught_by="formats",
)
def widened(x: Any) -> Any:
    import torch

    return launched(right_kernel, x, torch.float32)


@triton.jit
def narrow_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf"))
    d = v - tl.max(v, axis=0).to(x.dtype.element_ty)
    e = tl.exp(d.to(tl.float32)).to(x.dtype.element_ty)
    s = tl.sum(e.to(tl.float32), axis=0).to(x.dtype.element_ty)
    tl.store(y + row * columns + c, e / s, mask=c < columns)


@softmax.mistake(
    says="differences and sums are rounded to 16 bits on the way",
    tries=".to(tl.float32) right behind the load.",
    caught_by="formats",
)
def in_sixteen_bits(x: Any) -> Any:
    return launched(narrow_kernel, x)


@triton.jit
def two_pass_kernel(x, y, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    m = tl.max(tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32), axis=0)
    e = tl.exp(tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32) - m)
    tl.store(y + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


@softmax.mistake(
    says="x is read twice: once for the maximum, once for the exponentials",
    tries="one tl.load whose block is used for both.",
    caught_by="traffic",
)
def two_passes(x: Any) -> Any:
    return launched(two_pass_kernel, x)


@triton.jit
def exp_kernel(x, e, s, x_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, axis=0))
    tl.store(e + row * columns + c, v, mask=c < columns)
    tl.store(s + row, tl.sum(v, axis=0))


@triton.jit
def divide_kernel(e, s, y, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(e + row * columns + c, mask=c < columns) / tl.load(s + row)
    tl.store(y + row * columns + c, v, mask=c < columns)


@softmax.mistake(
    says="the exponentials go to memory and come back to be divided: two launches where one is enough",
    tries="the division in the kernel that has the row in registers.",
    caught_by="traffic",
)
def unfused(x: Any) -> Any:
    import torch

    rows, columns = x.shape
    e, s = _empty(x, torch.float32), torch.empty(rows, device=x.device)
    exp_kernel[(rows,)](x, e, s, x.stride(0), columns, BLOCK=_power(columns))
    y = _empty(x)
    divide_kernel[(rows,)](e, s, y, columns, BLOCK=_power(columns))
    return y


@softmax.mistake(
    says="x is copied first, to have its rows side by side",
    tries="x.stride(0) as an argument of the kernel: it costs nothing.",
    caught_by="traffic",
)
def copied(x: Any) -> Any:
    return launched(right_kernel, x.contiguous())


@softmax.mistake(
    says="torch computes it, and no kernel runs",
    tries="a kernel: load, maximum, exponential, sum, store.",
    caught_by="traffic",
)
def by_torch(x: Any) -> Any:
    import torch

    return torch.softmax(x.float(), dim=1).to(x.dtype)


@triton.jit
def rows_kernel(x, y, x_stride, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=-float("inf")).to(tl.float32)
    e = tl.exp2((v - tl.max(v, axis=1)[:, None]) * 1.4426950408889634)
    tl.store(y + r * columns + c, (e / tl.sum(e, axis=1)[:, None]).to(y.dtype.element_ty), mask=inside)


@softmax.alternative("two rows a program, exponentials to base 2")
def two_rows(x: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    rows_kernel[(-(-rows // 2),)](x, y, x.stride(0), rows, columns, ROWS=2, BLOCK=_power(columns))
    return y


@triton.jit
def persistent_kernel(x, y, x_stride, y_stride, rows, columns, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
        tl.store(y + row * y_stride + c, tl.softmax(v).to(y.dtype.element_ty), mask=c < columns)


@softmax.alternative("two programs that take turns with the rows, and Triton's own softmax of a block")
def persistent(x: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    persistent_kernel[(2,)](x, y, x.stride(0), y.stride(0), rows, columns, BLOCK=_power(columns))
    return y


@triton.jit
def halves_kernel(x, y, x_stride, columns, HALF: tl.constexpr):
    row, a = tl.program_id(0), tl.arange(0, HALF)
    b = a + HALF
    u = tl.load(x + row * x_stride + a, mask=a < columns, other=-float("inf")).to(tl.float32)
    v = tl.load(x + row * x_stride + b, mask=b < columns, other=-float("inf")).to(tl.float32)
    m = tl.maximum(tl.max(u, axis=0), tl.max(v, axis=0))
    u, v = tl.exp(u - m), tl.exp(v - m)
    scale = 1.0 / (tl.sum(u, axis=0) + tl.sum(v, axis=0))
    tl.store(y + row * columns + a, u * scale, mask=a < columns)
    tl.store(y + row * columns + b, v * scale, mask=b < columns)


@softmax.alternative("the row in two blocks, both in registers")
def halves(x: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    halves_kernel[(rows,)](x, y, x.stride(0), columns, HALF=max(1, _power(columns) // 2))
    return y
