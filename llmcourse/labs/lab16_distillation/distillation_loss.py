"""Exercise `distillation_loss`: soft targets and labels, T taken back from the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

IGNORE = -100

distillation_loss = Exercise(
    "distillation_loss",
    title="The distillation loss",
    arguments=("student", "teacher", "targets", "temperature", "weight"),
    shapes=(
        "student      float32 tensor [N, V]: the student's logits",
        "teacher      float32 tensor [N, V]: the teacher's, on the same tokens; no gradient may reach it",
        "targets      int64 tensor [N]: the labels, −100 where nothing is asked; at least one is asked",
        "temperature  T > 0, a float: what both models' logits are divided by in the soft part",
        "weight       w from 0 to 1: of the soft part; the labels have the rest",
        "returns      the loss, a tensor of no dimension, from which a gradient reaches the student",
    ),
    formula="mean over asked rows of  w·T²·KL(p ‖ q) + (1 − w)·(−log softmax(student)[target]);   "
    "p, q = softmax of teacher / T, student / T",
    difficulty=2,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "Two losses over the same rows. Which of them sees the temperature, and which rows count in their "
        "means? If T doubles, how does the gradient of KL in the student's logits change, and what takes "
        "that back?",
        "log_softmax of both logits over T, along the last dimension; KL of a row is Σ p·(log p − log q), "
        "with the *teacher's* p in front. Mean over the asked rows alone, times T². The label part is "
        "cross-entropy of the logits as they are, with −100 ignored. `teacher.detach()` keeps the gradient "
        "on one side.",
        "asked = targets != -100; log_p = (teacher.detach() / T).log_softmax(-1); log_q = (student / T)"
        ".log_softmax(-1); soft = (log_p.exp() * (log_p - log_q)).sum(-1)[asked].mean() * T**2; hard = "
        "F.cross_entropy(student, targets, ignore_index=-100); return w * soft + (1 - w) * hard.",
    ),
)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected(*given: Any) -> tuple[float, np.ndarray]:
    """The loss and its gradient in the student's logits, in float64: w·T·(q − p) + (1 − w)·(q₁ − one-hot)."""
    student, teacher, targets, temperature, weight = given
    s, t, y = student.double().numpy(), teacher.double().numpy(), targets.numpy()
    asked = y != IGNORE
    n = asked.sum()
    log_p, log_q = _log_softmax(t / temperature), _log_softmax(s / temperature)
    plain = _log_softmax(s)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    rows = np.flatnonzero(asked)
    loss = weight * temperature**2 * kl[asked].sum() / n - (1 - weight) * plain[rows, y[asked]].sum() / n
    hot = np.exp(plain)
    hot[rows, y[asked]] -= 1
    gradient = weight * temperature * (np.exp(log_q) - np.exp(log_p)) + (1 - weight) * hot
    gradient[~asked] = 0
    return float(loss), gradient / n


def _draw(t: Trial, rows: int, classes: int, *, hidden: float = 0.0, scale: float = 1.5) -> Any:
    targets = t.integers(0, classes, rows)
    mask = t.rng.random(rows) < hidden
    mask[0] = False
    return [
        tensor(t, rows, classes, scale=scale),
        tensor(t, rows, classes, scale=scale),
        torch.from_numpy(np.where(mask, IGNORE, targets).astype(np.int64)),
    ]


def _judge(t: Trial, given: Any, temperature: float, weight: float) -> None:
    found = t.call(*given, temperature, weight)
    t.close(found, expected(*given, temperature, weight)[0], rtol=2e-5, atol=2e-6)


@distillation_loss.check("with no weight on the teacher it is cross-entropy, whatever the temperature")
def labels(t: Trial) -> None:
    for temperature in (1.0, 3.0):
        _judge(t, _draw(t, t.odd(5, 9), t.odd(5, 11)), temperature, 0.0)


@distillation_loss.check("with all weight on the teacher, T = 1: the mean of KL(teacher ‖ student)")
def soft(t: Trial) -> None:
    given = _draw(t, t.odd(5, 9), t.odd(5, 11))
    _judge(t, given, 1.0, 1.0)
    _judge(t, [given[0].clone(), given[0].clone(), given[2]], 1.0, 1.0)


@distillation_loss.check("at a temperature: both distributions flattened, and T² in front")
def temperature(t: Trial) -> None:
    for heat in (2.0, 0.5, 7.0):
        _judge(t, _draw(t, t.odd(5, 9), t.odd(5, 11)), heat, 1.0)


@distillation_loss.check("both parts, each with its share")
def mixed(t: Trial) -> None:
    for weight in (0.3, 0.8):
        _judge(t, _draw(t, t.odd(5, 9), t.odd(5, 11)), 2.0, weight)


@distillation_loss.check("rows at which nothing is asked count in neither mean")
def masked(t: Trial) -> None:
    _judge(t, _draw(t, t.odd(15, 25), 7, hidden=0.5), 2.0, 0.6)
    given = _draw(t, 5, 7)
    given[2][1:] = IGNORE
    _judge(t, given, 3.0, 1.0)


@distillation_loss.check("logits of some hundred give a finite loss")
def extreme(t: Trial) -> None:
    student, teacher, targets = _draw(t, 6, 9)
    _judge(t, [student * 150, teacher * 150, targets], 1.0, 1.0)


@distillation_loss.check(
    "the gradient goes to the student, w·T·(q − p) in the soft part, and not to the teacher"
)
def gradient(t: Trial) -> None:
    given = _draw(t, t.odd(7, 11), 6, hidden=0.3)
    call = t.perform(*given, 3.0, 0.7, grads=True)
    want = expected(*given, 3.0, 0.7)
    t.close(call.value, want[0], "the loss", rtol=2e-5, atol=2e-6)
    grads = call.grads or (None, None)
    t.holds(grads[0] is not None, "no gradient reaches the student", "tensors all the way: no .item().")
    t.close(grads[0], want[1], "the gradient in the student's logits", rtol=2e-4, atol=2e-6)
    to_teacher = grads[1]
    t.holds(
        to_teacher is None or float(abs(to_teacher).max()) == 0.0,
        "a gradient reaches the teacher",
        "teacher.detach(): it is asked, not trained.",
    )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _logs(student: Any, teacher: Any, T: float) -> tuple[Any, Any]:
    return (teacher.detach() / T).log_softmax(-1), (student / T).log_softmax(-1)


def _kl(log_p: Any, log_q: Any) -> Any:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _soft(student: Any, teacher: Any, targets: Any, T: float) -> Any:
    return _kl(*_logs(student, teacher, T))[targets != IGNORE].mean() * T**2


def _hard(student: Any, targets: Any) -> Any:
    return torch.nn.functional.cross_entropy(student, targets, ignore_index=IGNORE)


@distillation_loss.mistake(
    says="the factor T² is missing: at T = 4 the soft part's gradient is a sixteenth of what it should be",
    tries="temperature ** 2 times the soft part.",
    caught_by="temperature",
)
def no_square(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    soft = _soft(student, teacher, targets, temperature) / temperature**2
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="the factor is T where it should be T²",
    tries="temperature ** 2: one T from each model's logits.",
    caught_by="temperature",
)
def one_factor(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    soft = _soft(student, teacher, targets, temperature) / temperature
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="the two directions are exchanged: this is KL(student ‖ teacher)",
    tries="the teacher's probabilities in front of the difference of the logarithms.",
    caught_by="soft",
)
def exchanged(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    log_p, log_q = _logs(student, teacher, temperature)
    soft = _kl(log_q, log_p)[targets != IGNORE].mean() * temperature**2
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="this is the cross-entropy with the teacher, not KL: the teacher's own entropy is still in it",
    tries="log p − log q in the sum. The gradient is the same, but the loss is not 0 where both agree.",
    caught_by="soft",
)
def cross_entropy(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    log_p, log_q = _logs(student, teacher, temperature)
    soft = -(log_p.exp() * log_q).sum(-1)[targets != IGNORE].mean() * temperature**2
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="only the teacher's logits are divided by the temperature",
    tries="both models at the same temperature: the student is to have the teacher's logits.",
    caught_by="temperature",
)
def one_side(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    log_p, _ = _logs(student, teacher, temperature)
    soft = _kl(log_p, student.log_softmax(-1))[targets != IGNORE].mean() * temperature**2
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="the labels' part is at the temperature too",
    tries="cross-entropy of the logits as they are: labels have no distribution to flatten.",
    caught_by="labels",
)
def hot_labels(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    hard = _hard(student / temperature, targets)
    return weight * _soft(student, teacher, targets, temperature) + (1 - weight) * hard


@distillation_loss.mistake(
    says="rows at which nothing is asked are in the soft part",
    tries="the rows where targets != -100, in both parts.",
    caught_by="masked",
)
def all_rows(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    soft = _kl(*_logs(student, teacher, temperature)).mean() * temperature**2
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="the soft part is a mean over all N·V entries, not over rows (PyTorch's kl_div with its default "
    "reduction does this)",
    tries=".sum(-1) first; or reduction='batchmean' on the asked rows.",
    caught_by="soft",
)
def over_entries(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    soft = _soft(student, teacher, targets, temperature) / student.shape[-1]
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="the shares are exchanged: the labels have the weight",
    tries="weight · soft + (1 − weight) · hard.",
    caught_by="labels",
)
def shares(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    return (1 - weight) * _soft(student, teacher, targets, temperature) + weight * _hard(student, targets)


@distillation_loss.mistake(
    says="the logarithm is taken of a softmax that has become 0",
    tries="log_softmax, which never forms the probability whose logarithm it takes.",
    caught_by="extreme",
)
def log_of_zero(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    p, q = ((x / temperature).softmax(-1) for x in (teacher.detach(), student))
    soft = (p * (p.log() - q.log())).sum(-1)[targets != IGNORE].mean() * temperature**2
    return weight * soft + (1 - weight) * _hard(student, targets)


@distillation_loss.mistake(
    says="the teacher's logits are not detached: the teacher would learn to be like the student",
    tries="teacher.detach().",
    caught_by="gradient",
)
def teacher_learns(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    soft = _kl(log_p, log_q)[targets != IGNORE].mean() * temperature**2
    return weight * soft + (1 - weight) * _hard(student, targets)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@distillation_loss.alternative("the logarithms written out")
def written_out(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    return weight * _soft(student, teacher, targets, temperature) + (1 - weight) * _hard(student, targets)


@distillation_loss.alternative("PyTorch's kl_div on the asked rows")
def kl_div(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    F = torch.nn.functional
    asked = targets != IGNORE
    s, t = student[asked], teacher.detach()[asked]
    log_p, log_q = F.log_softmax(t / temperature, -1), F.log_softmax(s / temperature, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    return weight * soft + (1 - weight) * F.cross_entropy(s, targets[asked])


@distillation_loss.alternative("cross-entropy with the teacher, less the teacher's entropy")
def by_entropy(student: Any, teacher: Any, targets: Any, temperature: float, weight: float) -> Any:
    log_p, log_q = _logs(student, teacher, temperature)
    asked = (targets != IGNORE).float()
    p = log_p.exp()
    soft = ((p * log_p).sum(-1) - (p * log_q).sum(-1)) * asked
    hard = -student.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0] * asked
    return (weight * temperature**2 * soft + (1 - weight) * hard).sum() / asked.sum()
