"""The feed-forward part of a block: each token on its own, through a wider layer and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models.config import ModelConfig
from llmcourse.models.linear import Linear, linear


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202); gate and up stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fused or self.gate_up.bias is not None:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
        else:
            gate, up = (linear(x, w) for w in self.gate_up.weight.chunk(2))
        return self.down(F.silu(gate) * up)


class PlainMLP(nn.Module):
    """down(f(up(x))), f being GELU or ReLU: the feed-forward part of the first transformers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = F.gelu if config.mlp == "gelu" else F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def mlp(config: ModelConfig) -> MLP | PlainMLP:
    """The feed-forward part that the configuration asks for."""
    return MLP(config) if config.mlp == "swiglu" else PlainMLP(config)
