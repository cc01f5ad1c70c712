"""Elementwise operations. What each saves decides what training costs in memory.

A derivative can often be written with the input or with the output. The output is the better thing
to keep: the next operation frequently keeps that same buffer, and then it costs nothing more.
"""

from __future__ import annotations

import numpy as np

from llmcourse.autograd.function import Array, Function, Grads, Shape
from llmcourse.errors import GraphError, ShapeError


def sum_to(grad: Array, shape: Shape) -> Array:
    """The backward of broadcasting: sum `grad` over every axis along which `shape` was repeated.

    One element of the input was copied to many places of the output, so its derivative is the sum
    over those places. grad [..., n, m] and shape [n, 1] give [n, 1].
    """
    added = tuple(range(grad.ndim - len(shape)))
    stretched = tuple(
        i + len(added) for i, n in enumerate(shape) if n == 1 and grad.shape[i + len(added)] != 1
    )
    return grad.sum(axis=added + stretched, keepdims=True).reshape(shape) if added or stretched else grad


def check_broadcast(name: str, a: Shape, b: Shape) -> None:
    """Raise `ShapeError` unless the two shapes broadcast, naming the axis that prevents it."""
    for back, (n, m) in enumerate(zip(a[::-1], b[::-1], strict=False), start=1):
        if n != m and 1 not in (n, m):
            raise ShapeError(
                f"{name}: shapes {a} and {b} do not broadcast (axis -{back} has {n} and {m}).",
                "Shapes are aligned at the last axis; two sizes fit when they are equal or one of them is 1.",
                f"reshape or transpose one of them so that axis -{back} is {n} or 1 in both.",
            )


class Binary(Function):
    """An operation on two broadcast arrays."""

    def broadcast(self, a: Array, b: Array) -> None:
        if a.shape != b.shape:
            check_broadcast(self.name, a.shape, b.shape)

    def sums(self, *grads: Array | None) -> Grads:
        return tuple(None if g is None else sum_to(g, s) for g, s in zip(grads, self.shapes, strict=True))


class Add(Binary):
    """a + b. Saves nothing: both derivatives are 1."""

    def forward(self, a: Array, b: Array) -> Array:
        self.broadcast(a, b)
        return a + b

    def backward(self, grad: Array) -> Grads:
        return self.sums(grad, grad)


class Sub(Binary):
    """a − b. Saves nothing."""

    def forward(self, a: Array, b: Array) -> Array:
        self.broadcast(a, b)
        return a - b

    def backward(self, grad: Array) -> Grads:
        return self.sums(grad, -grad if self.needs[1] else None)


class Mul(Binary):
    """a · b. Saves a if b wants a gradient, and b if a does."""

    def forward(self, a: Array, b: Array) -> Array:
        self.broadcast(a, b)
        self.save(a if self.needs[1] else None, b if self.needs[0] else None)
        return a * b

    def backward(self, grad: Array) -> Grads:
        a, b = self.saved
        return self.sums(grad * b if self.needs[0] else None, grad * a if self.needs[1] else None)


class Div(Binary):
    """a / b. Saves b, and a if b wants a gradient (d/db = −a / b²)."""

    def forward(self, a: Array, b: Array) -> Array:
        self.broadcast(a, b)
        self.save(a if self.needs[1] else None, b)
        return a / b

    def backward(self, grad: Array) -> Grads:
        a, b = self.saved
        down = grad / b
        return self.sums(down if self.needs[0] else None, -down * (a / b) if self.needs[1] else None)


class Neg(Function):
    """−a. Saves nothing."""

    def forward(self, a: Array) -> Array:
        return -a

    def backward(self, grad: Array) -> Grads:
        return (-grad,)


class Pow(Function):
    """aⁿ for a number n. Saves its input: d/da = n·aⁿ⁻¹."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        if not isinstance(exponent, int | float):
            raise GraphError(
                f"the exponent is a {type(exponent).__name__}, not a number.",
                "Pow differentiates with respect to the base only.",
                "(exponent * base.log()).exp() for a positive base.",
            )
        self.exponent = exponent

    def forward(self, a: Array) -> Array:
        self.save(a)
        return a**self.exponent

    def backward(self, grad: Array) -> Grads:
        (a,) = self.saved
        n = self.exponent
        return (np.zeros_like(a) if n == 0 else grad * n * a ** (n - 1),)


class Exp(Function):
    """eᵃ. Saves its output, which is its own derivative."""

    def forward(self, a: Array) -> Array:
        return self.save(np.exp(a))

    def backward(self, grad: Array) -> Grads:
        (y,) = self.saved
        return (grad * y,)


class Log(Function):
    """The natural logarithm. Saves its input: d/da = 1 / a."""

    def forward(self, a: Array) -> Array:
        self.save(a)
        return np.log(a)

    def backward(self, grad: Array) -> Grads:
        (a,) = self.saved
        return (grad / a,)


class Relu(Function):
    """max(a, 0). Saves its output: the gradient passes where it is positive (and at 0 it is 0)."""

    def forward(self, a: Array) -> Array:
        return self.save(np.maximum(a, 0))

    def backward(self, grad: Array) -> Grads:
        (y,) = self.saved
        return (grad * (y > 0),)


class Tanh(Function):
    """tanh a. Saves its output y: d/da = 1 − y²."""

    def forward(self, a: Array) -> Array:
        return self.save(np.tanh(a))

    def backward(self, grad: Array) -> Grads:
        (y,) = self.saved
        return (grad * (1 - y * y),)


class Sigmoid(Function):
    """1 / (1 + e⁻ᵃ). Saves its output y: d/da = y·(1 − y)."""

    def forward(self, a: Array) -> Array:
        small = np.exp(-np.abs(a))  # never overflows, whatever the sign of a
        return self.save(np.where(a >= 0, 1, small) / (1 + small))

    def backward(self, grad: Array) -> Grads:
        (y,) = self.saved
        return (grad * y * (1 - y),)
