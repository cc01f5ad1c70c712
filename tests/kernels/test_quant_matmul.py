"""Quantized products: every rung right on a CPU, planned with a reason, compiled for three GPUs, and run."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from against_float64 import refused
from quant_compiled import on_the_machine, target

from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.errors import DeviceError, ShapeError, UnknownNameError
from llmcourse.kernels import quant_plan
from llmcourse.kernels.checks import DtypeError
from llmcourse.kernels.quant_matmul import dequantize, quant_matmul
from llmcourse.kernels.quant_plan import QuantPlan, pick

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FORMATS = tuple(TOLERANCE)
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(m, n, k, bits=4, group=None, symmetric=True, dtype=torch.float32):
    """(x, arguments of quant_matmul, the exact product)."""
    q = quantize(random((n, k), seed=1), Scheme(bits, group, symmetric))
    x = random((m, k), dtype)
    return x, (q.packed(), q.scale, q.zero, bits, group), x.double() @ q.dequantize(torch.float64).T


def error(out, exact):
    """Largest difference over the largest exact value."""
    return float((out.double() - exact).abs().max() / exact.abs().max())


@pytest.fixture
def interpreter():
    return pytest.importorskip("llmcourse.kernels.counters")


# values

ODD = [(1, 1, 1), (3, 33, 96), (5, 40, 129), (9, 17, 64)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_odd_shapes_and_groups_of_every_kind_are_multiplied(interpreter, bits, symmetric, backend):
    for (m, n, k), (group, dtype) in zip(
        itertools.cycle(ODD), itertools.product((32, 64, None, -1, 20), FORMATS), strict=False
    ):
        x, arguments, exact = case(m, n, k, bits, group, symmetric, dtype)
        out = quant_matmul(x, *arguments, backend=backend)
        assert out.dtype == dtype
        assert error(out, exact) < TOLERANCE[dtype], (m, n, k, group, dtype)
        if group == 20 and dtype == torch.bfloat16:
            return


GEMV = QuantPlan("gemv", 1, 16, 64, 4, 1)
RUNGS = {
    "gemv": GEMV,
    "dot": QuantPlan("dot", 8, 16, 32, 4, 2, splits=1),
    "dot in three parts": QuantPlan("dot", 8, 16, 32, 4, 2, splits=3),
    "dot in two substeps": QuantPlan("dot", 16, 32, 32, 4, 2, splits=2, substeps=2),
    "dequantize": QuantPlan("dequantize"),
}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_rung_gives_the_same(interpreter, rung, bits):
    for group, k, symmetric in ((32, 160, True), (64, 200, False), (None, 77, False)):
        x, arguments, exact = case(2 if rung == "gemv" else 9, 21, k, bits, group, symmetric)
        for _ in range(2):  # the counters of the parts were left at 0
            out = quant_matmul(x, *arguments, plan=RUNGS[rung], backend="interpret")
            assert error(out, exact) < 2e-6, (group, k, symmetric)


def test_rows_of_any_leading_shape_and_stride_come_and_scales_may_lie_transposed(interpreter):
    x, (packed, scale, zero, bits, group), exact = case(6, 20, 64, group=32)
    wide = torch.zeros(2, 3, 128)
    wide[..., ::2] = x.view(2, 3, 64)
    turned = scale.T.contiguous().T
    out = quant_matmul(wide[..., ::2], packed, turned, zero, bits, group, backend="interpret")
    assert out.shape == (2, 3, 20)
    assert error(out.view(6, 20), exact) < 2e-6


def test_weights_in_e4m3_are_their_own_codes(interpreter):
    weight = random((24, 96)).to(torch.float8_e4m3fn)
    x, scale = random((3, 96), torch.bfloat16), torch.rand(24, 1)
    exact = x.double() @ (weight.double() * scale.double()).T
    for backend in ("reference", "interpret"):
        assert error(quant_matmul(x, weight, scale, None, 8, None, backend=backend), exact) < 1e-2


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_written_out_weights_are_those_of_the_quantizer(interpreter, dtype):
    for bits, group, symmetric in ((4, 32, False), (4, 20, True), (8, None, True), (8, -1, False)):
        q = quantize(random((19, 83)), Scheme(bits, group, symmetric))
        for backend in ("reference", "interpret"):
            out = dequantize(q.packed(), q.scale, q.zero, bits, group, 83, dtype, backend=backend)
            assert out.equal(q.dequantize(dtype))


def test_gradients_reach_the_activations_and_stop_at_the_weights(interpreter):
    x, arguments, _ = case(5, 24, 64, group=32)
    weight = quantize(random((24, 64), seed=1), Scheme(4, 32)).dequantize()
    upstream = random((5, 24), seed=2)
    for backend in ("reference", "interpret"):
        leaf = x.clone().requires_grad_()
        quant_matmul(leaf, *arguments, backend=backend).backward(upstream)
        torch.testing.assert_close(leaf.grad, upstream @ weight, atol=1e-5, rtol=1e-5)


def test_empty_products_are_empty():
    x, (packed, scale, zero, bits, group), _ = case(2, 8, 64, group=32)
    assert quant_matmul(x[:0], packed, scale, zero, bits, group).shape == (0, 8)


# bytes


def test_a_decoding_step_reads_every_code_and_scale_once(interpreter):
    n, k = 48, 256
    for bits, group in ((4, 64), (8, None)):
        x, arguments, _ = case(1, n, k, bits, group, dtype=torch.bfloat16)
        plan = QuantPlan("dot", 8, 16, 64, 4, 2, splits=2)
        with interpreter.counting() as counts:
            quant_matmul(x, *arguments, plan=plan, backend="interpret")
        (kernel,) = counts
        assert kernel.args["packed"].load_bytes == n * k * bits // 8
        assert kernel.args["scale"].load_unique_bytes == arguments[1].nbytes
        assert kernel.args["x"].load_bytes == n // 16 * k * 2  # by each tile of rows
        assert kernel.args["workspace"].store_bytes == 2 * n * 4


def test_what_is_written_out_first_moves_more_bytes_than_bfloat16_would(interpreter):
    n, k = 32, 256
    x, arguments, _ = case(1, n, k, 4, 64, dtype=torch.bfloat16)
    with interpreter.counting() as counts:
        quant_matmul(x, *arguments, plan=QuantPlan("dequantize"), backend="interpret")
    (kernel,) = counts
    assert kernel.args["packed"].load_bytes == n * k // 2
    assert kernel.args["out"].store_bytes == 2 * n * k


# planning


@pytest.mark.parametrize(
    ("m", "group", "capability", "rung", "why"),
    [
        (1, 128, 90, "dot", "bytes"),
        (64, 128, 80, "dot", "bytes"),
        (65, 128, 90, "dequantize", "65 rows"),
        (1, 20, 90, "dequantize", "groups of 20"),
        (1, 128, 75, "gemv", "no tensor cores"),
        (9, 128, 75, "dequantize", "9 rows"),
        (0, 128, 90, "reference", "empty"),
    ],
)
def test_the_plan_says_why(m, group, capability, rung, why):
    choice = pick(m, 4096, 4096, bits=4, group=group, capability=capability)
    assert choice.rung == rung
    assert why in choice.why


def test_a_step_never_crosses_from_one_group_to_the_next():
    for group, k in itertools.product((32, 64, 96, 128, 192, 4096), (576, 1536, 4096, 14336)):
        choice = pick(4, 4096, k, bits=4, group=group)
        assert choice.rung == "dot"
        assert group >= k or group % choice.plan.block_k == 0


def test_k_is_cut_so_that_an_h100_has_work_for_every_multiprocessor():
    for n, k in ((14336, 4096), (4096, 14336), (4096, 4096)):
        plan = pick(1, n, k, bits=4, group=128).plan
        programs = -(-n // plan.block_n) * plan.splits
        assert programs >= 3 * 132
        assert k // (plan.block_k * plan.substeps * plan.splits) >= 2


# errors


def test_what_cannot_be_multiplied_is_refused_in_three_parts(interpreter):
    x, (packed, scale, zero, bits, group), _ = case(2, 8, 64, group=32)
    refused(lambda: quant_matmul(x, packed, scale, zero, 3, group), ShapeError, "3 bits")
    refused(lambda: quant_matmul(x, packed.int(), scale, zero, bits, group), DtypeError, "Quantized.packed()")
    refused(lambda: quant_matmul(x[:, :62], packed, scale, zero, bits, group), ShapeError, "62 codes")
    refused(lambda: quant_matmul(x, packed, scale, zero, bits, 16), ShapeError, "(8, 4)")
    refused(lambda: quant_matmul(x, packed, scale, scale, bits, group), ShapeError, "zero")
    refused(lambda: quant_matmul(x.int(), packed, scale, zero, bits, group), DtypeError, "int32")
    refused(
        lambda: quant_matmul(x, packed, scale, zero, bits, group, plan=QuantPlan("fast")),
        UnknownNameError,
        "gemv",
    )
    refused(
        lambda: quant_matmul(x, packed, scale, zero, bits, group, plan=QuantPlan("dot"), backend="interpret"),
        ShapeError,
        "block_k=32",
    )
    refused(
        lambda: quant_matmul(x, packed, scale, zero, bits, group, backend="triton"), DeviceError, "interpret"
    )


# what the compiler makes of it


def shipped():
    for bits, m in quant_plan.DOT:
        yield bits, m, 90
        if (bits, m) in ((4, 8), (8, 64)):
            yield bits, m, 80
    for bits in (4, 8):
        yield bits, 1, 75


@pytest.mark.parametrize(("bits", "m", "capability"), list(shipped()))
def test_shipped_plans_compile_without_spills_and_read_16_bytes_at_a_time(bits, m, capability):
    plan = pick(m, 14336, 4096, bits=bits, group=128, capability=capability).plan
    dtype = torch.float16 if capability == 75 else torch.bfloat16
    made = target(plan, m, 14336, 4096, bits=bits, group=128, capability=capability, dtype=dtype)
    assert made.error is None
    assert made.spills == 0, made
    assert made.fits
    if plan.rung == "dot":
        assert made.count("LDGSTS", "128"), made.opcodes
        assert made.tensor_cores
    else:
        assert 128 in made.load_widths
    # No code is converted by the unit that converts integers, which takes four times as long as the others.
    assert not [name for name in made.opcodes if name.startswith("I2F.") and "16" in name]


def test_unpacking_by_exponents_takes_far_fewer_instructions():
    plan = QuantPlan("dot", 8, 64, 128, 4, 4)
    quick, plain = (
        target(plan, 8, 14336, 4096, bits=4, group=128, capability=90, quick=q).instructions
        for q in (True, False)
    )
    assert quick < 0.6 * plain


# the compiled kernel, run


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"),
    [
        (4, True, torch.bfloat16),
        (4, False, torch.float16),
        (8, True, torch.float16),
        (8, False, torch.bfloat16),
    ],
    ids=str,
)
def test_the_compiled_kernel_gives_the_exact_product_but_for_rounding(bits, symmetric, dtype):
    x, (packed, scale, zero, bits, _), exact = case(3, 70, 512, bits, 128, symmetric, dtype)
    plan = QuantPlan("dot", 8, 64, 128, 4, 3, splits=2)
    out = on_the_machine(x, packed, scale, zero, bits, 128, plan)
    assert error(out, exact) < ROUNDING[dtype]


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "plan"),
    [
        (3, 70, 544, 544, QuantPlan("dot", 8, 64, 128, 4, 3, splits=2)),
        (3, 70, 640, 128, QuantPlan("dot", 8, 32, 128, 2, 4, splits=3, substeps=2)),
        (19, 50, 512, 128, QuantPlan("dot", 16, 64, 128, 2, 3, splits=1)),
        (40, 128, 256, 256, QuantPlan("dot", 32, 128, 128, 4, 3, splits=1)),
    ],
    ids=str,
)
def test_tails_of_all_three_sizes_are_right_in_the_compiled_kernel(m, n, k, group, plan):
    x, (packed, scale, zero, bits, _), exact = case(m, n, k, 4, group, dtype=torch.bfloat16)
    out = on_the_machine(x, packed, scale, zero, bits, group, plan)
    assert error(out, exact) < 8e-3


def test_the_compiled_gemv_is_right():
    for dtype, bits in ((torch.float16, 8), (torch.bfloat16, 4), (torch.float32, 4)):
        x, (packed, scale, zero, bits, group), exact = case(2, 21, 256, bits, 128, False, dtype)
        out = on_the_machine(x, packed, scale, zero, bits, group, QuantPlan("gemv", 1, 8, 256, 2, 1))
        assert error(out, exact) < ROUNDING[dtype]


def test_the_compiled_kernel_reads_every_number_of_e4m3_but_nan():
    """x is the identity: out [K, N] is the weights, transposed."""
    bits = torch.arange(256, dtype=torch.uint8)
    bits[bits & 127 == 127] = 0
    weight = bits.view(1, 256).expand(2, 256).contiguous().view(torch.float8_e4m3fn)
    for dtype in (torch.float16, torch.bfloat16):
        plan = QuantPlan("dot", 64, 32, 128, 2, 2, splits=1)
        out = on_the_machine(torch.eye(256, dtype=dtype), weight, torch.ones(2, 1), None, 8, 256, plan)
        assert out[:, 1].equal(weight[1].to(dtype))
