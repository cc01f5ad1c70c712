"""The benchmarks of quantized products, as far as they need no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.bench import BENCHMARKS
from llmcourse.bench.quant_cases import SHAPES, error_of, weights
from llmcourse.bench.quant_matmul import allowed, crossover, run
from llmcourse.bench.quant_sweep import candidates, groups, other_parts
from llmcourse.kernels.matmul_plan import SHARED_BYTES
from llmcourse.kernels.quant_int8 import Int8Plan
from llmcourse.kernels.quant_matmul import quant_matmul


def test_the_benchmark_is_known_by_its_name_and_says_on_a_cpu_that_it_unpacks():
    assert "quant_matmul" in BENCHMARKS
    rows, notes = run("cpu")
    assert len(rows) == 2
    assert "unpacks" in notes[0]


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, None)])
def test_its_weights_are_those_that_the_product_is_compared_with(bits, group):
    torch.manual_seed(0)
    w = weights(24, 128, bits, group, "cpu")
    x = torch.randn(30, 128)
    assert error_of(quant_matmul(x, w.packed, w.scale, None, bits, group), x, w) < 1e-6
    assert w.moved == 24 * 128 * bits // 8 + 24 * (2 if group else 1) * 2
    assert 0.3 < float((x @ w.exact.T).std()) < 3  # of the activations' size


def test_the_crossover_is_the_first_batch_at_which_bfloat16_is_faster():
    def row(m, ratio):
        return {
            "format": "INT4 g128",
            "n": 8,
            "k": 4,
            "kernel": "quant_matmul",
            "m": m,
            "ratio_to_bf16": ratio,
        }

    (found,) = crossover([row(1, 3.0), row(64, 1.2), row(128, 0.9), row(256, 1.05)])
    assert (found["faster_to_batch"], found["slower_from_batch"]) == (64, 128)
    (found,) = crossover([row(1, 3.0), row(64, 1.2)])
    assert (found["faster_to_batch"], found["slower_from_batch"]) == (64, None)


def test_what_rounds_its_activations_may_differ_by_more():
    assert (
        allowed("quant_matmul") < allowed("int8_matmul alone") < allowed("torch._scaled_mm, rows quantized")
    )


def test_the_sweep_tries_different_plans_that_fit_an_h100_and_few_enough_for_one_sitting():
    total = 0
    for g in groups():
        plans = candidates(g, *SHAPES[0], multiprocessors=132)
        total += len(plans)
        assert len(plans) == len(set(plans)) >= 15, g.name
        for plan in plans:
            if isinstance(plan, Int8Plan):
                assert (plan.block_m + plan.block_n) * plan.block_k * plan.stages < SHARED_BYTES[90]
            elif plan.rung == "dot":
                assert plan.loop_bytes(g.bits) < SHARED_BYTES[90] // 2
                assert g.group is None or g.group % plan.block_k == 0
        assert all(p.splits != q.splits for p in plans[:1] for q in other_parts([p]))
    assert total < 700
