"""QLoRA: the frozen matrix in four bits, the correction beside it in float32 (Dettmers et al. 2023,
arXiv:2305.14314).

A frozen weight has no gradient and no optimizer state, so nothing forbids to store it in four bits. It must
still pass gradients through: dx = dy·W. The product forward is the quantized layer's own; backward
dequantizes the weight again, and forgets it. So what is kept for backward is nothing at all: x is needed
only for the gradient of a weight, and this one has none.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is kept as codes (`compress.quantized_linear.QuantizedLinear`)."""
    return not isinstance(layer, nn.Linear)


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a quantized layer as numbers [M, K]."""
    return cast(Tensor, cast(Any, layer).quantized.dequantize(dtype))


def frozen_product(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), differentiable in x also where the layer's kernel is not."""
    if not is_quantized(layer) or not (torch.is_grad_enabled() and x.requires_grad):
        return cast(Tensor, layer(x))
    return cast(Tensor, _Frozen.apply(x, layer))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return cast(Tensor, layer(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ dense_weight(ctx.layer, grads[0].dtype), None
