"""The KV cache: keys and values of the tokens a model has already read.

Attention at position p needs the keys and values of positions 0 … p. They never change, so they are
computed once and kept: 2·L·Hkv·D numbers a token. Without the cache, every new token would run the
whole prefix through the model again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.models.config import ModelConfig


class KVCache:
    """Room for `max_len` tokens of each of `batch` sequences, contiguous and reserved up front.

    k, v      [L, B, Hkv, T, D]
    lengths   tokens held for each sequence, a list of B integers
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        # Zeros, not empty: masked positions are multiplied by zero weights, and 0 × NaN is NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * batch

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def max_len(self) -> int:
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def row(self, index: int) -> KVCache:
        """Sequence `index` alone, sharing this cache's memory (its `lengths` is a copy)."""
        view = object.__new__(KVCache)
        view.k, view.v = self.k[:, index : index + 1], self.v[:, index : index + 1]
        view.lengths = [self.lengths[index]]
        return view

    def require(self, new: int) -> None:
        """Check that every sequence has room for `new` more tokens."""
        longest = max(self.lengths)
        if longest + new > self.max_len:
            raise ShapeError(
                f"{longest} cached tokens and {new} new ones do not fit {self.max_len}.",
                "This cache reserves its memory up front and does not grow.",
                f"max_len = {longest + new} or more, or a shorter prompt.",
            )

    def write(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, S, D] at `start` for all sequences; return all keys and values so far."""
        end = start + k.shape[2]
        self.k[layer, :, :, start:end] = k
        self.v[layer, :, :, start:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def scatter(
        self, layer: int, k: Tensor, v: Tensor, positions: Tensor, span: int
    ) -> tuple[Tensor, Tensor]:
        """Store one token k, v [B, Hkv, 1, D] per sequence at its own position [B]; return `span` tokens.

        Nothing here depends on a value on the host, so a CUDA graph can capture it.
        """
        index = positions.view(-1, 1, 1, 1).expand_as(k)
        self.k[layer].scatter_(2, index, k)
        self.v[layer].scatter_(2, index, v)
        return self.k[layer, :, :, :span], self.v[layer, :, :, :span]
