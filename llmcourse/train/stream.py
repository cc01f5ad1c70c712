"""Batches of a long list of token ids, at a place that can be written down and gone back to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.train.tasks import Batch


class TokenStream(Iterator[Batch]):
    """An endless supply of random stretches [B, S] of `ids`; the target of each token is the one after it.

    The stretches are drawn by a generator of its own, so that nothing else that draws random numbers moves
    them. `state_dict` is that generator: streams with the same state yield the same batches from there on.
    """

    def __init__(
        self, ids: Sequence[int] | Tensor, *, batch: int, length: int, seed: int, device: str = "cpu"
    ) -> None:
        self.ids = torch.as_tensor(ids, dtype=torch.long)
        if len(self.ids) <= length:
            raise ShapeError(
                f"stretches of {length} tokens from a text of {len(self.ids)}.",
                "Every stretch is cut from the text, with one token more for the last target.",
                f"length = {max(0, len(self.ids) - 1)} or less.",
            )
        self.batch, self.length, self.device = batch, length, device
        self.generator = torch.Generator().manual_seed(seed)
        self._window = torch.arange(length + 1)

    def __next__(self) -> Batch:
        last = len(self.ids) - self.length
        starts = torch.randint(0, last, (self.batch, 1), generator=self.generator)
        stretch = self.ids[starts + self._window]
        if self.device != "cpu":
            stretch = stretch.pin_memory().to(self.device, non_blocking=True)
        return Batch((stretch[:, :-1],), stretch[:, 1:])

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
