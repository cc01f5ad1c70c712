"""Exercise `adamw_step`: one step of the optimizer that trains language models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs import late_torch as torch
from llmcourse.labs.lab02_activations_losses_optimizers.adam_states import (
    ARGUMENTS,
    SHAPES,
    compare,
    first,
    later,
    means,
)

adamw_step = Exercise(
    "adamw_step",
    title="AdamW",
    arguments=ARGUMENTS,
    shapes=(
        *SHAPES,
        "returns  (w, m, v) after the step; the tensors that came in may be written over",
    ),
    formula="m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², w ← w − lr·λ·w − lr·m̂ / (√v̂ + ε), m̂ = m/(1−β₁ᵗ), …",
    difficulty=3,
    importance=5,
    minutes=20,
    points=5,
    hints=(
        "m begins at 0. After one step, which share of g is in it? By what must it be divided to be g again? "
        "And where does the weight decay go, if its size is not to depend on the gradients?",
        "Update m and v first and use the new ones. The corrected means are m / (1 − β₁ᵗ) and v / (1 − β₂ᵗ): "
        "do not store them, return the plain ones. ε is added to the root of the corrected v. The decay "
        "takes lr · λ · w from the weight and never touches g.",
        "m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g * g; w = w * (1 - lr * "
        "weight_decay); w = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps).",
    ),
)


def expected(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, decay: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(w, m, v) in float64 from the paper's algorithm 2, with a schedule multiplier of lr."""
    m, v, m_hat, v_hat = means(g, m, v, t, b1, b2)
    old = w.double().numpy()
    return old - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * old), m, v


def _agree(t: Trial, state: tuple[Any, ...], *settings: Any) -> None:
    compare(t, t.call(*state, *settings), expected(*state, *settings), state[0])


@adamw_step.check("the first step, without decay: a learning rate in every parameter, against the gradient")
def first_step(t: Trial) -> None:
    for shape in ((t.odd(3, 9), t.odd(3, 9)), (1,), (2, 3, 2)):
        _agree(t, first(t, *shape), 1, 0.01, 0.9, 0.999, 1e-15, 0.0)


@adamw_step.check("a later step: both means go on, and their correction is that of step t")
def later_step(t: Trial) -> None:
    for step in (2, t.size(3, 9), 200):
        _agree(t, later(t, t.odd(3, 9), 4), step, 0.02, 0.9, 0.99, 1e-15, 0.0)


@adamw_step.check("ε stands beside the corrected root")
def epsilon(t: Trial) -> None:
    _agree(t, later(t, 5, 3), t.size(2, 5), 0.05, 0.9, 0.99, 0.3, 0.0)
    _agree(t, later(t, 7, scale=1e-6), 3, 0.05, 0.8, 0.95, 1e-6, 0.0)


@adamw_step.check("the decay shrinks weights by lr · λ, whatever their gradients are")
def decay(t: Trial) -> None:
    for scale in (1.0, 1e3, 1e-3):
        _agree(t, later(t, t.odd(3, 9), 3, scale=scale), 4, 0.05, 0.9, 0.99, 1e-8, 0.4)


@adamw_step.check("a gradient of zero leaves no NaN behind")
def idle(t: Trial) -> None:
    w, g, m, v = first(t, 4)
    _agree(t, (w, torch.zeros_like(g), m, v), 1, 0.05, 0.9, 0.99, 1e-8, 0.1)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _means(g: Any, m: Any, v: Any, b1: float, b2: float) -> tuple[Any, Any]:
    return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g


def _move(w: Any, m: Any, v: Any, t: Any, lr: float, b1: float, b2: float, eps: float, decay: float) -> Any:
    direction = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    return w - lr * direction - lr * decay * w


@adamw_step.mistake(
    says="the means are not corrected for having begun at 0: the first steps are too long",
    tries="m / (1 − β₁ᵗ) and v / (1 − β₂ᵗ) in the step.",
    caught_by="first_step",
)
def uncorrected(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return w - lr * m / (v.sqrt() + eps) - lr * d * w, m, v


@adamw_step.mistake(
    says="the step is uphill: with the gradient, not against it",
    tries="w − lr · ….",
    caught_by="first_step",
)
def uphill(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, -m, v, t, lr, b1, b2, eps, d), m, v


@adamw_step.mistake(
    says="v is a mean of g, not of g²",
    tries="beta2 * v + (1 - beta2) * g * g.",
    caught_by="first_step",
)
def not_squared(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.abs()
    return _move(w, m, v, t, lr, b1, b2, eps, d), m, v


@adamw_step.mistake(
    says="no root is taken of v: the step shrinks as gradients grow",
    tries="v̂.sqrt() + eps.",
    caught_by="first_step",
)
def no_root(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, m, v * v / (1 - b2**t), t, lr, b1, b2, eps, d), m, v


@adamw_step.mistake(
    says="the corrected means are returned, and corrected again in the next step",
    tries="returning m and v as they are before the correction.",
    caught_by="first_step",
)
def corrected_kept(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, m, v, t, lr, b1, b2, eps, d), m / (1 - b1**t), v / (1 - b2**t)


@adamw_step.mistake(
    says="the old means come back, and every step is a first one",
    tries="returning the new m and v.",
    caught_by="first_step",
)
def old_returned(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    new = _means(g, m, v, b1, b2)
    return _move(w, *new, t, lr, b1, b2, eps, d), m, v


@adamw_step.mistake(
    says="β₁ and β₂ have changed places",
    tries="β₁ for m, β₂ for v.",
    caught_by="first_step",
)
def betas_exchanged(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b2, b1)
    return _move(w, m, v, t, lr, b2, b1, eps, d), m, v


@adamw_step.mistake(
    says="g has the share β and the mean 1 − β: hardly anything is remembered",
    tries="β · m + (1 − β) · g.",
    caught_by="first_step",
)
def shares_exchanged(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = (1 - b1) * m + b1 * g, (1 - b2) * v + b2 * g * g
    return _move(w, m, v, t, lr, b1, b2, eps, d), m, v


@adamw_step.mistake(
    says="t is taken to count from 0: the correction is that of the step after",
    tries="β ** t with t as it comes: 1 in the first step.",
    caught_by="first_step",
)
def one_too_many(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, m, v, t + 1, lr, b1, b2, eps, d), m, v


@adamw_step.mistake(
    says="the correction is 1 − β in every step, as if each were the first",
    tries="1 − β ** t.",
    caught_by="later_step",
)
def always_first(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, m, v, 1, lr, b1, b2, eps, d), m, v


@adamw_step.mistake(
    says="the step uses the means as they were before this gradient",
    tries="updating m and v first.",
    caught_by="first_step",
)
def stale(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    return _move(w, m, v, t, lr, b1, b2, eps, d), *_means(g, m, v, b1, b2)


@adamw_step.mistake(
    says="ε is added under the root",
    tries="v̂.sqrt() + eps.",
    caught_by="epsilon",
)
def under_the_root(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    step = (m / (1 - b1**t)) / (v / (1 - b2**t) + eps).sqrt()
    return w - lr * step - lr * d * w, m, v


@adamw_step.mistake(
    says="ε is added before the correction, which then makes it larger",
    tries="(v / (1 - beta2**t)).sqrt() + eps.",
    caught_by="epsilon",
)
def epsilon_corrected(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    step = (m / (1 - b1**t)) * math.sqrt(1 - b2**t) / (v.sqrt() + eps)
    return w - lr * step - lr * d * w, m, v


@adamw_step.mistake(
    says="the decay is added to the gradient: that is Adam with L2, and √v divides it too",
    tries="w · (1 − lr · λ), and g as it comes.",
    caught_by="decay",
)
def l2(w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float) -> Any:
    m, v = _means(g + d * w, m, v, b1, b2)
    return _move(w, m, v, t, lr, b1, b2, eps, 0.0), m, v


@adamw_step.mistake(
    says="the decay is λ · w, without the learning rate",
    tries="lr · λ · w: a schedule then slows the decay as well.",
    caught_by="decay",
)
def decay_without_rate(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, m, v, t, lr, b1, b2, eps, d / lr), m, v


@adamw_step.mistake(
    says="nothing decays",
    tries="w · (1 − lr · λ).",
    caught_by="decay",
)
def no_decay(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, m, v, t, lr, b1, b2, eps, 0.0), m, v


@adamw_step.mistake(
    says="the weight is multiplied by lr · λ, not made smaller by that share",
    tries="w · (1 − lr · λ).",
    caught_by="first_step",
)
def shrunk_to_nothing(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w * lr * d, m, v, t, lr, b1, b2, eps, 0.0), m, v


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@adamw_step.alternative("as the formula says")
def plain(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = _means(g, m, v, b1, b2)
    return _move(w, m, v, t, lr, b1, b2, eps, d), m, v


@adamw_step.alternative("in place, the corrections moved into the learning rate and the root")
def in_place(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    w.mul_(1 - lr * d)
    w.addcdiv_(m, v.sqrt() / math.sqrt(1 - b2**t) + eps, value=-lr / (1 - b1**t))
    return w, m, v


@adamw_step.alternative("the means moved towards the gradient, in a list")
def towards(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m, v = m + (g - m) * (1 - b1), v + (g.square() - v) * (1 - b2)
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    return [w - lr * (m_hat / (torch.sqrt(v_hat) + eps) + d * w), m, v]
