"""Encoder-decoder: one stack reads the source in both directions, another writes, looking at what was read.

It is the first transformer (Vaswani et al. 2017, arXiv:1706.03762). A block of the writing stack has one part
more than a decoder's: *cross-attention*, whose queries come from the target, and whose keys and values come
from the encoder's output. Those do not depend on the target, so they are computed once for a source and kept,
beside the cache of the target's own keys and values, which grows.

    source [B, S] → encoder → features [B, S, E] → keys, values of each layer [B, Hkv, S, D]   (once)
    target [B, T] → L × (x + self(norm(x)); x + cross(norm(x)); x + mlp(norm(x))) → logits [B, T, V]

Cross-attention turns nothing by position: a place in the source has no distance to a place in the target.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models.attention import Attention, attend
from llmcourse.models.block import Block
from llmcourse.models.cache import KVCache, KVState
from llmcourse.models.config import ModelConfig
from llmcourse.models.encoder import Encoder, padding_mask
from llmcourse.models.linear import linear
from llmcourse.models.norm import norm
from llmcourse.models.sizes import at_least
from llmcourse.models.state import State
from llmcourse.models.step import Step
from llmcourse.models.transformer import Transformer


class CrossState(State):
    """What one decoder layer keeps: of the source all keys and values, of the target those so far.

    k, v   [B, Hkv, S, D] of the source
    mask   True at its real tokens, [B, 1, 1, S]; None where nothing is padded
    own    the target's, or None when the target is read in one pass
    """

    def __init__(self, k: Tensor, v: Tensor, mask: Tensor | None, own: KVState | None) -> None:
        self.k, self.v, self.mask, self.own = k, v, mask, own

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.own.nbytes if self.own else 0)

    def row(self, index: int) -> Self:
        view = super().row(index)
        view.own = self.own.row(index) if self.own else None
        return view


class CrossAttention(Attention):
    """Attention with queries from one sequence, and keys and values from another: the same weights."""

    def remember(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder features [B, S, E] → keys and values [B, Hkv, S, D]."""
        k, v = (self.split_heads(self._part(source, i)) for i in (1, 2))
        return k if self.k_norm is None else self.k_norm(k), v

    def queries(self, x: Tensor) -> Tensor:
        """Target features [B, T, E] → queries [B, Hq, T, D]."""
        q = self.split_heads(self._part(x, 0))
        return q if self.q_norm is None else self.q_norm(q)

    def forward(self, x: Tensor, step: Step, state: CrossState) -> Tensor:  # type: ignore[override]
        seen = replace(step, mask=state.mask, causal=False, span=state.k.shape[2])
        return self.out(attend(self.queries(x), state.k, state.v, seen).transpose(1, 2).flatten(2))

    def _part(self, x: Tensor, which: int) -> Tensor:
        bias = None if self.qkv.bias is None else self.qkv.bias.split(self.sizes)[which]
        return linear(x, self.qkv.weight.split(self.sizes)[which], bias)


class CrossBlock(Block):
    """A decoder's block with cross-attention between its two parts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.cross_norm = norm(config)
        self.cross = CrossAttention(config)

    def forward(self, x: Tensor, step: Step, state: CrossState) -> Tensor:  # type: ignore[override]
        if self.post_norm:
            x = self.mixer_norm(x + self.mixer(x, step, state.own))
            x = self.cross_norm(x + self.cross(x, step, state))
            return x if self.mlp is None else self.mlp_norm(x + self.mlp(x))  # type: ignore[misc]
        x = x + self.mixer(self.mixer_norm(x), step, state.own)
        x = x + self.cross(self.cross_norm(x), step, state)
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))  # type: ignore[misc]


class EncoderDecoder(nn.Module):
    """`model(source, target)` gives logits [B, T, V]; `read` and `decoder` do the same a token at a time.

    Both stacks have the sizes of `config` and share one embedding. To generate, read the source once and let
    the decoder continue what it has written:

        reading = model.read(source, lengths, room=20)
        logits = model.decoder(start, reading)          # then the next token, and so on
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, classes=0)
        self.decoder = Transformer(config)
        self.decoder.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.n_layers))
        self.encoder.stack.embedding = self.decoder.embedding

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        """Parameters by formula: two stacks with one embedding, and a norm and an attention more a layer."""
        width = config.d_model * (2 if config.norm == "layer" else 1)
        embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
        cross = config.n_layers * (width + Attention.n_params(config))
        return 2 * config.n_params - embeddings + cross

    def forward(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of what follows each token of `target` [B, T], given `source` [B, S]."""
        reading = self.read(source, source_lengths)
        _same_batch(source, target)
        return self.decoder.run(target, self.decoder.plan(target, None), reading)

    def read(self, source: Tensor, source_lengths: Tensor | None = None, *, room: int = 0) -> Reading:
        """Encode `source` [B, S] and compute every layer's keys and values of it.

        room   tokens of target to make room for; 0 when the target will be given whole
        """
        at_least(0, room=room)
        features = self.encoder(source, source_lengths)
        mask = None if source_lengths is None else padding_mask(source, source_lengths)
        states = []
        for block in self.decoder.blocks:
            k, v = block.cross.remember(features)  # type: ignore[union-attr, operator]
            own = KVState(self.config, len(source), room, dtype=k.dtype, device=k.device) if room else None
            states.append(CrossState(k, v, mask, own))
        return Reading(self.config, states, batch=len(source), room=room, dtype=features.dtype)

    @torch.inference_mode()
    def generate(
        self, source: Tensor, source_lengths: Tensor | None = None, *, start: int, end: int, room: int
    ) -> list[list[int]]:
        """The likeliest next token, again and again, up to `end` (left out) or `room` tokens a row."""
        at_least(1, room=room)
        reading = self.read(source, source_lengths, room=room)
        tokens = torch.full((len(source), 1), start, device=source.device)
        written = []
        for _ in range(room):
            tokens = self.decoder(tokens, reading)[:, -1:].argmax(-1)
            written.append(tokens)
            if bool((torch.cat(written, dim=1) == end).any(1).all()):
                break
        rows = torch.cat(written, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]


class Reading(KVCache):
    """A source that was read: a cache whose layers hold its keys and values, and room for the target's."""

    def __init__(
        self, config: ModelConfig, states: list[CrossState], *, batch: int, room: int, dtype: torch.dtype
    ) -> None:
        self.kinds, self.dtype = config.kinds, dtype
        self.layers = list(states)
        self.max_len = room
        self.lengths = [0] * batch


def _same_batch(source: Tensor, target: Tensor) -> None:
    if len(source) != len(target):
        raise ShapeError(
            f"{len(source)} sources came with {len(target)} targets.",
            "Row i of the target is written while looking at row i of the source.",
            "as many rows in both.",
        )
