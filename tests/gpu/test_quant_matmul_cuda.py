"""Quantized products on a GPU: odd shapes, NaN beside them, CUDA graphs, int8, and peers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from llmcourse.bench.quant_cases import error_of, ours, peers, weights
from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.errors import CourseError
from llmcourse.kernels import quant_plan
from llmcourse.kernels.quant_int8 import TILES, int8_matmul, quantize_rows
from llmcourse.kernels.quant_matmul import chosen_for, dequantize, quant_matmul
from llmcourse.kernels.quant_plan import QuantPlan

CAPABILITY = torch.cuda.get_device_capability()[0] * 10 + torch.cuda.get_device_capability()[1]
AMPERE = pytest.mark.skipif(CAPABILITY < 80, reason="needs tensor cores that tl.dot uses (sm_80)")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def case(m, n, k, bits=4, group=128, symmetric=True, dtype=torch.bfloat16):
    q = quantize(torch.randn(n, k, device="cuda"), Scheme(bits, group, symmetric))
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    exact = x.double() @ q.dequantize(torch.float64).T
    return x, (q.packed(), q.scale, q.zero, bits, group), exact


def error(out, exact):
    """Largest difference in units of the root mean square of the exact result."""
    return float((out.double() - exact).abs().max() / exact.square().mean().sqrt().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_whatever_the_shape_and_the_groups_the_picked_rung_is_right(dtype):
    rng = random.Random(5)
    shapes = [
        (1, 1, 1),
        (1, 4096, 4096),
        (17, 33, 65),
        (64, 300, 1024),
        (65, 70, 128),
        (3, 577, 1536),
        (2, 16, 77),
    ]
    shapes += [
        (
            rng.choice([1, 2, 7, 8, 9, 16, 31, 64, 100]),
            rng.randrange(1, 700),
            rng.choice([32, 96, 100, 576, 1000, 1536]),
        )
        for _ in range(30)
    ]
    for m, n, k in shapes:
        bits, group = rng.choice([4, 8]), rng.choice([32, 64, 128, 20, None, -1])
        symmetric = rng.choice([True, False])
        x, arguments, exact = case(m, n, k, bits, group, symmetric, dtype)
        bound = TOLERANCE[dtype] * (6 if m * n == 1 else 1)
        assert error(quant_matmul(x, *arguments), exact) < 4 * bound, (m, n, k, bits, group, symmetric)


@AMPERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_shipped_tile_is_right_in_any_number_of_parts(dtype, symmetric):
    for (bits, m), plan in quant_plan.DOT.items():
        for group, k in ((128, 1024), (None, 1024), (None, 1000)):
            x, arguments, exact = case(m - 1, 300, k, bits, group, symmetric, dtype)
            for splits, substeps in ((1, 1), (2, 1), (3, 2), (7, 1)):
                tried = replace(plan, splits=splits, substeps=substeps)
                out = quant_matmul(x, *arguments, plan=tried)
                assert error(out, exact) < 4 * TOLERANCE[dtype], (bits, m, group, k, splits, substeps)


@pytest.mark.parametrize("bits", [4, 8])
def test_gemv_and_written_out_weights_are_right(bits):
    for dtype, group, k in itertools.product(TOLERANCE, (64, None), (512, 1000)):
        x, arguments, exact = case(3, 205, k, bits, group if k == 512 else None, False, dtype)
        for plan in (quant_plan.GEMV, QuantPlan("gemv", 1, 16, 512, 8, 1), QuantPlan("dequantize")):
            assert error(quant_matmul(x, *arguments, plan=plan), exact) < 4 * TOLERANCE[dtype], (dtype, plan)


@AMPERE
def test_what_lies_beside_rows_and_codes_does_not_matter():
    x, (packed, scale, zero, bits, group), exact = case(5, 70, 640, 4, 128)
    big = torch.full((20, 2000), float("nan"), device="cuda", dtype=torch.bfloat16)
    big[4:9, 6:646] = x
    codes = torch.full((100, 400), 255, device="cuda", dtype=torch.uint8)
    codes[3:73, 16:336] = packed
    for shift in (0, 1):  # pairs of columns, and columns that cannot be read in pairs
        rows = big[4:9, 6 + shift : 646] if not shift else torch.cat((big[4:9, 5:6], x), 1)[:, 1:]
        out = quant_matmul(rows, codes[3:73, 16:336], scale, zero, bits, group)
        assert error(out, exact) < 0.06


@AMPERE
@pytest.mark.parametrize("m", [1, 16, 64])
def test_a_product_is_the_same_every_time_and_in_a_graph(m):
    x, arguments, _ = case(m, 1000, 4096)
    first = quant_matmul(x, *arguments)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = quant_matmul(x, *arguments)
    for _ in range(50):
        graph.replay()
        assert quant_matmul(x, *arguments).equal(first)
    torch.cuda.synchronize()
    assert captured.equal(first)


def test_written_out_weights_are_those_of_the_quantizer_bit_for_bit():
    for bits, group, symmetric, dtype in itertools.product((4, 8), (64, None), (True, False), TOLERANCE):
        q = quantize(torch.randn(133, 320, device="cuda"), Scheme(bits, group, symmetric))
        assert dequantize(q.packed(), q.scale, q.zero, bits, group, 320, dtype).equal(q.dequantize(dtype))


def test_gradients_reach_the_activations():
    x, arguments, _ = case(6, 200, 256)
    leaf, upstream = x.clone().requires_grad_(), torch.randn(6, 200, device="cuda", dtype=torch.bfloat16)
    quant_matmul(leaf, *arguments).backward(upstream)
    weight = dequantize(*arguments[:4], 128, 256, torch.float64, backend="reference")
    assert error(leaf.grad, upstream.double() @ weight) < 0.06


def test_int8_sums_are_exact_integers():
    for m, n, k in [
        (1, 1, 1),
        (5, 300, 70),
        (16, 256, 4096),
        (65, 100, 1000),
        (300, 520, 777),
        (1024, 512, 2048),
    ]:
        x = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
        w = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        one = torch.ones(1, 1, device="cuda")
        exact = (x.double() @ w.double().T).float()
        out = int8_matmul(x, w, one, one, out_dtype=torch.float32)
        assert out.equal(exact), (m, n, k)
    for plan in TILES.values():
        out = int8_matmul(x, w, one, one, out_dtype=torch.float32, plan=plan)
        assert out.equal(exact)


def test_rows_are_quantized_as_the_reference_does_it():
    for dtype, k in itertools.product(TOLERANCE, (1, 77, 4096, 14336)):
        x = torch.randn(9, k, device="cuda", dtype=dtype)
        x[3] = 0
        for got, expected in zip(quantize_rows(x), quantize_rows(x, backend="reference"), strict=True):
            assert got.equal(expected)


@AMPERE
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, None)])
def test_the_kernels_of_the_benchmark_and_their_peers_agree(bits, group):
    w = weights(1024, 2048, bits, group)
    for m in (1, 17, 64):
        x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
        found, _ = peers(x, w)
        for name, function in {**found, **ours(x, w)}.items():
            assert error_of(function(), x, w) < (0.06 if "first" in name or "alone" in name else 6e-3), (
                name,
                m,
            )


@AMPERE
def test_addresses_of_large_weights_need_64_bits():
    n, k = 40_000, 131_072  # 2.6 · 10⁹ bytes of codes
    packed = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    scale = torch.rand(n, 1, device="cuda", dtype=torch.bfloat16) / k**0.5
    x = torch.randn(2, k, device="cuda", dtype=torch.bfloat16)
    last = dequantize(packed[-500:], scale[-500:], None, 4, None, k, torch.float32, backend="reference")
    out = quant_matmul(x, packed, scale, None, 4, None)[:, -500:]
    assert error(out, x.double() @ last.double().T) < 0.06


def test_tensors_on_two_devices_are_refused():
    x, (packed, scale, zero, bits, group), _ = case(2, 8, 128)
    with pytest.raises(CourseError, match="is on"):
        quant_matmul(x, packed.cpu(), scale, zero, bits, group)


def test_the_plan_of_this_device_says_why():
    choice = chosen_for(torch.empty(1, 4096, device="cuda", dtype=torch.bfloat16), 14336, 4, 128)
    assert choice.rung == ("dot" if CAPABILITY >= 80 else "gemv")
    assert choice.why
