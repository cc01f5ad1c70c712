"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

A head's D features are D/2 pairs; the pair i of the token at position p is turned by p·θ^(−2i/D).
The dot product of a query and a key then depends on their distance only. Pairs are (i, i + D/2), as
in Hugging Face checkpoints; GGUF's interleaved order is undone when weights are loaded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmcourse.models.config import ModelConfig, RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Radians a pair turns per position, [D/2], float32."""
    freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind == "llama3":
        # Slow pairs (few turns in the original context) are stretched, fast ones kept, and the band
        # between is blended (Llama 3.1 model card).
        turns = scaling.original_max_len * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / scaling.factor
    return freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x [B, H, S, D] by the angles whose cos and sin [B, 1, S, D] are given.

    With the halves a and b of a head, (a, b) becomes (a·cos − b·sin, b·cos + a·sin). Rolling x by half its
    width gives (b, a), and the minus stands in the table: sin is (−sin, sin).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Rope(nn.Module):
    """Tables of cos and sin for positions 0 … T−1, [T, D]; they grow when a longer sequence comes."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, length: int = 256) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.grow(length)

    def grow(self, length: int) -> None:
        """Make the tables at least `length` positions long, on the device and in the type they have.

        They at least double, so that a sequence that grows a token at a time rarely rebuilds them.
        """
        if len(self.cos) >= length:
            return
        length = max(length, 2 * len(self.cos))
        freq = frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), freq)
        # In float32 first: bfloat16 cannot tell positions 256 and 257 apart.
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat((cos, cos), dim=1).to(self.cos.device, self.cos.dtype)
        self.sin = torch.cat((-sin, sin), dim=1).to(self.sin.device, self.sin.dtype)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [B, S], each [B, 1, S, D]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
