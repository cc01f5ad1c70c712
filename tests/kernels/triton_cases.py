"""What the interpreter must get right, as functions that can run under any version of Triton.

Each compares a kernel's results with torch, NumPy or a published number, and returns counters, which have
to be the same under every version. `test_counters` runs them here, `test_triton_versions` elsewhere:

    python triton_cases.py      prints {"version": …, "counters": {case: {…}}}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda.libdevice import erf as cuda_erf
from triton.tools.tensor_descriptor import TensorDescriptor

from llmcourse.kernels.counters import Counts, count, interpreted

CASES: dict[str, Callable[[], dict[str, Any]]] = {}


def case(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    CASES[function.__name__] = function
    return function


def counters(c: Counts) -> dict[str, Any]:
    """All that does not depend on the version of Triton."""
    total = {k: v for k, v in c.total.items() if k != "float_ops"}
    lines = [c.lines[n] for n in sorted(c.lines)]
    return {
        "total": total,
        "args": {k: dict(v) for k, v in c.args.items()},
        "lines": [dict(v) for v in lines],
    }


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def softmax_kernel(x, out, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + column, mask=column < columns, other=-float("inf"))
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * stride + column, e / tl.sum(e, axis=0), mask=column < columns)


@case
def fused_softmax_moves_its_input_and_its_output_once() -> dict[str, Any]:
    x = randn(7, 1000)
    out = torch.empty_like(x)
    c = count(softmax_kernel)[(7,)](x, out, 1000, 1000, BLOCK=1024)
    assert torch.allclose(out, x.softmax(1), atol=1e-6)
    assert c.load_bytes == c.store_bytes == x.nbytes
    assert c.load_sectors == c.store_sectors == x.nbytes // 32
    assert c.load_unique_bytes == x.nbytes
    assert c.programs == 7
    return counters(c)


@triton.jit
def copy_kernel(x, out, n, stride, start, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + start + i * stride, mask=i < n), mask=i < n)


@case
def sectors_tell_strided_and_misaligned_loads_from_contiguous_ones() -> dict[str, Any]:
    x, out = torch.arange(4096.0), torch.zeros(64)
    found: dict[str, Any] = {}
    for stride, start, sectors in ((1, 0, 8), (2, 0, 16), (8, 0, 64), (16, 0, 64), (1, 3, 9), (0, 5, 1)):
        c = count(copy_kernel)[(1,)](x, out, 64, stride, start, BLOCK=64)
        assert torch.equal(out, x[start + stride * torch.arange(64)])
        assert (c.args["x"].load_sectors, c.args["x"].load_bytes) == (sectors, 256)
        assert c.args["x"].load_unique_bytes == (4 if stride == 0 else 256)
        found[f"{stride} {start}"] = counters(c)
    return found


@case
def masked_lanes_cost_nothing() -> dict[str, Any]:
    x, out = randn(100), torch.zeros(100)
    c = count(copy_kernel)[(4,)](x, out, 37, 1, 0, BLOCK=32)
    assert (c.load_bytes, c.store_bytes, c.load_ops) == (148, 148, 4)  # two programs have nothing to do
    assert torch.equal(out[:37], x[:37])
    assert not out[37:].any()
    return counters(c)


@triton.jit
def twice_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x + i) + tl.load(y + start + i)
    tl.store(out + i, total)


@case
def unique_bytes_count_what_is_read_again_only_once() -> dict[str, Any]:
    x, y, out = randn(64), randn(256), torch.zeros(64)
    c = count(twice_kernel)[(1,)](x, y, out, 256, BLOCK=64)
    assert torch.allclose(out, 4 * x + y.reshape(4, 64).sum(0), atol=1e-5)
    assert (c.args["x"].load_bytes, c.args["x"].load_unique_bytes) == (1024, 256)
    assert (c.args["y"].load_bytes, c.args["y"].load_unique_bytes) == (1024, 1024)
    shared = count(twice_kernel)[(1,)](y, y, out, 256, BLOCK=64)  # x and y are one tensor
    assert shared.args["x"].load_unique_bytes == 256
    assert shared.load_unique_bytes == 1024
    return {"apart": counters(c), "shared": counters(shared)}


@triton.jit
def pointers_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    chosen = tl.where(i % 2 == 0, x + i, y + i)
    tl.store(out + i, tl.load(chosen))


@case
def one_load_may_read_two_tensors() -> dict[str, Any]:
    x, y, out = randn(32), randn(32, seed=1), torch.zeros(32)
    c = count(pointers_kernel)[(1,)](x, y, out, BLOCK=32)
    assert torch.equal(out[0::2], x[0::2])
    assert torch.equal(out[1::2], y[1::2])
    assert c.args["x"].load_bytes == c.args["y"].load_bytes == 64
    assert c.load_ops == 1
    return counters(c)


@triton.jit
def scalar_mask_kernel(x, out, n):
    i = tl.program_id(0)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=7.0), mask=i < n)


@case
def a_scalar_mask_masks() -> dict[str, Any]:
    x, out = randn(3), torch.zeros(3)
    c = count(scalar_mask_kernel)[(5,)](x, out, 3)
    assert torch.equal(out, x)
    assert (c.load_bytes, c.load_ops) == (12, 5)
    return counters(c)


@triton.jit
def rows_kernel(x, out, rows, columns, sr, sc, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), BLOCK), BLOCK)
    v = tl.load(x + r * sr + c * sc, mask=c < columns)
    tl.store(out + r * columns + c, v, mask=c < columns)


@case
def views_and_transposed_tensors_are_read_where_they_lie() -> dict[str, Any]:
    base = randn(24, 40)
    found: dict[str, Any] = {}
    for name, x in {
        "transposed": base.T,
        "columns": base[:, 3:20],
        "every third": base[::3],
        "expanded": base[4:5].expand(6, 40),
    }.items():
        out = torch.empty(x.shape)
        c = count(rows_kernel)[(x.shape[0],)](x, out, *x.shape, *x.stride(), BLOCK=64)
        assert torch.equal(out, x)
        found[name] = counters(c)
    return found


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────


@triton.jit
def cast_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n).to(out.dtype.element_ty), mask=i < n)


SMALL = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a format of 8 or 16 bits."""
    bits = torch.arange(256**dtype.itemsize)
    return bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)


def awkward() -> torch.Tensor:
    """float32 numbers around every rounding boundary of the small formats, and random bit patterns."""
    generator = np.random.default_rng(0)
    grid = torch.cat([every(d).float() for d in (torch.bfloat16, torch.float16)]).numpy()
    grid = np.sort(grid[np.isfinite(grid)])
    ties = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    near = np.concatenate(
        [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, -np.float32(np.inf))]
    )
    eighth = torch.cat([every(d).float() for d in (torch.float8_e4m3fn, torch.float8_e5m2)]).numpy()
    eighth = np.sort(eighth[np.isfinite(eighth)])
    ties8 = (eighth[1:] + eighth[:-1]) / 2
    near8 = np.concatenate(
        [ties8, np.nextafter(ties8, np.float32(9e9)), np.nextafter(ties8, np.float32(-9e9))]
    )
    random = generator.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 65504, 65520, 65519.9, 448, 464, 463.9, 480]
    edges += [57344, 61440, 61439.9, 1e-45, 5.9e-8, 2.9e-8, 2.0**-25, 2.0**-133, 2.0**-134]
    return torch.from_numpy(np.concatenate([grid, near, near8, random, np.array(edges, np.float32)]))


def cast_differences(x: torch.Tensor, dtype: torch.dtype) -> int:
    out = torch.empty(x.shape, dtype=dtype)
    interpreted(cast_kernel)[(triton.cdiv(x.numel(), 65536),)](x, out, x.numel(), BLOCK=65536)
    if dtype == torch.float8_e4m3fn:
        x = x.float().clamp(-448, 448)  # torch before 2.13 makes NaN of what is too large
    got, expected = out.float().numpy(), x.to(dtype).float().numpy()
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return int((~same | (~np.isnan(got) & (np.signbit(got) != np.signbit(expected)))).sum())


@case
def every_conversion_is_what_torch_makes_of_it() -> dict[str, Any]:
    floats = awkward()
    for dtype in SMALL:
        assert cast_differences(floats, dtype) == 0, f"float32 → {dtype}"
        for other in (*SMALL, torch.float32):
            assert cast_differences(every(dtype), other) == 0, f"{dtype} → {other}"
    return {}


@triton.jit
def toward_zero_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@case
def rounding_toward_zero_cuts_the_mantissa() -> dict[str, Any]:
    x = torch.cat([randn(62), torch.tensor([3.4e38, -3.4e38])])
    out = torch.empty(64, dtype=torch.bfloat16)
    interpreted(toward_zero_kernel)[(1,)](x, out, BLOCK=64)
    assert torch.equal(out.view(torch.int16), (x.view(torch.int32) >> 16).to(torch.int16))
    return {}


@triton.jit
def arithmetic_kernel(x, y, out, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + B + i, a - b)
    tl.store(out + 2 * B + i, a * b)
    tl.store(out + 3 * B + i, a / b)
    tl.store(out + 4 * B + i, -a)
    tl.store(out + 5 * B + i, tl.maximum(a, b))
    tl.store(out + 6 * B + i, tl.where(a > b, a, b))
    tl.store(out + 7 * B + i, tl.abs(a) * 0.1)
    tl.store(out + 8 * B + i, tl.full((B,), 1.5, out.dtype.element_ty))
    tl.store(out + 9 * B + i, tl.exp(a.to(tl.float32)).to(out.dtype.element_ty))


@case
def sixteen_bit_arithmetic_rounds_once() -> dict[str, Any]:
    found: dict[str, Any] = {}
    n = 512
    for dtype in (torch.bfloat16, torch.float16):
        a, b = randn(n).to(dtype), randn(n, seed=1).to(dtype)
        out = torch.empty(10, n, dtype=dtype)
        c = count(arithmetic_kernel)[(1,)](a, b, out, B=n)
        tenth = torch.tensor(0.1, dtype=dtype)
        expected = [a + b, a - b, a * b, a / b, -a, torch.maximum(a, b), torch.maximum(a, b), a.abs() * tenth]
        expected += [torch.full((n,), 1.5, dtype=dtype)]
        for i, wanted in enumerate(expected):
            assert torch.equal(out[i], wanted), (dtype, i)
        assert torch.allclose(out[9].float(), a.float().exp(), rtol=2**-8)
        found[str(dtype)] = counters(c)
    return found


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=c.dtype.element_ty)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(a + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        y = tl.load(b + rk[:, None] * N + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee", out_dtype=c.dtype.element_ty)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@case
def dot_accumulates_in_float32_whatever_the_operands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    m, n, k = 37, 33, 70
    for dtype in (torch.float32, *SMALL):
        a, b, out = randn(m, k).to(dtype), randn(k, n, seed=1).to(dtype), torch.empty(m, n)
        c = count(matmul_kernel)[(3, 3)](a, b, out, m, n, k, BM=16, BN=16, BK=32)
        exact = a.double() @ b.double()
        assert (out - exact).abs().max() < 1e-5 * exact.abs().max(), dtype
        assert c.dot_flops == 2 * 48 * 48 * 96
        assert c.load_bytes == 3 * (a.nbytes + b.nbytes)
        assert (c.load_unique_bytes, c.store_bytes) == (a.nbytes + b.nbytes, out.nbytes)
        found[str(dtype)] = counters(c)
    a8, b8 = torch.randint(-128, 128, (m, k)).to(torch.int8), torch.randint(-128, 128, (k, n)).to(torch.int8)
    integers = torch.empty(m, n, dtype=torch.int32)
    interpreted(matmul_kernel)[(3, 3)](a8, b8, integers, m, n, k, BM=16, BN=16, BK=32)
    assert torch.equal(integers, a8.int() @ b8.int())
    return found


@triton.jit
def integer_kernel(out, a, b, wide):
    tl.store(out, a // b)
    tl.store(out + 1, a % b)
    tl.store(out + 2, (a.to(tl.uint32) >> 1).to(tl.int32))
    tl.store(out + 3, a >> 1)
    tl.store(out + 4, tl.umulhi(a, b))
    tl.store(out + 5, a ^ b)
    tl.store(out + 6, ~a)
    tl.store(out + 7, (a.to(tl.float32) * 3e9).to(tl.int32))
    tl.store(out + 8, (a.to(tl.float32) * float("nan")).to(tl.int32))
    tl.store(out + 9, a * 1000000007)
    tl.store(out + 10, (tl.umulhi(wide, wide) % 65536).to(tl.int32))
    tl.store(out + 11, min(a, b) + max(a, 5) + tl.cdiv(b, 2))


@case
def integers_divide_shift_wrap_and_saturate_as_on_a_gpu() -> dict[str, Any]:
    out = torch.zeros(12, dtype=torch.int32)
    wide = 0xFEDCBA9876543210 - 2**64
    interpreted(integer_kernel)[(1,)](out, -7, 3, wide)
    wrapped = (-7 * 1000000007 + 2**31) % 2**32 - 2**31
    high = ((wide % 2**64) ** 2 >> 64) - 2**64  # signed: the remainder has the sign of the dividend
    expected = [-2, -1, (-7 % 2**32) >> 1, -4, ((-7 % 2**32) * 3) >> 32, -7 ^ 3, 6, -(2**31), 0, wrapped]
    assert out.tolist()[:10] == expected
    assert out[10] == -(-high % 65536)
    assert out[11] == -7 + 5 + 2
    return {}


@triton.jit
def nan_kernel(x, out, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.store(out, tl.max(v, 0))
    tl.store(out + 1, tl.min(v, 0))
    tl.store(out + 2, tl.sum(tl.maximum(v, 0.0), 0))
    tl.store(out + 3, tl.sum(tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL), 0))
    tl.store(out + 4, tl.sum(tl.clamp(v, -1.0, 1.0), 0))


@case
def maximum_ignores_nan_unless_told_otherwise() -> dict[str, Any]:
    x = torch.tensor([1.0, float("nan"), -3.0, 2.0])
    out = torch.zeros(5)
    interpreted(nan_kernel)[(1,)](x, out, B=4)
    assert out[:3].tolist() == [2.0, -3.0, 3.0]
    assert out[3].isnan()
    assert out[4] == 1.0 - 1.0 - 1.0 + 1.0  # NaN is clamped to the lower bound
    return {}


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def reductions_kernel(x, out, index, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(out, tl.sum(v, 0))
    tl.store(out + 1, tl.max(v, 0))
    tl.store(out + 2, v.min(0))
    tl.store(index, tl.argmax(v, 0))
    tl.store(index + 1, tl.argmin(v, axis=0))
    tl.store(out + 8 + i, tl.cumsum(v, 0))
    tl.store(out + 8 + B + i, tl.sort(v))
    tl.store(out + 8 + 2 * B + i, tl.flip(v, 0))
    tl.store(out + 8 + 3 * B + i, v.softmax())
    tl.store(out + 8 + 4 * B + i, tl.cumsum(v, 0, reverse=True))
    tl.store(out + 8 + 5 * B + i, tl.cumprod(v, 0))


@case
def reductions_and_scans_agree_with_torch() -> dict[str, Any]:
    n = 64
    x, out, index = randn(n), torch.zeros(8 + 6 * n), torch.zeros(2, dtype=torch.int32)
    c = count(reductions_kernel)[(1,)](x, out, index, B=n)
    assert torch.allclose(out[:3], torch.stack([x.sum(), x.max(), x.min()]), atol=1e-5)
    assert index.tolist() == [int(x.argmax()), int(x.argmin())]
    rows = out[8:].reshape(6, n)
    assert torch.allclose(rows[0], x.cumsum(0), atol=1e-5)
    assert torch.equal(rows[1], x.sort().values)
    assert torch.equal(rows[2], x.flip(0))
    assert torch.allclose(rows[3], x.softmax(0), atol=1e-6)
    assert torch.allclose(rows[4], x.flip(0).cumsum(0).flip(0), atol=1e-5)
    assert torch.allclose(rows[5], x.cumprod(0), rtol=1e-4)
    return counters(c)


@triton.jit
def linear(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def larger(a, b):
    if a > b:  # noqa: SIM108
        r = a
    else:
        r = b
    return r


@triton.jit
def recurrence_kernel(a, b, out, most, R: tl.constexpr, T: tl.constexpr):
    at = tl.arange(0, R)[:, None] * T + tl.arange(0, T)[None, :]
    _, h = tl.associative_scan((tl.load(a + at), tl.load(b + at)), 1, linear)
    tl.store(out + at, h)
    tl.store(most + tl.arange(0, R), tl.reduce(h, 1, larger))


@case
def combine_functions_may_take_pairs_and_branch() -> dict[str, Any]:
    rows, length = 4, 32
    a, b = torch.rand(rows, length, generator=torch.Generator().manual_seed(2)), randn(rows, length)
    out, most = torch.empty(rows, length), torch.empty(rows)
    interpreted(recurrence_kernel)[(1,)](a, b, out, most, R=rows, T=length)
    h = torch.zeros(rows, dtype=torch.float64)
    for t in range(length):
        h = a[:, t].double() * h + b[:, t].double()
        assert torch.allclose(out[:, t].double(), h, atol=1e-5)
    assert torch.equal(most, out.max(1).values)
    return {}


@triton.jit
def half_sum_kernel(x, out, B: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, B)), 0))


@case
def sums_of_sixteen_bit_numbers_do_not_stall() -> dict[str, Any]:
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros(1)
        interpreted(half_sum_kernel)[(1,)](torch.full((1024,), 1.0, dtype=dtype), out, B=1024)
        assert out.item() == 1024  # adding 1 to 256 in bfloat16 stays at 256
    return {}


@triton.jit
def shapes_kernel(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    a, b = v.reshape(B // 2, 2).split()
    tl.store(out + i, tl.join(a, b).reshape(B))
    tl.store(out + v.shape[0] + i, tl.interleave(a, b))
    tl.store(out + 2 * B + i, tl.gather(v, B - 1 - i, 0))
    tl.store(out + 3 * B + i, v.reshape(B // 4, 4).T.reshape(B))
    tl.store(
        out + 4 * B + i, tl.trans(tl.broadcast_to(v[None, :], (4, B))).reshape(4 * B).reshape(4, B).sum(0)
    )


@case
def blocks_change_their_shapes() -> dict[str, Any]:
    x, out = randn(16), torch.zeros(5, 16)
    interpreted(shapes_kernel)[(1,)](x, out, B=16)
    assert torch.equal(out[0], x)
    assert torch.equal(out[1], x)
    assert torch.equal(out[2], x.flip(0))
    assert torch.equal(out[3], x.reshape(4, 4).T.reshape(-1))
    assert torch.allclose(out[4], x.repeat_interleave(4).reshape(4, 16).sum(0), atol=1e-6)
    return {}


@triton.jit
def histogram_kernel(x, out, B: tl.constexpr, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.histogram(tl.load(x + tl.arange(0, B)), N))


@case
def histograms_count() -> dict[str, Any]:
    x = torch.randint(0, 16, (128,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(16, dtype=torch.int32)
    interpreted(histogram_kernel)[(1,)](x, out, B=128, N=16)
    assert torch.equal(out.long(), torch.bincount(x, minlength=16))
    return {}


@triton.jit
def philox_kernel(out, seed):
    a, b, c, d = tl.randint4x(seed, tl.arange(0, 1))
    i = tl.arange(0, 1)
    tl.store(out + i, a)
    tl.store(out + 1 + i, b)
    tl.store(out + 2 + i, c)
    tl.store(out + 3 + i, d)


@triton.jit
def random_kernel(out, B: tl.constexpr):
    tl.store(out + tl.arange(0, B), tl.rand(7, tl.arange(0, B)))


@case
def random_numbers_are_those_of_philox() -> dict[str, Any]:
    out = torch.zeros(4, dtype=torch.int32)
    interpreted(philox_kernel)[(1,)](out, 0)
    # the known answer of Random123 for counter 0 and key 0 (Salmon et al. 2011)
    assert [v % 2**32 for v in out.tolist()] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    uniform = torch.zeros(4096)
    interpreted(random_kernel)[(1,)](uniform, B=4096)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.03
    return {}


# ── atomics ──────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def atomic_kernel(x, counts, sums, lock, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < n
    v = tl.load(x + i, mask=inside, other=0)
    tl.atomic_add(counts + v, 1, mask=inside)
    tl.atomic_add(sums + v, 1.0, mask=inside, sem="relaxed")
    tl.atomic_max(counts + 16 + v, i, mask=inside)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(sums + 20, tl.load(sums + 20) + 1.0)
    tl.atomic_xchg(lock, 0)


@case
def atomics_on_one_address_all_happen() -> dict[str, Any]:
    found: dict[str, Any] = {}
    n = 200
    x = torch.randint(0, 10, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    wanted = torch.bincount(x, minlength=10)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        counts = torch.zeros(32, dtype=torch.int32)
        sums, lock = torch.zeros(32, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        c = count(atomic_kernel)[(4,)](x, counts, sums, lock, n, B=64)
        assert torch.equal(counts[:10].long(), wanted)
        assert torch.equal(sums[:10].float(), wanted.float())
        assert sums[20] == 4
        assert all(counts[16 + v] == int((x == v).nonzero().max()) for v in range(10))
        assert c.args["counts"].atomic_bytes == 2 * n * 4
        assert c.args["sums"].atomic_bytes == n * dtype.itemsize
        found[str(dtype)] = counters(c)
    return found


@triton.jit
def tickets_kernel(counter, out, B: tl.constexpr):
    i = tl.arange(0, B)
    ticket = tl.atomic_add(counter + i * 0, 1)
    tl.store(out + ticket, i)


@case
def an_atomic_gives_each_lane_another_value() -> dict[str, Any]:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    interpreted(tickets_kernel)[(1,)](counter, out, B=32)
    assert counter.item() == 32
    assert sorted(out.tolist()) == list(range(32))
    return {}


@triton.jit
def extremes_kernel(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.atomic_max(out + i * 0, v)
    tl.atomic_min(out + 1 + i * 0, v)
    tl.atomic_xchg(out + 2, 5.0)


@case
def atomics_work_on_floats() -> dict[str, Any]:
    x, out = randn(32), torch.tensor([-float("inf"), float("inf"), 0.0])
    interpreted(extremes_kernel)[(1,)](x, out, B=32)
    assert out.tolist() == [x.max(), x.min(), 5.0]
    return {}


# ── descriptors ──────────────────────────────────────────────────────────────────────────────────


@triton.jit
def device_descriptor_kernel(x, out, M, N, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    target = tl.make_tensor_descriptor(out, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    i = tl.program_id(0) * BM
    for j in range(0, N, BN):
        target.store([i, j], source.load([i, j]) * 2)


@triton.jit
def host_descriptor_kernel(source, target, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    i = tl.program_id(0) * BM
    for j in tl.static_range(0, N, BN):
        target.store([i, j], source.load([i, j]))


@case
def tensor_descriptors_of_host_and_device_stay_inside_their_tensors() -> dict[str, Any]:
    x, out = randn(20, 36), torch.zeros(20, 36)
    c = count(device_descriptor_kernel)[(2,)](x, out, 20, 36, BM=16, BN=16)
    assert torch.equal(out, 2 * x)
    assert c.load_bytes == c.store_bytes == x.nbytes
    found = {"device": counters(c)}
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        x, out = randn(20, 48).to(dtype), torch.zeros(20, 48).to(dtype)
        made = [TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, out)]
        c = count(host_descriptor_kernel)[(2,)](*made, 48, BM=16, BN=16)
        assert torch.equal(out.float(), x.float())
        assert c.args["source"].load_bytes == x.nbytes
        found[str(dtype)] = counters(c)
    return found


@triton.jit
def gather_kernel(x, rows, out, total, N: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[N, C], strides=[C, 1], block_shape=[1, C])
    i = tl.arange(0, B)
    v = source.gather(tl.load(rows + i), 0)
    tl.store(out + i[:, None] * C + tl.arange(0, C)[None, :], v)
    target = tl.make_tensor_descriptor(total, shape=[B, C], strides=[C, 1], block_shape=[B, C])
    target.atomic_add([0, 0], v)


@case
def descriptors_gather_rows_and_add_to_tiles() -> dict[str, Any]:
    x = randn(20, 16)
    rows = torch.tensor([3, 0, 19, 3, 7, 8, 9, 1], dtype=torch.int32)
    out, total = torch.zeros(8, 16), torch.ones(8, 16)
    c = count(gather_kernel)[(1,)](x, rows, out, total, N=20, B=8, C=16)
    assert torch.equal(out, x[rows.long()])
    assert torch.equal(total, 1 + out)
    assert c.args["x"].load_unique_bytes == 7 * 64
    return {"x": dict(c.args["x"]), "total": dict(c.args["total"])}


# ── the language ─────────────────────────────────────────────────────────────────────────────────


THREE = tl.constexpr(3)


@triton.jit
def logic_kernel(out, n, B: tl.constexpr):
    i = tl.arange(0, B)
    inside = (i < n) and (i > 2)
    far = not (i < 4)
    either = (i == 0) or (i == 7)
    tl.store(out + i, inside.to(tl.int32) + 10 * far.to(tl.int32) + 100 * either.to(tl.int32))
    tl.store(out + B, THREE + THREE.value)
    total = 0
    k = 0
    while k < n and k >= 0:
        total += k
        k += 2
    tl.store(out + B + 1, total)
    for j in range(n, 0, -1):
        tl.store(out + B + 2, j.to(tl.int64).to(tl.int32))
    for j in tl.range(0, n, num_stages=2):
        tl.store(out + B + 3, tl.multiple_of(j, 1))
    tl.store(out + B + 4, 5 if n > 3 else 6)


@case
def and_or_not_and_loops_mean_what_they_mean_on_a_gpu() -> dict[str, Any]:
    n = 6
    i = torch.arange(8)
    out = torch.zeros(13, dtype=torch.int32)
    interpreted(logic_kernel)[(1,)](out, n, B=8)
    expected = ((i < n) & (i > 2)).int() + 10 * (i >= 4).int() + 100 * ((i == 0) | (i == 7)).int()
    assert torch.equal(out[:8], expected)
    assert out[8:].tolist() == [6, 0 + 2 + 4, 1, n - 1, 5]
    return {}


@triton.jit
def load_twice(p):
    """For kernels of other files."""
    return 2 * tl.load(p)


@triton.jit
def times(a, b):
    return a * b


@triton.jit
def arguments_kernel(
    p, nothing, flag, f, one, big, pair, out, DT: tl.constexpr, FN: tl.constexpr, NAME: tl.constexpr = "no"
):
    if nothing is not None:
        tl.store(out + 7, 1.0)
    if flag:
        tl.store(out, f)
    tl.store(out + 1, one)
    tl.store(out + 2, big.to(tl.float32))
    tl.store(out + 3, tl.load(pair[0]).to(DT).to(tl.float32))
    tl.store(out + 4, FN(tl.load(pair[1]), 2.0))
    if NAME == "yes":
        tl.store(out + 5, tl.load(p + 1))


@case
def arguments_arrive_as_a_launch_brings_them() -> dict[str, Any]:
    p, out = torch.zeros(2), torch.zeros(8)
    p[1] = 1
    a, b = torch.tensor([1.2345]), torch.tensor([3.0])
    c = count(arguments_kernel)[(1,)](
        p, None, True, 0.1, 1, 2**40, (a, b), out, DT=tl.bfloat16, FN=times, NAME="yes", num_warps=2
    )
    assert out.tolist() == [np.float32(0.1), 1.0, float(2**40), float(a.bfloat16()), 6.0, 1.0, 0.0, 0.0]
    assert list(c.args) == ["p", "pair[0]", "pair[1]", "out"]
    assert c.constants["NAME"] == "yes"
    return counters(c)


def closure_kernel() -> Any:
    FOUR = tl.constexpr(4)

    @triton.jit
    def kernel(out):
        tl.store(out, FOUR)

    return kernel


@case
def a_kernel_sees_constants_of_the_function_around_it() -> dict[str, Any]:
    out = torch.zeros(1, dtype=torch.int32)
    interpreted(closure_kernel())[(1,)](out)
    assert out.item() == 4
    return {}


@triton.jit
def library_kernel(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(out + i, libdevice.tanh(v))
    tl.store(out + B + i, cuda_erf(v))
    tl.store(out + 2 * B + i, tl.rsqrt(v * v + 1))
    tl.store(out + 3 * B + i, tl.math.erf(v))
    tl.store(out + 4 * B + i, tl.extra.cuda.libdevice.log1p(v * v))
    tl.store(out + 5 * B + i, libdevice.pow(v * v, v))
    tl.store(out + 6 * B + i, tl.sigmoid(v))


@case
def library_functions_agree_with_torch() -> dict[str, Any]:
    x, out = randn(32), torch.zeros(7, 32)
    interpreted(library_kernel)[(1,)](x, out, B=32)
    square = x * x
    expected = [x.tanh(), x.erf(), (square + 1).rsqrt(), x.erf(), square.log1p(), square**x, x.sigmoid()]
    for row, wanted in zip(out, expected, strict=True):
        assert torch.allclose(row, wanted, rtol=1e-6, atol=1e-6)
    return {}


@triton.autotune(
    configs=[triton.Config({"BLOCK": b}, num_warps=w) for b in (64, 128) for w in (2, 4)], key=["n"]
)
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(out + i, tl.load(x + i))
    else:
        tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@case
def autotuned_kernels_run_with_one_configuration() -> dict[str, Any]:
    x, out = randn(1000), torch.zeros(1000)

    def grid(meta: dict[str, Any]) -> tuple[int, ...]:
        return (triton.cdiv(meta["n"], meta["BLOCK"]),)

    first = count(tuned_kernel)[grid](x, out, 1000)
    assert torch.equal(out, x)
    assert (first.constants["BLOCK"], first.programs, first.constants["EVEN"]) == (64, 16, False)
    third = count(tuned_kernel, config=2)[grid](x, out, 1000)
    assert (third.constants["BLOCK"], third.programs) == (128, 8)
    own = count(tuned_kernel, config=triton.Config({"BLOCK": 8}))[grid](x, out, 1000)
    assert (own.programs, own.constants["EVEN"]) == (125, True)
    assert first.load_bytes == third.load_bytes == own.load_bytes == x.nbytes
    return {"first": counters(first), "third": counters(third), "own": counters(own)}


def main() -> None:
    """Run all cases and print what they counted."""
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2
    print(
        json.dumps({"version": triton.__version__, "counters": {name: run() for name, run in CASES.items()}})
    )


if __name__ == "__main__":
    main()
