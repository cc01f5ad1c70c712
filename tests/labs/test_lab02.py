"""Lab 02: references that torch agrees with, and a learner's functions in a training."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab
from llmcourse.labs.lab02_activations_losses_optimizers.adam_states import first, later
from llmcourse.labs.lab02_activations_losses_optimizers.adamw_step import expected as adamw_expected
from llmcourse.labs.lab02_activations_losses_optimizers.lamb_step import expected as lamb_expected
from llmcourse.labs.lab02_activations_losses_optimizers.learning_rate import expected as rate_expected
from llmcourse.labs.lab02_activations_losses_optimizers.swiglu_backward import expected as gate_expected
from llmcourse.labs.lab02_activations_losses_optimizers.token_loss import expected as loss_expected
from llmcourse.models import Transformer
from llmcourse.plug import PlugError, plug
from llmcourse.train.fit import fit, one_thread, scale_at
from llmcourse.train.optim import LAMB, AdamW
from llmcourse.train.variants import BASE, draw, phone_book

LAB = find_lab("02")
EXERCISES = {e.name: e for e in LAB.exercises}
MINE = {name: exercise.alternatives[0].fn for name, exercise in EXERCISES.items()}


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


def a_trial(seed=5):
    return Trial(LocalSubject(len), (), seed, "a test")


# ── the judge's own references ───────────────────────────────────────────────────────────────────────


def test_the_gate_s_gradients_that_judge_are_autograd_s():
    gate, up, grad = (torch.randn(5, 7, dtype=torch.float64) * s for s in (4.0, 1.0, 1.0))
    gate.requires_grad_()
    up.requires_grad_()
    want = torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)
    for got, right in zip(gate_expected(gate.detach(), up.detach(), grad), want, strict=True):
        assert np.allclose(got, right.numpy(), atol=1e-12)


def test_the_loss_that_judges_and_its_gradient_are_torch_s():
    logits = (torch.randn(9, 5, dtype=torch.float64) * 20).requires_grad_()
    targets = torch.tensor([0, 4, -100, 2, 2, -100, 1, 3, 0])
    loss = F.cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(loss, logits)
    value, slope = loss_expected(logits.detach(), targets)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert np.allclose(slope, grad.numpy(), atol=1e-14)


def test_the_rate_that_judges_is_the_package_s_own():
    for step in range(40):
        assert rate_expected(step, 30, 7, 1.0, 0.1) == pytest.approx(scale_at(step, 30, 7), abs=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_steps_that_judge_are_those_of_torch_and_of_the_package(decay):
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    for make, expected in ((torch.optim.AdamW, adamw_expected), (LAMB, lamb_expected)):
        w, g, m, v = (x.double() for x in first(a_trial(), 5, 3))
        p = torch.nn.Parameter(w.clone())
        optimizer = make([p], **settings)
        for t in range(1, 6):
            p.grad = g = torch.randn(5, 3, dtype=torch.float64)
            optimizer.step()
            w, m, v = map(torch.from_numpy, expected(w, g, m, v, t, 0.02, 0.8, 0.95, 1e-6, decay))
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 60):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, found)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert "return" in str(verdict(name, lambda *args: None))
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2), "text", float("nan")):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_torch_s_own_adamw_called_in_the_step_is_a_right_answer():
    def through_torch(w, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
        p = torch.nn.Parameter(w.clone())
        p.grad = g.clone()
        optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
        optimizer.state[p] = {"step": torch.tensor(t - 1.0), "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        return p.detach(), m, v

    assert verdict("adamw_step", through_torch).ok


def test_states_of_the_middle_of_a_training_are_possible_ones():
    _, _, m, v = later(a_trial(), 50, 40)
    assert bool((v >= 0).all())
    assert m.square().mean() < v.mean()


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


@one_thread()
def train(optimizer, lr, steps=12):
    model = draw(Transformer(BASE), seed=0)
    short = partial(optimizer, betas=(0.9, 0.98))
    return fit(model, phone_book(batch=16, seed=0), steps=steps, lr=lr, optimizer=short)


@pytest.mark.parametrize("name", EXERCISES)
def test_each_right_function_trains_the_model_alike(name):
    kind, lr = (LAMB, 0.05) if name == "lamb_step" else (AdamW, 0.02)
    own = train(kind, lr)
    for alternative in EXERCISES[name].alternatives:
        with plug(**{name: alternative.fn}) as used:
            assert train(kind, lr) == pytest.approx(own, abs=1e-3), alternative.name
        assert used.calls[name] >= 12
    assert train(kind, lr) == own


@pytest.mark.parametrize(("name", "mistake"), [
    ("swiglu_backward", "gate_as_constant"), ("token_loss", "no_onehot"), ("adamw_step", "uncorrected"),
    ("learning_rate", "straight"), ("lamb_step", "adamw"),
])  # fmt: skip
def test_a_mistake_shows_in_the_curve(name, mistake):
    kind, lr = (LAMB, 0.05) if name == "lamb_step" else (AdamW, 0.02)
    wrong = next(m.fn for m in EXERCISES[name].mistakes if m.name == mistake)
    own = train(kind, lr)
    with plug(**{name: wrong}):
        assert train(kind, lr) != pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize(("name", "wrong", "says"), [
    ("swiglu_backward", lambda gate, up, grad: gate, "d_gate, d_up"),
    ("swiglu_backward", lambda gate, up, grad: (gate[:1], up), "d_gate has shape"),
    ("token_loss", lambda logits, targets: (logits, logits), "loss is"),
    ("token_loss", lambda logits, targets: (1.0, logits.double()), "grad is torch.float64"),
    ("learning_rate", lambda step, steps, warmup, peak, floor: None, "the rate is None"),
    ("adamw_step", lambda w, *rest: (w, w), "a tuple of 2"),
    ("adamw_step", lambda w, *rest: (w, w, None), "v is None"),
])  # fmt: skip
def test_what_does_not_fit_the_training_is_refused(name, wrong, says):
    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        train(AdamW, 0.02, steps=2)


def test_a_step_may_write_over_what_it_is_given_and_a_lamb_with_bounds_is_the_package_s_own():
    a, b = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    for p, name in ((a, ""), (b, "lamb_step")):
        optimizer = LAMB([p], lr=0.1, bounds=(0.0, 1.0))
        p.grad = torch.arange(12.0).view(4, 3) - 5
        with plug(**({name: MINE[name]} if name else {})) as used:
            optimizer.step()
        assert not sum(used.calls.values())
    assert torch.equal(a, b)
    in_place = EXERCISES["adamw_step"].alternatives[1].fn
    with plug(adamw_step=in_place):
        AdamW([a], lr=0.1).step()
    assert bool(a.isfinite().all())
    assert a.grad.tolist() == (torch.arange(12.0).view(4, 3) - 5).tolist()
