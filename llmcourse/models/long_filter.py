"""Filters as long as the context, from few parameters: the two kinds that Hyena layers use.

    implicit   h_t = window(t) · network(t): a small network says the value for any t. Any shape is possible,
               and the convolution needs all inputs so far: its state grows with the sequence.
    modal      h_t = Re Σ_n R_n λ_nᵗ with |λ_n| < 1: a sum of decaying oscillations. Each is a recurrence,
               x_t = λ x_{t−1} + u_t, so that N complex numbers a channel are the whole state.

The second is how StripedHyena generates text at constant memory (Massaroli et al. 2023, arXiv:2310.18780,
who distil filters of the first kind into it; Poli et al. 2023, StripedHyena).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models.fft_conv import fft_conv
from llmcourse.models.recurrent import accumulator

if TYPE_CHECKING:
    from llmcourse.models.config import ModelConfig
    from llmcourse.models.hyena import HyenaState
    from llmcourse.models.step import Step

BANDS = 8
"""Frequencies among the features of a position: 1 … BANDS turns over the context."""
SHORTEST = 8
"""Tokens after which the fastest window has fallen to 1/e; the slowest needs the whole context."""


class ImplicitFilter(nn.Module):
    """h [E, L] from a network of two sine layers on features of the position (Poli et al. 2023, section 3.3).

    Sines, since a network of smooth ramps draws smooth filters only; a learned frequency for each unit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hyena.d_filter
        self.max_len, self.channels = config.max_len, config.d_model
        self.enter = nn.Linear(1 + 2 * BANDS, width)
        self.mix = nn.Linear(width, width)
        self.leave = nn.Linear(width, config.d_model, bias=False)
        self.frequency = nn.Parameter(torch.full((width,), 10.0))

    def forward(self, length: int) -> Tensor:
        """The first `length` taps of every channel's filter, [E, length], float32 at least."""
        kind = accumulator(self.leave.weight.dtype)
        t = torch.arange(length, dtype=kind, device=self.leave.weight.device)
        turns = (
            2
            * math.pi
            * t.unsqueeze(1)
            / self.max_len
            * torch.arange(1, BANDS + 1, dtype=kind, device=t.device)
        )
        features = torch.cat((t.unsqueeze(1) / self.max_len, turns.cos(), turns.sin()), dim=1)
        frequency = self.frequency.to(kind)
        for layer in (self.enter, self.mix):
            features = torch.sin(frequency * F.linear(features, layer.weight.to(kind), layer.bias.to(kind)))
        return (F.linear(features, self.leave.weight.to(kind)) * self.window(t)).mT.contiguous()

    def window(self, t: Tensor) -> Tensor:
        """exp(−t / τ) for positions t [L] → [L, E], τ from a few tokens to the context, energy ½."""
        last = max(self.max_len, SHORTEST)
        share = torch.linspace(0, 1, self.channels, dtype=t.dtype, device=t.device)
        tau = SHORTEST * (last / SHORTEST) ** share
        return torch.exp(-t.unsqueeze(1) / tau) * tau.rsqrt()

    def convolve(self, u: Tensor, step: Step, state: HyenaState | None) -> Tensor:
        """u [B, E, S] → [B, E, S], by FFT; with a state, u continues the inputs that it holds."""
        if state is None:
            return fft_conv(u, self(u.shape[-1]))
        # The last tap first: the dot product of a token with all before it needs no flip then.
        history, backwards = state.history, state.taps.backwards(self)
        if step.start is None:
            return self._one_each(u, history, backwards, step.positions)
        end = step.start + u.shape[-1]
        history[..., step.start : end] = u.detach()
        if u.shape[-1] > 1:
            return fft_conv(history[..., :end], backwards.flip(-1)[:, :end])[..., step.start :]
        seen = history[..., :end].to(backwards.dtype)
        return torch.linalg.vecdot(seen, backwards[:, -end:]).unsqueeze(-1).to(u.dtype)

    @staticmethod
    def _one_each(u: Tensor, history: Tensor, backwards: Tensor, positions: Tensor) -> Tensor:
        """One input for each sequence at its own position [B]."""
        history.scatter_(2, positions.view(-1, 1, 1).expand_as(u), u)
        lag = positions.unsqueeze(1) - torch.arange(history.shape[-1], device=u.device)  # [B, T]
        taps = torch.where(lag >= 0, backwards[:, -1 - lag.clamp_min(0)], 0)  # [E, B, T]
        return (history * taps.transpose(0, 1)).sum(-1, keepdim=True).to(u.dtype)

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        width = config.hyena.d_filter
        return width * (1 + 2 * BANDS + 1) + width * (width + 1) + width * config.d_model + width

    @staticmethod
    def flops(config: ModelConfig, tokens: int) -> int:
        """Of making the filter, once for all sequences of a batch."""
        width = config.hyena.d_filter
        return 2 * tokens * width * (1 + 2 * BANDS + width + config.d_model)


class ModalFilter(nn.Module):
    """h_t = Re Σ_n R_n λ_nᵗ, with λ = exp(−exp(log_rate) + i·angle): inside the unit circle by construction.

    log_rate, angle, and R = residue[..., 0] + i·residue[..., 1]: [E, N] each. angle 0 or π is a real pole,
    any other stands for a pole and its conjugate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.d_model, config.hyena.d_state)
        tau = float(max(config.max_len, 2)) ** torch.rand(shape)  # decay over 1 token … the context
        self.log_rate = nn.Parameter(-tau.log())
        self.angle = nn.Parameter(torch.rand(shape) * math.pi)
        self.residue = nn.Parameter(
            torch.randn(*shape, 2) * (tau * config.hyena.d_state).rsqrt().unsqueeze(-1)
        )

    def poles(self) -> Tensor:
        """log λ [E, N], complex."""
        kind = accumulator(self.angle.dtype)
        return torch.complex(-self.log_rate.to(kind).exp(), self.angle.to(kind))

    def residues(self) -> Tensor:
        """R [E, N], complex."""
        return torch.view_as_complex(self.residue.to(accumulator(self.residue.dtype)).contiguous())

    def grid(self, length: int) -> tuple[Tensor, Tensor]:
        """λ^(aK) [E, N, A] and λᵏ [E, N, K] with A·K ≥ length: every power up to there is a product of two.

        2·√length exponentials a mode, where a table of all powers would take `length`.
        """
        poles, fine = self.poles().unsqueeze(-1), math.isqrt(max(length - 1, 0)) + 1
        k = torch.arange(fine, device=poles.device)
        a = fine * torch.arange(-(-length // fine), device=poles.device)
        return torch.exp(poles * a), torch.exp(poles * k)

    def ring(self, start: Tensor, length: int) -> Tensor:
        """Re Σ_n start_n λ_nᵗ for t = 0 … length − 1, from start [..., E, N] complex: [..., E, length].

        Re(xy) = Re x·Re y − Im x·Im y: one matrix product over modes and their two parts.
        """
        coarse, fine = self.grid(length)
        left = start.unsqueeze(-1) * coarse
        left, right = torch.cat((left.real, -left.imag), dim=-2), torch.cat((fine.real, fine.imag), dim=-2)
        return (left.mT @ right).flatten(-2)[..., :length]

    def absorb(self, u: Tensor) -> Tensor:
        """Σ_s λ^(S−1−s) u_s: what inputs u [B, E, S] leave in the modes, [B, E, N] complex."""
        coarse, fine = self.grid(u.shape[-1])
        n_coarse, n_fine = coarse.shape[-1], fine.shape[-1]
        u = F.pad(u, (n_coarse * n_fine - u.shape[-1], 0)).unflatten(-1, (n_coarse, n_fine))
        fine = fine.flip(-1)
        runs = torch.complex(u @ fine.real.mT, u @ fine.imag.mT)  # [B, E, A, N]
        return (runs * coarse.flip(-1).mT).sum(-2)

    def forward(self, length: int) -> Tensor:
        """The first `length` taps of every channel's filter, [E, length], float32 at least."""
        return self.ring(self.residues(), length)

    def convolve(self, u: Tensor, step: Step, state: HyenaState | None) -> Tensor:
        """u [B, E, S] → [B, E, S]: by FFT, and what came before by the state x [B, E, N]."""
        length = u.shape[-1]
        if state is None:
            return fft_conv(u, self(length))
        residues, wide = self.residues(), u.to(accumulator(u.dtype))
        poles, before = self.poles(), torch.complex(*state.modes.unbind(-1))
        if length == 1:
            after = poles.exp() * before + wide
            y = (residues * after).sum(-1, keepdim=True).real
        else:
            y = fft_conv(wide, self(length)) + self.ring(residues * poles.exp() * before, length)
            after = torch.exp(poles * length) * before + self.absorb(wide)
        state.modes.copy_(torch.view_as_real(after.detach()))
        return y.to(u.dtype)

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        return 4 * config.d_model * config.hyena.d_state

    @staticmethod
    def flops(config: ModelConfig, tokens: int) -> int:
        """Of making the filter, once for a whole batch: two products and sums for each tap and mode."""
        return 4 * tokens * config.d_model * config.hyena.d_state


FILTERS: dict[str, type[ImplicitFilter] | type[ModalFilter]] = {
    "implicit": ImplicitFilter,
    "modal": ModalFilter,
}
