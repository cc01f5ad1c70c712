"""LLM.int8(): most features in INT8, the few outliers in full precision (Dettmers et al. 2022).

In models of some size a handful of features carry values tens of times larger than the rest. In one scale
with them, everything else would be rounded to a few steps. But they are few: less than one in a hundred. So
the product is taken apart along its features,

    W x = W_O x_O  (16 bits, O: features with an input of 6 or more)  +  W_R x_R  (INT8, all others)

and the INT8 part has a scale for each token and for each output ("vector-wise"). Nothing is folded or fitted.
The price is a second, small product and the gathering of its operands at every call.

The authors look for outliers in each batch; here O is fixed beforehand from a text, so that shapes never
change and only the columns of O need their weights in 16 bits. (arXiv:2208.07339.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.compress.calibrate import Inputs
from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.compress.smoothquant import Int8Linear

THRESHOLD = 6.0


def outliers(inputs: Inputs, threshold: float = THRESHOLD) -> Tensor:
    """The features with an input of `threshold` or more, in order."""
    return (inputs.absmax >= threshold).nonzero().flatten()


class MixedLinear(nn.Module):
    """x [..., K] → [..., N]: columns `features` of the weight as they are, all others in W8A8."""

    features: Tensor
    regular: Tensor

    def __init__(self, layer: nn.Linear, features: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        features = features.to(layer.weight.device)
        keep = torch.ones(self.in_features, dtype=torch.bool, device=features.device)
        keep[features] = False
        self.register_buffer("features", features)
        self.register_buffer("regular", keep.nonzero().flatten())
        self.register_buffer("weight", layer.weight.detach()[:, features].clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.rest = Int8Linear(quantize(layer.weight.detach()[:, keep], Scheme(8))) if keep.any() else None

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x[..., self.features], self.weight.to(x.dtype), self.bias)
        return y if self.rest is None else y + self.rest(x[..., self.regular])


def llm_int8(layer: nn.Linear, inputs: Inputs, threshold: float = THRESHOLD) -> MixedLinear:
    """A linear layer taken apart by the largest inputs that a text gave each of its features."""
    return MixedLinear(layer, outliers(inputs, threshold))
