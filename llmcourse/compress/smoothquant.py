"""W8A8: activations in INT8 too, and SmoothQuant, which makes them fit (Xiao et al. 2022).

Weights in 8 bits save bytes; for the product itself to run on integer units, its other operand must be
integers as well. Activations are harder than weights: a few features are tens of times larger than all
others, in every token. One scale for a tensor, or for a token, is then set by them, and what is left for
the other features is a handful of steps.

A scale for each feature would help and cannot be had: it would sit inside the sum over features. But it can
be moved into the weight beforehand (`fold`), and weights can bear it. SmoothQuant shares the difficulty
out:

    s_k = max|x_k|^α / max|W_k|^(1−α)        x_k / s_k,  W_k · s_k

α = 1 makes all features equally large and leaves the whole difficulty to the weights; α = 0 the reverse;
0.5 suits most models.

(arXiv:2211.10438.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.compress.calibrate import Inputs
from llmcourse.compress.fold import Joint, fold_all
from llmcourse.compress.quantize import Quantized, Scheme, quantize
from llmcourse.errors import ShapeError
from llmcourse.models.transformer import Transformer

LARGEST = 127  # symmetric: −128 is left out, as a code without an opposite


def smoothing(absmax: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's scale [K] of each feature, by its largest input [K] and largest weight in [N, K]."""
    if not 0 <= alpha <= 1:
        raise ShapeError(
            f"alpha = {alpha}.",
            "It is the share of the difficulty that moves from the inputs to the weights.",
            "alpha = 0.5.",
        )
    columns = weight.detach().float().abs().amax(0).clamp(min=1e-5)
    return absmax.float().clamp(min=1e-5) ** alpha / columns ** (1 - alpha)


def smoothquant(model: Transformer, inputs: Mapping[str, Inputs], alpha: float = 0.5) -> Transformer:
    """A copy of the model that computes the same, its activations' outliers moved into the weights.

    inputs   `calibrate(model, tokens)`; layers that are not in it are left alone
    """
    smooth = copy.deepcopy(model)

    def scales(joint: Joint) -> Tensor | None:
        if joint.name not in inputs:
            return None
        return smoothing(inputs[joint.name].absmax, joint.layer.weight, alpha)

    fold_all(smooth, scales)
    return smooth


def round_activations(x: Tensor, largest: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] in INT8: codes (integers from −127 to 127, float32) and their scale.

    largest   the magnitude that 127 stands for, fixed beforehand for all tokens (what is beyond is clipped);
              None: each token's own largest, scale [..., 1]
    """
    x = x.float()
    top = x.abs().amax(-1, keepdim=True) if largest is None else torch.as_tensor(largest, device=x.device)
    scale = top.float().clamp(min=1e-12) / LARGEST
    return (x / scale).round().clamp(-LARGEST, LARGEST), scale


class Int8Linear(nn.Module):
    """x [..., K] → [..., N], weight and activations in INT8, summed exactly, and scaled at the end.

    quantized   a weight [N, K] in INT8, symmetric, one scale for a row or for all
    largest     of the inputs, as in `round_activations`

    Here the codes are multiplied in float32, whose sums of integers are exact below 2²⁴; a GPU multiplies
    them as integers (`kernels.quant_matmul`). The values are the same, only the speed is not.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    largest: Tensor | None

    def __init__(
        self, quantized: Quantized, bias: Tensor | None = None, largest: Tensor | float | None = None
    ) -> None:
        super().__init__()
        scheme = quantized.scheme
        if scheme.bits != 8 or not scheme.symmetric or quantized.scale.shape[1] != 1 or scheme.codes != "int":
            raise ShapeError(
                f"a weight in {scheme} came to a product of integers.",
                "A scale that changes along a row would have to be applied inside the sum of integers.",
                "Scheme(8), one scale a row, or Scheme(8, −1).",
            )
        self.out_features, self.in_features = quantized.shape
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer(
            "largest", None if largest is None else torch.as_tensor(largest).detach().clone()
        )

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = round_activations(x, self.largest)
        y = F.linear(codes, self.codes.float()) * (scale * self.scale.float().view(1, -1))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def int8_linear(layer: nn.Linear, inputs: Inputs | None = None) -> Int8Linear:
    """A linear layer in W8A8, one weight scale a row.

    inputs   fix one activation scale for all tokens by the largest input seen; None: one a token, as it comes
    """
    largest = None if inputs is None else inputs.absmax.max()
    return Int8Linear(quantize(layer.weight, Scheme(8)), layer.bias, largest)
