"""Softmax and cross-entropy, fused so that they are stable and keep one array.

For logits z [B, C] and p = softmax(z), the loss of a row with target t is −log p[t], and its
derivative with respect to the row's logits is p − onehot(t): the exponential and the logarithm
cancel. Composed from separate operations the same gradient divides by p[t], which may be 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.autograd.function import Array, Function, Grads
from llmcourse.autograd.ops.reduce import normalize_axis
from llmcourse.errors import ShapeError


def log_softmax(z: Array, axis: int) -> Array:
    """z − log Σ exp z, with the maximum taken out first: the largest exponent is then 0."""
    z = z - z.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


class AlongAxis(Function):
    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis

    def check_axis(self, a: Array) -> None:
        normalize_axis(self.axis, a.shape, self.name)


class Softmax(AlongAxis):
    """exp z / Σ exp z along an axis. Saves its output p: dz = p · (g − Σ g·p)."""

    def forward(self, z: Array) -> Array:
        self.check_axis(z)
        return self.save(np.exp(log_softmax(z, self.axis)))

    def backward(self, grad: Array) -> Grads:
        (p,) = self.saved
        return (p * (grad - (grad * p).sum(axis=self.axis, keepdims=True)),)


class LogSoftmax(AlongAxis):
    """log softmax along an axis. Saves its output y: dz = g − exp(y) · Σ g."""

    def forward(self, z: Array) -> Array:
        self.check_axis(z)
        return self.save(log_softmax(z, self.axis))

    def backward(self, grad: Array) -> Grads:
        (y,) = self.saved
        return (grad - np.exp(y) * grad.sum(axis=self.axis, keepdims=True),)


class CrossEntropy(Function):
    """Mean over rows of −log softmax(z)[target]. Saves the probabilities and the targets.

    Shapes   logits [B, C] and targets [B] (integers in 0 … C−1); returns a single number.
    Saves    B·C·itemsize bytes of probabilities and the targets' B integers.
    """

    def __init__(self, targets: Array) -> None:
        super().__init__()
        self.targets: Any = np.asarray(targets)

    def forward(self, z: Array) -> Array:
        targets, self.targets = self.targets, None  # from here on, kept through `save` or not at all
        self._check(z, targets)
        rows = np.arange(len(z))
        logp = log_softmax(z, axis=-1)
        loss = -logp[rows, targets].mean()
        self.save(np.exp(logp, out=logp))
        self.save(targets, role="input")
        return loss

    def backward(self, grad: Array) -> Grads:
        p, targets = self.saved
        dz = p.copy()
        dz[np.arange(len(p)), targets] -= 1
        return (dz * (grad / len(p)),)

    def _check(self, z: Array, targets: Array) -> None:
        if z.ndim != 2 or targets.shape != z.shape[:1]:
            raise ShapeError(
                f"cross_entropy: logits of shape {z.shape} and targets of shape {targets.shape}.",
                "It takes one row of logits [B, C] and one class number [B] for each example.",
                "logits.reshape(-1, C) and targets.reshape(-1)."
                if z.ndim > 2
                else "logits [B, C], targets [B].",
            )
        if not np.issubdtype(targets.dtype, np.integer):
            raise ShapeError(
                f"cross_entropy: targets are {targets.dtype}, not integers.",
                "A target is the number of the right class.",
                "targets.argmax(-1) if they are one-hot rows, targets.astype(int) if they are class numbers.",
            )
        if len(targets) == 0 or targets.min() < 0 or targets.max() >= z.shape[1]:
            seen = f"from {targets.min()} to {targets.max()}" if len(targets) else "missing"
            raise ShapeError(
                f"cross_entropy: targets are {seen}, for {z.shape[1]} classes.",
                f"Classes are numbered 0 to {z.shape[1] - 1}, and a mean needs at least one row.",
                "targets in that range; check whether yours count from 1.",
            )
