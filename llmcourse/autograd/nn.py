"""A multilayer perceptron: linear maps with a nonlinearity between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from llmcourse.autograd.mode import no_grad
from llmcourse.autograd.tensor import Tensor


class Linear:
    """x @ weight + bias: x [B, in] gives [B, out].

    The weight [in, out] starts normal with variance 2 / in, which keeps the size of the
    activations from layer to layer when ReLU zeroes half of them (He et al. 2015).
    """

    def __init__(
        self, inputs: int, outputs: int, rng: np.random.Generator, name: str = "", dtype: Any = None
    ):
        dtype = dtype or np.float32
        weight = rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(dtype)
        self.weight = Tensor(weight, requires_grad=True, name=f"W{name}")
        self.bias = Tensor(np.zeros(outputs, dtype), requires_grad=True, name=f"b{name}")

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class MLP:
    """Linear layers of the given sizes, with an activation after each but the last.

    sizes        (64, 32, 10): 64 inputs, one hidden layer of 32, 10 outputs
    activation   a function of one tensor
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Callable[[Tensor], Tensor] = Tensor.relu,
        seed: int = 0,
        dtype: Any = np.float32,
    ) -> None:
        rng = np.random.default_rng(seed)
        pairs = pairwise(sizes)
        self.layers = [Linear(n, m, rng, str(i), dtype) for i, (n, m) in enumerate(pairs, start=1)]
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in (layer.weight, layer.bias)]


def sgd_step(parameters: Iterable[Tensor], lr: float) -> None:
    """Move each parameter against its gradient, in place, and forget the gradient."""
    with no_grad():
        for p in parameters:
            if p.grad is not None:
                p.add_(-lr * p.grad)
                p.grad = None
