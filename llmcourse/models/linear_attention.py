"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): attention whose memory does not grow.

Softmax attention weighs token s for query t by exp(q_t·k_s): the exponential of a product, which has to be
formed for every pair. Replace it by a product of features, φ(q_t)·φ(k_s), and the sum can be bracketed the
other way round:

    Σ_s (φ(q_t)·φ(k_s)) v_s  =  φ(q_t) · Σ_s φ(k_s) v_sᵀ  =  φ(q_t) S_t        S_t [D, Dv]

S_t grows by one outer product a token and never changes its size. The weights are divided by their sum,
φ(q_t)·z_t with z_t = Σ_s φ(k_s). Three ways to compute the same numbers:

    parallel    the S × S table of weights, masked: S²·(D + Dv) multiplications
    recurrent   token by token through the state: S·D·Dv, but one token after the other
    chunked     parallel within chunks of C tokens, the state between them: S·(C·(D + Dv) + 2·D·Dv),
                linear in S and made of matrix products
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models.linear import Linear
from llmcourse.models.recurrent import accumulator, accumulator_size
from llmcourse.models.state import Shapes, State

if TYPE_CHECKING:
    from llmcourse.models.config import ModelConfig
    from llmcourse.models.step import Step

CHUNK = 64
TINY = 1e-12
"""Least sum of weights. φ is positive, but so many halvings below 1 it is zero in float32."""


class Memory(NamedTuple):
    """s [..., D, Dv] = Σ φ(k) vᵀ and z [..., D] = Σ φ(k), over the tokens so far."""

    s: Tensor
    z: Tensor


def features(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1: x + 1 above zero, exp(x) below; positive, so that weights are."""
    return F.elu(x) + 1


def empty_memory(q: Tensor, k: Tensor, v: Tensor) -> Memory:
    """The memory before the first token, in the type in which sums are kept."""
    lead = k.shape[:-2]
    kind = accumulator(q.dtype)
    return Memory(
        k.new_zeros(*lead, k.shape[-1], v.shape[-1], dtype=kind), k.new_zeros(*lead, k.shape[-1], dtype=kind)
    )


def parallel(q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
    """All tokens at once, through the table of weights.

    q, k [..., S, D] (features already), v [..., S, Dv] → [..., S, Dv], and the memory after the last
    token. Leading dimensions broadcast: a group of query heads may share a key/value head.
    """
    s, z = memory or empty_memory(q, k, v)
    weights = (q @ k.mT).tril()
    top = weights @ v + q @ s.to(q.dtype)
    bottom = weights.sum(-1) + (q @ z.to(q.dtype).unsqueeze(-1)).squeeze(-1)
    after = Memory(s + (k.mT @ v).to(s.dtype), z + k.sum(-2, dtype=z.dtype))
    return top / bottom.clamp_min(TINY).unsqueeze(-1), after


def recurrent(q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
    """One token after the other: write φ(k) vᵀ into the state, then read it with φ(q)."""
    s, z = memory or empty_memory(q, k, v)
    out = []
    for t in range(q.shape[-2]):
        key, value, query = (x[..., t, :].to(s.dtype) for x in (k, v, q))
        s = s + key.unsqueeze(-1) * value.unsqueeze(-2)
        z = z + key
        top = (query.unsqueeze(-2) @ s).squeeze(-2)
        bottom = (query * z).sum(-1, keepdim=True)
        out.append((top / bottom.clamp_min(TINY)).to(v.dtype))
    return torch.stack(out, dim=-2), Memory(s, z)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Memory]:
    """Chunks of tokens: inside one the table of weights, from all before it the state.

    What the chunks add to the state are independent products; one cumulative sum over the chunks gives every
    chunk the state that it starts from. Nothing here is a loop over tokens or chunks.
    """
    s, z = memory or empty_memory(q, k, v)
    length = q.shape[-2]
    q, k, v = (F.pad(x, (0, 0, 0, -length % chunk)).unflatten(-2, (-1, chunk)) for x in (q, k, v))
    added = (k.mT @ v).to(s.dtype), k.sum(-2, dtype=z.dtype)  # [..., N, D, Dv], [..., N, D]
    s = torch.cat((s.unsqueeze(-3), added[0]), dim=-3).cumsum(-3)  # before chunk 0, 1, …, N
    z = torch.cat((z.unsqueeze(-2), added[1]), dim=-2).cumsum(-2)
    weights = (q @ k.mT).tril()
    top = weights @ v + q @ s[..., :-1, :, :].to(q.dtype)
    bottom = weights.sum(-1) + (q @ z[..., :-1, :].to(q.dtype).unsqueeze(-1)).squeeze(-1)
    out = top / bottom.clamp_min(TINY).unsqueeze(-1)
    return out.flatten(-3, -2)[..., :length, :], Memory(s[..., -1, :, :], z[..., -1, :])


FORMS = {"parallel": parallel, "recurrent": recurrent, "chunked": chunked}


class LinearState(State):
    """s [B, Hkv, D, D] and z [B, Hkv, D]: D + 1 numbers for every feature of a key/value head."""

    recurrent = True
    s: Tensor
    z: Tensor

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        heads, d, kind = config.n_kv_heads, config.head_dim, accumulator(dtype)
        return {"s": ((heads, d, d), kind), "z": ((heads, d), kind)}


class LinearAttention(nn.Module):
    """Causal linear attention in place of softmax attention: the same projections, no positions.

    form   "chunked", "parallel" or "recurrent": the same numbers. A single token is always recurrent.
    """

    state = LinearState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim, self.n_kv, self.sizes = config.head_dim, config.n_kv_heads, [q, kv, kv]
        self.qkv = Linear(config.d_model, q + 2 * kv, bias=config.qkv_bias or config.bias)
        self.out = Linear(q, config.d_model, bias=config.bias)
        self.form = "chunked"

    def forward(self, x: Tensor, step: Step, state: LinearState | None) -> Tensor:
        """x [B, S, E] → [B, S, E]; with a state, x continues the sequences that it holds."""
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(x).split(self.sizes, -1)
        )
        q = features(q).unflatten(1, (self.n_kv, -1))  # [B, Hkv, Hq/Hkv, S, D]
        k, v = features(k).unsqueeze(2), v.unsqueeze(2)  # [B, Hkv, 1, S, D]
        memory = None
        if state is not None:
            memory = Memory(state.s.unsqueeze(2), state.z.unsqueeze(2))
        form = FORMS["recurrent" if x.shape[1] == 1 else self.form]
        y, after = form(q, k, v, memory)
        if state is not None:
            state.s.copy_(after.s.detach().squeeze(2))
            state.z.copy_(after.z.detach().squeeze(2))
        return self.out(y.flatten(1, 2).transpose(1, 2).flatten(2))

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        biases = (q + 2 * kv) * (config.qkv_bias or config.bias) + config.d_model * config.bias
        return config.d_model * (2 * q + 2 * kv) + biases

    @staticmethod
    def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
        """(D + 1)·D·Hkv numbers, whatever `tokens`."""
        return config.n_kv_heads * config.head_dim * (config.head_dim + 1) * accumulator_size(itemsize)

    @staticmethod
    def flops(config: ModelConfig, tokens: int) -> int:
        """Multiplications and additions of the chunked form over a whole sequence, projections included."""
        d, heads = config.head_dim, config.n_heads
        padded = tokens + -tokens % CHUNK
        inside = 2 * CHUNK * 2 * d  # a query against its chunk's keys, and the weights against the values
        between = 2 * d * (d + 1)  # a query against s and z
        write = 2 * d * d  # k vᵀ
        projections = 2 * tokens * config.d_model * (2 * heads + 2 * config.n_kv_heads) * d
        return projections + padded * (heads * (inside + between) + config.n_kv_heads * write)
