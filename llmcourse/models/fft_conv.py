"""Causal convolution with a filter as long as the sequence, by FFT: S·log S instead of S².

    y_t = Σ_{s ≤ t} h_{t−s} u_s

A product of two spectra is a *circular* convolution: what runs out at the end comes back in at the start, so
the first outputs would hold the future. With both padded by zeros to S + L − 1 places or more, nothing that
runs out reaches a place that is read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmcourse.models.recurrent import accumulator


def fft_size(length: int, taps: int) -> int:
    """The transform's length: the power of two from length + taps − 1 on."""
    return 1 << max(0, length + taps - 2).bit_length()


def fft_conv(u: Tensor, h: Tensor) -> Tensor:
    """Causal convolution of u [..., S] with h [..., L] along the last dimension: [..., S], of u's type.

    Leading dimensions broadcast. Computed in float32 at least (there is no FFT in bfloat16).
    """
    length, kind = u.shape[-1], accumulator(u.dtype)
    n = fft_size(length, h.shape[-1])
    spectrum = torch.fft.rfft(u.to(kind), n=n) * torch.fft.rfft(h.to(kind), n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :length].to(u.dtype)


def toeplitz(h: Tensor, length: int) -> Tensor:
    """The convolution as a matrix [..., S, S]: entry (t, s) is h[t − s], and 0 above the diagonal."""
    t = torch.arange(length, device=h.device)
    lag = t.unsqueeze(1) - t
    taps = torch.where((lag >= 0) & (lag < h.shape[-1]), h[..., lag.clamp(0, h.shape[-1] - 1)], 0)
    return taps


def direct_conv(u: Tensor, h: Tensor) -> Tensor:
    """The same convolution by its definition: u [..., S], h [..., L] → [..., S] in S² multiplications."""
    return (toeplitz(h, u.shape[-1]).to(u.dtype) @ u.unsqueeze(-1)).squeeze(-1)


def fft_flops(length: int) -> float:
    """FLOPs a channel of `fft_conv` with a filter as long as the sequence: 2.5·n·log₂ n a real FFT.

    Two transforms forward, one back, n/2 complex products. (The filter's own transform is counted with it.)
    """
    n = fft_size(length, length)
    return 3 * 2.5 * n * math.log2(n) + 6 * (n // 2 + 1)


def direct_flops(length: int) -> int:
    """FLOPs a channel by the definition, pairs with s ≤ t only."""
    return length * (length + 1)
