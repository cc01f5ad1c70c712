"""Lab 12: its bank, the judges' own references, and a model that trains on a learner's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab
from llmcourse.labs.lab12_training_memory.accumulated_gradient import _draw
from llmcourse.labs.lab12_training_memory.accumulated_gradient import expected as gradient_of
from llmcourse.labs.lab12_training_memory.best_pieces import by_all_cuts, kept, least
from llmcourse.labs.lab12_training_memory.checkpointed_mlp import expected as through_layers
from llmcourse.models import Transformer
from llmcourse.plug import PlugError, plug
from llmcourse.train.checkpoint import Checkpointed, best_pieces, measured_pieces
from llmcourse.train.fit import build, one_thread
from llmcourse.train.lean import fit_lean
from llmcourse.train.precision import LossScaler
from llmcourse.train.saved import saved_tensors
from llmcourse.train.small import small
from llmcourse.train.tasks import Text

LAB = find_lab("12")
EXERCISES = {e.name: e for e in LAB.exercises}
TEXT = Text("the quick brown fox jumps over the lazy dog; " * 40)


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


def a_trial(seed=5):
    return Trial(LocalSubject(len), (), seed, "a test")


# ── the judge's own references ───────────────────────────────────────────────────────────────────────


def test_the_gradient_that_judges_is_torchs_of_the_whole_batch():
    weight, xs, targets = _draw(a_trial(), [5, 1, 8])
    w = weight.double().requires_grad_()
    loss = F.cross_entropy(torch.cat(xs).double() @ w.T, torch.cat(targets), ignore_index=-100)
    loss.backward()
    found = gradient_of(weight, xs, targets)
    assert np.allclose(found[0], loss.item())
    assert np.allclose(found[1], w.grad.numpy())


def test_the_layer_that_judges_is_the_second_half_of_a_block():
    torch.manual_seed(0)
    block = build(Transformer, small(31, 1), seed=0).blocks[0].double()
    x = torch.randn(7, 64, dtype=torch.float64)
    want = x + block.mlp(block.mlp_norm(x))
    y, _ = through_layers(x, block.mlp.gate_up.weight[None], block.mlp.down.weight[None])
    assert np.allclose(y, want.detach().numpy())


def test_the_least_that_judges_is_the_least_of_all_ways_to_cut():
    rng = np.random.default_rng(0)
    for _ in range(40):
        inside = [int(n) for n in rng.integers(1, 40, rng.integers(1, 10))]
        border = int(rng.integers(0, 60))
        assert least(border, inside) == by_all_cuts(border, inside)
        assert kept(border, inside, best_pieces(border, inside)) == least(border, inside)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 52):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, str(found))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert verdict(name, lambda *args: None).state == "failed"
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2), [], "text", float("nan"), [0, "a"]):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_a_right_stack_that_keeps_everything_fails_on_its_bytes_alone():
    found = verdict("checkpointed_mlp", EXERCISES["checkpointed_mlp"].mistakes[0].fn)
    failing = [r.check.name for r in found.results if not r.ok]
    assert failing == ["saved", "peak"]
    assert "bytes kept for backward" in str(found)


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


def trained(**how):
    model = build(Transformer, small(TEXT.vocab_size, 2), seed=0)
    return fit_lean(model, TEXT.batches(batch=4, length=16, seed=1), steps=12, **how)


@pytest.mark.parametrize("alternative", EXERCISES["scaler_step"].alternatives, ids=lambda a: a.name)
@one_thread()
def test_a_training_scaled_by_a_learners_function_is_the_packages_own(alternative):
    def scaled():
        return trained(precision="float16 autocast", scaler=LossScaler(2.0**22, interval=3))

    own = scaled()
    with plug(scaler_step=alternative.fn) as used:
        mine = scaled()
    assert used.calls["scaler_step"] == 12
    assert (mine.skipped, mine.scale) == (own.skipped, own.scale)
    assert mine.curve == pytest.approx(own.curve, abs=1e-6)


@pytest.mark.parametrize("alternative", EXERCISES["checkpointed_mlp"].alternatives, ids=lambda a: a.name)
@one_thread()
def test_a_training_through_a_learners_layers_is_the_packages_own(alternative):
    own = trained()
    with plug(checkpointed_mlp=alternative.fn) as used:
        mine = trained()
    assert used.calls["checkpointed_mlp"] == 24
    assert mine.curve == pytest.approx(own.curve, abs=1e-4)


def test_a_model_keeps_less_with_a_learners_layers():
    model, found = build(Transformer, small(TEXT.vocab_size, 2), seed=0), []
    tokens = torch.zeros(2, 32, dtype=torch.long)
    with saved_tensors(model) as saved:
        model(tokens)
    found.append(saved.bytes)
    with plug(checkpointed_mlp=EXERCISES["checkpointed_mlp"].alternatives[0].fn):
        with saved_tensors(model) as saved:
            model(tokens)
        found.append(saved.bytes)
    assert found[1] < 0.75 * found[0]


@pytest.mark.parametrize("alternative", EXERCISES["best_pieces"].alternatives, ids=lambda a: a.name)
def test_a_model_is_cut_where_a_learners_function_says(alternative):
    model = build(Transformer, small(TEXT.vocab_size, 3), seed=0)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with plug(best_pieces=alternative.fn) as used:
        starts = measured_pieces(model, tokens)
    assert used.calls["best_pieces"] == 1
    assert Checkpointed(model, starts=starts)(tokens).shape == (1, 16, TEXT.vocab_size)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("scaler_step", lambda grads, scale, good, interval: None, "None"),
        ("scaler_step", lambda grads, scale, good, interval: (grads[:1], scale, good), "a list of"),
        ("scaler_step", lambda grads, scale, good, interval: (grads, None, good), "scale is None"),
        ("checkpointed_mlp", lambda x, a, b: x[:, :3], "has shape"),
        ("checkpointed_mlp", lambda x, a, b: x.double(), "float64"),
        ("best_pieces", lambda border, inside: [1, 2], "ascending whole numbers from 0"),
        ("best_pieces", lambda border, inside: [0, 9], "block 9"),
        ("best_pieces", lambda border, inside: 3, "ascending"),
    ],
)
def test_what_does_not_fit_the_trainer_is_refused(name, wrong, says):
    model = build(Transformer, small(TEXT.vocab_size, 2), seed=0)
    batches = TEXT.batches(batch=1, length=8, seed=0)

    def train():
        starts = measured_pieces(model, next(batches).inputs[0])
        fit_lean(model, batches, steps=1, precision="float16 autocast", starts=starts)

    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        train()


def test_a_wrong_scaler_changes_the_training():
    own = trained(precision="float16 autocast", scaler=LossScaler(2.0**10))
    wrong = next(m.fn for m in EXERCISES["scaler_step"].mistakes if m.name == "never_skips")
    with plug(scaler_step=wrong):
        mine = trained(precision="float16 autocast", scaler=LossScaler(2.0**24))
    assert not np.allclose(mine.curve, own.curve, atol=1e-2)
