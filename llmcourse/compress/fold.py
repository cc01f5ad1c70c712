"""Scales that move from a layer's inputs into its weight, without changing what the model computes.

    W x = (W · diag(s)) (diag(1/s) x)

for any positive s [K]. The 1/s costs nothing at run time where what makes x can absorb it: a norm's weight,
or the rows of the linear layer before. SmoothQuant picks s to take outliers out of x; AWQ, to make the
columns of W that matter most stand out of the rounding error. In a pre-norm block there are four such
places:

    qkv       ← the norm before attention
    out       ← the value rows of qkv: attention mixes tokens, never features, so a factor on a value feature
                comes out at the other end. With grouped-query attention several heads of `out` read the same
                value head, and must share its scales
    gate_up   ← the norm before the MLP
    down      ← the up rows of gate_up: down sees silu(gate) · up, in which a factor on up stays a factor
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcourse.models.attention import Attention
from llmcourse.models.mlp import MLP
from llmcourse.models.transformer import Transformer


@dataclass(frozen=True)
class Joint:
    """A linear layer and what makes its inputs.

    name      of the layer
    layer     the layer, with K input features
    source    the weight (and bias) whose output features are the inputs: a norm's [K], or rows of a matrix
    shared    groups of features that must have the same scale [K]: the number of each feature's group; None
              where each feature is its own
    """

    name: str
    layer: nn.Linear
    source: tuple[Tensor, ...]
    shared: Tensor | None = None

    def tie(self, scale: Tensor) -> Tensor:
        """The scales [K] with those that must be equal made so: their geometric mean."""
        if self.shared is None:
            return scale
        groups = int(self.shared.max()) + 1
        total = torch.zeros(groups, dtype=torch.float64, device=scale.device)
        total.index_add_(0, self.shared, scale.double().log())
        return (total / self.shared.bincount()).exp()[self.shared].to(scale.dtype)

    @torch.no_grad()
    def fold(self, scale: Tensor) -> None:
        """Multiply the layer's columns by scale [K] and divide what makes its inputs by it, in place."""
        self.layer.weight.mul_(scale.to(self.layer.weight.dtype))
        made = scale
        if self.shared is not None:  # one of each group: the source makes each shared feature once
            made = scale.new_empty(int(self.shared.max()) + 1).index_copy_(0, self.shared, scale)
        for part in self.source:
            part.div_(made.to(part.dtype).view(-1, *[1] * (part.dim() - 1)))


def joints(model: Transformer) -> list[Joint]:
    """The places of a model, block by block: each block's `down` and `out` before what they fold into.

    That order matters to a method that rounds weights as it goes: `gate_up` and `qkv` change when the
    scales of `down` and `out` move into them.
    """
    return [joint for i, block in enumerate(model.blocks) for joint in _of_block(f"blocks.{i}.", block)]


def _of_block(prefix: str, block: nn.Module) -> list[Joint]:
    if block.post_norm:  # what comes out of a norm is then also the residual stream
        return []
    found = []
    mlp, mixer = block.mlp, block.mixer
    if isinstance(mlp, MLP):
        up = _rows(mlp.gate_up, slice(mlp.down.in_features, None))
        found.append(Joint(f"{prefix}mlp.down", mlp.down, up))
        found.append(Joint(f"{prefix}mlp.gate_up", mlp.gate_up, _all_of(block.mlp_norm)))
    if isinstance(mixer, Attention):
        q, kv, _ = mixer.sizes
        groups = q // kv
        head = torch.arange(q, device=mixer.out.weight.device) // mixer.head_dim
        feature = torch.arange(q, device=head.device) % mixer.head_dim
        shared = head // groups * mixer.head_dim + feature if groups > 1 else None
        found.append(Joint(f"{prefix}mixer.out", mixer.out, _rows(mixer.qkv, slice(q + kv, None)), shared))
        found.append(Joint(f"{prefix}mixer.qkv", mixer.qkv, _all_of(block.mixer_norm)))
    return found


def _all_of(norm: object) -> tuple[Tensor, ...]:
    return tuple(norm.parameters()) if isinstance(norm, nn.Module) else ()


def _rows(layer: nn.Linear, rows: slice) -> tuple[Tensor, ...]:
    """Views of the weight and bias of these outputs."""
    return tuple(p.detach()[rows] for p in (layer.weight, layer.bias) if p is not None)


Scales = Callable[[Joint], Tensor | None]


def fold_all(model: Transformer, scales: Scales) -> None:
    """Fold `scales(joint)` [K] at every place of the model, in place; None leaves a place as it is."""
    for joint in joints(model):
        scale = scales(joint)
        if scale is not None:
            joint.fold(joint.tie(scale))
