"""Lab 16: its bank, the judges' own references, and trainings on a learner's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcourse.compress import distill
from llmcourse.compress.acceptance import expected_passes
from llmcourse.compress.distill import from_teacher
from llmcourse.compress.draft_report import draft_report
from llmcourse.compress.linear_kl import linear_kl
from llmcourse.compress.small_pair import student_config
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab
from llmcourse.labs.lab16_distillation.acceptance_report import passes
from llmcourse.labs.lab16_distillation.distillation_loss import _draw, expected
from llmcourse.labs.lab16_distillation.linear_kl_gradients import expected as gradients_of
from llmcourse.models import Transformer
from llmcourse.plug import PlugError, plug
from llmcourse.train.fit import build, fit, one_thread
from llmcourse.train.small import small
from llmcourse.train.tasks import Text

LAB = find_lab("16")
EXERCISES = {e.name: e for e in LAB.exercises}
TEXT = Text("the quick brown fox jumps over the lazy dog; " * 40)


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


# ── the judge's own references ───────────────────────────────────────────────────────────────────────


def test_the_loss_and_gradient_that_judge_are_the_packages_in_float64():
    student, teacher, targets = _draw(Trial(LocalSubject(len), (), 5, "a test"), 9, 7, hidden=0.4)
    z = student.double().requires_grad_()
    loss = distill.distillation_loss(z, teacher.double(), targets, 2.5, 0.6)
    loss.backward()
    want = expected(student, teacher, targets, 2.5, 0.6)
    assert np.allclose(want[0], loss.item(), rtol=1e-5)
    assert np.allclose(want[1], z.grad.numpy(), atol=1e-6)


def test_the_gradients_that_judge_are_autograds():
    x, weight, teacher_x, teacher_weight = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(((7, 3), (11, 3), (7, 5), (11, 5)))
    )
    a, w = (t.double().requires_grad_() for t in (x, weight))
    loss = distill.forward_kl(a @ w.T, (teacher_x @ teacher_weight.T).double()).mean()
    loss.backward()
    want = gradients_of(x, weight, teacher_x, teacher_weight)
    for found, right in zip((loss.detach(), a.grad, w.grad), want, strict=True):
        assert np.allclose(found.numpy(), right, atol=1e-6)


def test_the_passes_that_judge_are_the_packages_by_another_way():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 30):
        for length in (1, 3, 9):
            chances = rng.random(count)
            assert passes(chances, length) == pytest.approx(expected_passes(torch.tensor(chances), length))


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
    nonsense = (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2, 3), [], "text", float("nan"))
    for value in nonsense:
        assert verdict(name, lambda *args, value=value: value).state == "failed"


def test_right_gradients_from_all_logits_at_once_fail_on_their_bytes_alone():
    wrong = next(m.fn for m in EXERCISES["linear_kl_gradients"].mistakes if m.name == "all_at_once")
    found = verdict("linear_kl_gradients", wrong)
    assert [r.check.name for r in found.results if not r.ok] == ["cost"]
    assert "largest intermediate" in str(found)


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


def trained(steps=8):
    teacher = build(Transformer, small(TEXT.vocab_size), seed=0).requires_grad_(False)
    student = build(Transformer, student_config(TEXT.vocab_size), seed=1)
    batches = TEXT.batches(batch=2, length=16, seed=1)
    return fit(student, batches, steps=steps, loss=from_teacher(teacher, temperature=2.0, weight=0.7))


@pytest.mark.parametrize("alternative", EXERCISES["distillation_loss"].alternatives, ids=lambda a: a.name)
@one_thread()
def test_a_student_trains_on_a_learners_loss_as_on_the_packages(alternative):
    own = trained()
    with plug(distillation_loss=alternative.fn) as used:
        mine = trained()
    assert used.calls["distillation_loss"] == 8
    assert mine == pytest.approx(own, abs=1e-4)


def step(dtype=None):
    x, weight, teacher_x, teacher_weight = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(((7, 3), (11, 3), (7, 5), (11, 5)))
    )
    x.requires_grad_()
    weight.requires_grad_()
    linear_kl(x, weight, teacher_x, teacher_weight, rows=4, dtype=dtype).backward()
    return x.grad, weight.grad


@pytest.mark.parametrize("alternative", EXERCISES["linear_kl_gradients"].alternatives, ids=lambda a: a.name)
def test_a_learners_gradients_go_where_the_packages_go(alternative):
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 2e-2)):
        own = step(dtype)
        with plug(linear_kl_gradients=alternative.fn) as used:
            mine = step(dtype)
        assert used.calls["linear_kl_gradients"] == 1
        assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(own, mine, strict=True))


def report():
    models = [build(Transformer, student_config(TEXT.vocab_size), seed=s).eval() for s in (0, 1)]
    return repr(draft_report(*models, [([1, 2], [3, 4, 5, 6]), ([5], [1, 2, 3])], length=2))


@pytest.mark.parametrize("alternative", EXERCISES["acceptance_report"].alternatives, ids=lambda a: a.name)
def test_a_draft_is_reported_by_a_learners_function(alternative):
    own = report()
    with plug(acceptance_report=alternative.fn) as used:
        mine = report()
    assert used.calls["acceptance_report"] == 2
    assert mine == own


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("distillation_loss", lambda s, t, y, T, w: None, "None"),
        ("distillation_loss", lambda s, t, y, T, w: s, "has shape"),
        ("distillation_loss", lambda s, t, y, T, w: s.detach().sum(), "lost the student's graph"),
        ("linear_kl_gradients", lambda x, w, a, b, n: x, r"\(loss, grad_x, grad_weight\)"),
        ("linear_kl_gradients", lambda x, w, a, b, n: (x.sum(), w, x), "grad_x has shape"),
        ("acceptance_report", lambda p, q, y, n: (0.5, p[:, 0], 0.0), "tokens_per_pass is 0"),
        ("acceptance_report", lambda p, q, y, n: (0.5, p, 1.0), "accepted is of shape"),
    ],
)
def test_what_does_not_fit_the_training_is_refused(name, wrong, says):
    work = {"distillation_loss": trained, "linear_kl_gradients": step, "acceptance_report": report}
    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        work[name]()
