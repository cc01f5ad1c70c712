"""Exercise `rms_norm`: a reduction along the row, in float32 whatever the row is stored in."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import TRAFFIC, at_minimum, result, run, tensor
from llmcourse.kernels.language import tl, triton

rms_norm = Exercise(
    "rms_norm",
    title="A reduction and a scale: RMSNorm",
    arguments=("x", "weight", "eps"),
    shapes=(
        "x        float32, float16 or bfloat16 tensor [M, N], 1 ≤ N ≤ 4,096; the elements of a row lie",
        "         side by side, rows are x.stride(0) apart",
        "weight   tensor [N] of the same format, contiguous",
        "eps      float, inside the root",
        "returns  contiguous tensor [M, N] of the same format, computed in float32",
        "cost     x is read once, the result written once, weight read at most once for each row",
    ),
    formula="y[r, c] = x[r, c] / √(Σ_c x[r, c]² / N + eps) · weight[c]",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "It is softmax's kernel with another reduction. Which lanes take part in the sum of squares, and "
        "by what number is the sum divided: by that of the columns, or by that of the lanes?",
        "Load the row once with mask and other=0.0, in float32. tl.sum(v * v, axis=0) / columns is the mean "
        "of the squares, zeros add nothing. One number a row, 1/√(mean + eps), scales the row; weight is "
        "loaded with the same column offsets and mask.",
        "v = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32); "
        "scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / columns + eps); "
        "w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32); tl.store(…, v * scale * w, "
        "mask=inside).",
    ),
)


def expected(x: Any, weight: Any, eps: float) -> np.ndarray:
    """RMSNorm of the rows in float64."""
    v, w = x.double().numpy(), weight.double().numpy()
    return v / np.sqrt((v**2).mean(axis=1, keepdims=True) + eps) * w


def _agree(t: Trial, x: Any, eps: float = 1e-6, what: str = "", rtol: float | None = None) -> None:
    weight = tensor(t, x.shape[1], dtype=str(x.dtype).removeprefix("torch."))
    t.close(result(t, x, weight, eps), expected(x, weight, eps), what, rtol=rtol)


@rms_norm.check("rows of 2ⁿ columns")
def powers(t: Trial) -> None:
    _agree(t, tensor(t, t.odd(3, 7), 64))
    _agree(t, tensor(t, 2, 256, scale=10))


@rms_norm.check("any number of columns, one too")
def odd(t: Trial) -> None:
    _agree(t, tensor(t, 3, t.odd(33, 47)))
    _agree(t, tensor(t, t.odd(3, 7), t.odd(129, 191)))
    _agree(t, tensor(t, 5, 1) + 6)


@rms_norm.check("eps stands under the root, and keeps rows near zero finite")
def epsilon(t: Trial) -> None:
    _agree(t, tensor(t, 3, 32, scale=0.1), eps=0.1)
    x = tensor(t, 3, 16)
    x[1] = 0.0
    _agree(t, x, eps=1e-5)


@rms_norm.check("rows that do not touch")
def strided(t: Trial) -> None:
    _agree(t, tensor(t, t.odd(3, 7), t.odd(17, 63), order="rows"), what="x has 3 more elements between rows")


@rms_norm.check("float16 and bfloat16 come and go, float32 computes")
def formats(t: Trial) -> None:
    for dtype, rtol in (("float16", 2e-3), ("bfloat16", 8e-3)):
        x = tensor(t, 3, 2 * t.odd(401, 501), dtype=dtype, scale=0.3)
        x += 2.0  # squares that a sum in 16 bits cannot hold apart
        weight = tensor(t, x.shape[1], dtype=dtype)
        got = result(t, x, weight, 1e-6)
        t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), dtype, "number format")
        t.close(got, expected(x, weight, 1e-6), rtol=rtol, atol=1e-6)
    x, weight = tensor(t, 2, 70, dtype="float16", scale=400), tensor(t, 70, dtype="float16")
    t.close(result(t, x, weight, 1e-6), expected(x, weight, 1e-6), rtol=2e-3, atol=1e-6)


@rms_norm.check("x is read once, the result written once, weight once a row at most")
def traffic(t: Trial) -> None:
    x = tensor(t, t.odd(5, 9), t.odd(65, 255), order="rows")
    weight = tensor(t, x.shape[1])
    call = run(t, x, weight, 1e-6, watch=TRAFFIC)
    t.close(call.value, expected(x, weight, 1e-6))
    n = x.numel() * x.itemsize
    at_minimum(
        call,
        loads=2 * n,
        stores=n,
        reads="every element of x once, and for each row every element of weight",
        writes="every element once",
    )


def _empty(x: Any, dtype: Any = None) -> Any:
    import torch

    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launched(kernel: Any, x: Any, weight: Any, eps: float, dtype: Any = None) -> Any:
    """The wrapper that most solutions have: one program a row."""
    y = _empty(x, dtype)
    rows, columns = x.shape
    kernel[(rows,)](x, weight, y, x.stride(0), columns, eps, BLOCK=_power(columns))
    return y


@triton.jit
def right_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@triton.jit
def load_unmasked_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c).to(tl.float32)
    w = tl.load(weight + c).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@rms_norm.mistake(
    says="the loads have no mask: a block reads into the next row, and past the end of x and weight",
    tries="mask=c < columns, other=0.0 in every tl.load.",
    caught_by="odd",
)
def load_unmasked(x: Any, weight: Any, eps: Any) -> Any:
    return launched(load_unmasked_kernel, x, weight, eps)


@triton.jit
def store_unmasked_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w)


@rms_norm.mistake(
    says="the store has no mask: a block writes into the next row, and the last one past the end",
    tries="mask=c < columns in tl.store.",
    caught_by="odd",
)
def store_unmasked(x: Any, weight: Any, eps: Any) -> Any:
    return launched(store_unmasked_kernel, x, weight, eps)


@triton.jit
def over_block_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / BLOCK + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@rms_norm.mistake(
    says="the mean is taken over the lanes of the block, not over the columns",
    tries="tl.sum(v * v, axis=0) / columns.",
    caught_by="odd",
)
def mean_over_block(x: Any, weight: Any, eps: Any) -> Any:
    return launched(over_block_kernel, x, weight, eps)


@triton.jit
def ones_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=1.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=1.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@rms_norm.mistake(
    says="the lanes beyond the last column hold 1, and each adds to the sum of squares",
    tries="other=0.0.",
    caught_by="odd",
)
def ones_outside(x: Any, weight: Any, eps: Any) -> Any:
    return launched(ones_kernel, x, weight, eps)


@triton.jit
def eps_outside_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    root = tl.sqrt(tl.sum(v * v, axis=0) / columns) + eps
    tl.store(y + row * columns + c, v / root * w, mask=c < columns)


@rms_norm.mistake(
    says="eps is added to the root, not under it",
    tries="tl.sqrt(mean + eps).",
    caught_by="epsilon",
)
def eps_outside_root(x: Any, weight: Any, eps: Any) -> Any:
    return launched(eps_outside_kernel, x, weight, eps)


@rms_norm.mistake(
    says="eps is left out: a row of zeros is divided by zero",
    tries="tl.sqrt(mean + eps).",
    caught_by="epsilon",
)
def no_eps(x: Any, weight: Any, eps: Any) -> Any:
    return launched(right_kernel, x, weight, 0.0)


@triton.jit
def mean_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    d = tl.where(c < columns, v - tl.sum(v, axis=0) / columns, 0.0)
    scale = tl.rsqrt(tl.sum(d * d, axis=0) / columns + eps)
    tl.store(y + row * columns + c, d * scale * w, mask=c < columns)


@rms_norm.mistake(
    says="the mean is subtracted first: that is LayerNorm",
    tries="the row as it is: only its root mean square is divided out.",
    caught_by="powers",
)
def layer_norm(x: Any, weight: Any, eps: Any) -> Any:
    return launched(mean_kernel, x, weight, eps)


@triton.jit
def sum_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + c, v * tl.rsqrt(tl.sum(v * v, axis=0) + eps) * w, mask=c < columns)


@rms_norm.mistake(
    says="the sum of the squares is taken for their mean",
    tries="tl.sum(v * v, axis=0) / columns.",
    caught_by="powers",
)
def sum_for_mean(x: Any, weight: Any, eps: Any) -> Any:
    return launched(sum_kernel, x, weight, eps)


@triton.jit
def no_weight_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + c, v * tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps), mask=c < columns)


@rms_norm.mistake(
    says="weight is left out",
    tries="tl.load(weight + c, …), times the scaled row.",
    caught_by="powers",
)
def no_weight(x: Any, weight: Any, eps: Any) -> Any:
    return launched(no_weight_kernel, x, weight, eps)


@rms_norm.mistake(
    says="rows are taken to lie side by side: x.stride(0) is not asked",
    tries="x + row * x_stride, with x.stride(0) from the wrapper.",
    caught_by="strided",
)
def assumed_contiguous(x: Any, weight: Any, eps: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    right_kernel[(rows,)](x, weight, y, columns, columns, eps, BLOCK=_power(columns))
    return y


@triton.jit
def narrow_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    mean = (tl.sum(v * v, axis=0) / columns).to(tl.float32)
    tl.store(y + row * columns + c, v.to(tl.float32) * tl.rsqrt(mean + eps) * w, mask=c < columns)


@rms_norm.mistake(
    says="the squares are added up in 16 bits: bfloat16 keeps 8 bits of the sum, float16 overflows at 65,504",
    tries=".to(tl.float32) right behind the load.",
    caught_by="formats",
)
def summed_in_sixteen_bits(x: Any, weight: Any, eps: Any) -> Any:
    return launched(narrow_kernel, x, weight, eps)


@rms_norm.mistake(
    says="the result is float32, whatever came in",
    tries="torch.empty(x.shape, dtype=x.dtype, device=x.device).",
    caught_by="formats",
)
def widened(x: Any, weight: Any, eps: Any) -> Any:
    import torch

    return launched(right_kernel, x, weight, eps, torch.float32)


@triton.jit
def two_pass_kernel(x, weight, y, x_stride, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = 0.0
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
        total += tl.sum(v * v, axis=0)
    scale = tl.rsqrt(total / columns + eps)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
        w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
        tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@rms_norm.mistake(
    says="x is read in two passes: one for the sum of squares, one for the result",
    tries="a block that holds the whole row: BLOCK=triton.next_power_of_2(columns), one tl.load.",
    caught_by="traffic",
)
def two_passes(x: Any, weight: Any, eps: Any) -> Any:
    return launched(two_pass_kernel, x, weight, eps)


@rms_norm.mistake(
    says="x is copied first, to have its rows side by side",
    tries="x.stride(0) as an argument of the kernel: it costs nothing.",
    caught_by="traffic",
)
def copied(x: Any, weight: Any, eps: Any) -> Any:
    return launched(right_kernel, x.contiguous(), weight, eps)


@rms_norm.mistake(
    says="torch computes it, and no kernel runs",
    tries="a kernel: load, sum of squares, scale, store.",
    caught_by="traffic",
)
def by_torch(x: Any, weight: Any, eps: Any) -> Any:
    import torch

    v = x.float()
    return (v * torch.rsqrt((v * v).mean(dim=1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@triton.jit
def rows_kernel(x, weight, y, x_stride, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / columns + eps)
    tl.store(y + r * columns + c, (v * scale[:, None] * w).to(y.dtype.element_ty), mask=inside)


@rms_norm.alternative("four rows a program, which share one reading of weight")
def four_rows(x: Any, weight: Any, eps: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    rows_kernel[(-(-rows // 4),)](
        x, weight, y, x.stride(0), rows, columns, eps, ROWS=4, BLOCK=_power(columns)
    )
    return y


@triton.jit
def persistent_kernel(x, weight, y, x_stride, y_stride, rows, columns, eps, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
        v = v / tl.sqrt_rn(tl.sum(v * v, axis=0) / columns + eps)
        tl.store(y + row * y_stride + c, (w * v).to(y.dtype.element_ty), mask=c < columns)


@rms_norm.alternative("two programs that take turns with the rows and keep weight in registers")
def persistent(x: Any, weight: Any, eps: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    persistent_kernel[(2,)](x, weight, y, x.stride(0), y.stride(0), rows, columns, eps, BLOCK=_power(columns))
    return y
