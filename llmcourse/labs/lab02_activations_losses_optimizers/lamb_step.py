"""Exercise `lamb_step`: AdamW's direction, as long as the layer's weights allow."""

from __future__ import annotations

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

lamb_step = Exercise(
    "lamb_step",
    title="LAMB",
    arguments=ARGUMENTS,
    shapes=(
        *SHAPES,
        "returns  (w, m, v) after the step; the tensors that came in may be written over",
        "norms    ‖·‖ is the root of the sum of squares over the whole tensor: one ratio for a layer",
        "zero     where ‖w‖ or ‖u‖ is 0, the ratio is 1",
    ),
    formula="u = m̂ / (√v̂ + ε) + λ·w;   w ← w − lr · (‖w‖ / ‖u‖) · u;   m, v, m̂, v̂ as in AdamW",
    difficulty=3,
    importance=4,
    minutes=20,
    points=5,
    hints=(
        "How long is the step, compared with the weights, once u has been divided by its own length? What "
        "would happen to a bias that is still 0, if its step were as long as it is?",
        "Everything up to m̂ / (√v̂ + ε) is AdamW's. Here the decay λ·w belongs to u, before its norm is "
        "taken. Both norms are over the whole tensor: one number each. Replace the ratio by 1 where either "
        "norm is 0.",
        "u = m_hat / (v_hat.sqrt() + eps) + weight_decay * w; size, length = w.norm(), u.norm(); ratio = "
        "size / length if size > 0 and length > 0 else 1.0; return w - lr * ratio * u, m, v.",
    ),
)


def expected(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, decay: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(w, m, v) in float64, You et al. 2020, algorithm 2, φ(z) = z."""
    m, v, m_hat, v_hat = means(g, m, v, t, b1, b2)
    old = w.double().numpy()
    u = m_hat / (np.sqrt(v_hat) + eps) + decay * old
    size, length = np.sqrt((old**2).sum()), np.sqrt((u**2).sum())
    ratio = size / length if size > 0 and length > 0 else 1.0
    return old - lr * ratio * u, m, v


def _agree(t: Trial, state: tuple[Any, ...], *settings: Any) -> None:
    compare(t, t.call(*state, *settings), expected(*state, *settings), state[0])


@lamb_step.check("a step is lr times as long as the weights, in AdamW's direction")
def direction(t: Trial) -> None:
    for size in (0.02, 1.0, 50.0):
        w, g, m, v = later(t, t.odd(3, 9), 5)
        _agree(t, (w * size, g, m, v), t.size(2, 6), 0.02, 0.9, 0.99, 1e-6, 0.0)


@lamb_step.check("the first step: its direction is the gradients' signs")
def first_step(t: Trial) -> None:
    for shape in ((t.odd(3, 9), 4), (2, 3, 2), (7,)):
        _agree(t, first(t, *shape, scale=100.0), 1, 0.02, 0.9, 0.999, 1e-6, 0.0)


@lamb_step.check("the decay is part of the direction that is measured")
def decay(t: Trial) -> None:
    for size in (5.0, 0.2):
        w, g, m, v = later(t, 4, t.odd(3, 9))
        _agree(t, (w * size, g, m, v), 5, 0.03, 0.9, 0.99, 1e-6, 0.3)


@lamb_step.check("weights that are 0 move, by lr times the direction")
def zero_weights(t: Trial) -> None:
    w, g, m, v = later(t, t.odd(3, 9))
    _agree(t, (torch.zeros_like(w), g, m, v), 3, 0.02, 0.9, 0.99, 1e-6, 0.1)


@lamb_step.check("a direction of 0 leaves the weights where they are")
def zero_direction(t: Trial) -> None:
    w, g, m, v = first(t, 3, 2)
    _agree(t, (w, torch.zeros_like(g), m, v), 1, 0.02, 0.9, 0.99, 1e-6, 0.0)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _adam(g: Any, m: Any, v: Any, t: int, b1: float, b2: float, eps: float) -> tuple[Any, Any, Any]:
    """(direction, m, v)."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps), m, v


def _ratio(size: Any, length: Any) -> Any:
    safe = torch.where(length > 0, length, 1.0)
    return torch.where((size > 0) & (length > 0), size / safe, 1.0)


@lamb_step.mistake(
    says="there is no trust ratio: this is AdamW",
    tries="a factor ‖w‖ / ‖u‖.",
    caught_by="direction",
)
def adamw(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    return w - lr * (r + d * w), m, v


@lamb_step.mistake(
    says="the ratio is upside down, ‖u‖ / ‖w‖",
    tries="‖w‖ / ‖u‖: large weights may move far.",
    caught_by="direction",
)
def upside_down(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * _ratio(u.norm(), w.norm()) * u, m, v


@lamb_step.mistake(
    says="the weights' length is divided by that of the gradient, as in LARS, not of the step",
    tries="‖u‖ as the divisor.",
    caught_by="direction",
)
def lars(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * _ratio(w.norm(), g.norm()) * u, m, v


@lamb_step.mistake(
    says="the step is divided by ‖u‖ and not made as long as the weights",
    tries="‖w‖ as a factor.",
    caught_by="direction",
)
def unit_steps(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * _ratio(torch.ones(()), u.norm()) * u, m, v


@lamb_step.mistake(
    says="norms are taken of each row: a ratio for every row, not one for the layer",
    tries="w.norm() and u.norm(), without dim.",
    caught_by="direction",
)
def by_rows(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * _ratio(w.norm(dim=-1, keepdim=True), u.norm(dim=-1, keepdim=True)) * u, m, v


@lamb_step.mistake(
    says="lengths are sums of magnitudes, not roots of sums of squares",
    tries="w.norm(), or w.square().sum().sqrt().",
    caught_by="direction",
)
def l1(w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * _ratio(w.abs().sum(), u.abs().sum()) * u, m, v


@lamb_step.mistake(
    says="squares of the norms are divided: a root is missing",
    tries="w.norm(), or w.square().sum().sqrt().",
    caught_by="direction",
)
def squares(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * _ratio(w.square().sum(), u.square().sum()) * u, m, v


@lamb_step.mistake(
    says="the ratio is never above 1: layers with large weights are held back",
    tries="‖w‖ / ‖u‖ as it is.",
    caught_by="direction",
)
def at_most_one(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * _ratio(w.norm(), u.norm()).clamp_max(1.0) * u, m, v


@lamb_step.mistake(
    says="the direction is the mean gradient, without √v: large gradients drown the small ones",
    tries="m̂ / (√v̂ + ε).",
    caught_by="direction",
)
def no_variance(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    _, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = m / (1 - b1**t) + d * w
    return w - lr * _ratio(w.norm(), u.norm()) * u, m, v


@lamb_step.mistake(
    says="weights decay beside the ratio, as in AdamW: the step is longer than lr · ‖w‖",
    tries="u = m̂ / (√v̂ + ε) + λ · w, and then its norm.",
    caught_by="decay",
)
def decay_beside(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    return w - lr * _ratio(w.norm(), r.norm()) * r - lr * d * w, m, v


@lamb_step.mistake(
    says="the norm is taken before the decay is added",
    tries="u = m̂ / (√v̂ + ε) + λ · w, and then its norm.",
    caught_by="decay",
)
def norm_too_early(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    return w - lr * _ratio(w.norm(), r.norm()) * (r + d * w), m, v


@lamb_step.mistake(
    says="nothing decays",
    tries="u = m̂ / (√v̂ + ε) + λ · w.",
    caught_by="decay",
)
def no_decay(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    return w - lr * _ratio(w.norm(), r.norm()) * r, m, v


@lamb_step.mistake(
    says="the decay is added to the gradient, before the means",
    tries="u = m̂ / (√v̂ + ε) + λ · w, and g as it comes.",
    caught_by="decay",
)
def l2(w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float) -> Any:
    r, m, v = _adam(g + d * w, m, v, t, b1, b2, eps)
    return w - lr * _ratio(w.norm(), r.norm()) * r, m, v


@lamb_step.mistake(
    says="weights of length 0 get steps of length 0, and a bias never leaves 0",
    tries="a ratio of 1 where ‖w‖ is 0.",
    caught_by="zero_weights",
)
def stuck_at_zero(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    return w - lr * w.norm() / (u.norm() + 1e-12) * u, m, v


@lamb_step.mistake(
    says="a direction of length 0 is divided by its length, which is NaN",
    tries="a ratio of 1 where ‖u‖ is 0.",
    caught_by="zero_direction",
)
def zero_by_zero(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    ratio = w.norm() / u.norm() if w.norm() > 0 else 1.0
    return w - lr * ratio * u, m, v


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@lamb_step.alternative("plain numbers for the norms")
def by_numbers(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    r, m, v = _adam(g, m, v, t, b1, b2, eps)
    u = r + d * w
    size, length = w.norm().item(), u.norm().item()
    return w - lr * (size / length if size and length else 1.0) * u, m, v


@lamb_step.alternative("in place, without waiting for the norms")
def in_place(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, b1: float, b2: float, eps: float, d: float
) -> Any:
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    u = m.div(1 - b1**t).div_(v.div(1 - b2**t).sqrt_().add_(eps)).add_(w, alpha=d)
    ratio = torch.nan_to_num(w.norm() / u.norm(), nan=1.0, posinf=1.0)
    w.sub_(lr * torch.where(ratio > 0, ratio, 1.0) * u)
    return [w, m, v]
