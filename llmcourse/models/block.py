"""A block: tokens see each other (the mixer), then each is worked on alone (the feed-forward part)."""

from __future__ import annotations

from torch import Tensor, nn

from llmcourse.models.config import ModelConfig
from llmcourse.models.mixers import MIXERS
from llmcourse.models.mlp import mlp
from llmcourse.models.norm import norm
from llmcourse.models.state import State
from llmcourse.models.step import Step


class Block(nn.Module):
    """Pre-norm residual block: the stream x only ever has something added to it.

    With `config.post_norm` the norms stand after the sums, as in the first transformer.
    """

    def __init__(self, config: ModelConfig, kind: str = "attention") -> None:
        super().__init__()
        self.mixer_norm = norm(config)
        self.mixer: nn.Module = MIXERS[kind](config)
        self.mlp_norm: nn.Module | None = norm(config) if config.d_ff else None
        self.mlp: nn.Module | None = mlp(config) if config.d_ff else None
        self.post_norm = config.post_norm

    def forward(self, x: Tensor, step: Step, state: State | None) -> Tensor:
        if self.post_norm:
            x = self.mixer_norm(x + self.mixer(x, step, state))
            return x if self.mlp is None else self.mlp_norm(x + self.mlp(x))  # type: ignore[misc]
        x = x + self.mixer(self.mixer_norm(x), step, state)
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))  # type: ignore[misc]
