"""A short causal convolution, one filter a channel: each token is mixed with the few before it.

Linear layers treat tokens one by one, and a recurrent state forgets who stood next to whom. Looking two or
three tokens back is what SSM and Hyena layers use to compare neighbours. Its state is the last width − 1
inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConv(nn.Module):
    """y[t] = Σ_j weight[j] · x[t − (width − 1) + j] + bias, with zeros before the first token.

    weight [C, width], whose last column meets the current token (as in `nn.Conv1d`), bias [C]
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        nn.init.uniform_(self.bias, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, S, C] after `tail` [B, width − 1, C] (None: zeros); the result, and the new tail."""
        before = self.width - 1
        padded = F.pad(x, (0, 0, before, 0)) if tail is None else torch.cat((tail.to(x.dtype), x), dim=1)
        length = x.shape[1]
        y = self.bias.expand_as(x)
        for j in range(self.width):
            y = torch.addcmul(y, padded[:, j : j + length], self.weight[:, j])
        return y, padded[:, length:]

    @staticmethod
    def n_params(channels: int, width: int) -> int:
        return channels * (width + 1)
