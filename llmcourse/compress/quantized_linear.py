"""Linear layers that keep their weight as codes, and models made of them.

A weight-only quantized layer computes what F.linear computes with the weights that its codes stand for. Its
gain is in what it reads: at decode a layer's time is the time to read its weight, and a code is 4 or 8 bits
where a bfloat16 is 16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.compress.quantize import Quantized, Scheme, quantize

How = Callable[[str, nn.Linear], "Quantized | nn.Module | None"]


class QuantizedLinear(nn.Module):
    """x [..., K] → [..., N] by a quantized weight [N, K]; the weight is frozen, gradients reach x and bias.

    packed [N, ⌈K·bits/8⌉] uint8, scale [N, G], zero [N, G] or None, bias [N] or None
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, quantized: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.scheme = quantized.scheme
        self.out_features, self.in_features = quantized.shape
        self.register_buffer("packed", quantized.packed())
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("zero", quantized.zero)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def quantized(self) -> Quantized:
        shape = self.out_features, self.in_features
        return Quantized.from_packed(self.packed, self.scale, self.zero, self.scheme, shape)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for [N, K], made anew at each use, in the format of the scales."""
        return self.quantized.dequantize(self.scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized.dequantize(x.dtype), self.bias)


def quantize_model(
    model: nn.Module, how: How | Scheme, skip: Sequence[str] = ("head", "embedding")
) -> nn.Module:
    """A copy of a model whose linear layers are quantized; what is not replaced is shared, not copied.

    how    a Scheme (round to nearest), or how(name, layer) → its Quantized, another module, or None (keep)
    skip   names of layers, and of modules with all their layers, that are kept
    """
    if isinstance(how, Scheme):
        scheme = how
        how = lambda name, layer: quantize(layer.weight, scheme)  # noqa: E731
    shared = {id(p): p for p in (*model.parameters(), *model.buffers())}
    smaller = copy.deepcopy(model, shared)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or any(name == s or name.startswith(s + ".") for s in skip):
            continue
        new = how(name, layer)
        if isinstance(new, Quantized):
            new = QuantizedLinear(new, layer.bias)
        if new is not None:
            parent, _, last = name.rpartition(".")
            setattr(smaller.get_submodule(parent), last, new)
    return smaller
