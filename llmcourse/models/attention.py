"""Attention in its multi-head, grouped-query, multi-query and sliding-window forms: one module.

    Hkv = Hq      multi-head (Vaswani et al. 2017, arXiv:1706.03762)
    1 < Hkv < Hq  grouped-query (Ainslie et al. 2023, arXiv:2305.13245): Hq/Hkv queries share a key/value head
    Hkv = 1       multi-query (Shazeer 2019, arXiv:1911.02150)
    window        each query sees the last `window` tokens (Jiang et al. 2023, arXiv:2310.06825) and the sinks

They differ in what must be kept of a token, 2·Hkv·D numbers a layer, and for how long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models.cache import KVState, RollingState
from llmcourse.models.linear import Linear, linear
from llmcourse.models.norm import RMSNorm
from llmcourse.models.rope import rotate
from llmcourse.models.step import Step

if TYPE_CHECKING:
    from llmcourse.models.config import ModelConfig


class Attention(nn.Module):
    """Attention over everything that a pass may see. The Q, K and V projections are one weight, stacked.

    `fused` runs them as one matrix product; otherwise as three, on slices of the same weight.
    """

    state: type[KVState | RollingState] = KVState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim, self.n_kv, self.sizes = config.head_dim, config.n_kv_heads, [q, kv, kv]
        self.qkv = Linear(config.d_model, q + 2 * kv, bias=config.qkv_bias or config.bias)
        self.out = Linear(q, config.d_model, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.fused = True

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        biases = (q + 2 * kv) * (config.qkv_bias or config.bias) + config.d_model * config.bias
        return config.d_model * (2 * q + 2 * kv) + biases + 2 * config.head_dim * config.qk_norm

    @staticmethod
    def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
        return 2 * config.n_kv_heads * config.head_dim * itemsize * tokens

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, E] → queries and keys together [B, Hq + Hkv, S, D], and values [B, Hkv, S, D]."""
        if self.fused:
            heads = self.split_heads(self.qkv(x))
            return heads[:, : -self.n_kv], heads[:, -self.n_kv :]
        weights = self.qkv.weight.split(self.sizes)
        biases = self.qkv.bias.split(self.sizes) if self.qkv.bias is not None else (None, None, None)
        q, k, v = (self.split_heads(linear(x, w, b)) for w, b in zip(weights, biases, strict=True))
        return torch.cat((q, k), dim=1), v

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, H·D] → [B, H, S, D]."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def heads(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, E] → q [B, Hq, S, D] and k, v [B, Hkv, S, D], normed and turned by their positions."""
        qk, v = self.project(x)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : -self.n_kv]), self.k_norm(qk[:, -self.n_kv :])), dim=1)
        if step.cos is not None and step.sin is not None:
            qk = rotate(qk, step.cos, step.sin)  # queries and keys of a position turn by the same angles
        return qk[:, : -self.n_kv], qk[:, -self.n_kv :], v

    def forward(self, x: Tensor, step: Step, state: KVState | RollingState | None) -> Tensor:
        q, k, v = self.heads(x, step)
        if state is not None:
            k, v, step = state.extend(k, v, step)
        return self.out(attend(q, k, v, step).transpose(1, 2).flatten(2))


class WindowAttention(Attention):
    """Attention to the last `config.window` tokens and to the first `config.sinks`, with a rolling cache."""

    state = RollingState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window, self.sinks = config.window, config.sinks

    @staticmethod
    def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
        return Attention.cache_bytes(config, min(tokens, config.window + config.sinks), itemsize)

    def forward(self, x: Tensor, step: Step, state: KVState | RollingState | None) -> Tensor:
        if state is None and step.span > self.window:
            step = step.windowed(self.window, self.sinks)
        return super().forward(x, step, state)


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float | None = None) -> Tensor:
    """q [B, Hq, S, D] over k [B, Hkv, T, D] and v [B, Hkv, T, Dv] → [B, Hq, S, Dv], by PyTorch's kernels.

    scale   of the scores; None: 1/√D
    """
    batch, n_heads, length, dim = q.shape
    if length == 1:
        # One query a head: the Hq/Hkv queries that share a key/value head become the rows of one
        # attention problem, so that keys and values are read once for all of them.
        grouped = q.reshape(batch, k.shape[1], -1, dim)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=step.mask, scale=scale)
        return out.reshape(batch, n_heads, 1, -1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=step.mask, is_causal=step.causal, scale=scale, enable_gqa=n_heads != k.shape[1]
    )
