"""The KV cache in 8 bits: half the bytes of bfloat16, a quarter of float32.

At long contexts and large batches the cache outgrows the weights, and attention at decode takes as long as
the cache's bytes do. Keys and values of a token never change, so each is rounded once, when it is stored:

    int8   a scale for each token and head: x ≈ scale · code, scale = max |x| / 127     D + 2 bytes for D
    fp8    e4m3 without a scale: 4 bits of exponent cover keys and values as they come  D bytes for D

An INT8 step is 1/127 of the largest number beside it; an FP8 step is 1/8 to 1/16 of the number itself. So
INT8 is some ten times finer where the numbers of a head are of one size, and FP8 keeps small numbers beside
a large one.

A pass reads even its own tokens as they were stored. So it does not matter into which pieces a prompt was
cut: a token is the same to all that look at it. What is read is written out in the model's format for each
layer in turn, which costs memory for one layer's numbers and time to make them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.errors import UnknownNameError
from llmcourse.models.cache import KVState
from llmcourse.models.config import ModelConfig
from llmcourse.models.state import Shapes
from llmcourse.models.step import Step

FP8 = torch.float8_e4m3fn
SCALE = torch.bfloat16


class Int8KVState(KVState):
    """k, v int8 [B, Hkv, T, D], with k_scale, v_scale bfloat16 [B, Hkv, T, 1]."""

    k_scale: Tensor
    v_scale: Tensor

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        codes = (config.n_kv_heads, max_len, config.head_dim), torch.int8
        scale = (config.n_kv_heads, max_len, 1), SCALE
        return {"k": codes, "v": codes, "k_scale": scale, "v_scale": scale}

    def extend(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Step]:
        """Store the keys and values [B, Hkv, S, D] of a pass; return all that it looks at, and how."""
        read = []
        for new, codes, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            rounded, scale = to_int8(new)
            held = put(rounded, step, codes), put(scale, step, scales)
            read.append(from_int8(*held, new.dtype))
        return read[0], read[1], step


class Fp8KVState(KVState):
    """k, v float8_e4m3fn [B, Hkv, T, D]; what lies beyond ±448 becomes ±448."""

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        return KVState.shapes(config, max_len, FP8)

    def extend(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Step]:
        """Store the keys and values [B, Hkv, S, D] of a pass; return all that it looks at, and how."""
        return put(to_fp8(k), step, self.k).to(k.dtype), put(to_fp8(v), step, self.v).to(v.dtype), step


STORED: dict[str, type[KVState]] = {"int8": Int8KVState, "fp8": Fp8KVState}


def stored_as(name: str) -> type[KVState]:
    """The state of an attention layer that keeps its tokens so. Raises UnknownNameError."""
    if name not in STORED:
        raise UnknownNameError(
            f"a cache cannot be stored as {name!r}.",
            "Keys and values are kept in the model's format, or in 8 bits.",
            f"one of {', '.join(STORED)}, or None for the model's format.",
        )
    return STORED[name]


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] → codes int8 [..., D] and scale bfloat16 [..., 1]; codes fit the scale as it was rounded."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).to(SCALE)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale.float()).to(dtype)


def to_fp8(x: Tensor) -> Tensor:
    """x in e4m3, saturated (what a cast does beyond 448 depends on the version of PyTorch)."""
    largest = torch.finfo(FP8).max
    return x.clamp(-largest, largest).to(FP8)


def put(new: Tensor, step: Step, held: Tensor) -> Tensor:
    """Store [B, Hkv, S, ·] at the positions of a pass in `held` [B, Hkv, T, ·]; return all it looks at."""
    if step.start is None:
        index = step.positions.view(-1, 1, 1, 1).expand_as(new)
        # As bytes: PyTorch scatters no FP8.
        kind = torch.uint8 if held.dtype.itemsize == 1 else held.dtype
        held.view(kind).scatter_(2, index, new.view(kind))
        return held[:, :, : step.span]
    end = step.start + new.shape[2]
    held[:, :, step.start : end] = new
    return held[:, :, :end]
