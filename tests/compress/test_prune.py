"""Masks, Wanda, SparseGPT and structured pruning: against plain formulas, and on the real model."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from llmcourse.bench import pruning_figures
from llmcourse.bench.prune import CALIBRATION, TEST, pieces
from llmcourse.bench.pruning_figures import found, perplexities
from llmcourse.bench.records import Record
from llmcourse.compress.calibrate import Inputs, calibrate, layers_of
from llmcourse.compress.masks import Pattern, keep, wanda_scores
from llmcourse.compress.prune import METHODS, front, prune, pruned_weight, sparsity_of
from llmcourse.compress.sparse_linear import Sparse24Linear, pack_model
from llmcourse.compress.sparsegpt import damped, sparsegpt, update
from llmcourse.compress.structured import best, refit, shrink, unit_scores
from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.models import ModelConfig, random_model
from llmcourse.models.perplexity import perplexity
from llmcourse.widgets.sparsity import draw, error, layer, pruned

SIZES = {
    "vocab_size": 50,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 3,
    "head_dim": 8,
    "d_ff": 24,
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return random_model(ModelConfig(**SIZES, qkv_bias=True))


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(1))


def features(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_the_lowest_scores_go_and_exactly_as_many_as_asked(share):
    torch.manual_seed(0)
    scores = torch.rand(7, 13)
    stay = keep(scores, Pattern(share))
    assert int((~stay).sum()) == int(share * 91)
    if share:
        assert scores[~stay].max() <= scores[stay].min()
    rows = keep(scores, Pattern(share, per="row"))
    assert ((~rows).sum(1) == int(share * 13)).all()


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 14])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
def test_of_every_m_neighbours_the_n_largest_stay_and_a_short_last_group_keeps_what_it_has(columns, n, m):
    torch.manual_seed(columns)
    scores = torch.randn(5, columns)
    stay = keep(scores, Pattern(n=n, m=m))
    for row, start in itertools.product(range(5), range(0, columns, m)):
        part, kept = scores[row, start : start + m], stay[row, start : start + m]
        assert int(kept.sum()) == min(n, len(part))
        assert set(part[kept].tolist()) == set(part.topk(min(n, len(part))).values.tolist())


def test_equal_scores_keep_the_first_and_no_more():
    assert keep(torch.ones(2, 8), Pattern(n=2, m=4))[0].tolist() == [True, True, False, False] * 2
    assert int(keep(torch.zeros(3, 5), Pattern(0.4)).sum()) == 9


def test_patterns_that_leave_nothing_are_refused():
    for wrong in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"n": 0, "m": 4}, {"n": 5, "m": 4}):
        with pytest.raises(ShapeError):
            Pattern(**wrong)
    assert Pattern(n=2, m=4).sparsity == 0.5
    with pytest.raises(ShapeError):
        keep(torch.zeros(3), Pattern())


def test_wandas_score_is_the_change_of_the_output_when_the_weight_alone_goes():
    x, w = features(30, 6), features(4, 6, 1)
    scores = wanda_scores(w, Inputs.of(x, dtype=torch.float64).norm)
    for n, k in itertools.product(range(4), range(6)):
        without = w.clone()
        without[n, k] = 0
        assert torch.isclose(((x @ without.T) - (x @ w.T)).norm(), scores[n, k])


# ── SparseGPT ────────────────────────────────────────────────────────────────────────────────────────


def by_inverses(weight, hessian, pattern, block, mask=None):
    """The paper's algorithm with an inverse for each column: no factor, no lazy updates."""
    w, stay = weight.clone(), torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    size = pattern.m or block
    for j in range(w.shape[1]):
        if mask is None and j % size == 0:
            columns = list(range(j, min(j + size, w.shape[1])))
            cost = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0] for c in columns])
            stay[:, columns] = keep(w[:, columns] ** 2 / cost, pattern)
        p = torch.linalg.inv(hessian[j:, j:])
        w[:, j:] -= torch.where(stay[:, j], 0, w[:, j] / p[0, 0])[:, None] * p[0]
        w[~stay[:, j], j] = 0
    return w


@pytest.mark.parametrize(
    "pattern", [Pattern(0.5), Pattern(0.3, per="row"), Pattern(n=2, m=4), Pattern(n=4, m=8)]
)
@pytest.mark.parametrize(("columns", "block"), [(13, 5), (16, 8), (9, 128), (6, 1)])
def test_sparsegpt_is_the_papers_formula(pattern, columns, block):
    weight, x = features(7, columns, 3), features(4 * columns, columns, 4)
    gram = x.T @ x
    got = sparsegpt(weight, gram, pattern, block=block)
    want = by_inverses(weight, damped(gram), pattern, block)
    assert torch.equal(got == 0, want == 0)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-8)


def test_one_weight_of_a_row_goes_as_the_optimal_brain_surgeon_says():
    x, w = features(40, 9), features(3, 9, 1)
    gram = x.T @ x
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 0] = False
    got = update(w, gram, mask)
    fit = torch.linalg.lstsq(x[:, 1:], x @ w.T).solution.T  # the best that the other eight can do
    assert torch.allclose(got[:, 1:], fit)
    inverse = torch.linalg.inv(gram)
    change = got - w
    assert torch.allclose(((change @ gram) * change).sum(1), w[:, 0] ** 2 / inverse[0, 0])


def test_sparsegpt_leaves_the_output_nearer_than_wanda_and_wanda_nearer_than_magnitude():
    w, inputs = layer()
    for pattern in (Pattern(0.5), Pattern(n=2, m=4)):
        errors = [inputs.error(pruned_weight(w, inputs, m, pattern) - w) for m in METHODS]
        assert errors == sorted(errors, reverse=True)


def test_features_that_never_occur_do_not_break_it():
    x = features(20, 8)
    x[:, 3] = 0
    w = features(5, 8, 1)
    got = sparsegpt(w, x.T @ x)
    assert torch.isfinite(got).all()
    assert got.dtype == w.dtype


def test_a_zero_pattern_changes_nothing_and_wrong_shapes_are_refused():
    x, w = features(20, 8), features(5, 8, 1)
    assert torch.equal(sparsegpt(w, x.T @ x, Pattern(0.0)), w)
    with pytest.raises(ShapeError, match="gram"):
        sparsegpt(w, torch.eye(7))
    with pytest.raises(UnknownNameError, match="random"):
        pruned_weight(w, None, "random", Pattern())
    with pytest.raises(ShapeError, match="without a layer's inputs"):
        pruned_weight(w, None, "wanda", Pattern())


# ── models ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(n=2, m=4)])
def test_a_model_has_as_many_zeros_as_asked_for_in_its_blocks_and_none_elsewhere(
    net, tokens, method, pattern
):
    head = net.head.weight.clone()
    done = prune(net, method, pattern, None if method == "magnitude" else tokens)
    assert done.sparsity == pytest.approx(0.5, abs=0.01)
    assert sparsity_of(net)["all"] == done.sparsity
    assert torch.equal(net.head.weight, head)
    assert torch.isfinite(net(tokens)).all()


def test_only_the_first_blocks_are_pruned_when_asked(net, tokens):
    before = copy.deepcopy(net)
    prune(net, "wanda", Pattern(0.5), tokens, first=1)
    assert sparsity_of(net.blocks[0])["all"] == pytest.approx(0.5, abs=0.01)
    assert sparsity_of(net.blocks[1])["all"] == 0
    assert len(net.blocks) == 2
    assert len(front(before, 1).blocks) == 1


def test_a_packed_model_computes_what_the_pruned_one_does(net, tokens):
    prune(net, "magnitude", Pattern(n=2, m=4))
    want = net(tokens)
    before, after = pack_model(net)
    assert after < 0.6 * before
    assert isinstance(net.blocks[0].mixer.qkv, Sparse24Linear)
    assert torch.allclose(net(tokens), want, atol=1e-5)
    assert torch.allclose(net(tokens[:1, :3]), want[:1, :3], atol=1e-5)


def test_a_model_that_is_not_pruned_is_not_packed_in_part(net):
    with pytest.raises(ShapeError, match="keep"):
        pack_model(net)
    assert not any(isinstance(m, Sparse24Linear) for m in net.modules())


# ── the explorable ──────────────────────────────────────────────────────────────────────────────────


def test_tighter_patterns_lose_more_and_every_choice_draws():
    w, inputs = layer()
    for method in METHODS:
        lost = [
            error(w, inputs, pruned(w, inputs, method, at, 0.5))
            for at in ("anywhere", "2:4", "whole columns")
        ]
        assert lost == sorted(lost)
    assert draw("wanda", "whole columns", 0.75).axes
    with pytest.raises(UnknownNameError, match="3:4:5"):
        pruned(w, inputs, "wanda", "3:4:5", 0.5)


# ── structured ───────────────────────────────────────────────────────────────────────────────────────


def test_a_units_score_is_what_its_columns_send():
    x, w = features(30, 12), features(5, 12, 1)
    scores = unit_scores(w, x.T @ x, 3)
    for unit in range(4):
        columns = slice(3 * unit, 3 * unit + 3)
        assert torch.isclose(scores[unit], ((x[:, columns] @ w[:, columns].T) ** 2).sum())


def test_the_fit_is_least_squares():
    x, w = features(60, 10), features(4, 10, 1)
    stay = torch.tensor([0, 3, 4, 7, 9])
    want = torch.linalg.lstsq(x[:, stay], x @ w.T).solution.T
    assert torch.allclose(refit(w, x.T @ x, stay, damp=0.0), want)
    assert torch.allclose(refit(w, x.T @ x, stay, damp=1e9), w[:, stay], atol=1e-6)


def test_a_smaller_model_is_the_large_one_with_units_switched_off(net, tokens):
    assert torch.equal(shrink(net, tokens)(tokens), net(tokens))
    small = shrink(net, tokens, d_ff=15, n_kv_heads=2, fit=False)
    assert (small.config.n_heads, small.config.n_kv_heads, small.config.d_ff) == (4, 2, 15)
    off, seen = copy.deepcopy(net), calibrate(net, tokens)
    for i, block in enumerate(off.blocks):
        for linear, size, count in ((block.mlp.down, 1, 15), (block.mixer.out, 16, 2)):
            gram = seen[f"blocks.{i}.{'mlp.down' if size == 1 else 'mixer.out'}"].gram
            stay = best(unit_scores(linear.weight, gram, size), count)
            gone = sorted(set(range(linear.in_features // size)) - set(stay.tolist()))
            for unit in gone:
                linear.weight[:, unit * size : unit * size + size] = 0
    assert torch.allclose(small(tokens), off(tokens), atol=1e-5)


def test_sizes_that_no_model_has_are_refused(net, tokens):
    for wrong in ({"d_ff": 25}, {"d_ff": 0}, {"n_kv_heads": 4}):
        with pytest.raises(ShapeError, match="asked for"):
            shrink(net, tokens, **wrong)
    relu = random_model(ModelConfig(**SIZES, mlp="relu"))
    with pytest.raises(ShapeError, match="another kind"):
        shrink(relu, tokens)


# ── the real model ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_perplexities_of_the_real_model_at_one_half_are_in_order(smol):
    """Four of its 30 blocks: the record, below, has all of them."""
    model, tokenizer = smol
    text = pieces(tokenizer, CALIBRATION, count=4, length=256)
    test = pieces(tokenizer, TEST, count=3, length=160)
    values = [perplexity(model, test)]
    for method in ("sparsegpt", "wanda", "magnitude"):
        half = copy.deepcopy(model)
        prune(half, method, Pattern(0.5), None if method == "magnitude" else text, first=4)
        assert len(layers_of(half)) == 120
        values.append(perplexity(half, test))
    assert values == sorted(values)
    assert values[3] > 1.5 * values[0] > values[2]


def test_the_notebooks_figures_are_drawn_from_records_and_say_when_there_is_none(monkeypatch):
    from matplotlib.figure import Figure

    dense = {"kind": "dense", "perplexity": 10.0, "read_seconds": 1.0}
    rows = [
        {"kind": kind, "method": m, "pattern": p, "sparsity": 0.5, "perplexity": 20.0}
        for kind, p in (("unstructured", "50%"), ("pattern", "2:4"))
        for m in METHODS
    ]
    less = {"kind": "structured", "name": "half", "sparsity": 0.3, "perplexity": 30.0, "read_seconds": 0.5}
    rows += [dense, less | {"fit": False}, less | {"fit": True}]
    times = [
        {"n": 14336, "k": 4096, "m": 1, "who": w, "us": u} for w, u in (("cublas", 44.0), ("ours", 22.0))
    ]
    versions = {"torch": "2"}
    records = {
        "prune": Record("prune", {"name": "GPU"}, versions, "2026-01-01", "", rows),
        "sparse24": Record("sparse24", {"name": "GPU"}, versions, "2026-01-01", "", times),
    }
    monkeypatch.setattr(pruning_figures, "found", records.get)
    assert "recorded on GPU" in pruning_figures.perplexity_figure(Figure())
    assert "2.00" in repr(pruning_figures.structured_table())
    assert "2.00, ours" in repr(pruning_figures.times_table())
    monkeypatch.setattr(pruning_figures, "found", lambda name: None)
    for shown in (pruning_figures.perplexity_figure(Figure()), pruning_figures.times_table()):
        assert "not recorded yet" in shown
    # At best a product of one row waits for bytes, one of thousands for FLOPs.
    few, many = ([pruning_figures.at_best(3e12, 8e14, m, share=s) for s in (1, 0.5)] for m in (1, 8192))
    assert few[0] > 1.9 * few[1]
    assert many[0] == many[1]


def test_the_recorded_perplexities_at_one_half_are_in_order():
    record = found("prune", "")
    if record is None:
        pytest.skip("no record of `prune` yet")
    dense = record.row(kind="dense")["perplexity"]
    for at in (perplexities(record, "unstructured")["50%"], perplexities(record, "pattern")["2:4"]):
        assert dense < at["sparsegpt"] < at["wanda"] < at["magnitude"]
