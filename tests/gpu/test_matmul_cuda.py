"""Matrix products on a GPU: every rung right on awkward shapes, gradients, fp8, CUDA graphs, two streams."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llmcourse.errors import CourseError
from llmcourse.kernels import matmul_plan as plan
from llmcourse.kernels.matmul import matmul, reference
from llmcourse.kernels.matmul_fp8 import quantize, scaled_matmul
from llmcourse.kernels.matmul_plan import pick

CAPABILITY = torch.cuda.get_device_capability()[0] * 10 + torch.cuda.get_device_capability()[1]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HOPPER = pytest.mark.skipif(CAPABILITY < 90, reason="needs TMA (sm_90)")
FP8 = pytest.mark.skipif(CAPABILITY < 89, reason="needs fp8 tensor cores (sm_89)")


def error(out, exact):
    """Largest difference in units of the root mean square of the exact result."""
    return float((out.double() - exact).abs().max() / exact.square().mean().sqrt().clamp(min=1e-30))


def matrix(rows, columns, dtype, *, transposed=False):
    if transposed:
        return torch.randn(columns, rows, device="cuda", dtype=dtype).T
    return torch.randn(rows, columns, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_whatever_the_shape_the_picked_rung_is_right(dtype):
    rng = random.Random(3)
    shapes = [
        (1, 1, 1),
        (1, 4096, 300),
        (17, 33, 65),
        (64, 1000, 128),
        (65, 1, 7),
        (300, 512, 257),
        (129, 136, 520),
    ]
    shapes += [
        tuple(rng.choice([1, 8, 40, 96, 127, 200, 256, 384, 1000]) for _ in range(3)) for _ in range(20)
    ]
    for m, k, n in shapes:
        a_t, b_t = rng.choice([False, True]), rng.choice([False, True])
        a, b = matrix(m, k, dtype, transposed=a_t), matrix(k, n, dtype, transposed=b_t)
        out = matmul(a, b)
        bound = TOLERANCE[dtype] * (6 if k == 1 or m * n == 1 else 1)
        assert error(out, a.double() @ b.double()) < bound * 4, (m, k, n, a_t, b_t, pick(a, b))


@pytest.mark.parametrize("rung", ["naive", "grouped", "split_k"])
def test_pointer_rungs_read_only_what_is_theirs(rung):
    """Slices of a matrix of NaN: one element beyond a row or column and the result is NaN."""
    for (m, k, n), step in itertools.product([(70, 45, 130), (16, 200, 100)], (1, 2)):
        big_a, big_b = (
            torch.full((420, 420), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        a = big_a[3 : 3 + m, 5 : 5 + step * k : step]
        b = big_b[7 : 7 + k, 1 : 1 + step * n : step]
        a.copy_(torch.randn(m, k))
        b.copy_(torch.randn(k, n))
        assert error(matmul(a, b, rung=rung), a.double() @ b.double()) < 0.06


@HOPPER
@pytest.mark.parametrize("rung", ["descriptor", "persistent"])
def test_descriptor_rungs_stay_within_slices_of_a_larger_matrix(rung):
    big = torch.full((1024, 1024), float("nan"), device="cuda", dtype=torch.bfloat16)
    a, b = big[8:308, 16:216], big[512:712, 24:520]
    a.copy_(torch.randn(300, 200))
    b.copy_(torch.randn(200, 496))
    assert error(matmul(a, b, rung=rung), a.double() @ b.double()) < 0.06


@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_shipped_tile_is_right(dtype):
    a, b = matrix(520, 712, dtype), matrix(712, 1032, dtype, transposed=True)
    exact = a.double() @ b.double()
    bias = torch.randn(1032, device="cuda", dtype=dtype)
    for (config, _), rung in itertools.product(plan.HOPPER_16, ("descriptor", "persistent")):
        assert error(matmul(a, b, rung=rung, config=config), exact) < 4 * TOLERANCE[dtype]
        out = matmul(a, b, bias=bias, activation="gelu", rung=rung, config=config)
        assert error(out, reference(a.double(), b.double(), bias.double(), "gelu")) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("m", [1, 16, 33, 64])
def test_split_k_is_right_and_the_same_every_time(m):
    a, b = matrix(m, 4096, torch.bfloat16), matrix(4096, 1000, torch.bfloat16, transposed=True)
    first = matmul(a, b, rung="split_k")
    assert error(first, a.double() @ b.double()) < 0.04
    for _ in range(50):
        assert matmul(a, b, rung="split_k").equal(first)


def test_split_k_on_two_streams_and_in_a_graph_at_once():
    a, b = matrix(8, 8192, torch.bfloat16), matrix(8192, 512, torch.bfloat16, transposed=True)
    expected = matmul(a, b, rung="split_k")
    streams = [torch.cuda.Stream() for _ in range(2)]
    graph, outs = torch.cuda.CUDAGraph(), []
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = matmul(a, b, rung="split_k")
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(matmul(a, b, rung="split_k"))
        graph.replay()
    torch.cuda.synchronize()
    assert all(o.equal(expected) for o in [*outs, captured])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_equal_torchs(dtype):
    leaves = [
        torch.randn(*s, device="cuda", dtype=dtype, requires_grad=True)
        for s in ((200, 320), (264, 320), (264,))
    ]
    weight = torch.randn(200, 264, device="cuda", dtype=dtype)
    a, w, bias = leaves
    ours = torch.autograd.grad((matmul(a, w.T, bias=bias, activation="silu") * weight).sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(
        (reference(wide[0], wide[1].T, wide[2], "silu") * weight.double()).sum(), wide
    )
    for got, expected in zip(ours, exact, strict=True):
        assert error(got, expected) < 8 * TOLERANCE[dtype]


@FP8
@pytest.mark.parametrize("per", [("tensor", "tensor"), ("row", "column")])
@pytest.mark.parametrize("fast", [True, False])
def test_fp8_is_as_exact_as_torch_scaled_mm(per, fast):
    for m, k, n in [(256, 512, 384), (16, 4096, 256), (128, 8192, 128), (80, 272, 1040)]:
        a, sa = quantize(torch.randn(m, k, device="cuda"), per[0])
        b, sb = quantize(torch.randn(k, n, device="cuda"), per[1])
        b = b.T.contiguous().T
        exact = a.double() @ b.double() * sa.double() * sb.double()
        ours = error(scaled_matmul(a, b, sa, sb, fast_accum=fast), exact)
        theirs = error(
            torch._scaled_mm(a, b, scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16, use_fast_accum=fast),
            exact,
        )
        assert ours < 1.5 * theirs + 0.01, (m, k, n)


@FP8
def test_fp8_reads_odd_shapes_and_row_major_b():
    for m, k, n in [(70, 33, 65), (1, 1, 1), (128, 100, 30)]:
        a, sa = quantize(torch.randn(m, k, device="cuda"))
        b, sb = quantize(torch.randn(k, n, device="cuda"))
        exact = a.double() @ b.double() * sa.double() * sb.double()
        assert error(scaled_matmul(a, b, sa, sb), exact) < 0.06


@HOPPER
def test_large_matrices_whose_elements_need_64_bit_addresses():
    a = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)  # 2.3 · 10⁹ elements
    b = torch.randn(32_768, 128, device="cuda", dtype=torch.bfloat16)
    rows = slice(69_000, 70_000)
    exact = a[rows].double() @ b.double()
    for rung in ("grouped", "persistent"):
        assert error(matmul(a, b, rung=rung)[rows], exact) < 0.04


def test_matrices_on_two_devices_are_refused():
    with pytest.raises(CourseError, match="is on"):
        matmul(torch.zeros(2, 2), torch.zeros(2, 2, device="cuda"))
