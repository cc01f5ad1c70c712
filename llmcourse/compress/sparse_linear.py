"""Linear layers that keep a 2:4 weight packed, and multiply by what is kept.

    prune(model, "sparsegpt", Pattern(n=2, m=4), tokens)
    pack_model(model)                  9/16 of the layers' bytes in 16 bits; on a GPU decoding reads no more

With few rows of x (decoding) the packed kernels multiply; with many, waiting for weights is no longer what
takes time, and the weight is unpacked for a dense product, on its way, by each call.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.compress.calibrate import layers_of
from llmcourse.kernels import sparse24

FEW = 64  # rows up to which the packed kernels are meant


class Sparse24Linear(nn.Module):
    """`nn.Linear` with a packed 2:4 weight [N, K]; no gradient reaches it.

    Raises   ShapeError for a weight that is not 2:4.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        packed = sparse24.pack24(layer.weight.detach())
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("values", packed.values)
        self.register_buffer("indices", packed.indices)
        self.bias = layer.bias
        self.values: Tensor
        self.indices: Tensor

    @property
    def packed(self) -> sparse24.Sparse24:
        return sparse24.Sparse24(self.values, self.indices, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        if x.numel() > FEW * self.in_features:
            return F.linear(x, self.packed.dense(), self.bias)
        y = sparse24.sparse24_linear(x, self.packed)
        return y if self.bias is None else y + self.bias


def pack_model(model: nn.Module) -> tuple[int, int]:
    """Put packed layers in the place of all linear layers of a model's blocks; (bytes before, bytes after).

    Raises   ShapeError for a layer whose weight is not 2:4; the model is then left as it was.
    """
    layers = layers_of(model)
    packed = {name: Sparse24Linear(layer) for name, layer in layers.items()}
    before = sum(layer.weight.nbytes for layer in layers.values())
    for name, layer in packed.items():
        model.set_submodule(name, layer)
    return before, sum(layer.packed.nbytes for layer in packed.values())
