"""The Hyena operator (Poli et al. 2023, arXiv:2302.10866): gates around a long convolution.

    q, k, v = short convolutions of three projections of x
    y = out( q ⊙ (h ∗ (k ⊙ v) + skip · (k ⊙ v)) )

Read next to attention: the filter h says how much a token at distance t counts, the same for every token and
text, in S·log S by FFT; what depends on the text are the two gates, feature by feature. What it cannot do is
to look up *which* earlier token fits the current one, and so a StripedHyena-style stack puts attention into
some of its layers: `layers = ("hyena", "hyena", "attention", …)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcourse.models.fft_conv import fft_flops
from llmcourse.models.linear import Linear
from llmcourse.models.long_filter import FILTERS
from llmcourse.models.recurrent import accumulator, accumulator_size
from llmcourse.models.short_conv import ShortConv
from llmcourse.models.state import Shapes, State

if TYPE_CHECKING:
    from llmcourse.models.config import ModelConfig
    from llmcourse.models.step import Step


class Taps:
    """A filter's values [E, T], the last first, worked out when a sequence begins; one for all rows.

    Written in place: a CUDA graph finds them where they were when it was captured.
    """

    def __init__(self, table: Tensor) -> None:
        self.table, self.known = table, False

    def backwards(self, taps: Callable[[int], Tensor]) -> Tensor:
        if not self.known:
            self.table.copy_(taps(self.table.shape[1]).detach().flip(-1))
            self.known = True
        return self.table


class HyenaState(State):
    """tail [B, d_conv − 1, 3E], the last inputs of the short convolutions, and what the filter needs:

    implicit   history [B, E, T], every input so far: E numbers a token, half of multi-head attention's
    modal      modes [B, E, N, 2], one complex number a mode

    `taps` keeps the implicit filter's values while a sequence lasts. They come from the weights and serve all
    rows, so they are not counted in `nbytes` (nor are the tables of RoPE).
    """

    recurrent = True
    tail: Tensor
    history: Tensor
    modes: Tensor
    taps: Taps

    def __init__(self, config: ModelConfig, batch: int, max_len: int, **options: Any) -> None:
        super().__init__(config, batch, max_len, **options)
        if config.hyena.kind != "modal":
            kind = accumulator(self.tail.dtype)
            self.taps = Taps(torch.zeros(config.d_model, max_len, dtype=kind, device=self.tail.device))

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        sizes, width = config.hyena, config.d_model
        tail = {"tail": ((sizes.d_conv - 1, 3 * width), dtype)}
        if sizes.kind == "modal":
            return {**tail, "modes": ((width, sizes.d_state, 2), accumulator(dtype))}
        return {**tail, "history": ((width, max_len), dtype)}

    def reset(self) -> None:
        super().reset()
        if hasattr(self, "taps"):
            self.taps.known = False


class Hyena(nn.Module):
    """Order 2, as in the paper's language models: one long convolution between two gates."""

    state = HyenaState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.proj = Linear(width, 3 * width, bias=config.bias)
        self.conv = ShortConv(3 * width, config.hyena.d_conv)
        self.filter = FILTERS[config.hyena.kind](config)
        self.skip = nn.Parameter(torch.ones(width))
        self.out = Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, step: Step, state: HyenaState | None) -> Tensor:
        """x [B, S, E] → [B, S, E]; with a state, x continues the sequences that it holds."""
        mixed, tail = self.conv(self.proj(x), None if state is None else state.tail)
        if state is not None:
            state.tail.copy_(tail.detach())
        q, k, v = mixed.chunk(3, dim=-1)
        u = k * v
        y = self.filter.convolve(u.transpose(1, 2), step, state).transpose(1, 2)
        return self.out(q * torch.addcmul(y, self.skip, u))

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        width = config.d_model
        biases = 4 * width * config.bias
        convs = ShortConv.n_params(3 * width, config.hyena.d_conv)
        return 4 * width * width + biases + convs + width + FILTERS[config.hyena.kind].n_params(config)

    @staticmethod
    def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
        """implicit: E·T numbers and the tail; modal: 2·E·N and the tail, whatever `tokens`."""
        sizes, width = config.hyena, config.d_model
        tail = 3 * width * (sizes.d_conv - 1) * itemsize
        if sizes.kind == "implicit":
            return tail + width * tokens * itemsize
        return tail + 2 * width * sizes.d_state * accumulator_size(itemsize)

    @staticmethod
    def flops(config: ModelConfig, tokens: int) -> int:
        """Multiplications and additions of a whole sequence, projections and the filter itself included."""
        width = config.d_model
        projections = 2 * tokens * 4 * width * width
        gates = tokens * width * (3 * 2 * config.hyena.d_conv + 4)
        filters = FILTERS[config.hyena.kind].flops(config, tokens)
        return projections + gates + filters + round(width * fft_flops(tokens))
