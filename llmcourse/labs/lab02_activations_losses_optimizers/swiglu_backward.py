"""Exercise `swiglu_backward`: what passes a gate on its way back."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

swiglu_backward = Exercise(
    "swiglu_backward",
    title="Backward through a gate",
    arguments=("gate", "up", "grad"),
    shapes=(
        "gate, up  tensors of one shape, what went into y = silu(gate) · up, silu(z) = z · sigmoid(z)",
        "grad      tensor of the same shape: the loss's gradient with respect to y",
        "returns   (d_gate, d_up): its gradients with respect to gate and up, of the same shape",
    ),
    formula="d_up = grad · silu(gate);   d_gate = grad · up · silu′(gate)",
    difficulty=2,
    importance=4,
    minutes=15,
    points=3,
    hints=(
        "silu(z) is a product of z and sigmoid(z). What is the derivative of a product? And what is that of "
        "the sigmoid, in terms of the sigmoid itself?",
        "silu′(z) = σ(z) + z · σ(z) · (1 − σ(z)). Use torch.sigmoid: exp(z) / (1 + exp(z)) is ∞/∞ for z "
        "above 88. Each of the two results has the incoming gradient as a factor, and the other input.",
        "s = torch.sigmoid(gate); d_up = grad * gate * s; d_gate = grad * up * (s + gate * s * (1 - s)); "
        "return d_gate, d_up.",
    ),
)


def expected(gate: Any, up: Any, grad: Any) -> tuple[np.ndarray, np.ndarray]:
    """(d_gate, d_up) in float64; σ(z) = (1 + tanh(z/2)) / 2 overflows nowhere."""
    z, u, g = (x.double().numpy() for x in (gate, up, grad))
    s = (1 + np.tanh(z / 2)) / 2
    return g * u * (s + z * s * (1 - s)), g * z * s


def _inputs(t: Trial, *shape: int, scale: float = 1.0) -> tuple[Any, Any, Any]:
    return tensor(t, *shape, scale=scale), tensor(t, *shape), tensor(t, *shape)


def _call(t: Trial, *inputs: Any) -> tuple[Any, ...]:
    return t.pair(t.call(*inputs), 2, "a pair (d_gate, d_up)")


@swiglu_backward.check("the gradient of up is the gate's output times what comes in")
def values_path(t: Trial) -> None:
    for shape in ((t.odd(3, 9), t.odd(5, 11)), (1, 1), (2, 3, 4)):
        inputs = _inputs(t, *shape)
        t.close(_call(t, *inputs)[1], expected(*inputs)[1], "d_up")


@swiglu_backward.check("the gradient of the gate is up times silu's slope times what comes in")
def gate_path(t: Trial) -> None:
    for shape in ((t.odd(3, 9), t.odd(5, 11)), (7,), (2, 3, 4)):
        inputs = _inputs(t, *shape, scale=2.0)
        t.close(_call(t, *inputs)[0], expected(*inputs)[0], "d_gate")


@swiglu_backward.check("gates far open and far closed, and at zero")
def extreme(t: Trial) -> None:
    gate = torch.tensor([-500.0, -100.0, -20.0, 0.0, 20.0, 100.0, 500.0])
    inputs = gate, tensor(t, 7), tensor(t, 7)
    for name, got, want in zip(("d_gate", "d_up"), _call(t, *inputs), expected(*inputs), strict=True):
        t.close(got, want, name, rtol=1e-5)


@swiglu_backward.check("the inputs stay as they were")
def unchanged(t: Trial) -> None:
    _call(t, *_inputs(t, 3, 5))
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _back(gate: Any, up: Any, grad: Any, slope: Any = None) -> tuple[Any, Any]:
    s = torch.sigmoid(gate)
    slope = s + gate * s * (1 - s) if slope is None else slope
    return grad * up * slope, grad * gate * s


@swiglu_backward.mistake(
    says="the two results are in the wrong order",
    tries="return d_gate, d_up.",
    caught_by="values_path",
)
def exchanged(gate: Any, up: Any, grad: Any) -> Any:
    return _back(gate, up, grad)[::-1]


@swiglu_backward.mistake(
    says="d_up has the gate itself as its factor: what multiplied up was silu(gate)",
    tries="grad * gate * torch.sigmoid(gate).",
    caught_by="values_path",
)
def raw_gate(gate: Any, up: Any, grad: Any) -> Any:
    return _back(gate, up, grad)[0], grad * gate


@swiglu_backward.mistake(
    says="d_up has sigmoid(gate) as its factor, without the gate: that is a GLU, not a SwiGLU",
    tries="grad * gate * torch.sigmoid(gate).",
    caught_by="values_path",
)
def sigmoid_gate(gate: Any, up: Any, grad: Any) -> Any:
    return _back(gate, up, grad)[0], grad * torch.sigmoid(gate)


@swiglu_backward.mistake(
    says="what comes in from above is not used: these are derivatives of y, not of the loss",
    tries="grad as a factor of both results.",
    caught_by="values_path",
)
def no_incoming(gate: Any, up: Any, grad: Any) -> Any:
    return _back(gate, up, torch.ones_like(grad))


@swiglu_backward.mistake(
    says="silu was taken for z alone times the sigmoid's slope: the term with σ(z) itself is missing",
    tries="the product rule: σ(z) + z · σ(z) · (1 − σ(z)).",
    caught_by="gate_path",
)
def half_product_rule(gate: Any, up: Any, grad: Any) -> Any:
    s = torch.sigmoid(gate)
    return _back(gate, up, grad, gate * s * (1 - s))


@swiglu_backward.mistake(
    says="silu's slope was taken to be σ(z): the term z · σ′(z) is missing",
    tries="the product rule: σ(z) + z · σ(z) · (1 − σ(z)).",
    caught_by="gate_path",
)
def gate_as_constant(gate: Any, up: Any, grad: Any) -> Any:
    return _back(gate, up, grad, torch.sigmoid(gate))


@swiglu_backward.mistake(
    says="this is the sigmoid's slope, σ · (1 − σ), not silu's",
    tries="the product rule: σ(z) + z · σ(z) · (1 − σ(z)).",
    caught_by="gate_path",
)
def sigmoid_slope(gate: Any, up: Any, grad: Any) -> Any:
    s = torch.sigmoid(gate)
    return _back(gate, up, grad, s * (1 - s))


@swiglu_backward.mistake(
    says="this is ReLU's slope: 1 where the gate is open, 0 where it is closed",
    tries="silu′(z) = σ(z) + z · σ(z) · (1 − σ(z)).",
    caught_by="gate_path",
)
def relu_slope(gate: Any, up: Any, grad: Any) -> Any:
    return _back(gate, up, grad, (gate > 0).to(gate.dtype))


@swiglu_backward.mistake(
    says="d_gate has no up in it, which multiplied the gate's output",
    tries="grad * up * silu′(gate).",
    caught_by="gate_path",
)
def no_up(gate: Any, up: Any, grad: Any) -> Any:
    return _back(gate, torch.ones_like(up), grad)


@swiglu_backward.mistake(
    says="the sigmoid is exp(z) / (1 + exp(z)), and for a gate far open that is ∞ / ∞",
    tries="torch.sigmoid(gate), or 1 / (1 + exp(−gate)).",
    caught_by="extreme",
)
def overflows(gate: Any, up: Any, grad: Any) -> Any:
    s = gate.exp() / (1 + gate.exp())
    return grad * up * (s + gate * s * (1 - s)), grad * gate * s


@swiglu_backward.mistake(
    says="the results are written over the inputs",
    tries="grad * up * …, new tensors, where you have mul_ or *=.",
    caught_by="unchanged",
)
def in_place(gate: Any, up: Any, grad: Any) -> Any:
    d_gate, d_up = _back(gate, up, grad)
    return up.copy_(d_gate), gate.copy_(d_up)


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@swiglu_backward.alternative("the slope as σ · (1 + z · (1 − σ)), from 1 / (1 + exp(−z))")
def factored(gate: Any, up: Any, grad: Any) -> Any:
    s = 1 / (1 + torch.exp(-gate))
    return [grad * up * s * (1 + gate * (1 - s)), grad * gate * s]


@swiglu_backward.alternative("the slope from silu's own value: silu + σ · (1 − silu)")
def from_output(gate: Any, up: Any, grad: Any) -> Any:
    s, y = torch.sigmoid(gate), torch.nn.functional.silu(gate)
    return grad * up * (y + s * (1 - y)), grad * y


@swiglu_backward.alternative("autograd")
def by_autograd(gate: Any, up: Any, grad: Any) -> Any:
    with torch.enable_grad():
        pair = [x.detach().clone().requires_grad_() for x in (gate, up)]
        return torch.autograd.grad(torch.nn.functional.silu(pair[0]) * pair[1], pair, grad)
