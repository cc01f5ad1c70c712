"""A tower of layers that reads digits: small enough to train a hundred times in a notebook.

What is compared on it is optimizers, so everything else is fixed by a seed: weights, the order of the images,
and the schedule. The images are scikit-learn's, 1,797 of 8 × 8 pixels; the last 389 are held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from llmcourse.errors import MissingPackageError, ShapeError
from llmcourse.train import schedules
from llmcourse.train.fit import one_thread
from llmcourse.train.optim import SGD, decay_groups

TRAINING = 1408


@dataclass(frozen=True)
class DigitsRun:
    """A trained tower: the share of held-out digits that it reads right, its losses, and itself."""

    accuracy: float
    curve: list[float]
    model: nn.Module


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] of pixels from 0 to 1, and what they show [1797]; shuffled once, always alike."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError(
            "scikit-learn is not installed.",
            "The digits come with it, so that nothing has to be downloaded.",
            "pip install scikit-learn.",
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def tower(layers: int, *, width: int = 64, seed: int) -> nn.Sequential:
    """`layers` hidden layers of `width` ReLUs between 64 pixels and 10 classes, PyTorch's first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Linear(width if i else 64, width), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(width, 10))


@one_thread()
def train_digits(
    optimizer: Callable[..., Optimizer],
    *,
    batch: int,
    lr: float,
    seed: int,
    epochs: int = 12,
    layers: int = 4,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
) -> DigitsRun:
    """Train a tower for `epochs` passes over the digits, whatever the batch: a larger one makes fewer steps.

    optimizer   makes one of (groups of parameters, lr=lr)
    warmup      share of the steps in which the learning rate climbs; then it falls along a cosine to 0

    Raises ShapeError when the batch is no number from 1 to 1408.
    """
    if not 1 <= batch <= TRAINING:
        raise ShapeError(
            f"batches of {batch} digits.",
            f"There are {TRAINING} to train on, and a step takes a batch of them.",
            f"batch from 1 to {TRAINING}.",
        )
    x, y = digits()
    model = tower(layers, seed=seed)
    stepper = optimizer(decay_groups(model, weight_decay), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = TRAINING // batch
    steps, curve = epochs * per_epoch, []
    ramp = max(1, int(warmup * steps)) if warmup else 0
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(TRAINING, generator=generator)
        chosen = order[step % per_epoch * batch :][:batch]
        for group in stepper.param_groups:
            group["lr"] = lr * schedules.cosine(step, steps, warmup=ramp)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        curve.append(loss.item())
    with torch.no_grad():
        right = (model(x[TRAINING:]).argmax(1) == y[TRAINING:]).float().mean()
    return DigitsRun(float(right), curve, model)


@one_thread()
def silent_units(
    activation: Callable[[Tensor], Tensor], *, lr: float, seed: int = 0, steps: int = 100
) -> float:
    """The share of 128 hidden units that get no gradient (below 0.001) from any digit, after `steps` of SGD.

    One hidden layer, batches of 64 in order. Such a unit cannot change any more: nothing passes it backward.
    """
    x, y = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(64, 128), nn.Linear(128, 10)
    stepper = SGD([*first.parameters(), *last.parameters()], lr=lr)
    for step in range(steps):
        chosen = torch.arange(step * 64, step * 64 + 64) % TRAINING
        stepper.zero_grad()
        F.cross_entropy(last(activation(first(x[chosen]))), y[chosen]).backward()
        stepper.step()
    z = first(x[:TRAINING]).detach().requires_grad_()
    (passed,) = torch.autograd.grad(activation(z).sum(), z)
    return float((passed.abs().amax(0) < 1e-3).float().mean())
