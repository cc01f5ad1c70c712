"""The walk over tiles, the two-unit timeline, the figures of chapter 10 and its torch code."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from llmcourse.bench import flash_figures
from llmcourse.bench.records import Record, save
from llmcourse.errors import UnknownNameError
from llmcourse.kernels.attention_in_tiles import merge, naive, tiled, tiled_backward, triple, with_gradients
from llmcourse.kernels.attention_reference import visible
from llmcourse.kernels.flash_cost import Sizes, forward_bytes
from llmcourse.kernels.flash_plan import Tiles
from llmcourse.widgets import attention_bytes, flash_tiles, ping_pong

# ── the walk ─────────────────────────────────────────────────────────────────────────────────────────


def some_walks(seed):
    rng = random.Random(seed)
    for _ in range(20):
        queries = rng.choice((1, 7, 64, 100, 129))
        keys = queries + rng.choice((0, 0, 1, 31, 64))
        m, n = rng.choice((16, 32, 64)), rng.choice((16, 32, 64))
        causal = rng.random() < 0.7
        yield queries, keys, m, n, causal, rng.choice((0, 0, 1, 20, 64)) if causal else 0


@pytest.mark.parametrize("seed", range(4))
def test_exactly_the_blocks_with_a_visible_pair_are_loaded_and_edges_have_a_hidden_one(seed):
    for queries, keys, m, n, causal, window in some_walks(seed):
        seen = visible(queries, keys, causal=causal, window=window).numpy()
        wanted = {
            (a, c): not seen[a : a + m, c : c + n].all()
            for a in range(0, queries, m)
            for c in range(0, keys, n)
            if seen[a : a + m, c : c + n].any()
        }
        steps = flash_tiles.walk(queries, keys, m, n, causal=causal, window=window)
        assert {(s.queries[0], s.keys[0]): s.edge for s in steps} == wanted


@pytest.mark.parametrize("seed", range(4))
def test_its_bytes_are_those_of_the_kernel_s_own_formula(seed):
    for queries, keys, m, n, causal, window in some_walks(seed):
        steps = flash_tiles.walk(queries, keys, m, n, causal=causal, window=window)
        sizes = Sizes(1, 1, 1, queries, keys, 64, 2, causal, window)
        assert flash_tiles.moved(steps, 64, 2) == sum(forward_bytes(sizes, Tiles("pointer", m, n, 4, 1)))


def test_every_control_redraws_the_picture():
    explorer = flash_tiles.flash_tiles(length=256)
    seen = {explorer.image.value}
    for name, value in (
        ("step", 3),
        ("mask", "causal, window"),
        ("window", 32),
        ("block_m", 32),
        ("block_n", 16),
    ):
        explorer.controls[name].value = value
        seen.add(explorer.image.value)
    assert len(seen) == 6
    assert explorer._repr_mimebundle_()["image/png"]


def test_no_control_of_the_walk_is_without_effect():
    controls = flash_tiles.flash_tiles(length=256, mask="causal", step=8).controls
    assert controls["step"].max == len(flash_tiles.walk(256, 256, 64, 64))
    assert controls["window"].disabled
    controls["mask"].value = "causal, window"
    assert not controls["window"].disabled
    controls["block_m"].value = controls["block_n"].value = 256
    assert (controls["step"].max, controls["step"].value) == (1, 1)


def test_the_curves_of_bytes_keep_their_order_and_the_picture_is_drawn():
    curves = list(attention_bytes.curves(64).values())
    for larger, smaller in pairwise(curves):
        assert all(a >= b for a, b in zip(larger, smaller, strict=True))
    figure = Figure()
    attention_bytes.draw(figure, 64, {(64, 0): 1 << 16})
    assert figure.axes


# ── two units at once ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("times", [(1.0, 1.0), (2.0, 1.0), (1.0, 5.0)])
def test_no_unit_does_two_things_and_nothing_starts_before_what_it_needs(groups, ahead, times):
    spans = ping_pong.schedule(5, *times, groups=groups, ahead=ahead)
    assert len(spans) == 15 * groups
    for unit in (0, 1):
        mine = sorted((s.start, s.end) for s in spans if s.unit == unit)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(mine))
    at = {(s.group, s.name): s for s in spans}
    for g in range(groups):
        for j in range(5):
            assert at[g, f"P{j}"].start >= at[g, f"S{j}"].end
            assert at[g, f"O{j}"].start >= at[g, f"P{j}"].end


def test_one_group_has_the_ceiling_of_no_overlap_and_two_come_near_that_of_the_busier_unit():
    product, softmax = 1.0, 1.5
    alone = ping_pong.schedule(200, product, softmax, groups=1)
    assert ping_pong.utilisation(alone) == pytest.approx(2 / 3.5)
    both = ping_pong.schedule(100, product, softmax, groups=2)
    assert ping_pong.utilisation(both) > 0.97
    slow = ping_pong.schedule(100, product, 4.0, groups=2)
    assert ping_pong.utilisation(slow, unit=1) > 0.97
    assert ping_pong.utilisation(slow) == pytest.approx(2 / 4, abs=0.02)
    figure = Figure()
    ping_pong.draw(figure, {"alone": alone[:30], "both": both[:30]})
    assert len(figure.axes) == 2


# ── the same in torch ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("S", "T", "blocks"), [(1, 1, (1, 1)), (13, 29, (4, 7)), (32, 32, (64, 16))])
def test_tiles_forward_and_backward_are_torch_s_attention(S, T, blocks):
    torch.manual_seed(S)
    q, k, v = (torch.randn(n, 8, dtype=torch.float64) for n in (S, T, T))
    dout = torch.randn(S, 8, dtype=torch.float64)

    def torch_s(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    want = with_gradients(torch_s, (q, k, v), dout, torch.float64)
    out, lse = tiled(q, k, v, *blocks)
    assert torch.allclose(out, want[0])
    assert torch.allclose(naive(q, k, v), want[0])
    assert torch.allclose(lse, (q @ k.T / 8**0.5).logsumexp(1))
    for got, right in zip(tiled_backward(q, k, v, out, lse, dout, blocks[1]), want[1:], strict=True):
        assert torch.allclose(got, right)


def test_merging_is_associative_and_has_a_neutral_element():
    torch.manual_seed(0)
    s, v = 50 * torch.randn(5, 12, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    a, b, c = (triple(s[:, i : i + 4], v[i : i + 4]) for i in (0, 4, 8))
    nothing = torch.full((5,), -1e300, dtype=torch.float64), *(0 * x for x in a[1:])
    for x, y in zip(merge(merge(a, b), c), merge(a, merge(b, c)), strict=True):
        assert torch.allclose(x, y, rtol=1e-12)
    for x, y in zip(merge(nothing, a), a, strict=True):
        assert torch.equal(x, y)
    _, total, acc = merge(merge(a, b), c)
    assert torch.allclose(acc / total[:, None], s.softmax(1) @ v)


# ── recorded figures ─────────────────────────────────────────────────────────────────────────────────


def rows():
    for direction in ("forward", "backward"):
        for head_dim in (64, 128):
            for length in (1024, 8192):
                head = {"group": direction, "direction": direction, "head_dim": head_dim, "length": length}
                head |= {"causal": True, "ceiling_tflops": 700.0, "no_overlap_tflops": 500.0}
                yield {**head, "who": "ours: pointer", "tflops": 400.0 + head_dim, "us": 1.0}
                yield {**head, "who": "cuDNN", "tflops": 450.0 + length / 100, "us": 1.0}
                yield {**head, "who": "flex_attention", "unavailable": "no such thing"}
    yield {"group": "memory", "who": "naive", "length": 1024, "peak_bytes": 7}
    yield {"group": "ceiling", "who": "copy", "gb_per_s": 3000.0}


def test_the_figures_of_a_record_are_told_and_drawn(tmp_path):
    device = {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    save(Record("flash", device, {"torch": "2.11.0"}, "2026-11-24", "", list(rows())), tmp_path)
    figures = flash_figures.of("cpu", folder=tmp_path)
    assert figures.best("forward", 128, 8192) == ("cuDNN", pytest.approx(531.92))
    assert figures.best("forward", 128, 1024) == ("ours: pointer", 528.0)
    assert figures.rate("backward", 64, 1024, "ours: pointer") == 464.0
    text = repr(figures.table("forward", 64))
    assert "flex_attention" not in text
    assert "ceiling, side by side" in text
    assert "recorded on NVIDIA H100" in text
    figure = Figure()
    figures.draw(figure)
    assert len(figure.axes) == 4
    with pytest.raises(UnknownNameError, match="nobody called 'flex_attention'"):
        figures.rate("forward", 64, 1024, "flex_attention")


def test_a_sweep_is_told_by_tile_and_way(tmp_path):
    device = {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    choice = {"groups": 2, "block_n": 64, "persistent": False}
    head = {"group": "hopper D64", "stage": "tiles"}
    rates = {(False, False): 300.0, (True, False): 310.0, (False, True): 320.0, (True, True): 330.0}
    swept = [
        {**head, "choice": {**choice, "ordered": a, "overlap": b}, "tflops": rates[a, b]} for a, b in rates
    ]
    swept += [
        {**swept[3], "choice": {**swept[3]["choice"], "persistent": True}, "tflops": 999.0},
        {**swept[3], "group": "hopper D64 causal", "tflops": 999.0},
        {**swept[3], "stage": "heads", "tflops": 999.0},
        {**swept[3], "group": "forward D64", "choice": {"rung": "pointer"}, "tflops": 999.0},
    ]
    save(Record("flash_sweep", device, {"torch": "2.11.0"}, "2026-11-24", "", swept), tmp_path)
    table, gains = flash_figures.ways(folder=tmp_path)
    assert gains == [pytest.approx(1.1)]
    assert "999" not in repr(table)
    assert all(f"{rate:.0f}" in repr(table) for rate in rates.values())


def test_without_a_record_that_is_said(tmp_path):
    with pytest.raises(UnknownNameError, match="no record of 'flash'"):
        flash_figures.of("cpu", folder=tmp_path)


def test_the_walk_s_naive_bytes_are_the_matrix_four_times_and_every_tensor_once():
    assert flash_tiles.naive(10, 20, 4, 2) == (4 * 200 + 2 * 10 * 4 + 2 * 20 * 4) * 2
    assert np.isclose(flash_tiles.naive(512, 512, 64, 2) / 2**10, 2304)
