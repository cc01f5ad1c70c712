"""Reductions: sum, mean, max. Backward gives each element back its share of the result's gradient."""

from __future__ import annotations

import math

import numpy as np

from llmcourse.autograd.function import Array, Function, Grads, Shape
from llmcourse.errors import ShapeError

Axis = int | tuple[int, ...] | None


def normalize_axis(axis: Axis, shape: Shape, name: str) -> tuple[int, ...]:
    """Axes as sorted non-negative numbers; None means all of them."""
    ndim = len(shape)
    axes = tuple(range(ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ShapeError(
                f"{name}: shape {shape} has no axis {a}.",
                f"It has {ndim} axes, numbered 0 to {ndim - 1}, or −{ndim} to −1 from the end."
                if ndim
                else "It is a single number and has no axes.",
                "one of those numbers." if ndim else "axis=None.",
            )
    chosen = sorted(a % ndim for a in axes)
    if len(set(chosen)) < len(chosen):
        raise ShapeError(
            f"{name}: axis {axes} names an axis of shape {shape} twice.",
            "Each axis can be reduced once.",
            f"axis={tuple(sorted(set(chosen)))}.",
        )
    return tuple(chosen)


class Reduction(Function):
    """A function of all elements along some axes."""

    def __init__(self, axis: Axis = None, keepdims: bool = False) -> None:
        super().__init__()
        self.axis, self.keepdims = axis, keepdims

    def axes(self) -> tuple[int, ...]:
        return normalize_axis(self.axis, self.shapes[0], self.name)

    def count(self) -> int:
        """How many elements go into one result."""
        return math.prod(self.shapes[0][a] for a in self.axes())

    def spread(self, grad: Array) -> Array:
        """`grad` as a read-only view of the input's shape, each result's gradient repeated."""
        if not self.keepdims:
            grad = np.expand_dims(grad, self.axes())
        return np.broadcast_to(grad, self.shapes[0])


class Sum(Reduction):
    """Saves nothing: every derivative is 1."""

    def forward(self, a: Array) -> Array:
        return a.sum(axis=self.axes(), keepdims=self.keepdims)

    def backward(self, grad: Array) -> Grads:
        return (self.spread(grad),)


class Mean(Reduction):
    """Saves nothing: every derivative is 1 / count."""

    def forward(self, a: Array) -> Array:
        return a.mean(axis=self.axes(), keepdims=self.keepdims)

    def backward(self, grad: Array) -> Grads:
        return (self.spread(grad / self.count()),)


class Max(Reduction):
    """Saves where the maximum was (one int64 for each result); of equal maxima the first is meant."""

    def forward(self, a: Array) -> Array:
        axes = self.axes()
        if self.count() == 0:
            raise ShapeError(
                f"max: shape {a.shape} has no element along axis {self.axis}.",
                "There is no greatest among none.",
                "an axis of at least one element.",
            )
        rows = self._rows(a)
        first = rows.argmax(axis=-1)
        self.save(first)
        best = np.take_along_axis(rows, first[..., None], axis=-1)[..., 0]
        return np.expand_dims(best, axes) if self.keepdims else best

    def backward(self, grad: Array) -> Grads:
        (first,) = self.saved
        axes, shape = self.axes(), self.shapes[0]
        kept = [a for a in range(len(shape)) if a not in axes]
        out = np.zeros([shape[a] for a in kept] + [self.count()], grad.dtype)
        np.put_along_axis(out, first[..., None], grad.reshape(first.shape)[..., None], axis=-1)
        order = kept + list(axes)
        return (out.reshape([shape[a] for a in order]).transpose(np.argsort(order)),)

    def _rows(self, a: Array) -> Array:
        """The reduced axes moved last and joined into one."""
        axes = self.axes()
        kept = [i for i in range(a.ndim) if i not in axes]
        return a.transpose(kept + list(axes)).reshape([a.shape[i] for i in kept] + [self.count()])
