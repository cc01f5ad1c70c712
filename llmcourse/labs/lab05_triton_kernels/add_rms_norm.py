"""Exercise `add_rms_norm`: two operations, one pass, and what the second one no longer has to read."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import TRAFFIC, at_minimum, run, tensor
from llmcourse.kernels.language import tl, triton

add_rms_norm = Exercise(
    "add_rms_norm",
    title="Fusion: residual addition and norm in one pass",
    arguments=("x", "residual", "weight", "eps"),
    shapes=(
        "x, residual   tensors [M, N] of one format, 1 ≤ N ≤ 4,096; elements of a row side by side, rows",
        "              x.stride(0) and residual.stride(0) apart",
        "weight        tensor [N] of the same format, contiguous;  eps  float",
        "returns       (h, y), contiguous [M, N] of the same format: the sum, and its RMSNorm",
        "cost          x and residual are read once, h and y written once, weight read at most once for",
        "              each row; x and residual stay as they are",
    ),
    formula="h = x + residual     y[r, c] = h[r, c] / √(Σ_c h[r, c]² / N + eps) · weight[c]",
    difficulty=2,
    importance=5,
    minutes=20,
    points=5,
    hints=(
        "An addition by itself reads two tensors and writes one, a norm after it reads one and writes one: "
        "5 in all. Which of the five is not needed when one program does both?",
        "Your RMSNorm kernel, with h = x + residual in the place of the row that was loaded, and one more "
        "store. h is in registers when it is normalised; nothing has to be loaded back. The two inputs may "
        "have different strides.",
        "h = tl.load(x + row * x_stride + c, …).to(tl.float32) + tl.load(residual + row * r_stride + c, "
        "…).to(tl.float32); tl.store(h_out + row * columns + c, h, mask=inside); then RMSNorm of h into y. "
        "The wrapper makes two empty tensors and returns both, the sum first.",
    ),
)


def expected(x: Any, residual: Any, weight: Any, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The sum and its RMSNorm in float64."""
    h, w = x.double().numpy() + residual.double().numpy(), weight.double().numpy()
    return h, h / np.sqrt((h**2).mean(axis=1, keepdims=True) + eps) * w


def _compare(t: Trial, got: Any, want: Any, rtol: float | None = None, what: str = "") -> None:
    h, y = t.pair(got, 2, "(h, y)")
    t.close(h, want[0], f"h{what}", rtol=rtol)
    t.close(y, want[1], f"y{what}", rtol=rtol)


def _agree(t: Trial, x: Any, residual: Any, eps: float = 1e-6, what: str = "") -> None:
    weight = tensor(t, x.shape[1])
    got = run(t, x, residual, weight, eps).value
    _compare(t, got, expected(x, residual, weight, eps), what=what)


@add_rms_norm.check("rows of 2ⁿ columns")
def powers(t: Trial) -> None:
    rows = t.odd(3, 7)
    _agree(t, tensor(t, rows, 64), tensor(t, rows, 64))
    _agree(t, tensor(t, 2, 128, scale=3), tensor(t, 2, 128), eps=0.1)


@add_rms_norm.check("any number of columns, one too")
def odd(t: Trial) -> None:
    for rows, columns in ((3, t.odd(33, 47)), (t.odd(3, 7), t.odd(129, 191))):
        _agree(t, tensor(t, rows, columns), tensor(t, rows, columns))
    _agree(t, tensor(t, 5, 1) + 6, tensor(t, 5, 1) + 6)


@add_rms_norm.check("rows that do not touch, in one input or in both")
def strided(t: Trial) -> None:
    rows, columns = t.odd(3, 7), t.odd(17, 63)
    for first, second in (("rows", "C"), ("C", "rows"), ("rows", "rows")):
        x, residual = (tensor(t, rows, columns, order=order) for order in (first, second))
        _agree(t, x, residual, what=", with 3 more elements between rows of x, of residual or of both")


@add_rms_norm.check("x and residual are left as they were")
def untouched(t: Trial) -> None:
    rows, columns = t.odd(3, 7), t.odd(17, 63)
    _agree(t, tensor(t, rows, columns), tensor(t, rows, columns))
    t.unchanged()


@add_rms_norm.check("float16 and bfloat16 come and go, float32 computes")
def formats(t: Trial) -> None:
    for dtype, rtol in (("float16", 2e-3), ("bfloat16", 1e-2)):
        n = 2 * t.odd(401, 501)
        x, residual = (tensor(t, 3, n, dtype=dtype, scale=0.3) + 1 for _ in range(2))
        weight = tensor(t, n, dtype=dtype)
        got = t.pair(run(t, x, residual, weight, 1e-6).value, 2, "(h, y)")
        for name, value in zip(("h", "y"), got, strict=True):
            told = str(getattr(value, "dtype", "none")).removeprefix("torch.")
            t.equal(told, dtype, f"number format of {name}")
        _compare(t, got, expected(x, residual, weight, 1e-6), rtol)
    x, residual = (tensor(t, 2, 70, dtype="float16", scale=300) for _ in range(2))  # squares beyond 65,504
    weight = tensor(t, 70, dtype="float16")
    _compare(t, run(t, x, residual, weight, 1e-6).value, expected(x, residual, weight, 1e-6), 2e-3)


@add_rms_norm.check("x and residual are read once, h and y written once")
def traffic(t: Trial) -> None:
    rows, columns = t.odd(5, 9), t.odd(65, 255)
    x, residual = (tensor(t, rows, columns, order=order) for order in ("rows", "C"))
    weight = tensor(t, columns)
    call = run(t, x, residual, weight, 1e-6, watch=TRAFFIC)
    _compare(t, call.value, expected(x, residual, weight, 1e-6))
    n = x.numel() * x.itemsize
    at_minimum(
        call,
        loads=3 * n,
        stores=2 * n,
        reads="x and residual once, and for each row every element of weight",
        writes="h and y once",
    )


def _empty(x: Any, dtype: Any = None) -> Any:
    import torch

    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launched(kernel: Any, x: Any, residual: Any, weight: Any, eps: float, dtype: Any = None) -> Any:
    """The wrapper that most solutions have: one program a row."""
    h, y = _empty(x, dtype), _empty(x, dtype)
    rows, columns = x.shape
    kernel[(rows,)](
        x, residual, weight, h, y, x.stride(0), residual.stride(0), columns, eps, BLOCK=_power(columns)
    )
    return h, y


@triton.jit
def right_kernel(x, residual, weight, h, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    v += tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(h + row * columns + c, v, mask=c < columns)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@add_rms_norm.mistake(
    says="the results are returned the other way round, the norm first",
    tries="return h, y.",
    caught_by="powers",
)
def swapped(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    h, y = launched(right_kernel, x, residual, weight, eps)
    return y, h


@triton.jit
def x_normed_kernel(x, residual, weight, h, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    r = tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(h + row * columns + c, v + r, mask=c < columns)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@add_rms_norm.mistake(
    says="x is normalised, and the sum is not",
    tries="the sum of squares, and the scaling, of h = x + residual.",
    caught_by="powers",
)
def x_normed(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    return launched(x_normed_kernel, x, residual, weight, eps)


@triton.jit
def added_after_kernel(x, residual, weight, h, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    r = tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(h + row * columns + c, v + r, mask=c < columns)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w + r, mask=c < columns)


@add_rms_norm.mistake(
    says="residual is added behind the norm",
    tries="the norm of x + residual.",
    caught_by="powers",
)
def added_after(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    return launched(added_after_kernel, x, residual, weight, eps)


@triton.jit
def load_unmasked_kernel(x, residual, weight, h, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c).to(tl.float32)
    v += tl.load(residual + row * r_stride + c).to(tl.float32)
    tl.store(h + row * columns + c, v, mask=c < columns)
    w = tl.load(weight + c).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@add_rms_norm.mistake(
    says="the loads have no mask: a block reads into the next row, and past the end",
    tries="mask=c < columns, other=0.0 in every tl.load.",
    caught_by="odd",
)
def load_unmasked(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    return launched(load_unmasked_kernel, x, residual, weight, eps)


@triton.jit
def store_unmasked_kernel(x, residual, weight, h, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    v += tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(h + row * columns + c, v)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@add_rms_norm.mistake(
    says="a store has no mask: a block writes into the next row, and the last one past the end",
    tries="mask=c < columns in every tl.store.",
    caught_by="odd",
)
def store_unmasked(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    return launched(store_unmasked_kernel, x, residual, weight, eps)


@triton.jit
def over_block_kernel(x, residual, weight, h, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    v += tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(h + row * columns + c, v, mask=c < columns)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / BLOCK + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@add_rms_norm.mistake(
    says="the mean is taken over the lanes of the block, not over the columns",
    tries="tl.sum(v * v, axis=0) / columns.",
    caught_by="odd",
)
def mean_over_block(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    return launched(over_block_kernel, x, residual, weight, eps)


@add_rms_norm.mistake(
    says="both inputs are read with the row stride of x",
    tries="residual.stride(0) as an argument of its own.",
    caught_by="strided",
)
def one_stride(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    h, y = _empty(x), _empty(x)
    rows, columns = x.shape
    right_kernel[(rows,)](
        x, residual, weight, h, y, x.stride(0), x.stride(0), columns, eps, BLOCK=_power(columns)
    )
    return h, y


@add_rms_norm.mistake(
    says="rows are taken to lie side by side: no stride is asked",
    tries="x.stride(0) and residual.stride(0) as arguments of the kernel.",
    caught_by="strided",
)
def assumed_contiguous(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    h, y = _empty(x), _empty(x)
    rows, columns = x.shape
    right_kernel[(rows,)](
        x, residual, weight, h, y, columns, columns, columns, eps, BLOCK=_power(columns)
    )  # fmt: skip
    return h, y


@triton.jit
def in_place_kernel(x, residual, weight, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    v += tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(residual + row * r_stride + c, v, mask=c < columns)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@add_rms_norm.mistake(
    says="the sum is written over residual, which is the caller's",
    tries="an empty tensor for h.",
    caught_by="untouched",
)
def in_place(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    y = _empty(x)
    rows, columns = x.shape
    in_place_kernel[(rows,)](
        x, residual, weight, y, x.stride(0), residual.stride(0), columns, eps, BLOCK=_power(columns)
    )
    return residual, y


@triton.jit
def narrow_kernel(x, residual, weight, h, y, x_stride, r_stride, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0)
    v += tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0)
    tl.store(h + row * columns + c, v, mask=c < columns)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    mean = (tl.sum(v * v, axis=0) / columns).to(tl.float32)
    tl.store(y + row * columns + c, v.to(tl.float32) * tl.rsqrt(mean + eps) * w, mask=c < columns)


@add_rms_norm.mistake(
    says="the squares are added up in 16 bits, where float16 overflows at 65,504",
    tries=".to(tl.float32) right behind each load.",
    caught_by="formats",
)
def summed_in_sixteen_bits(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    return launched(narrow_kernel, x, residual, weight, eps)


@add_rms_norm.mistake(
    says="the results are float32, whatever came in",
    tries="torch.empty(x.shape, dtype=x.dtype, device=x.device) for both.",
    caught_by="formats",
)
def widened(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    import torch

    return launched(right_kernel, x, residual, weight, eps, torch.float32)


@triton.jit
def add_kernel(x, residual, h, x_stride, r_stride, columns, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns).to(tl.float32)
    v += tl.load(residual + row * r_stride + c, mask=c < columns).to(tl.float32)
    tl.store(h + row * columns + c, v, mask=c < columns)


@triton.jit
def norm_kernel(h, weight, y, columns, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(h + row * columns + c, mask=c < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(y + row * columns + c, v * scale * w, mask=c < columns)


@add_rms_norm.mistake(
    says="h is loaded back after it was stored, by a second kernel or by the same",
    tries="normalising the block that is still in registers.",
    caught_by="traffic",
)
def unfused(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    h, y = _empty(x), _empty(x)
    rows, columns = x.shape
    block = _power(columns)
    add_kernel[(rows,)](x, residual, h, x.stride(0), residual.stride(0), columns, BLOCK=block)
    norm_kernel[(rows,)](h, weight, y, columns, eps, BLOCK=block)
    return h, y


@add_rms_norm.mistake(
    says="torch adds, and the kernel normalises: the sum goes to memory and comes back",
    tries="the addition in the kernel.",
    caught_by="traffic",
)
def added_by_torch(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    h, y = x + residual, _empty(x)
    rows, columns = x.shape
    norm_kernel[(rows,)](h, weight, y, columns, eps, BLOCK=_power(columns))
    return h, y


@triton.jit
def rows_kernel(
    x, residual, weight, h, y, x_stride, r_stride, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(residual + r * r_stride + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + r * columns + c, v.to(h.dtype.element_ty), mask=inside)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / columns + eps)
    tl.store(y + r * columns + c, (v * scale[:, None] * w).to(y.dtype.element_ty), mask=inside)


@add_rms_norm.alternative("two rows a program")
def two_rows(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    h, y = _empty(x), _empty(x)
    rows, columns = x.shape
    strides = x.stride(0), residual.stride(0)
    rows_kernel[(-(-rows // 2),)](
        x, residual, weight, h, y, *strides, rows, columns, eps, ROWS=2, BLOCK=_power(columns)
    )
    return h, y


@triton.jit
def rounded_kernel(x, residual, weight, out, x_stride, r_stride, rows, columns, eps, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        v = tl.load(x + row * x_stride + c, mask=c < columns, other=0.0).to(tl.float32)
        v += tl.load(residual + row * r_stride + c, mask=c < columns, other=0.0).to(tl.float32)
        stored = v.to(out.dtype.element_ty)  # the norm sees the sum as it is stored
        tl.store(out + row * columns + c, stored, mask=c < columns)
        v = stored.to(tl.float32)
        v *= tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
        at = out + (rows + row) * columns + c
        tl.store(at, (v * w).to(out.dtype.element_ty), mask=c < columns)


@add_rms_norm.alternative(
    "programs that take turns with the rows; h rounded before the norm; one buffer for both"
)
def persistent(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    import torch

    rows, columns = x.shape
    both = torch.empty((2, rows, columns), dtype=x.dtype, device=x.device)
    strides = x.stride(0), residual.stride(0)
    rounded_kernel[(2,)](x, residual, weight, both, *strides, rows, columns, eps, BLOCK=_power(columns))
    return both[0], both[1]
