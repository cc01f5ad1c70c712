"""What a training of this folder gives back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Run(Generic[Model]):
    """A trained model and how it got there.

    loss     at every update
    reward   PPO and GRPO: mean reward of each batch of samples;  DPO: mean margin of each batch of pairs
    kl       PPO and GRPO: nats a sequence from the model it began with, of each batch of samples
    """

    model: Model
    loss: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def frozen(model: Model) -> Model:
    """A copy that stays as it is: the reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def trainable(model: Model) -> Model:
    """A copy that learns, also of a model that was loaded to be run."""
    return copy.deepcopy(model).requires_grad_(True)
