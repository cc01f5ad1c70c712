"""What the checks of `adamw_step` and `lamb_step` share: states in the middle of a training."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

ARGUMENTS = ("w", "g", "m", "v", "t", "lr", "beta1", "beta2", "eps", "weight_decay")
SHAPES = (
    "w, g     float32 tensors of one shape: a parameter and its gradient",
    "m, v     float32 tensors of that shape: running means of g and g² over the steps before; 0 at first",
    "t        integer from 1: the number of this step, after which the means hold t gradients",
    "lr, beta1, beta2, eps, weight_decay  floats",
)


def first(t: Trial, *shape: int, scale: float = 1.0) -> tuple[Any, ...]:
    """(w, g, m, v) before the first step."""
    w, g = tensor(t, *shape), tensor(t, *shape, scale=scale)
    return w, g, torch.zeros_like(w), torch.zeros_like(w)


def later(t: Trial, *shape: int, scale: float = 1.0) -> tuple[Any, ...]:
    """(w, g, m, v) after some steps: means that gradients of this size could have."""
    w, g, m = (tensor(t, *shape, scale=s) for s in (1.0, scale, 0.3 * scale))
    return w, g, m, (tensor(t, *shape, scale=scale) ** 2 * 0.5).clone()


def means(
    g: Any, m: Any, v: Any, t: int, beta1: float, beta2: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """m and v after this step, and both corrected for having begun at 0; float64."""
    g, m, v = (x.double().numpy() for x in (g, m, v))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return m, v, m / (1 - beta1**t), v / (1 - beta2**t)


def compare(t: Trial, got: Any, want: tuple[np.ndarray, ...], w: Any) -> None:
    """The weight by what it moved, which is little beside itself; the means as they are."""
    w_new, m, v = t.pair(got, 3, "(w, m, v)")
    for name, value in (("w", w_new), ("m", m), ("v", v)):
        t.equal(list(getattr(value, "shape", ())), list(w.shape), f"shape of {name}")
    moved = float(np.abs(want[0] - w.double().numpy()).max())
    t.close(w_new, want[0], "w", rtol=1e-6, atol=1e-4 * moved + 3e-7 * float(w.abs().max()))
    t.close(m, want[1], "m")
    t.close(v, want[2], "v")
