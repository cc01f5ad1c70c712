"""Operations written as functions: those of several tensors, and those with targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmcourse.autograd.ops.shape import Concat, Stack
from llmcourse.autograd.ops.softmax import CrossEntropy
from llmcourse.autograd.tensor import Tensor, apply
from llmcourse.errors import ShapeError


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors one after another along an existing axis; all other sizes must be equal."""
    return apply(Concat(axis), *_some(tensors, "concat"))


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape as the slices of a new axis."""
    return apply(Stack(axis), *_some(tensors, "stack"))


def cross_entropy(logits: Tensor, targets: Any) -> Tensor:
    """Mean of −log softmax(logits)[target] over the rows: logits [B, C], targets [B] integers; in nats."""
    return apply(CrossEntropy(targets.data if isinstance(targets, Tensor) else np.asarray(targets)), logits)


def _some(tensors: Sequence[Tensor], name: str) -> Sequence[Tensor]:
    if not tensors:
        raise ShapeError(f"{name} of no tensors.", "The result would have no shape.", "at least one tensor.")
    return tensors
