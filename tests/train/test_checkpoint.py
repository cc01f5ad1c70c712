"""Checkpointing, offload and the count of what is kept: gradients as without, and fewer bytes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.errors import GraphError, ShapeError
from llmcourse.grading.cost import counter
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.checkpoint import (
    Checkpointed,
    best_pieces,
    best_segment,
    checkpoint,
    kept_bytes,
    kept_in_pieces,
    measured_pieces,
    segments,
)
from llmcourse.train.fit import build
from llmcourse.train.offload import offload
from llmcourse.train.saved import saved_tensors

CONFIG = ModelConfig(29, 24, 5, 3, 1, 8, 40, max_len=64)
TOKENS = torch.randint(0, 29, (3, 17), generator=torch.Generator().manual_seed(0))


def gradients(net, model, context=None):
    model.zero_grad()
    if context is None:
        loss = F.cross_entropy(net(TOKENS).flatten(0, 1), TOKENS.flatten())
    else:
        with context:
            loss = F.cross_entropy(net(TOKENS).flatten(0, 1), TOKENS.flatten())
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("by", ["hand", "torch"])
@pytest.mark.parametrize("how", [{"every": 1}, {"every": 2}, {"every": 9}, {"starts": [0, 1, 4]}])
def test_gradients_equal_those_of_the_plain_model(how, by):
    model = build(Transformer, CONFIG, seed=1)
    want = gradients(model, model)
    assert torch.equal(gradients(Checkpointed(model, **how, by=by), model), want)


def test_fewer_bytes_are_kept_and_one_block_is_alive_at_a_time():
    model, kept, alive = build(Transformer, CONFIG, seed=1), {}, {}
    for every in (0, 5, 1):
        net = Checkpointed(model, every)
        with saved_tensors(model) as saved:
            features = net.features(TOKENS)
        kept[every] = saved.bytes
        features.sum().backward()
        with counter("largest_intermediate")() as count:
            net.features(TOKENS).sum().backward()
        alive[every] = count.values["peak_bytes"]
    assert kept[5] < kept[1] < kept[0] / 6
    assert alive[1] < alive[0] / 2
    assert alive[5] > 0.8 * alive[0]


def test_dropout_draws_the_same_numbers_again_and_the_stream_goes_on_as_if_nothing_was():
    x = torch.ones(500, requires_grad=True)
    torch.manual_seed(3)
    y = checkpoint(lambda t: F.dropout(t, 0.5), x)
    after = torch.rand(1)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    following = torch.rand(1)
    torch.manual_seed(3)
    F.dropout(torch.ones(500), 0.5)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(following, torch.rand(1))


def test_autocast_is_as_it_was_when_the_piece_runs_again():
    seen = []
    layer = nn.Linear(4, 4)

    def run(x):
        y = layer(x)
        seen.append(y.dtype)
        return y

    x = torch.ones(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = checkpoint(run, x)
    y.float().sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


def test_several_inputs_get_gradients_and_those_that_ask_none_get_none():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3)
    c = torch.randn(3, requires_grad=True)
    checkpoint(lambda a, b, c: (a * b + c * c).sin(), a, b, c).sum().backward()
    inner = (a * b + c * c).cos()
    torch.testing.assert_close(a.grad, (inner * b).detach())
    torch.testing.assert_close(c.grad, (2 * inner * c).detach())
    assert b.grad is None


def test_a_piece_without_a_gradient_to_pass_is_refused_by_hand_and_not_by_torch():
    layer = nn.Linear(2, 2)
    with pytest.raises(GraphError, match="asks for a gradient"):
        checkpoint(layer, torch.ones(1, 2))
    checkpoint(layer, torch.ones(1, 2), by="torch").sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert not checkpoint(layer, torch.ones(1, 2)).requires_grad


# ── where to cut ─────────────────────────────────────────────────────────────────────────────────


def test_the_best_length_of_equal_steps_is_the_root():
    for root in range(1, 12):
        assert best_segment(root**2, 1, 1) == root


def test_a_transformer_is_best_cut_into_single_blocks():
    assert best_segment(16, 1, 18) == 1
    assert best_segment(16, 18, 1) > 8


@given(st.integers(0, 60), st.lists(st.integers(1, 50), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_no_way_to_cut_keeps_less_than_the_best_pieces(border, inside):
    found = kept_in_pieces(border, inside, best_pieces(border, inside))
    n = len(inside)
    ways = ([0, *cut] for k in range(n) for cut in combinations(range(1, n), k))
    assert found == min(kept_in_pieces(border, inside, way) for way in ways)


def test_equal_blocks_in_best_pieces_keep_as_little_as_equal_pieces():
    for n, border, inside in ((16, 7, 7), (30, 5, 90), (12, 100, 3)):
        starts = best_pieces(border, [inside] * n)
        best = kept_bytes(n, best_segment(n, border, inside), border, inside)
        assert kept_in_pieces(border, [inside] * n, starts) <= best


def test_pieces_of_a_hybrid_follow_what_its_blocks_keep():
    config = ModelConfig(29, 24, 6, 3, 1, 8, 0, max_len=64, layers=("hyena", "attention") * 3)
    model = build(Transformer, config, seed=0)
    starts = measured_pieces(model, TOKENS)
    assert starts[0] == 0
    want = gradients(model, model)
    got = gradients(Checkpointed(model, starts=starts), model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_pieces_that_make_no_sense_are_refused():
    model = build(Transformer, CONFIG, seed=1)
    for starts in ([1, 3], [0, 3, 2], [0, 2, 2]):
        with pytest.raises(ShapeError, match="pieces that begin"):
            Checkpointed(model, starts=starts)(TOKENS)
    with pytest.raises(ShapeError, match="pieces of 0"):
        segments(5, 0)


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────


def test_operations_keep_what_their_gradients_need():
    a, b = (torch.randn(10, requires_grad=True) for _ in range(2))
    cases = {
        "add": (lambda: a + b, 0),
        "exp": (lambda: a.exp(), 40),
        "mul": (lambda: a * b, 0),
        "mul of exp": (lambda: a.exp() * b, 40),
        "sum of squares": (lambda: (a + b).square().sum(), 40),
    }
    for name, (run, want) in cases.items():
        with saved_tensors(a, b) as saved:
            run()
        assert saved.bytes == want, name


def test_a_view_keeps_its_whole_storage_once():
    a = torch.randn(10, requires_grad=True)
    with saved_tensors(a) as saved:
        x = a + 1
        x[:2].square().sum() + x[5:].square().sum()
    assert (saved.bytes, saved.calls) == (40, 2)
    assert "40" in repr(saved.table())


def test_the_count_agrees_with_the_graders_own():
    model = build(Transformer, CONFIG, seed=1)
    with saved_tensors(model) as saved:
        model(TOKENS).sum()
    with counter("saved_bytes")(arguments=(model,)) as count:
        kept = model(TOKENS).sum()
    assert kept is not None
    assert saved.bytes == count.values["saved_bytes"]


# ── offload ──────────────────────────────────────────────────────────────────────────────────────


def test_offloaded_gradients_are_the_same_to_the_bit_and_every_byte_is_counted():
    model = build(Transformer, CONFIG, seed=1)
    want = gradients(model, model)
    with saved_tensors(model) as saved:
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
    moving = offload(model, least=0)
    model.zero_grad()
    with moving as traffic:
        loss = F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
    loss.backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), want)
    assert traffic.out == saved.bytes
    assert traffic.back >= traffic.out


def test_small_storages_and_weights_stay():
    x, w = torch.randn(8, requires_grad=True), torch.randn(1000, requires_grad=True)
    with offload(w, least=1000) as traffic:
        y = (x.exp().sum() * w.sin()).sum()
    y.backward()
    assert traffic.out == 4000  # sin(w): made here and large
    assert traffic.stayed > 0
    torch.testing.assert_close(w.grad, (x.exp().sum() * w.cos()).detach())


def test_a_storage_that_is_changed_and_kept_again_leaves_again():
    x = torch.ones(100, requires_grad=True)
    with offload(least=0) as traffic:
        a = x * 2
        b = a.exp()
        with torch.no_grad():
            scratch = torch.ones(100)
        c = (scratch * x).sum()
        scratch.add_(1)
        d = (scratch * x).sum()
    (b.sum() + c + d).backward()
    torch.testing.assert_close(x.grad, (2 * (2 * x).exp() + 1 + 2).detach())
    assert traffic.out >= 3 * 400


def test_a_negative_size_is_refused():
    with pytest.raises(ShapeError, match="least"), offload(least=-1):
        pass


def test_counting_keeps_nothing_alive():
    model = build(Transformer, CONFIG, seed=1)
    net, alive = Checkpointed(model, 1), []
    for counted in (False, True):
        with counter("largest_intermediate")() as count:
            if counted:
                with saved_tensors(model):
                    net.features(TOKENS).sum().backward()
            else:
                net.features(TOKENS).sum().backward()
        model.zero_grad()
        alive.append(count.values["peak_bytes"])
    assert alive[1] == alive[0]
