"""The ceiling model of attention: its reference figures, its parts against brute force, what must hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.bench.records import recorded
from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.hardware import GPUS, gpu
from llmcourse.kernels.attention_ceiling import (
    GENERATIONS,
    Generation,
    blocks_of_tiles,
    ceiling,
    clock_of,
    grid_share,
    l2_demand,
    limits,
    predict,
    rates,
    visible_share,
)
from llmcourse.kernels.attention_reference import visible
from llmcourse.kernels.flash_cost import visible_pairs

H100 = replace(rates("H100 SXM"), matmul=800e12, exponentials=3.9e12)


@pytest.mark.parametrize(("head_dim", "one_after_the_other"), [(64, 444), (128, 571)])
def test_the_figures_of_an_h100(head_dim, one_after_the_other):
    assert ceiling(H100, GENERATIONS["wgmma"], head_dim) / 1e12 == pytest.approx(one_after_the_other, abs=0.5)
    assert ceiling(H100, GENERATIONS["overlapped"], head_dim) / 1e12 == pytest.approx(800)


def test_an_h100_computes_3_9_tera_exponentials_a_second_at_the_clock_of_its_peak():
    assert clock_of(gpu("H100 SXM")) == pytest.approx(1.83e9, rel=1e-3)
    assert rates("H100 SXM").exponentials == pytest.approx(3.87e12, rel=2e-3)
    assert clock_of(gpu("A100 80GB")) == pytest.approx(1.41e9, rel=1e-2)
    assert clock_of(gpu("T4")) == pytest.approx(1.59e9, rel=1e-2)
    for g in GPUS.values():
        assert clock_of(g) <= g.clock


def test_the_fp8_ceiling_at_head_dim_64_is_the_exponentials():
    fp8 = rates("H100 SXM", "fp8", matmul=1269e12)
    overlapped = GENERATIONS["overlapped"]
    assert ceiling(fp8, overlapped, 64) == pytest.approx(4 * 64 * fp8.exponentials)
    assert ceiling(fp8, overlapped, 128) == pytest.approx(1269e12)


def test_measured_rates_replace_published_ones():
    r = rates("NVIDIA H100 80GB HBM3", matmul=700e12, copy=3.0e12)
    assert (r.matmul, r.copy) == (700e12, 3.0e12)
    assert rates("H100 SXM").matmul == gpu("H100 SXM").peak["bf16"]
    with pytest.raises(UnknownNameError, match="fp8"):
        rates("A100 80GB", "fp8")


@given(
    name=st.sampled_from(sorted(GENERATIONS)),
    head_dim=st.sampled_from([32, 64, 128, 256]),
    backward=st.booleans(),
)
def test_a_ceiling_is_under_each_of_its_limits(name, head_dim, backward):
    g = GENERATIONS[name]
    flops = (10 if backward else 4) * head_dim
    top = ceiling(H100, g, head_dim, backward=backward)
    for seconds in limits(H100, g, head_dim, backward=backward).values():
        assert top <= flops / seconds * (1 + 1e-12)
    beside = ceiling(H100, replace(g, overlap=True), head_dim, backward=backward)
    assert top <= beside <= 2 * top * (1 + 1e-12)


def test_naive_attention_is_bound_by_the_memory_for_its_scores():
    for head_dim in (64, 128):
        shape = {"batch": 1, "heads": 8, "queries": 2048, "keys": 2048, "head_dim": head_dim}
        found = predict(H100, GENERATIONS["naive"], **shape)
        assert found.limited_by == "memory"
        # two matrices of S·T 16-bit numbers, each written once and read once
        assert found.flops_per_s < 4 * head_dim / (2 * 2 * 2 / H100.copy)
        causal = predict(H100, GENERATIONS["naive"], **shape, causal=True)
        assert causal.visible == pytest.approx(0.5, rel=1e-3)


@settings(max_examples=40)
@given(
    queries=st.integers(1, 300),
    keys=st.integers(1, 300),
    block_m=st.sampled_from([16, 64, 128]),
    block_n=st.sampled_from([16, 64, 128]),
    causal=st.booleans(),
)
def test_blocks_are_those_with_a_visible_pair(queries, keys, block_m, block_n, causal):
    g = Generation("", block_m=block_m, block_n=block_n)
    seen = visible(queries, keys, causal=causal)
    blocks = blocks_of_tiles(queries, keys, g, causal=causal)
    for i, count in enumerate(blocks):
        columns = seen[i * block_m : (i + 1) * block_m].any(0).nonzero().flatten()
        assert count == (0 if len(columns) == 0 else int(columns.max()) // block_n + 1)
    pairs = int(seen.sum())
    assert pairs == visible_pairs(queries, keys, causal=causal)
    assert visible_share(queries, keys, g, causal=causal) == pytest.approx(
        pairs / (sum(blocks) * block_m * block_n)
    )


@given(work=st.lists(st.floats(0.1, 10), min_size=1, max_size=40), slots=st.integers(1, 8))
def test_a_grid_is_never_better_than_its_longest_tile_or_its_sum(work, slots):
    share = grid_share(work, slots)
    longest = max(max(work), sum(work) / slots)
    assert 0 < share <= sum(work) / (slots * longest) * (1 + 1e-9)
    assert grid_share(work, 1) == pytest.approx(1)


def test_heavy_tiles_first_leave_a_shorter_tail():
    work = [float(i) for i in range(1, 41)]
    assert grid_share(work[::-1], 12) > grid_share(work, 12)


def test_a_long_sequence_reaches_the_ideal_and_a_short_one_does_not():
    g = GENERATIONS["overlapped"]
    shares = []
    for length in (256, 1024, 4096, 16384):
        found = predict(
            H100, g, batch=16384 // length, heads=16, queries=length, keys=length, head_dim=128, causal=True
        )
        assert found.flops_per_s == pytest.approx(found.ideal * found.visible * found.grid * found.start)
        shares.append(found.flops_per_s / found.ideal)
    assert shares == sorted(shares)
    assert shares[0] < 0.7
    assert shares[-1] > 0.95


def test_nothing_that_was_measured_is_above_its_ceiling():
    rows = [r for r in recorded("flash").results if "ceiling_tflops" in r and "tflops" in r]
    assert {r["direction"] for r in rows} == {"forward", "backward"}
    assert max(r["tflops"] / r["ceiling_tflops"] for r in rows) < 1
    # Ways that overlap are faster than the model of those that do not, so that it is no bound for them.
    assert any(r["who"] == "ours: hopper" and r["tflops"] > r["no_overlap_tflops"] for r in rows)


def test_five_products_backward_are_a_higher_ceiling_than_seven():
    one, two = GENERATIONS["one kernel"], GENERATIONS["overlapped"]
    for head_dim in (64, 128):
        assert ceiling(H100, one, head_dim) == ceiling(H100, two, head_dim)
        gain = ceiling(H100, one, head_dim, backward=True) / ceiling(H100, two, head_dim, backward=True)
        assert 1 < gain <= 7 / 5 + 1e-9


def test_an_empty_attention_has_no_rate():
    with pytest.raises(ShapeError, match="0 keys"):
        predict(H100, GENERATIONS["wgmma"], batch=1, heads=1, queries=1, keys=0, head_dim=64)


def test_l2_is_asked_for_keys_and_values_once_a_tile():
    head_dim, length, block_m = 128, 4096, 128
    flops, tiles = 4 * length * length * head_dim, math.ceil(length / block_m)
    nbytes = tiles * 2 * length * head_dim * torch.bfloat16.itemsize
    assert l2_demand(1e12, block_m) == pytest.approx(nbytes / (flops / 1e12))
    assert l2_demand(700e12, 128) == pytest.approx(5.5e12, rel=0.01)
