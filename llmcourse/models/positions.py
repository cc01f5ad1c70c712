"""Positions added to the embeddings, where attention does not turn its queries and keys by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcourse.models.config import ModelConfig


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of geometrically spaced wavelengths, positions [...] → [..., width], float32.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5: features 2i and 2i + 1 are the sine and cosine of
    p·10000^(−2i/width).
    """
    freq = 10_000.0 ** -(torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions[..., None].float() * freq
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


class Positions(nn.Module):
    """What is added to a token's embedding for its position: learned, sinusoidal, or nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.width = config.position, config.d_model
        self.learned = nn.Embedding(config.max_len, config.d_model) if self.kind == "learned" else None

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """x [B, S, E] with the positions [B, S] added."""
        if self.learned is not None:
            return x + self.learned(position_ids)
        if self.kind == "sinusoidal":
            return x + sinusoids(position_ids, self.width).to(x.dtype)
        return x
