"""The KV cache: keys and values of the tokens a model has already read.

Attention at position p needs the keys and values of positions 0 … p. They never change, so they are
computed once and kept: 2·L·Hkv·D numbers a token. Without the cache, every new token would run the
whole prefix through the model again. Layers that are not attention keep something else, or less.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.models.config import ModelConfig
from llmcourse.models.state import Shapes, State
from llmcourse.models.step import Step


class KVState(State):
    """Keys and values of every token, contiguous, reserved up front: k, v [B, Hkv, T, D]."""

    k: Tensor
    v: Tensor

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        one = (config.n_kv_heads, max_len, config.head_dim), dtype
        return {"k": one, "v": one}

    def extend(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Step]:
        """Store the keys and values [B, Hkv, S, D] of a pass; return all that it looks at, and how."""
        if step.start is None:
            return self._scatter(k, step, self.k), self._scatter(v, step, self.v), step
        end = step.start + k.shape[2]
        self.k[:, :, step.start : end] = k
        self.v[:, :, step.start : end] = v
        return self.k[:, :, :end], self.v[:, :, :end], step

    def _scatter(self, new: Tensor, step: Step, held: Tensor) -> Tensor:
        """Store one token [B, Hkv, 1, D] a sequence at its own position; return `span` tokens.

        Nothing here depends on a value on the host, so a CUDA graph can capture it.
        """
        held.scatter_(2, step.positions.view(-1, 1, 1, 1).expand_as(new), new)
        return held[:, :, : step.span]


class RollingState(State):
    """Keys and values of the window and of the sinks only: memory that stops growing.

    k, v [B, Hkv, sinks + window, D]. Position p of the first `sinks` lies in slot p; a later one in slot
    sinks + (p − sinks) mod window, where it replaces the position that has just left the window.
    """

    k: Tensor
    v: Tensor

    def __init__(self, config: ModelConfig, batch: int, max_len: int, **options: Any) -> None:
        super().__init__(config, batch, max_len, **options)
        self.window, self.sinks = config.window, config.sinks

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        return KVState.shapes(config, min(config.window + config.sinks, max_len), dtype)

    def extend(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Step]:
        """Store the keys and values [B, Hkv, S, D] of a pass; return all that it looks at, and how."""
        if k.shape[2] == 1:  # the slot it overwrites has left its window
            index = self.slot(step.positions).view(-1, 1, 1, 1).expand_as(k)
            self.k.scatter_(2, index, k)
            self.v.scatter_(2, index, v)
            held = self.positions_held(step.positions + 1)
            return self.k, self.v, step.windowed(self.window, self.sinks, held)
        # Several tokens: the first of them still see what the last ones overwrite.
        keys, values, positions = k, v, step.position_ids
        if step.start != 0:
            held = self.positions_held(step.positions)
            keys, values = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
            positions = torch.cat((held, positions), dim=1)
        self._keep(k, v, step.position_ids[0])
        return keys, values, step.windowed(self.window, self.sinks, positions)

    def slot(self, positions: Tensor) -> Tensor:
        """Where the token at each position is kept."""
        ring = self.sinks + (positions - self.sinks) % self.window
        return torch.where(positions < self.sinks, positions, ring)

    def positions_held(self, lengths: Tensor) -> Tensor:
        """The position in each slot once `lengths` [B] tokens were read, [B, slots]; negative: empty."""
        slots = torch.arange(self.k.shape[2], device=lengths.device)
        newest = lengths[:, None] - 1
        ring = newest - (newest - slots) % self.window
        ring = torch.where(ring >= self.sinks, ring, -1)
        first = torch.where(slots <= newest, slots, -1)
        return torch.where(slots < self.sinks, first, ring)

    def _keep(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Store the tokens at positions [S], except those that have left the window already."""
        kept = (positions < self.sinks) | (positions > positions[-1] - self.window)
        slots = self.slot(positions[kept])
        self.k[:, :, slots] = k[:, :, kept]
        self.v[:, :, slots] = v[:, :, kept]


class KVCache:
    """What a model's layers keep of `batch` sequences of up to `max_len` tokens.

    layers    one `State` a layer
    lengths   tokens read of each sequence, a list of B integers
    stored    None: attention layers keep tokens in `dtype`; int8, fp8: in 8 bits (`models.quantized_cache`).
              Other layers keep what they keep

    Raises UnknownNameError, or ShapeError where there is no attention layer to store so.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stored: str | None = None,
    ) -> None:
        from llmcourse.models.mixers import MIXERS

        states = {kind: MIXERS[kind].state for kind in config.kinds}
        if stored is not None:
            from llmcourse.models.quantized_cache import stored_as

            states |= {"attention": stored_as(stored)}
            if "attention" not in config.kinds:
                raise ShapeError(
                    f"a cache in {stored} was asked for layers {sorted(set(config.kinds))}.",
                    "Only attention to all tokens keeps a key and a value of each.",
                    "stored = None.",
                )
        self.layers: list[State] = [
            states[kind](config, batch, max_len, dtype=dtype, device=device) for kind in config.kinds
        ]
        self.kinds, self.dtype = config.kinds, dtype
        self.max_len = max_len
        self.lengths = [0] * batch

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.layers)

    def row(self, index: int) -> KVCache:
        """Sequence `index` alone, sharing this cache's memory (its `lengths` is a copy)."""
        if not -self.batch <= index < self.batch:
            raise ShapeError(
                f"row {index} of a cache of {self.batch} sequences.",
                "Each sequence has one row, and they are counted from 0.",
                f"a row from 0 to {self.batch - 1}.",
            )
        view = copy.copy(self)
        view.layers = [state.row(index) for state in self.layers]
        view.lengths = [self.lengths[index]]
        return view

    def reset(self) -> None:
        """Forget all sequences, keeping the memory."""
        for state in self.layers:
            state.reset()
        self.lengths = [0] * self.batch

    def belongs_to(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Check that it was made for layers of these kinds, and for numbers of this type (or autocast's)."""
        if self.kinds != config.kinds:
            raise ShapeError(
                f"a cache for layers {self.kinds} came to a model of {config.kinds}.",
                "Each kind of layer keeps something else of a sequence.",
                "KVCache(model.config, …).",
            )
        if self.dtype != dtype and not any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise ShapeError(
                f"a cache of {self.dtype} came to a model of {dtype}.",
                "What is kept is multiplied with what is new, and both need one type.",
                "KVCache(model.config, …, dtype=model.dtype).",
            )

    def require(self, new: int) -> None:
        """Check that every sequence has room for `new` more tokens."""
        longest = max(self.lengths)
        if longest + new > self.max_len:
            raise ShapeError(
                f"{longest} cached tokens and {new} new ones do not fit {self.max_len}.",
                "This cache reserves its memory up front and does not grow.",
                f"max_len = {longest + new} or more, or a shorter prompt.",
            )
