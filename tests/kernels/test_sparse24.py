"""2:4 packing and its products: against float64, in the interpreter, to the byte, and compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.errors import CourseError, ShapeError
from llmcourse.kernels import sparse24
from llmcourse.kernels.compile_report import compile_report
from llmcourse.kernels.counters import counting
from llmcourse.kernels.sparse24 import Sparse24, SparsePlan, mask24, minimum_bytes, pack24, sparse24_linear
from llmcourse.kernels.sparse24_format import packed_bytes
from llmcourse.kernels.sparse24_plan import candidates, plan_for

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def weight_of(n, k, dtype=torch.float32, seed=0):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return w * mask24(w)


def worst(y, x, w):
    exact = x.double() @ w.double().T
    return float((y.double() - exact).norm() / exact.norm())


# ── the format ───────────────────────────────────────────────────────────────────────────────────────


def test_two_of_four_stay_as_torch_would_choose():
    torch.manual_seed(0)
    w = torch.randn(9, 32)
    groups = w.abs().view(9, 8, 4)
    want = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, -1).indices, True)
    assert torch.equal(mask24(w), want.view(9, 32))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 4), (5, 7), (2, 16), (9, 33), (4, 100)])
def test_packing_and_back_is_exact(n, k, dtype):
    w = weight_of(n, k, dtype)
    packed = pack24(w)
    assert torch.equal(packed.dense(), w)
    assert packed.nbytes == packed_bytes(n, k, w.itemsize)
    assert packed.to(torch.float64).values.dtype == torch.float64


def test_places_are_in_the_lowest_bits_first():
    w = torch.zeros(1, 16)
    w[0, [0, 3, 5, 6, 8, 9, 14, 15]] = torch.arange(1.0, 9.0)
    packed = pack24(w)
    assert packed.values.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    want = (0 | 3 << 2) | (1 | 2 << 2) << 4 | (0 | 1 << 2) << 8 | (2 | 3 << 2) << 12
    assert int(packed.indices[0, 0]) & 0xFFFF == want


def test_zeros_may_stay_and_three_of_four_may_not():
    w = torch.zeros(2, 8)
    w[0, 2], w[1, 4:6] = 1.0, 2.0
    assert torch.equal(pack24(w).dense(), w)
    mask = torch.tensor([[True, False, True, False] * 2] * 2)
    assert torch.equal(pack24(w, mask).dense(), w * mask)
    w[1, 6] = 3.0
    with pytest.raises(ShapeError, match="columns 4 to 7 of row 1 keep 3"):
        pack24(w)


def test_sixteen_bit_weights_take_nine_sixteenths_of_their_bytes():
    w = weight_of(32, 256, torch.bfloat16)
    assert pack24(w).nbytes / w.nbytes == 9 / 16


# ── the products ─────────────────────────────────────────────────────────────────────────────────────

PLANS = (
    None,
    SparsePlan("select", 8, 32),
    SparsePlan("expand", 16, 32, 16, splits=1),
    SparsePlan("expand", 32, 16, 16, splits=3),
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (7, 5, 1), (33, 47, 2), (40, 100, 5), (17, 64, 17)])
def test_both_kernels_compute_the_dense_product_at_odd_sizes(n, k, m, dtype):
    w, x = weight_of(n, k, dtype), torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    for plan in PLANS[: 2 if m < 3 else 4] if dtype != torch.float32 else PLANS:
        y = sparse24_linear(x, pack24(w), backend="interpret", plan=plan)
        assert y.shape == (m, n)
        assert y.dtype == dtype
        assert worst(y, x, w) < TOLERANCE[dtype], plan


@pytest.mark.parametrize("rows", [2, 4])
def test_several_rows_a_program_and_rows_that_do_not_touch(rows):
    w, wide = weight_of(13, 48), torch.randn(2 * rows, 60, generator=torch.Generator().manual_seed(2))
    x = wide[:, :48]
    for plan in (SparsePlan("select", 8, 32, rows), SparsePlan("expand", 16, 32, 16)):
        assert worst(sparse24_linear(x, pack24(w), backend="interpret", plan=plan), x, w) < 1e-6


def test_the_reference_and_leading_dimensions():
    w, x = weight_of(6, 20), torch.randn(2, 3, 20)
    assert torch.allclose(sparse24_linear(x, pack24(w)), x @ w.T, atol=1e-5)
    assert sparse24_linear(x[:0], pack24(w), backend="interpret").shape == (0, 3, 6)


def test_values_and_indices_are_read_once_and_nothing_else_of_the_weight():
    w, x = weight_of(37, 72, torch.bfloat16), torch.randn(1, 72).bfloat16()
    packed = pack24(w)
    for plan, m in ((SparsePlan("select", 8, 32), 1), (SparsePlan("expand", 16, 32, 16), 16)):
        lines = x.expand(m, 72).contiguous()
        with counting() as counts:
            sparse24_linear(lines, packed, plan=plan)
        args = counts[0].args
        assert args["values"].load_bytes == packed.values.nbytes
        assert args["indices"].load_bytes == packed.indices.nbytes
        assert counts.unique_bytes == minimum_bytes(m, 37, 80, 2) - m * 2 * 8  # x has no filling


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.randn(2, 9), "columns"),
        (torch.randn(2, 8).half(), "float16"),
        (torch.randn(2, 16)[:, ::2], "strides"),
    ],
)
def test_what_does_not_fit_is_refused(x, kind):
    with pytest.raises(CourseError, match=kind):
        sparse24_linear(x, pack24(weight_of(3, 8)))


def test_a_plan_for_more_rows_than_there_are_is_refused():
    with pytest.raises(ShapeError, match="3 rows"):
        sparse24_linear(
            torch.randn(3, 8),
            pack24(weight_of(3, 8)),
            backend="interpret",
            plan=SparsePlan("select", 8, 32, 2),
        )


# ── compiled ─────────────────────────────────────────────────────────────────────────────────────────


def compiled(m, n, k, plan, capability, monkeypatch, dtype=torch.float16):
    launched = []
    monkeypatch.setattr(
        sparse24,
        "launch",
        lambda kernel, grid, *a, interpret=False, **meta: launched.append((kernel, a, meta)),
    )
    monkeypatch.setattr(sparse24, "choose", lambda *_: "triton")
    monkeypatch.setattr(
        sparse24, "counters_for", lambda tiles, _: torch.empty(tiles, dtype=torch.int32, device="meta")
    )

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    filled = k + -k % 16
    packed = Sparse24(meta(n, filled // 2), meta(n, filled // 16, dtype=torch.int16), (n, k))
    sparse24_linear(meta(m, k), packed, plan=plan)
    ((kernel, arguments, constants),) = launched
    return compile_report(kernel, *arguments, capabilities=(capability,), **constants)[capability]


CASES = [(m, capability) for capability in (75, 80, 90) for m in (1, 2, 16, 64)]


@pytest.mark.parametrize(("m", "capability"), CASES)
def test_shipped_plans_compile_without_spills(m, capability, monkeypatch):
    plan = plan_for(m, 14336, 4096, capability)
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    target = compiled(m, 14336, 4096, plan, capability, monkeypatch, dtype)
    assert target.error is None
    assert target.spills == 0, target
    assert target.fits
    assert (target.tensor_cores > 0) == (capability >= 80 and plan.kernel == "expand")


def test_the_sweep_has_plans_of_both_kinds_and_none_twice():
    plans = list(candidates(1, 14336, 4096))
    assert {p.kernel for p in plans} == {"select", "expand"}
    assert len(plans) == len(set(plans))
    assert all(p.block_m <= 4 or p.kernel == "expand" for p in plans)
    assert {p.kernel for p in candidates(16, 4096, 4096)} == {"expand"}
