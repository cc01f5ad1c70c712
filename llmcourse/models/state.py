"""What a layer keeps of the tokens it has read, so that it need not read them again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmcourse.models.config import ModelConfig

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class State:
    """One layer's memory of `batch` sequences. Its tensors have the batch first and are updated in place.

    So a row can be a view, and a CUDA graph finds the tensors where they were when it was captured.
    `recurrent`: what is kept depends on every token read, and is not overwritten when a token is read again.
    """

    recurrent = False

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, (shape, kind) in self.shapes(config, max_len, dtype).items():
            # Zeros, not empty: masked positions are multiplied by zero weights, and 0 × NaN is NaN.
            setattr(self, name, torch.zeros(batch, *shape, dtype=kind, device=device))

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        """Shape and type of each tensor, of one sequence of up to `max_len` tokens."""
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def row(self, index: int) -> Self:
        """The memory of sequence `index` alone, the same memory."""
        view = copy.copy(self)
        for name, tensor in self.tensors.items():
            setattr(view, name, tensor[index].unsqueeze(0))
        return view

    def reset(self) -> None:
        """Forget: the next token is a sequence's first. Slots addressed by position need no wiping."""
        if self.recurrent:
            for tensor in self.tensors.values():
                tensor.zero_()
