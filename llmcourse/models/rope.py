"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

A head's D features are D/2 pairs; the pair i of the token at position p is turned by p·θ^(−2i/D).
The dot product of a query and a key then depends on their distance only. Pairs are (i, i + D/2), as
in Hugging Face checkpoints; GGUF's interleaved order is undone when weights are loaded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmcourse.models.config import ModelConfig
from llmcourse.models.sizes import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Radians a pair turns per position, [D/2], float32."""
    if scaling.kind == "ntk":
        # The slowest pair, θ^(−(D−2)/D), is stretched by the factor: the base takes factor^(D/(D−2)).
        theta *= scaling.factor ** (head_dim / (head_dim - 2))
    freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        keep = _kept(head_dim, theta, scaling, freq)
        return keep * freq + (1 - keep) * freq / scaling.factor
    return freq


def _kept(head_dim: int, theta: float, scaling: RopeScaling, freq: Tensor) -> Tensor:
    """How far each pair keeps its frequency, from 0 (stretched in full) to 1 (not at all), [D/2].

    A pair that turns often within the original context tells neighbours apart and is kept; one that turns
    less than once was never seen at larger angles and is stretched.
    """
    if scaling.kind == "llama3":
        turns = scaling.original_max_len * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return ((turns - low) / (high - low)).clamp(0, 1)

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        return head_dim * math.log(scaling.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (
        max(math.floor(pair(scaling.beta_fast)), 0),
        min(math.ceil(pair(scaling.beta_slow)), head_dim - 1),
    )
    width = max(high - low, 0.001)
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def attention_factor(scaling: RopeScaling) -> float:
    """What cos and sin are multiplied by: YaRN sharpens attention over the longer context, others do not."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpening(scaling.factor, scaling.mscale) / sharpening(scaling.factor, scaling.mscale_all_dim)
    return sharpening(scaling.factor)


def sharpening(factor: float, mscale: float = 1.0) -> float:
    """0.1·mscale·ln(factor) + 1, fitted by YaRN's authors (arXiv:2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x [B, H, S, D] by the angles whose cos and sin [B, 1, S, D] are given.

    With the halves a and b of a head, (a, b) becomes (a·cos − b·sin, b·cos + a·sin). Rolling x by half its
    width gives (b, a), and the minus stands in the table: sin is (−sin, sin).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of [H·D, E] from rotary pairs (2i, 2i+1), as in GGUF and DeepSeek, to pairs (i, i + D/2)."""
    rows, width = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


class Rope(nn.Module):
    """Tables of cos and sin for positions 0 … T−1, [T, D]; they grow when a longer sequence comes."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, length: int = 256) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.worked_out_as = self.cos.dtype
        if config.position == "rope":
            self.grow(length)

    def grow(self, length: int) -> None:
        """Make the tables at least `length` positions long, on the device and in the type they have.

        They at least double, so that a sequence that grows a token at a time rarely rebuilds them. After the
        model changed its type they are worked out anew: numbers rounded to bfloat16 stay so in float32.
        """
        have = len(self.cos)
        if have >= length and self.cos.dtype == self.worked_out_as:
            return
        length = have if have >= length else max(length, 2 * have)
        self.worked_out_as = self.cos.dtype
        scaling = self.config.rope_scaling
        freq = frequencies(self.config.rope_dim, self.config.rope_theta, scaling)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), freq)
        # In float32 first: bfloat16 cannot tell positions 256 and 257 apart.
        factor = attention_factor(scaling)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.cos = torch.cat((cos, cos), dim=1).to(self.cos.device, self.cos.dtype)
        self.sin = torch.cat((-sin, sin), dim=1).to(self.sin.device, self.sin.dtype)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [B, S], each [B, 1, S, D]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
