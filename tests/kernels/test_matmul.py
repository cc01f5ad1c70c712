"""Matrix products: every rung right on a CPU, planned with a reason, compiled for three GPUs, no spills."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from matmul_compiled import Case, compiled

from llmcourse.errors import CourseError, ShapeError, UnknownNameError
from llmcourse.kernels import matmul_plan as plan
from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.matmul import flops, matmul, minimum_bytes, reference
from llmcourse.kernels.matmul_fp8 import quantize, scaled_matmul
from llmcourse.kernels.matmul_plan import Config, best_tiles, pick

KERNELS = ("naive", "grouped", "split_k", "descriptor", "persistent")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ODD = [(1, 1, 1), (33, 17, 65), (5, 130, 3), (70, 40, 1), (1, 100, 72)]


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(out, exact):
    """Largest difference over the largest exact value."""
    return float((out.double() - exact).abs().max() / exact.abs().max())


@pytest.fixture
def interpreter():
    return pytest.importorskip("llmcourse.kernels.counters")


# values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rung", ["naive", "grouped", "split_k"])
def test_pointer_rungs_multiply_odd_shapes_and_any_strides(interpreter, rung, dtype):
    for m, k, n in ODD:
        a = random((m, k), dtype)
        for b in (random((k, n), dtype, 1), random((n, k), dtype, 1).T, random((k, 3 * n), dtype, 1)[:, ::3]):
            out = matmul(a, b, rung=rung, backend="interpret")
            assert out.shape == (m, n)
            assert out.dtype == dtype
            assert error(out, a.double() @ b.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rung", ["descriptor", "persistent"])
def test_descriptor_rungs_multiply_shapes_that_end_within_a_tile(interpreter, rung, dtype):
    for (m, k, n), a_t, b_t in itertools.product([(72, 40, 104), (8, 96, 8)], (False, True), (False, True)):
        a = random((k, m), dtype).T if a_t else random((m, k), dtype)
        b = random((n, k), dtype, 1).T if b_t else random((k, n), dtype, 1)
        out = matmul(a, b, rung=rung, backend="interpret")
        assert error(out, a.double() @ b.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("rung", KERNELS[1:])
@pytest.mark.parametrize("activation", ["", "relu", "gelu", "silu"])
def test_bias_and_activation_are_applied_once_at_the_end(interpreter, rung, activation):
    a, b, bias = random((40, 96)), random((96, 72), seed=1), random((72,), seed=2)
    out = matmul(a, b, bias=bias, activation=activation, rung=rung, backend="interpret")
    assert error(out, reference(a.double(), b.double(), bias.double(), activation)) < 2e-6


@pytest.mark.parametrize("subtiles", [1, 2])
@pytest.mark.parametrize("flatten", [True, False])
def test_switches_of_the_persistent_rung_do_not_change_the_result(interpreter, subtiles, flatten):
    a, b = random((100, 48)), random((48, 136), seed=1)
    config = Config(32, 32, 16, 4, 2, group_m=3, subtiles=subtiles, flatten=flatten)
    out = matmul(a, b, rung="persistent", config=config, backend="interpret")
    assert error(out, a.double() @ b.double()) < 2e-6


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_split_k_gives_the_same_for_any_number_of_parts_also_when_some_are_empty(interpreter, splits):
    a, b = random((5, 150)), random((150, 40), seed=1)
    config = Config(16, 32, 32, 4, 2, splits=splits)
    for _ in range(2):  # the counters were left at 0
        out = matmul(a, b, rung="split_k", config=config, backend="interpret")
        assert error(out, a.double() @ b.double()) < 2e-6


def test_gradients_equal_torchs(interpreter):
    leaves = [random(s, seed=i).requires_grad_() for i, s in enumerate([(33, 40), (24, 40), (24,)])]
    weight = random((33, 24), seed=9)
    grads = []
    for multiply in (lambda a, b, c: matmul(a, b, bias=c, activation="silu", backend="interpret"), None):
        a, w, c = leaves
        out = multiply(a, w.T, c) if multiply else reference(a, w.T, c, "silu")
        grads.append(torch.autograd.grad((out * weight).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rung", KERNELS[1:])
@pytest.mark.parametrize("per", [("tensor", "tensor"), ("row", "column")])
def test_fp8_products_carry_their_scales(interpreter, rung, per):
    a, scale_a = quantize(random((40, 64)) * torch.logspace(-2, 2, 40)[:, None], per[0])
    b, scale_b = quantize(random((64, 48), seed=1), per[1])
    b = b.T.contiguous().T
    exact = a.double() @ b.double() * scale_a.double() * scale_b.double()
    for fast in (True, False):
        out = scaled_matmul(
            a, b, scale_a, scale_b, rung=rung, fast_accum=fast, out_dtype=torch.float32, backend="interpret"
        )
        assert error(out, exact) < 1e-6


def test_quantize_uses_the_whole_range_of_each_group_and_no_more():
    x = random((20, 30)) * torch.logspace(-3, 3, 20)[:, None]
    for per, dims in (("tensor", (0, 1)), ("row", 1), ("column", 0)):
        q, scale = quantize(x, per)
        assert (q.float().abs().amax(dims) == 448).all()
        assert (((q.float() * scale) - x).abs() <= x.abs() / 16 + scale * 2**-10).all()


def test_fp8_on_a_cpu_agrees_with_torch_scaled_mm():
    (a, sa), (b, sb) = quantize(random((32, 64))), quantize(random((64, 16), seed=1))
    theirs = torch._scaled_mm(a, b.T.contiguous().T, scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16)
    torch.testing.assert_close(scaled_matmul(a, b, sa, sb), theirs, atol=0.02, rtol=0.01)


def test_empty_products_are_zeros_and_cpu_tensors_take_the_reference():
    assert matmul(torch.empty(3, 0), torch.empty(0, 4)).equal(torch.zeros(3, 4))
    assert matmul(torch.empty(0, 5), torch.empty(5, 4)).shape == (0, 4)
    a, b = random((3, 5)), random((5, 4))
    assert matmul(a, b).equal(a @ b)


# bytes and FLOPs


@pytest.mark.parametrize("rung", ["naive", "grouped", "descriptor", "persistent"])
def test_each_rung_asks_for_the_bytes_its_docstring_says(interpreter, rung):
    m, k, n = 96, 64, 128
    config = Config(32, 32, 32, 4, 2, group_m=2)
    a, b = random((m, k)), random((k, n), seed=1)
    with interpreter.counting() as counts:
        matmul(a, b, rung=rung, config=config, backend="interpret")
    loaded, stored = plan.asked_bytes(m, n, k, config, itemsize=4, out_itemsize=4)
    assert (counts.load_bytes, counts.store_bytes) == (loaded, stored)
    assert counts.dot_flops == flops(m, n, k)


def test_least_bytes_are_those_of_one_tile_that_holds_everything():
    config = Config(128, 128, 64, 4, 2)
    assert sum(plan.asked_bytes(100, 90, 80, config, itemsize=2, out_itemsize=2)) == minimum_bytes(
        100, 90, 80, 2
    )


def test_grouped_order_visits_every_tile_once():
    for tiles_m, tiles_n, group in itertools.product((1, 3, 8), (1, 5, 8), (1, 2, 3, 16)):
        tiles = list(plan.tile_order(tiles_m, tiles_n, group))
        assert sorted(tiles) == sorted(itertools.product(range(tiles_m), range(tiles_n)))
    assert list(plan.tile_order(2, 3, 1)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert list(plan.tile_order(3, 8, 3))[:4] == [(0, 0), (1, 0), (2, 0), (0, 1)]


def test_the_grouped_order_needs_fewer_bytes_at_a_time():
    config = Config(128, 128, 64, 8, 3)
    naive, grouped = (
        plan.wave_bytes(8192, 8192, 8192, config, programs=132, itemsize=2, group_m=g) for g in (1, 8)
    )
    assert naive == (3 + 64) * 128 * 8192 * 2
    assert grouped == (8 + 17) * 128 * 8192 * 2


def test_the_waves_together_are_all_tiles_once():
    config = Config(128, 256, 64, 8, 3)
    for group_m in (1, 8):
        waves = [plan.wave_tiles(1000, 3000, config, programs=13, group_m=group_m, wave=w) for w in range(8)]
        assert [len(w) for w in waves] == [13] * 7 + [5]
        assert sorted(itertools.chain(*waves)) == sorted(itertools.product(range(8), range(12)))


# planning


@pytest.mark.parametrize(
    ("shape", "capability", "rung", "why"),
    [
        ((512, 512, 512), 90, "persistent", "descriptor"),
        ((512, 512, 512), 80, "grouped", "no TMA"),
        ((512, 512, 512), 75, "grouped", "no TMA"),
        ((16, 512, 512), 90, "split_k", "16 rows"),
        ((512, 513, 512), 90, "grouped", "1026 bytes"),
        ((512, 0, 512), 90, "reference", "empty"),
    ],
)
def test_the_plan_says_why(shape, capability, rung, why):
    m, k, n = shape
    choice = pick(
        torch.empty(m, k, dtype=torch.bfloat16),
        torch.empty(n, k, dtype=torch.bfloat16).T,
        capability=capability,
    )
    assert choice.rung == rung
    assert why in choice.why


def test_the_plan_sees_what_a_descriptor_cannot_hold():
    base = torch.empty(512, 1024, dtype=torch.bfloat16)
    weight = torch.empty(512, 512, dtype=torch.bfloat16).T
    assert "no contiguous dimension" in pick(base[:, ::2], weight, capability=90).why
    assert "does not start" in pick(base[:, 1:513], weight, capability=90).why
    assert pick(base[:, :512], weight, capability=90).rung == "persistent"
    odd = torch.empty(512, 511, dtype=torch.bfloat16)
    assert "out's lines" in pick(base[:, :512], weight[:, :511], odd, capability=90).why


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_plan_sees_that_a_new_result_would_not_fit_a_descriptor(dtype):
    """b.T has lines of K elements, however odd N is; the result's are N elements apart."""
    a, weight = torch.empty(512, 512, dtype=dtype), torch.empty(500, 512, dtype=dtype)
    assert "the result's lines are 500 elements (1000 bytes)" in pick(a, weight.T, capability=90).why
    assert pick(a, weight.T, out_itemsize=4, capability=90).rung == "persistent"


def test_fp8_needs_its_contiguous_k_and_a_device_that_has_it():
    a = torch.empty(512, 512, dtype=torch.float8_e4m3fn)
    assert pick(a, a.T, capability=90).rung == "persistent"
    assert "K is contiguous" in pick(a, a, capability=90).why
    assert pick(a, a.T, capability=80).rung == "reference"


def test_tiles_are_chosen_to_fill_the_last_wave():
    big, small = Config(128, 256, 64, 8, 4), Config(128, 128, 64, 8, 4)
    table = ((big, 1.0), (small, 0.9))
    assert best_tiles(8192, 8192, table, 132) == big
    assert best_tiles(2048, 2048, table, 132) == big  # 128 tiles: one wave
    assert best_tiles(1024, 1024, table, 132) == small  # 32 of 132 would work


def test_a_small_square_takes_tiles_that_leave_no_multiprocessor_idle():
    for dtype, fast in ((torch.bfloat16, True), (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)):
        shapes = {}
        for n in (1024, 2048, 8192):
            a = torch.empty(n, n, dtype=dtype, device="meta")
            config = best_tiles(n, n, plan.tiles_for(a.dtype.itemsize, fast), 132)
            shapes[n] = (config.block_m, config.block_n)
        assert shapes[1024] == (64, 128)
        assert shapes[2048] == shapes[8192] == ((128, 256) if fast else (128, 128))


# errors


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda x: matmul(x, torch.empty(3, 4)), ShapeError, "b has 3 rows"),
        (lambda x: matmul(x, torch.empty(6, 5)), ShapeError, "b.T"),
        (lambda x: matmul(x[None], x.T), ShapeError, "flatten"),
        (lambda x: matmul(x, torch.empty(5, 2, dtype=torch.float16)), DtypeError, "float16"),
        (lambda x: matmul(x.int(), x.T.int()), DtypeError, "int32"),
        (lambda x: matmul(x, x.T, bias=torch.empty(3)), ShapeError, "bias"),
        (lambda x: matmul(x, x.T, activation="tanh"), UnknownNameError, "gelu"),
        (lambda x: matmul(x, x.T, rung="fast"), UnknownNameError, "persistent"),
        (lambda x: matmul(x, x.T, rung="persistent", backend="interpret"), StrideError, "20 bytes"),
        (lambda x: scaled_matmul(x, x.T, torch.ones(()), torch.ones(())), DtypeError, "quantize"),
        (
            lambda x: scaled_matmul(*[x.to(torch.float8_e4m3fn)] * 2, torch.ones(()), torch.ones(())),
            ShapeError,
            "b.T",
        ),
        (
            lambda x: scaled_matmul(
                x.to(torch.float8_e4m3fn), x.T.to(torch.float8_e4m3fn), torch.ones(3), torch.ones(())
            ),
            ShapeError,
            "one for each row of a",
        ),
    ],
)
def test_what_cannot_be_multiplied_is_refused_in_three_parts(call, kind, words):
    with pytest.raises(kind) as caught:
        call(torch.zeros(2, 5))
    assert isinstance(caught.value, CourseError)
    assert words in str(caught.value)
    assert all((caught.value.what, caught.value.why, caught.value.fix))


# binaries


def cases():
    for capability in (75, 80, 90):
        for dtype, size in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
            aligned = plan.grouped(capability, size)
            config = plan.grouped(capability, size, aligned=False)
            if dtype == "bf16":
                yield Case("naive", capability, dtype, aligned)
                yield Case("grouped", capability, dtype, aligned, "NN")
                yield Case("grouped", capability, dtype, config, "any strides", odd=True)
            yield Case("grouped", capability, dtype, config, odd=True)
    yield Case("grouped", 90, "fp8", plan.grouped(90, 1))
    yield Case("grouped", 90, "fp8", plan.grouped(90, 1, aligned=False), "any strides", odd=True)
    for m, capability in itertools.product((1, 17, 64), (80, 90)):
        yield Case("split_k", capability, "bf16", plan.skinny(m, 14336, 4096, 2, 132), odd=m == 1)
    yield Case("split_k", 90, "fp8", plan.skinny(16, 14336, 4096, 1, 132))
    for config, _ in plan.HOPPER_16:
        yield Case("persistent", 90, "bf16", config)
    yield Case("persistent", 90, "fp16", plan.HOPPER_16[0][0], "NN")
    for config, _ in plan.DESCRIPTOR_16:
        yield Case("descriptor", 90, "bf16", config)
    for config, _ in plan.HOPPER_8:
        yield Case("persistent", 90, "fp8", config)
    for config, _ in plan.HOPPER_8_PRECISE:
        yield Case("persistent", 90, "fp8", config, precise=True)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_shipped_configurations_compile_without_spills(case):
    binary = compiled(case)
    assert binary.stack_bytes == 0, f"{binary.registers} registers and {binary.stack_bytes} bytes of stack"
    assert binary.shared_bytes <= plan.SHARED_BYTES[case.capability]
    if case.dtype == "fp32" or case.capability == 75:
        assert "mma" not in binary.ptx  # plain multiply-adds, as the docstring says
    elif case.capability == 80 or case.config.block_m < 64:
        assert "mma.sync" in binary.ptx
    else:
        assert "wgmma.mma_async" in binary.ptx
    assert ("cp.async.bulk.tensor" in binary.ptx) == (case.rung in ("descriptor", "persistent"))
