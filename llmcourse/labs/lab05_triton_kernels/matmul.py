"""Exercise `matmul`: tiles, tl.dot, and an accumulator in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.perform import Call
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import DOTS, at_minimum, run, tensor
from llmcourse.kernels.language import tl, triton

matmul = Exercise(
    "matmul",
    title="A matrix product in tiles",
    arguments=("a", "b", "block_m", "block_n", "block_k"),
    shapes=(
        "a         float32, float16 or bfloat16 tensor [M, K], b [K, N] of the same format, any sizes",
        "          from 1, any strides",
        "block_m, block_n, block_k   powers of 2 from 16: the sides of the tiles",
        "returns   contiguous tensor [M, N] of the same format, accumulated in float32",
        "cost      a is read once for each column of tiles, b once for each row of tiles:",
        "          M·K·⌈N / block_n⌉ + K·N·⌈M / block_m⌉ elements; c is written once; tl.dot multiplies",
    ),
    formula="c[i, j] = Σ_k a[i, k] · b[k, j]",
    difficulty=4,
    importance=5,
    minutes=45,
    points=8,
    hints=(
        "A program owns a tile of c. Which rows of a and which columns of b does it need, and must it hold "
        "all of them at once? What do the lanes of a tile hold that lie outside of a or b, so that the sum "
        "does not change?",
        "rows [block_m, 1] from axis 0 of the grid, columns [1, block_n] from axis 1. Walk along K in steps "
        "of block_k: load a tile [block_m, block_k] of a and one [block_k, block_n] of b, masked on both "
        "sides with other=0.0, and add tl.dot of the two to tl.zeros((block_m, block_n), tl.float32). An "
        "element (i, j) lies at i · stride(0) + j · stride(1).",
        "for start in range(0, K, BK): k = start + tl.arange(0, BK); "
        "at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0); "
        "bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0); "
        "acc = tl.dot(at, bt, acc). Behind the loop: store acc.to(c.dtype.element_ty) where rows < M and "
        "columns < N.",
    ),
)


def expected(a: Any, b: Any) -> np.ndarray:
    """The product in float64."""
    return a.double().numpy() @ b.double().numpy()


def _agree(
    t: Trial, m: int, n: int, k: int, *blocks: int, orders: str = "CC", what: str = "", watch: Any = ()
) -> Call:
    names = {"C": "C", "T": "T", "r": "rows"}
    a = tensor(t, m, k, order=names[orders[0]])
    b = tensor(t, k, n, order=names[orders[1]])
    call = run(t, a, b, *blocks, watch=watch)
    t.close(call.value, expected(a, b), what)
    return call


@matmul.check("sizes that are multiples of the tiles")
def whole(t: Trial) -> None:
    _agree(t, 32, 48, 16, 16, 16, 16)
    _agree(t, 32, 32, 64, 32, 16, 32)


@matmul.check("M and N that are not")
def edges(t: Trial) -> None:
    _agree(t, t.odd(17, 31), 32, 32, 16, 16, 16)
    _agree(t, 16, t.odd(17, 31), 32, 16, 16, 16)
    _agree(t, t.odd(33, 47), t.odd(3, 15), 16, 32, 16, 16)


@matmul.check("a K that is not, and single elements")
def inner(t: Trial) -> None:
    _agree(t, 16, 16, t.odd(33, 47), 16, 16, 16)
    _agree(t, t.odd(17, 31), t.odd(17, 31), t.odd(3, 15), 16, 32, 16)
    _agree(t, 1, 1, 1, 16, 16, 16)


@matmul.check("transposed matrices, and rows that do not touch")
def strided(t: Trial) -> None:
    m, n, k = t.odd(17, 31), t.odd(33, 47), t.odd(17, 31)
    for orders in ("TC", "CT", "rr"):
        _agree(t, m, n, k, 16, 16, 16, orders=orders, what="strides other than (columns, 1)")


@matmul.check("float16 and bfloat16 come and go, float32 accumulates")
def formats(t: Trial) -> None:
    for dtype, rtol in (("float16", 2e-3), ("bfloat16", 8e-3)):
        a, b = tensor(t, 17, 33, dtype=dtype), tensor(t, 33, 19, dtype=dtype)
        got = run(t, a, b, 16, 16, 16).value
        t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), dtype, "number format")
        t.close(got, expected(a, b), rtol=rtol)
    # Partial sums of about 115,000, beyond float16's 65,504, of which little is left at the end.
    a, b = tensor(t, 16, 64) + 60, tensor(t, 64, 16) + 60
    b[32:] *= -1
    a, b = a.half(), b.half()
    t.close(run(t, a, b, 16, 16, 16).value, expected(a, b), "with partial sums above 65,504", rtol=2e-3)


@matmul.check("the tiles are all that is read, and tl.dot multiplies them")
def traffic(t: Trial) -> None:
    m, n, k = t.odd(33, 63), t.odd(33, 63), t.odd(33, 63)
    bm, bn, bk = (32, 16, 32) if t.size(0, 1) else (16, 32, 16)
    call = _agree(t, m, n, k, bm, bn, bk, orders="TC", watch=DOTS)
    across, down, steps = -(-n // bn), -(-m // bm), -(-k // bk)
    at_minimum(
        call,
        loads=4 * (m * k * across + k * n * down),
        stores=4 * m * n,
        reads=f"a once for each of {across} columns of tiles, b once for each of {down} rows",
        writes=f"{m} × {n} elements of c once",
    )
    flops = call.costs["kernel_dot_flops"]
    t.holds(
        flops >= 2 * m * n * k,
        f"tl.dot does {flops:,} FLOPs, expected 2·M·N·K = {2 * m * n * k:,} and more",
        tries="tl.dot(a_tile, b_tile, acc): it is what tensor cores run.",
    )
    most = 2 * across * down * steps * bm * bn * bk
    t.at_most(flops, most, "FLOPs in tl.dot", "one tl.dot for each step along K and each tile of c.")


def _output(a: Any, b: Any, dtype: Any = None) -> Any:
    import torch

    return torch.empty((a.shape[0], b.shape[1]), dtype=dtype or a.dtype, device=a.device)


def launched(
    kernel: Any, a: Any, b: Any, bm: int, bn: int, bk: int, *, strides: Any = None, dtype: Any = None
) -> Any:
    """The wrapper that most solutions have: a grid of tiles of c."""
    (m, k), n = a.shape, b.shape[1]
    c = _output(a, b, dtype)
    strides = strides or (*a.stride(), *b.stride())
    kernel[(-(-m // bm), -(-n // bn))](a, b, c, m, n, k, *strides, BM=bm, BN=bn, BK=bk)
    return c


@triton.jit
def right_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc = tl.dot(at, bt, acc, input_precision="ieee")
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@triton.jit
def swapped_axes_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(1) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc = tl.dot(at, bt, acc)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="the axes of the grid have changed places: tiles are missing wherever c has not as many rows of "
    "tiles as columns",
    tries="rows from the axis with ⌈M / block_m⌉ programs, columns from the one with ⌈N / block_n⌉.",
    caught_by="whole",
)
def swapped_axes(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(swapped_axes_kernel, a, b, block_m, block_n, block_k)


@triton.jit
def overwritten_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc = tl.dot(at, bt)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="each step replaces the accumulator: only the last tile along K counts",
    tries="acc += tl.dot(…), or tl.dot(…, acc).",
    caught_by="whole",
)
def overwritten(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(overwritten_kernel, a, b, block_m, block_n, block_k)


@triton.jit
def first_tile_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    for _ in range(0, K, BK):
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc = tl.dot(at, bt, acc)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="every step loads the first tiles again: the place along K does not move",
    tries="k = start + tl.arange(0, BK) in the loop, or pointers that move on by BK · stride.",
    caught_by="whole",
)
def first_tile_again(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(first_tile_kernel, a, b, block_m, block_n, block_k)


@triton.jit
def unmasked_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak)
        bt = tl.load(b + k[:, None] * bk + columns * bn)
        acc = tl.dot(at, bt, acc)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="the loads have no mask: the last tiles reach past the ends of a and b",
    tries="mask=(rows < M) & (k < K) for a, (k < K) & (columns < N) for b, other=0.0 for both.",
    caught_by="edges",
)
def unmasked(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(unmasked_kernel, a, b, block_m, block_n, block_k)


@triton.jit
def store_unmasked_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc = tl.dot(at, bt, acc)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty))


@matmul.mistake(
    says="the store has no mask: the last tiles reach past the end of c",
    tries="mask=(rows < M) & (columns < N) in tl.store.",
    caught_by="edges",
)
def store_unmasked(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(store_unmasked_kernel, a, b, block_m, block_n, block_k)


@triton.jit
def k_unmasked_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=rows < M, other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=columns < N, other=0.0)
        acc = tl.dot(at, bt, acc)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="the end of K has no mask: the last step reads into the next row of a, and past the end",
    tries="(k[None, :] < K) in the mask of a, (k[:, None] < K) in that of b.",
    caught_by="inner",
)
def k_unmasked(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(k_unmasked_kernel, a, b, block_m, block_n, block_k)


@triton.jit
def rounded_down_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, K // BK):
        k = step * BK + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc = tl.dot(at, bt, acc)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="the number of steps along K is rounded down: the last, partial step is missing",
    tries="range(0, K, BK), or tl.cdiv(K, BK) steps.",
    caught_by="inner",
)
def rounded_down(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(rounded_down_kernel, a, b, block_m, block_n, block_k)


@matmul.mistake(
    says="both matrices are taken to be contiguous: their strides are not asked",
    tries="a.stride(0), a.stride(1), b.stride(0), b.stride(1) as arguments of the kernel.",
    caught_by="strided",
)
def assumed_contiguous(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    strides = (a.shape[1], 1, b.shape[1], 1)
    return launched(right_kernel, a, b, block_m, block_n, block_k, strides=strides)


@matmul.mistake(
    says="the strides of b have changed places: that multiplies by b transposed",
    tries="k · b.stride(0) + column · b.stride(1).",
    caught_by="whole",
)
def b_transposed(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    strides = (*a.stride(), b.stride(1), b.stride(0))
    return launched(right_kernel, a, b, block_m, block_n, block_k, strides=strides)


@triton.jit
def half_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), c.dtype.element_ty)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc += tl.dot(at, bt).to(c.dtype.element_ty)
    tl.store(c + rows * N + columns, acc, mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="the accumulator has the format of c: in float16 it overflows at 65,504, and each step rounds",
    tries="tl.zeros((BM, BN), tl.float32), converted once, at the store.",
    caught_by="formats",
)
def half_accumulator(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(half_kernel, a, b, block_m, block_n, block_k)


@matmul.mistake(
    says="the result is float32, whatever came in",
    tries="torch.empty((M, N), dtype=a.dtype, device=a.device).",
    caught_by="formats",
)
def widened(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    import torch

    return launched(right_kernel, a, b, block_m, block_n, block_k, dtype=torch.float32)


@matmul.mistake(
    says="the tiles are 16 × 16, whatever was asked for: a and b are read more often",
    tries="block_m, block_n and block_k for the grid and for the kernel.",
    caught_by="traffic",
)
def fixed_tiles(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(right_kernel, a, b, 16, 16, 16)


@triton.jit
def no_dot_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
        bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
        acc += tl.sum(at.to(tl.float32)[:, :, None] * bt.to(tl.float32)[None, :, :], axis=1)
    tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.mistake(
    says="a product of blocks is summed by hand: no tl.dot, so no tensor cores",
    tries="tl.dot(a_tile, b_tile, acc).",
    caught_by="traffic",
)
def no_dot(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(no_dot_kernel, a, b, block_m, block_n, block_k)


@matmul.mistake(
    says="a and b are copied first, to be contiguous",
    tries="their strides as arguments of the kernel.",
    caught_by="traffic",
)
def copied(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(right_kernel, a.contiguous(), b.contiguous(), block_m, block_n, block_k)


@matmul.mistake(
    says="torch computes it, and no kernel runs",
    tries="a kernel: tiles, tl.dot, store.",
    caught_by="traffic",
)
def by_torch(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return (a.float() @ b.float()).to(a.dtype)


@triton.jit
def grouped_kernel(
    a, b, c, M, N, K, am, ak, bk, bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, across, down = tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    rows = (first + tile % (GROUP * across) % height) * BM + tl.arange(0, BM)
    columns = tile % (GROUP * across) // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a += rows[:, None] * am + k[None, :] * ak
    b += k[:, None] * bk + columns[None, :] * bn
    acc = tl.zeros((BM, BN), tl.float32)
    for left in range(K, 0, -BK):
        at = tl.load(a, mask=(rows[:, None] < M) & (k[None, :] < left), other=0.0)
        bt = tl.load(b, mask=(k[:, None] < left) & (columns[None, :] < N), other=0.0)
        acc += tl.dot(at, bt, input_precision="ieee")
        a += BK * ak
        b += BK * bk
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], acc.to(c.dtype.element_ty), mask=inside)


@matmul.alternative("tiles numbered in bands of two rows, pointers that move on")
def grouped(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    (m, k), n = a.shape, b.shape[1]
    c, grid = _output(a, b), (-(-m // block_m) * -(-n // block_n),)
    strides = (*a.stride(), *b.stride())
    grouped_kernel[grid](a, b, c, m, n, k, *strides, BM=block_m, BN=block_n, BK=block_k, GROUP=2)
    return c


@triton.jit
def persistent_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    across = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * across, tl.num_programs(0)):
        rows = tile // across * BM + tl.arange(0, BM)[:, None]
        columns = tile % across * BN + tl.arange(0, BN)[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(tl.cdiv(K, BK)):
            k = step * BK + tl.arange(0, BK)
            at = tl.load(a + rows * am + k[None, :] * ak, mask=(rows < M) & (k[None, :] < K), other=0.0)
            bt = tl.load(b + k[:, None] * bk + columns * bn, mask=(k[:, None] < K) & (columns < N), other=0.0)
            acc = tl.dot(at, bt, acc, input_precision="ieee")
        tl.store(c + rows * N + columns, acc.to(c.dtype.element_ty), mask=(rows < M) & (columns < N))


@matmul.alternative("three programs that take turns with the tiles")
def persistent(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    (m, k), n = a.shape, b.shape[1]
    c = _output(a, b)
    persistent_kernel[(3,)](
        a, b, c, m, n, k, *a.stride(), *b.stride(), BM=block_m, BN=block_n, BK=block_k
    )  # fmt: skip
    return c


@triton.jit
def transposed_kernel(
    a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = tl.load(a + rows[None, :] * am + k[:, None] * ak, mask=(rows[None, :] < M) & (k[:, None] < K))
        bt = tl.load(
            b + k[None, :] * bk + columns[:, None] * bn, mask=(k[None, :] < K) & (columns[:, None] < N)
        )
        at = tl.where((rows[None, :] < M) & (k[:, None] < K), at, 0.0)
        bt = tl.where((k[None, :] < K) & (columns[:, None] < N), bt, 0.0)
        acc = tl.dot(bt, at, acc, input_precision="ieee")
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], tl.trans(acc).to(c.dtype.element_ty), mask=inside)


@matmul.alternative("the transposed product of transposed tiles; zeros put in behind the loads")
def transposed(a: Any, b: Any, block_m: int, block_n: int, block_k: int) -> Any:
    return launched(transposed_kernel, a, b, block_m, block_n, block_k)
