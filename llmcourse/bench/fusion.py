"""What fusing saves, counted: the same layers in separate kernels and in one, at a language model's sizes.

Bytes are the different ones of every launch, which must cross the memory whatever a cache serves; a tensor
that one kernel writes and the next reads counts twice, since at a model's sizes it does not stay in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from llmcourse.kernels import add_rms_norm, layer_norm, rms_norm, softmax, swiglu
from llmcourse.kernels.counters import counting


@dataclass(frozen=True)
class Saving:
    """One layer: kernels and bytes apart, bytes fused, and the least there can be."""

    name: str
    launches: int
    separate: int
    fused: int
    least: int

    @property
    def ratio(self) -> float:
        """How many times as many bytes the separate kernels move."""
        return self.separate / self.fused


def ladder(tokens: int, width: int, hidden: int, device: str = "cpu") -> Iterator[Saving]:
    """Softmax, norms, add + norm [tokens, width] and SwiGLU [tokens, hidden] in bf16, counted one by one."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x, residual, w, b = random(tokens, width), random(tokens, width), random(width), random(width)
    layers: dict[ModuleType, tuple[Tensor, ...]] = {
        softmax: (x,),
        rms_norm: (x, w),
        layer_norm: (x, w, b),
        add_rms_norm: (x, residual, w),
        swiglu: (random(tokens, 2 * hidden),),
    }
    for module, inputs in layers.items():
        name = module.__name__.rpartition(".")[2]
        with counting() as separate:
            getattr(module, f"{name}_naive")(*inputs)
        with counting() as fused:
            getattr(module, name)(*inputs)
        least = module.minimum_bytes(tokens, hidden if module is swiglu else width, 2)
        yield Saving(name, len(separate), separate.unique_bytes, fused.unique_bytes, least)
