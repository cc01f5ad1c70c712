"""The training loop: forward, backward, step; the same numbers for the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmcourse.autograd.digits import Digits
from llmcourse.autograd.functional import cross_entropy
from llmcourse.autograd.mode import no_grad
from llmcourse.autograd.nn import MLP, sgd_step
from llmcourse.autograd.tensor import Tensor


@dataclass(frozen=True)
class Epoch:
    """After one pass over the training images: mean loss during it (nats), accuracy on the held-out ones."""

    loss: float
    accuracy: float


def accuracy(model: MLP, x: np.ndarray, y: np.ndarray) -> float:
    """The share of images whose largest logit is that of the right class. Forward only."""
    with no_grad():
        return float((model(Tensor(x)).data.argmax(axis=1) == y).mean())


def fit(
    model: MLP, data: Digits, *, epochs: int, batch: int = 64, lr: float = 0.2, seed: int = 0
) -> list[Epoch]:
    """Train `model` by stochastic gradient descent, in place, and return what happened in each epoch."""
    rng = np.random.default_rng(seed)
    history = []
    for _ in range(epochs):
        order = rng.permutation(len(data.x_train))
        losses = []
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            loss = cross_entropy(model(Tensor(data.x_train[rows])), data.y_train[rows])
            loss.backward()
            sgd_step(model.parameters(), lr)
            losses.append(loss.item())
        history.append(Epoch(float(np.mean(losses)), accuracy(model, data.x_test, data.y_test)))
    return history
