"""A decoder-only transformer of the Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU.

The four sizes that matter later are visible in the shapes: weights are read once a step whatever the
batch (decode is memory-bound), activations are tiny at decode, and the KV cache grows with B·T.

    tokens [B, S] → embedding [B, S, E] → L × (x + attention(norm(x)); x + mlp(norm(x))) → norm → logits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models.cache import KVCache
from llmcourse.models.config import ModelConfig
from llmcourse.models.linear import Linear, linear
from llmcourse.models.rope import Rope, rotate


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share, worked out once.

    cos, sin    rotary tables for the tokens of this pass, [B, 1, S, D]
    start       position of the first token when all sequences are equally long, else None
    positions   each sequence's position, [B] (used when start is None: one token a sequence)
    mask        True where a query may look, broadcastable to [B, Hq, S, T]; None: see `causal`
    causal      the pass is a whole prefix from position 0, masked by the kernel itself
    span        keys that the pass looks at, T
    """

    cos: Tensor
    sin: Tensor
    start: int | None
    positions: Tensor
    mask: Tensor | None
    causal: bool
    span: int


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention. The Q, K and V projections are one weight, stacked.

    `fused` runs them as one matrix product; otherwise as three, on slices of the same weight.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim, self.n_kv, self.sizes = config.head_dim, config.n_kv_heads, [q, kv, kv]
        self.qkv = Linear(config.d_model, q + 2 * kv, bias=config.qkv_bias)
        self.out = Linear(q, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.fused = True

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

    def forward(self, x: Tensor, step: Step, cache: KVCache | None, layer: int) -> Tensor:
        qk, v = self.project(x)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : -self.n_kv]), self.k_norm(qk[:, -self.n_kv :])), dim=1)
        qk = rotate(qk, step.cos, step.sin)  # queries and keys of a position turn by the same angles
        q, k = qk[:, : -self.n_kv], qk[:, -self.n_kv :]
        if cache is not None and step.start is not None:
            k, v = cache.write(layer, k, v, step.start)
        elif cache is not None:
            k, v = cache.scatter(layer, k, v, step.positions, step.span)
        return self.out(attend(q, k, v, step).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
    """q [B, Hq, S, D] over k, v [B, Hkv, T, D] → [B, Hq, S, D], by PyTorch's attention kernels."""
    batch, n_heads, length, dim = q.shape
    if length == 1:
        # One query a head: the Hq/Hkv queries that share a key/value head become the rows of one
        # attention problem, so that keys and values are read once for all of them.
        grouped = q.reshape(batch, k.shape[1], -1, dim)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=step.mask).reshape(q.shape)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=step.mask, is_causal=step.causal, enable_gqa=n_heads != k.shape[1]
    )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202); gate and up stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
        else:
            gate, up = (linear(x, w) for w in self.gate_up.weight.chunk(2))
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: the stream x only ever has something added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, step: Step, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), step, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The whole model. `model(tokens)` gives logits for every position, `model(tokens, cache)` reads
    `tokens` as the continuation of what the cache holds, and appends to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.rope = Rope(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters (a tied output head counts once)."""
        return sum(p.nbytes for p in self.parameters())

    def fuse(self, on: bool = True) -> Transformer:
        """Run Q/K/V, and gate/up, as one matrix product each (on) or apart (off). Same weights."""
        for block in self.blocks:
            block.attention.fused = block.mlp.fused = on  # type: ignore[union-attr]
        return self

    def pack(self, on: bool = True) -> Transformer:
        """On a CPU, keep bfloat16 weights a second time in the layout that oneDNN reads fastest (on)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.packed = on
        return self

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits [B, S, V] for tokens [B, S]; with `last_only` for the last position alone, [B, 1, V].

        Raises ShapeError when tokens are not [B, S], the batch differs from the cache's, the cache
        is full, or sequences of unequal length are given more than one token at once.
        """
        step = self.plan(tokens, cache)
        logits = self.run(tokens, step, cache, last_only=last_only)
        if cache is not None:
            cache.lengths = [n + tokens.shape[1] for n in cache.lengths]
        return logits

    def run(self, tokens: Tensor, step: Step, cache: KVCache | None, *, last_only: bool = False) -> Tensor:
        """The layers, for a step already planned. Only device work: a CUDA graph can capture it."""
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, step, cache, layer)
        return self.head(self.norm(x[:, -1:] if last_only else x))

    def plan(self, tokens: Tensor, cache: KVCache | None) -> Step:
        """Positions, mask and rotary tables of one pass over tokens [B, S]."""
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ShapeError(
                f"tokens have shape {list(tokens.shape)}.",
                "The model reads a batch of sequences, [B, S], of at least one token.",
                "torch.tensor([ids]) for one sequence of ids.",
            )
        batch, length = tokens.shape
        lengths = [0] * batch if cache is None else cache.lengths
        if len(lengths) != batch:
            raise ShapeError(
                f"{batch} sequences came for a cache of {len(lengths)}.",
                "Each sequence continues its own row of the cache.",
                f"KVCache(config, batch={batch}, …).",
            )
        if cache is not None:
            cache.require(length)
        if len(set(lengths)) > 1:
            if length > 1:
                raise ShapeError(
                    f"sequences of lengths {lengths} were given {length} new tokens each.",
                    "Sequences of unequal length advance one token at a time here.",
                    "reading each prompt into its own row, cache.row(i).",
                )
            return self.ragged_step(torch.tensor(lengths, device=self.device), max(lengths) + 1)
        start = lengths[0]
        span = start + length
        self.rope.grow(span)
        positions = torch.arange(start, span, device=self.device).expand(batch, -1)
        mask = None
        if start and length > 1:
            mask = torch.arange(span, device=self.device) <= positions[0, :, None]
        cos, sin = self.rope(positions)
        return Step(cos, sin, start, positions[:, 0], mask, start == 0 and length > 1, span)

    def ragged_step(self, positions: Tensor, span: int) -> Step:
        """One token for each sequence, at its own position [B]; keys 0 … span−1 are looked at."""
        self.rope.grow(span)
        mask = (torch.arange(span, device=self.device) <= positions[:, None])[:, None, None]
        cos, sin = self.rope(positions[:, None])
        return Step(cos, sin, None, positions, mask, False, span)
