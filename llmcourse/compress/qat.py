"""Training with rounding in the loop, and the gradient that rounding does not have.

Post-training methods choose codes for weights that were trained without knowing that they would be rounded.
Quantization-aware training (QAT) goes on training: the forward pass computes with the rounded weights, so the
loss sees what rounding does, and the optimizer moves the weights underneath, kept in full precision.

Rounding is a staircase: its derivative is zero wherever it has one, and by the chain rule nothing would ever
be learned. The *straight-through estimator* (Hinton's lectures of 2012; Bengio et al. 2013, arXiv:1308.3432)
treats rounding as the identity on the way back,

    forward    ŵ = round(w)          backward    ∂L/∂w := ∂L/∂ŵ

which is wrong for one weight at one step, and right on average over the steps in which many weights move: a
weight near the middle between two points of its grid jumps when the loss pushes it for long enough.

The loss here is the distance of the model's predictions from its own before rounding, KL(before ‖ after)
(as in LLM-QAT, Liu et al. 2023, arXiv:2305.17888). Trained on the text's own next tokens, the model would
also learn the text, and a smaller perplexity would show nothing about rounding; this way the best that it
can become is what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmcourse.compress.calibrate import layers_of
from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.models.transformer import Transformer
from llmcourse.train.fit import fit


class StraightThrough(torch.autograd.Function):
    """Forward: the nearest points of the grids of a weight [N, K]. Backward: as if that were the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        return quantize(weight, scheme).dequantize(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Rounded(nn.Module):
    """A parametrization: a layer computes with the rounded weight; the optimizer sees the one underneath."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight, self.scheme)


def insert_rounding(model: Transformer, scheme: Scheme) -> Transformer:
    """Round the weights of all linear layers of the blocks at every use, in place."""
    for layer in layers_of(model).values():
        parametrize.register_parametrization(layer, "weight", Rounded(scheme))
    return model


def remove_rounding(model: Transformer) -> Transformer:
    """Take the rounding out again, in place; the weights underneath stay."""
    for layer in layers_of(model).values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return model


def divergence(teacher: nn.Module, student: nn.Module, tokens: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) in nats over all positions of tokens [B, S]."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(tokens).float(), dim=-1).flatten(0, 1)
    got = F.log_softmax(student(tokens).float(), dim=-1).flatten(0, 1)
    return F.kl_div(got, wanted, log_target=True, reduction="batchmean")


def qat(
    model: Transformer,
    batches: Iterable[Tensor],
    scheme: Scheme,
    *,
    steps: int,
    lr: float = 1e-4,
    teacher: nn.Module | None = None,
    autocast: bool = False,
) -> tuple[Transformer, list[float]]:
    """A copy of the model trained to be rounded to `scheme`, and its loss (nats) at every step.

    batches    tokens [B, S] on the model's device
    teacher    whose predictions are wanted; the model as it is unless given
    autocast   matrix products in bfloat16

    The copy holds the weights underneath: `quantize_model(copy, scheme)` is what was trained. Embedding and
    head are not. Raises ShapeError as `fit` does.
    """
    student = copy.deepcopy(model).requires_grad_(False)
    for layer in layers_of(student).values():
        layer.requires_grad_(True)
    for name, p in student.named_parameters():
        if name.rpartition(".")[0].endswith("norm"):
            p.requires_grad_(True)
    insert_rounding(student, scheme)
    place = nullcontext() if not autocast else torch.autocast(model.device.type, torch.bfloat16)

    def loss(trained: nn.Module, tokens: Tensor) -> Tensor:
        with place:
            return divergence(model if teacher is None else teacher, trained, tokens)

    curve = fit(student, batches, steps=steps, lr=lr, loss=loss, weight_decay=0.0)
    return remove_rounding(student).requires_grad_(False), curve


def pieces(tokens: Tensor, *, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """An endless supply of random pieces [batch, length] of a text [T]."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (batch,), generator=draw)
        yield torch.stack([tokens[s : s + length] for s in starts])
