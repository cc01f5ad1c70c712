"""The decoder-only transformer: tokens in, logits for the next token out.

The four sizes that matter later are visible in the shapes: weights are read once a step whatever the
batch (decode is memory-bound), activations are tiny at decode, and the KV cache grows with B·T.

    tokens [B, S] → embedding [B, S, E] → L × (x + mixer(norm(x)); x + mlp(norm(x))) → norm → logits
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models.block import Block
from llmcourse.models.cache import KVCache
from llmcourse.models.config import ModelConfig
from llmcourse.models.linear import Linear
from llmcourse.models.norm import norm
from llmcourse.models.positions import Positions
from llmcourse.models.rope import Rope
from llmcourse.models.step import Step


class Transformer(nn.Module):
    """The whole model. `model(tokens)` gives logits for every position, `model(tokens, cache)` reads
    `tokens` as the continuation of what the cache holds, and appends to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = Positions(config)
        self.rope = Rope(config)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.kinds)
        self.norm = nn.Identity() if config.post_norm else norm(config)
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
        """Bytes of all parameters (a tied output head counts once) and of all quantized layers."""
        inside = (m for m in self.modules() if m is not self)
        return sum(p.nbytes for p in self.parameters()) + sum(getattr(m, "weight_bytes", 0) for m in inside)

    def fuse(self, on: bool = True) -> Transformer:
        """Run Q/K/V, and gate/up, as one matrix product each (on) or apart (off). Same weights."""
        for module in self.modules():
            if hasattr(module, "fused"):
                module.fused = on  # type: ignore[assignment]
        return self

    def pack(self, on: bool = True) -> Transformer:
        """On a CPU, keep bfloat16 weights a second time in the layout that oneDNN reads fastest (on)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.packed = on
        return self

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits [B, S, V] for tokens [B, S]; with `last_only` for the last position alone, [B, 1, V].

        With a cache no gradient is recorded: what it holds is overwritten before a backward pass reads it.

        Raises ShapeError when tokens are not ids [B, S] of the vocabulary, the cache is another model's, of
        another batch or full, or sequences of unequal length are given more than one token at once.
        """
        step = self.plan(tokens, cache)
        if cache is not None and step.start == 0:
            cache.reset()
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            logits = self.run(tokens, step, cache, last_only=last_only)
        if cache is not None:
            cache.lengths = [n + tokens.shape[1] for n in cache.lengths]
        return logits

    def run(self, tokens: Tensor, step: Step, cache: KVCache | None, *, last_only: bool = False) -> Tensor:
        """The layers, for a step already planned. Only device work: a CUDA graph can capture it."""
        return self.head(self.features(tokens, step, cache, last_only=last_only))

    def features(
        self, tokens: Tensor, step: Step, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor:
        """What the head reads, [B, S, E] or [B, 1, E]: for a loss that never holds all logits."""
        x = self.positions(self.embedding(tokens), step.position_ids)
        for i, block in enumerate(self.blocks):
            x = block(x, step, None if cache is None else cache.layers[i])
        return self.norm(x[:, -1:] if last_only else x)

    def plan(self, tokens: Tensor, cache: KVCache | None) -> Step:
        """Positions, mask and rotary tables of one pass over tokens [B, S]."""
        self._require_ids(tokens)
        batch, length = tokens.shape
        lengths = [0] * batch if cache is None else cache.lengths
        if len(lengths) != batch:
            raise ShapeError(
                f"{batch} sequences came for a cache of {len(lengths)}.",
                "Each sequence continues its own row of the cache.",
                f"KVCache(config, batch={batch}, …).",
            )
        if cache is not None:
            cache.belongs_to(self.config, self.dtype)
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
        position_ids = torch.arange(start, span, device=self.device).expand(batch, -1)
        mask = None
        if start and length > 1:
            mask = torch.arange(span, device=self.device) <= position_ids[0, :, None]
        return self._step(position_ids, start, span, mask, causal=start == 0 and length > 1)

    def ragged_step(self, positions: Tensor, span: int) -> Step:
        """One token for each sequence, at its own position [B]; keys 0 … span−1 are looked at."""
        mask = (torch.arange(span, device=self.device) <= positions[:, None])[:, None, None]
        return self._step(positions[:, None], None, span, mask, causal=False)

    def _step(
        self, position_ids: Tensor, start: int | None, span: int, mask: Tensor | None, *, causal: bool
    ) -> Step:
        self._require_positions(span)
        cos = sin = None
        if self.config.position == "rope":
            self.rope.grow(span)
            cos, sin = self.rope(position_ids)
        return Step(position_ids, start, span, mask, causal, cos, sin)

    def _require_ids(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
            raise ShapeError(
                f"tokens have shape {list(tokens.shape)} and are {str(tokens.dtype).removeprefix('torch.')}.",
                "The model reads a batch of sequences of ids, [B, S], of at least one token.",
                "torch.tensor([ids]) for one sequence of ids.",
            )
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking would make the CPU wait for a GPU, or break a graph
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ShapeError(
                f"the id {low if low < 0 else high} is not one of {self.config.vocab_size} tokens.",
                "Each id names a row of the embedding.",
                f"ids from 0 to {self.config.vocab_size - 1}; another model's tokenizer gives others.",
            )

    def _require_positions(self, span: int) -> None:
        if self.config.position == "learned" and span > self.config.max_len:
            raise ShapeError(
                f"a sequence of {span} tokens came for {self.config.max_len} learned positions.",
                "A position that was never learned has no embedding.",
                f"at most {self.config.max_len} tokens, or position='rope', which goes on for ever.",
            )
