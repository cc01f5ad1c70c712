"""KL between two heads' distributions without the logits of more than a few tokens in memory.

Distilling needs logits of teacher and student for every token: at V = 49,152 and 16,384 tokens 3.2 GB each
in float32, and as much again for softmax and gradient. But a token's loss needs its own row alone, and its
gradient with respect to the student's logits is known as soon as the row is:

    ∂ KL(p ‖ q) / ∂z = q − p        ∂ TV(p, q) / ∂z = q·(s − Σ q·s),  s = ½·sign(q − p)

So rows come in pieces: logits are made, turned into loss and gradient, multiplied back into the gradients of
features and head, and forgotten. A teacher need not be asked twice either: its last *features* (576 numbers a
token for the course's model) stand for its 49,152 logits, and can be kept for the whole training text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.compress.distill import DistillationError
from llmcourse.errors import ShapeError

ROWS = 2048
"""Tokens whose logits are in memory at once."""


def linear_kl_gradients(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over N tokens of KL(p ‖ q), and its gradients with respect to x [N, E] and weight [V, E].

    q = softmax(x weightᵀ), p = softmax(teacher_x teacher_weightᵀ); teacher_x [N, E'], teacher_weight [V, E'].
    No tensor has more than rows·V numbers.
    """
    return _gradients(x, weight, teacher_x, teacher_weight, rows, 0.0)


def _gradients(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, rows: int, variation: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    loss = x.new_zeros((), dtype=torch.float32)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        log_q = (x[part] @ weight.T).log_softmax(-1, dtype=torch.float32)
        log_p = (teacher_x[part] @ teacher_weight.T).log_softmax(-1, dtype=torch.float32)
        p, q = log_p.exp(), log_q.exp()
        loss += (1 - variation) * torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
        if variation:
            gradient = q - p
            loss += variation * gradient.abs().sum() / 2
            sign = gradient.sign().mul_(0.5)
            pull = q.mul_(sign.sub_((q * sign).sum(-1, keepdim=True)))
            gradient.mul_(1 - variation).add_(pull, alpha=variation)
        else:
            gradient = q.sub_(p)
        gradient = gradient.mul_(1 / len(x)).to(x.dtype)
        grad_x[part] = gradient @ weight
        grad_weight += gradient.T @ x[part]
    return loss / len(x), grad_x, grad_weight.to(weight.dtype)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        teacher_x: Tensor,
        teacher_weight: Tensor,
        rows: int,
        variation: float,
    ) -> Tensor:
        if variation:
            loss, grad_x, grad_weight = _gradients(x, weight, teacher_x, teacher_weight, rows, variation)
        else:
            loss, grad_x, grad_weight = linear_kl_gradients(x, weight, teacher_x, teacher_weight, rows)
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, None, None, None


def linear_kl(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    rows: int = ROWS,
    variation: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean of (1 − w)·KL(p ‖ q) + w·TV(p, q) over tokens, w = `variation`, differentiable in x and weight.

    x [N, E], weight [V, E]: the student's features and head;  teacher_x [N, E'], teacher_weight [V, E']
    rows     tokens whose logits are in memory at once
    dtype    of the matrix products (None: as the tensors come); softmax and sums are in float32

    Raises ShapeError, DistillationError.
    """
    if x.dim() != 2 or len(x) != len(teacher_x) or len(weight) != len(teacher_weight) or not len(x):
        raise ShapeError(
            f"features {list(x.shape)} and {list(teacher_x.shape)} came with heads {list(weight.shape)} and "
            f"{list(teacher_weight.shape)}.",
            "Student and teacher read the same tokens and speak one vocabulary.",
            "x [N, E] and teacher_x [N, E'], weight [V, E] and teacher_weight [V, E'].",
        )
    if rows < 1 or not 0 <= variation <= 1:
        raise DistillationError(
            f"rows = {rows}, variation = {variation}.",
            "At least one token is looked at, and the two distances share a weight of 1.",
            "rows = 1 or more, variation from 0 to 1.",
        )
    parts = (x, weight, teacher_x.detach(), teacher_weight.detach())
    x, weight, teacher_x, teacher_weight = (t if dtype is None else t.to(dtype) for t in parts)
    device = x.device.type
    with torch.autocast(device, enabled=False):
        return _LinearKL.apply(x, weight, teacher_x, teacher_weight, rows, variation)
