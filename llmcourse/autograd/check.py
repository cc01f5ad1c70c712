"""Gradient check: a backward pass against finite differences, in float64.

The central difference (f(x+h) − f(x−h)) / 2h is wrong by two things. The Taylor series leaves a
truncation error that grows as h²; subtracting two nearly equal numbers leaves a round-off error
that grows as ε/h, with ε = 2.2·10⁻¹⁶ in float64. Their sum is least near h = ε^⅓ ≈ 6·10⁻⁶. In
float32 (ε = 1.2·10⁻⁷) even the best step leaves some ε^⅔ = 2·10⁻⁵, too coarse to tell a slightly
wrong backward from a right one: so the check asks for float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmcourse.autograd.mode import no_grad
from llmcourse.autograd.tensor import Tensor
from llmcourse.errors import CourseError, GraphError

STEP = float(np.finfo(np.float64).eps ** (1 / 3))


class GradientMismatch(CourseError, AssertionError):
    """A backward pass that disagrees with finite differences."""


@dataclass(frozen=True)
class GradReport:
    """elements: derivatives compared; worst: the largest |analytic − numeric| among them."""

    elements: int
    worst: float

    def __str__(self) -> str:
        return f"{self.elements} derivatives agree with finite differences"


def numeric_gradient(f: Callable[[], float], x: np.ndarray, step: float = STEP) -> np.ndarray:
    """df/dx by central differences: two evaluations of `f` for each element of `x`.

    `f` takes no argument and reads `x`, which is changed in place and put back.
    """
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        middle = x[index]
        x[index] = middle + step
        above = f()
        x[index] = middle - step
        below = f()
        x[index] = middle
        gradient[index] = (above - below) / (2 * step)
    return gradient


def gradcheck(
    fn: Callable[..., Tensor],
    *inputs: Tensor,
    step: float = STEP,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    seed: int = 0,
) -> GradReport:
    """Hold the gradients of `fn(*inputs)` against central differences, every element of every input.

    A result that is not a scalar is multiplied with fixed random numbers and summed: if all of
    its derivatives are right, so is that sum's. Inputs that require no gradient are left as they are.

    Raises   GradientMismatch naming the first element that differs by more than atol + rtol·|numeric|,
             GraphError for inputs that are not float64.
    """
    checked = [(i, t) for i, t in enumerate(inputs) if t.requires_grad]
    for i, t in checked:
        if t.dtype != np.float64:
            raise GraphError(
                f"gradcheck: input {i} is {t.dtype}.",
                "Finite differences subtract nearly equal numbers and need the digits of float64.",
                "Tensor(data, dtype=np.float64, requires_grad=True).",
            )
    fresh = [Tensor(np.array(t.data), requires_grad=t.requires_grad, name=t.name) for t in inputs]
    out = fn(*fresh)
    weights = np.random.default_rng(seed).uniform(0.5, 1.5, out.shape)
    out.backward(weights)

    def scalar() -> float:
        with no_grad():
            return float((fn(*fresh).data * weights).sum())

    worst, elements = 0.0, 0
    for i, _ in checked:
        x, analytic = fresh[i].data, fresh[i].grad
        numeric = numeric_gradient(scalar, x, step)
        found = np.zeros_like(x) if analytic is None else analytic
        if not np.allclose(found, numeric, rtol=rtol, atol=atol):
            raise _mismatch(i, found, numeric, rtol, atol)
        elements += x.size
        worst = max(worst, float(np.abs(found - numeric).max(initial=0.0)))
    return GradReport(elements, worst)


def _mismatch(
    i: int, analytic: np.ndarray, numeric: np.ndarray, rtol: float, atol: float
) -> GradientMismatch:
    wrong = ~np.isclose(analytic, numeric, rtol=rtol, atol=atol)
    first = tuple(int(n) for n in np.argwhere(wrong)[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = analytic[wrong] / numeric[wrong]
    why = "Backward and forward do not describe the same function."
    if np.allclose(ratios, ratios[0], rtol=1e-4, atol=0):
        why = f"Every wrong element is {ratios[0]:.4g} times what it should be: a lost or doubled factor."
    return GradientMismatch(
        f"the gradient of input {i} at {first} is {analytic[first]:.6g}, and finite differences give "
        f"{numeric[first]:.6g} ({wrong.sum()} of {wrong.size} elements differ).",
        why,
        "the operations one by one: gradcheck takes any function of tensors.",
    )
