"""Distillation's losses against PyTorch's and by formula, whose text is read, and what a student gains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmcourse.compress import distill
from llmcourse.compress.linear_kl import linear_kl
from llmcourse.compress.small_pair import go_on, own_words_loss, small_teacher, train_student, written_texts
from llmcourse.errors import CourseError, ShapeError
from llmcourse.grading.cost import counter
from llmcourse.train.tasks import IGNORE


def logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ── distances ────────────────────────────────────────────────────────────────────────────────────────


def test_divergences_are_those_of_torch_distributions():
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    q, p = (torch.distributions.Categorical(logits=z) for z in (student, teacher))
    kl = torch.distributions.kl_divergence
    assert torch.allclose(distill.forward_kl(student, teacher), kl(p, q))
    assert torch.allclose(distill.reverse_kl(student, teacher), kl(q, p))
    m = torch.distributions.Categorical(probs=0.3 * p.probs + 0.7 * q.probs)
    mixed = 0.3 * kl(p, m) + 0.7 * kl(q, m)
    assert torch.allclose(distill.jensen_shannon(student, teacher, 0.3), mixed)
    overlap = torch.minimum(p.probs, q.probs).sum(-1)
    assert torch.allclose(distill.total_variation(student, teacher), 1 - overlap)


def test_the_jensen_shannon_mixture_leads_from_forward_to_reverse_kl():
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    near_0, near_1 = (distill.jensen_shannon(student, teacher, mix) for mix in (1e-6, 1 - 1e-6))
    assert torch.allclose(near_0 / 1e-6, distill.forward_kl(student, teacher), rtol=1e-3)
    assert torch.allclose(near_1 / 1e-6, distill.reverse_kl(student, teacher), rtol=1e-3)


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.5, 2.0])
def test_a_mixture_of_one_part_is_refused(mix):
    with pytest.raises(CourseError, match="mixture"):
        distill.jensen_shannon(logits(2, 3), logits(2, 3), mix)


# ── the loss ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (3.0, 0.4), (0.5, 0.9), (2.0, 0.0)])
def test_the_loss_is_kl_div_and_cross_entropy_of_the_asked_rows(temperature, weight):
    student, teacher = logits(9, 6), logits(9, 6, seed=1)
    targets = torch.tensor([0, 5, IGNORE, 2, IGNORE, 1, 1, 3, IGNORE])
    asked = targets != IGNORE
    log_q, log_p = ((z[asked] / temperature).log_softmax(-1) for z in (student, teacher))
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    want = weight * soft + (1 - weight) * F.cross_entropy(student[asked], targets[asked])
    got = distill.distillation_loss(student, teacher, targets, temperature, weight)
    assert torch.allclose(got.double(), want, rtol=1e-5)


def test_the_factor_keeps_the_gradient_as_large_where_temperature_is_high():
    teacher, lengths = logits(1, 30, seed=1), {}
    asked = torch.zeros(1, dtype=torch.long)
    for temperature in (10.0, 100.0):
        student = logits(1, 30).requires_grad_()
        distill.soft_loss(student, teacher, asked, temperature=temperature).backward()
        lengths[temperature] = float(student.grad.norm())
    assert 0.5 < lengths[100.0] / lengths[10.0] < 2


def test_no_gradient_reaches_the_teacher():
    student, teacher = (logits(3, 5, seed=s).requires_grad_() for s in (0, 1))
    distill.distillation_loss(student, teacher, torch.tensor([0, 1, 2]), 2.0, 0.5).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_what_cannot_be_a_loss_is_refused():
    targets = torch.zeros(2, dtype=torch.long)
    with pytest.raises(CourseError, match="temperature is 0"):
        distill.soft_loss(logits(2, 3), logits(2, 3), targets, temperature=0)
    with pytest.raises(CourseError, match=r"a weight of 1\.5"):
        distill.distillation_loss(logits(2, 3), logits(2, 3), targets, 1.0, 1.5)
    with pytest.raises(ShapeError, match="vocabulary"):
        distill.distillation_loss(logits(2, 3), logits(2, 4), targets)


# ── in pieces ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows", [1, 4, 11, 64])
@pytest.mark.parametrize("variation", [0.0, 0.3, 1.0])
def test_pieces_give_the_loss_and_gradients_of_all_logits_together(rows, variation):
    x, weight, teacher_x, teacher_weight = (
        logits(*shape, seed=i) for i, shape in enumerate(((11, 5), (13, 5), (11, 7), (13, 7)))
    )
    (a, w), (b, u) = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    both = a @ w.T, teacher_x @ teacher_weight.T
    want = (1 - variation) * distill.forward_kl(*both) + variation * distill.total_variation(*both)
    (3 * want.mean()).backward()
    got = linear_kl(b, u, teacher_x, teacher_weight, rows=rows, variation=variation)
    (3 * got).backward()
    assert torch.allclose(got.double(), want.mean(), rtol=1e-5)
    assert torch.allclose(b.grad, a.grad, atol=1e-5)
    assert torch.allclose(u.grad, w.grad, atol=1e-5)


def test_pieces_keep_the_logits_of_few_tokens_in_memory():
    x, weight, teacher_x, teacher_weight = (
        logits(*shape).float() for shape in ((128, 4), (500, 4), (128, 6), (500, 6))
    )
    with counter("largest_intermediate")() as cost:
        loss = linear_kl(x.requires_grad_(), weight.requires_grad_(), teacher_x, teacher_weight, rows=8)
        loss.backward()
    assert cost.values["largest_intermediate"] <= 4 * 8 * 500


def test_features_and_heads_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match="one vocabulary"):
        linear_kl(logits(3, 2), logits(5, 2), logits(3, 2), logits(6, 2))
    with pytest.raises(CourseError, match="rows = 0"):
        linear_kl(logits(3, 2), logits(5, 2), logits(3, 2), logits(5, 2), rows=0)


# ── whose text ───────────────────────────────────────────────────────────────────────────────────────


class Counts(nn.Module):
    """Always says that the next token is the last plus one, of 10."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, tokens):
        return 50 * self.one * F.one_hot((tokens + 1) % 10, 10).float()


def test_a_writer_continues_each_prompt_and_is_asked_at_its_own_tokens_only():
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.0, 1.0):
        batch = distill.written_by(
            Counts(),
            torch.tensor([[3, 7, 8], [1, 1, 4]]),
            length=4,
            generator=generator,
            temperature=temperature,
        )
        assert batch.inputs[0].tolist() == [[3, 7, 8, 9, 0, 1], [1, 1, 4, 5, 6, 7]]
        assert batch.targets.tolist() == [[IGNORE, IGNORE, 9, 0, 1, 2], [IGNORE, IGNORE, 5, 6, 7, 8]]


@pytest.fixture(scope="module")
def pair():
    return small_teacher(steps=120, tests=2)


def test_a_student_gains_over_labels_alone_on_three_seeds(pair):
    for seed in range(3):
        labels, soft = (train_student(pair, m, seed=seed, steps=80) for m in ("labels", "soft targets"))
        assert soft.loss < labels.loss - 0.03, seed
        assert soft.overlap > labels.overlap + 0.02, seed


def test_a_student_can_learn_from_the_teachers_text_and_go_on_with_its_own(pair):
    student = train_student(pair, "sequence-level", steps=30)
    untrained = train_student(pair, "labels", steps=1)
    assert student.overlap > untrained.overlap + 0.1
    after = go_on(pair, student, own_words=True, distance=distill.reverse_kl, steps=8)
    assert own_words_loss(pair, after.model) < own_words_loss(pair, student.model) + 0.05


def test_the_teachers_texts_follow_their_openings(pair):
    texts = written_texts(pair, rows=3, length=5)
    assert [(len(p), len(w)) for p, w in texts] == [(8, 5)] * 3
    assert texts[0][0] == pair.held_out[0].inputs[0][0, :8].tolist()
