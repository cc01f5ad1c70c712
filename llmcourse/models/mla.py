"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437).

All heads' keys and values are made from one narrow latent c of the token, and only c is kept, with one
rotary key shared by all heads:

    c = norm(W_DKV x)      k_h = [W_UK,h c ; k_R]      v_h = W_UV,h c      q_h = [q_N,h ; rope(q_R,h)]

*Expanded*, keys and values are made for every head and attention is the usual one: right for many queries
at once. *Absorbed*, W_UK moves to the query's side, since q_N·(W_UK c) = (W_UKᵀ q_N)·c, and W_UV behind the
weighted sum: every head then attends to the same kv_rank + rope_dim numbers of a token, as in multi-query
attention, and nothing is made per head and token. Right for decoding, where reading the cache is the cost.
The rotation cannot be absorbed, for it stands between the two matrices; hence the separate rotary part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcourse.models.attention import attend
from llmcourse.models.linear import Linear
from llmcourse.models.norm import RMSNorm
from llmcourse.models.rope import rotate, sharpening
from llmcourse.models.sizes import LatentSizes
from llmcourse.models.state import Shapes, State
from llmcourse.models.step import Step

if TYPE_CHECKING:
    from llmcourse.models.config import ModelConfig


class LatentState(State):
    """The latent and the rotary key of every token: latent [B, T, kv_rank + rope_dim]."""

    latent: Tensor

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        sizes = latent_sizes(config)
        return {"latent": ((max_len, sizes.kv_rank + sizes.rope_dim), dtype)}

    def extend(self, latent: Tensor, step: Step) -> Tensor:
        """Store what is kept of a pass's tokens [B, S, kv_rank + rope_dim]; return all that it looks at."""
        if step.start is None:
            index = step.positions.view(-1, 1, 1).expand_as(latent)
            self.latent.scatter_(1, index, latent)
            return self.latent[:, : step.span]
        end = step.start + latent.shape[1]
        self.latent[:, step.start : end] = latent
        return self.latent[:, :end]


class LatentAttention(nn.Module):
    """MLA. `absorb`: True or False to take one form always; None: absorbed for a single cached token."""

    state = LatentState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sizes = sizes = latent_sizes(config)
        self.n_heads = config.n_heads
        queries = config.n_heads * sizes.qk_dim
        if sizes.q_rank:
            self.q_down = Linear(config.d_model, sizes.q_rank, bias=config.bias)
            self.q_norm = RMSNorm(sizes.q_rank, 1e-6)
        self.q_up = Linear(sizes.q_rank or config.d_model, queries, bias=False)
        self.kv_down = Linear(config.d_model, sizes.kv_rank + sizes.rope_dim, bias=config.bias)
        self.kv_norm = RMSNorm(sizes.kv_rank, 1e-6)
        self.kv_up = Linear(sizes.kv_rank, config.n_heads * (sizes.nope_dim + sizes.v_dim), bias=False)
        self.out = Linear(config.n_heads * sizes.v_dim, config.d_model, bias=config.bias)
        scaling = config.rope_scaling
        self.scale = sizes.qk_dim**-0.5 * sharpening(scaling.factor, scaling.mscale_all_dim) ** 2
        self.absorb: bool | None = None

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        s, width, heads = latent_sizes(config), config.d_model, config.n_heads
        q = s.q_rank * (width + 1 + config.bias) if s.q_rank else 0
        q += (s.q_rank or width) * heads * s.qk_dim
        kv = (width + config.bias) * (s.kv_rank + s.rope_dim) + s.kv_rank
        kv += s.kv_rank * heads * (s.nope_dim + s.v_dim)
        return q + kv + (heads * s.v_dim + config.bias) * width

    @staticmethod
    def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
        sizes = latent_sizes(config)
        return (sizes.kv_rank + sizes.rope_dim) * itemsize * tokens

    def queries(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x [B, S, E] → the parts of the queries without and with position, [B, H, S, nope or rope]."""
        low = self.q_norm(self.q_down(x)) if self.sizes.q_rank else x
        q = self.q_up(low).view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)
        nope, rope = q.split([self.sizes.nope_dim, self.sizes.rope_dim], dim=-1)
        return nope, self.turn(rope, step)

    def compress(self, x: Tensor, step: Step) -> Tensor:
        """x [B, S, E] → what is kept of each token, [B, S, kv_rank + rope_dim]."""
        latent, rope = self.kv_down(x).split([self.sizes.kv_rank, self.sizes.rope_dim], dim=-1)
        return torch.cat((self.kv_norm(latent), self.turn(rope[:, None], step)[:, 0]), dim=-1)

    @staticmethod
    def turn(x: Tensor, step: Step) -> Tensor:
        return x if step.cos is None or step.sin is None else rotate(x, step.cos, step.sin)

    def forward(self, x: Tensor, step: Step, state: LatentState | None) -> Tensor:
        nope, rope = self.queries(x, step)
        latent = self.compress(x, step)
        if state is not None:
            latent = state.extend(latent, step)
        absorb = self.absorb if self.absorb is not None else state is not None and x.shape[1] == 1
        heads = (self.absorbed if absorb else self.expanded)(nope, rope, latent, step)
        return self.out(heads.transpose(1, 2).flatten(2))

    def expanded(self, nope: Tensor, rope: Tensor, latent: Tensor, step: Step) -> Tensor:
        """Keys and values made for every head: H·T·(nope + v) numbers more than what is kept. [B, H, S, v]"""
        c, shared = latent.split([self.sizes.kv_rank, self.sizes.rope_dim], dim=-1)
        kv = self.kv_up(c).view(*c.shape[:2], self.n_heads, -1).transpose(1, 2)
        k, v = kv.split([self.sizes.nope_dim, self.sizes.v_dim], dim=-1)
        shared = shared[:, None].expand(-1, self.n_heads, -1, -1)
        q, k = torch.cat((nope, rope), dim=-1), torch.cat((k, shared), dim=-1)
        return attend(q, k, v, step, self.scale)

    def absorbed(self, nope: Tensor, rope: Tensor, latent: Tensor, step: Step) -> Tensor:
        """All heads attend to the latent itself, which is key and value at once. [B, H, S, v]"""
        weight = self.kv_up.weight.view(self.n_heads, -1, self.sizes.kv_rank)
        up_k, up_v = weight.split([self.sizes.nope_dim, self.sizes.v_dim], dim=1)
        # Not `nope @ up_k`, for which PyTorch copies the weights for every sequence of the batch.
        q = torch.cat((torch.einsum("bhsn,hnr->bhsr", nope, up_k), rope), dim=-1)
        key = latent[:, None]
        mixed = attend(q, key, key[..., : self.sizes.kv_rank], step, self.scale)
        return torch.einsum("bhsr,hvr->bhsv", mixed, up_v)


def latent_sizes(config: ModelConfig) -> LatentSizes:
    assert config.latent is not None  # the configuration has refused latent layers without sizes
    return config.latent
