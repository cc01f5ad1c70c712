"""Selective state-space layer, the mixer of Mamba (Gu & Dao 2023, arXiv:2312.00752).

Every channel keeps N numbers h that decay and take in the channel's input x:

    h_t = exp(Δ_t·A) ⊙ h_{t−1} + Δ_t·B_t·x_t        y_t = C_t·h_t + D·x_t

A [C, N] < 0 is learned: N rates of decay a channel. Δ, B and C are computed from the token itself, and that
is the *selection*: with a large Δ a token overwrites the state, with Δ near 0 it leaves no trace. Linear
attention writes every token with the same weight and never forgets; here both are decided by what is read.

The recurrence is linear in h, so it need not run token by token. Two steps (a, b): h → a·h + b one after
the other are one such step,

    (a₂, b₂) after (a₁, b₁)  =  (a₂·a₁, a₂·b₁ + b₂),

and this composition is associative: all prefixes come in log₂(S) rounds (Hillis & Steele 1986,
doi:10.1145/7902.7903; Blelloch 1990), each of S independent operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmcourse.models.linear import Linear, linear
from llmcourse.models.recurrent import accumulator, accumulator_size
from llmcourse.models.short_conv import ShortConv
from llmcourse.models.state import Shapes, State

if TYPE_CHECKING:
    from llmcourse.models.config import ModelConfig
    from llmcourse.models.step import Step

CHUNK, LARGE_CHUNK = 64, 256
"""Tokens whose states exist at a time, on a CPU and on a GPU, where each chunk costs its launches."""
SHORTEST, LONGEST = 1e-3, 1e-1
"""Step sizes Δ of a new layer, spread evenly in their logarithm."""

Scan = Callable[[Tensor, Tensor, Tensor], Tensor]


def scan_sequential(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """h_t = a_t·h_{t−1} + b_t for t = 0 … S−1, from h [B, …] before; a, b and the result [B, S, …]."""
    states = torch.empty_like(b)
    for t in range(a.shape[1]):
        h = torch.addcmul(b[:, t], a[:, t], h, out=states[:, t])
    return states


def scan_parallel(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """The same in ceil(log₂ S) rounds. After the round of reach r, (a_t, b_t) stand for the last 2r steps."""
    a, b = a.clone(), b.clone()
    b[:, 0] += a[:, 0] * h
    reach = 1
    while reach < a.shape[1]:
        b[:, reach:] += (
            a[:, reach:] * b[:, :-reach]
        )  # the product is a new tensor: all are read, then written
        a[:, reach:] = a[:, reach:] * a[:, :-reach]
        reach *= 2
    return b


SCANS: dict[str, Scan] = {"sequential": scan_sequential, "parallel": scan_parallel}


class LinearRecurrence(torch.autograd.Function):
    """A scan with its gradient, which is a scan too, from the last token to the first.

    Every later state sees h_t through h_{t+1} alone, so dL/dh_t collects λ_t = g_t + a_{t+1}·λ_{t+1}; then
    dL/db_t = λ_t and dL/da_t = λ_t·h_{t−1}. Only a and the states are kept, not the rounds of the scan.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h: Tensor, scan: Scan) -> Tensor:
        states = scan(a, b, h)
        ctx.save_for_backward(a, h, states)
        ctx.scan = scan
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, h, states = ctx.saved_tensors
        following = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), dim=1)
        back = ctx.scan(following.flip(1), grad.flip(1), torch.zeros_like(h)).flip(1)
        before = torch.cat((h.unsqueeze(1), states[:, :-1]), dim=1)
        return back * before, back, a[:, 0] * back[:, 0], None


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor | None = None,
    *,
    scan: str = "parallel",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """y_t = C_t·h_t with h_t = exp(Δ_t·A)·h_{t−1} + Δ_t·B_t·x_t, and the last state.

    x, dt [B, S, C], A [C, N] (negative), B, C [B, S, N], h [B, C, N] before the first token (None: zeros)
    → y [B, S, C], h [B, C, N]

    The tokens are taken in chunks, each scanned as `scan` says ("parallel" or "sequential"), so that the
    states [B, chunk, C, N], N times as large as x, exist for one chunk at a time.
    """
    if h is None:
        h = x.new_zeros(x.shape[0], *A.shape)
    out = []
    for x_part, dt_part, b_part, c_part in zip(*(t.split(chunk, dim=1) for t in (x, dt, B, C)), strict=True):
        decay = torch.exp(dt_part.unsqueeze(-1) * A)
        taken = (dt_part * x_part).unsqueeze(-1) * b_part.unsqueeze(2)
        states = LinearRecurrence.apply(decay, taken, h, SCANS[scan])
        out.append((states @ c_part.unsqueeze(-1)).squeeze(-1))
        h = states[:, -1]
    return torch.cat(out, dim=1), h


class SSMState(State):
    """tail [B, d_conv − 1, C], the last inputs of the short convolution, and h [B, C, N]."""

    recurrent = True
    tail: Tensor
    h: Tensor

    @staticmethod
    def shapes(config: ModelConfig, max_len: int, dtype: torch.dtype) -> Shapes:
        channels = config.ssm.expand * config.d_model
        return {
            "tail": ((config.ssm.d_conv - 1, channels), dtype),
            "h": ((channels, config.ssm.d_state), accumulator(dtype)),
        }


class SSM(nn.Module):
    """x → (u, gate) → short convolution of u → selective scan → times silu(gate) → out.

    The weights have the names and shapes of transformers' MambaMixer; only conv1d is [C, width] here.
    scan   "parallel", "sequential" or "fused" (the same numbers), or "auto", see `way`. "fused" is the kernel
           of `llmcourse.kernels.selective_scan`: no gradient, and on a CPU the reference.
    """

    state = SSMState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, channels, rank = config.ssm, config.ssm.expand * config.d_model, dt_rank(config)
        self.splits = [rank, sizes.d_state, sizes.d_state]
        self.in_proj = Linear(config.d_model, 2 * channels, bias=config.bias)
        self.conv1d = ShortConv(channels, sizes.d_conv)
        self.x_proj = Linear(channels, sum(self.splits), bias=False)
        self.dt_proj = Linear(rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, sizes.d_state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = Linear(channels, config.d_model, bias=config.bias)
        self.scan = "auto"
        with torch.no_grad():
            dt = torch.exp(torch.empty(channels).uniform_(math.log(SHORTEST), math.log(LONGEST)))
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, step: Step, state: SSMState | None) -> Tensor:
        """x [B, S, E] → [B, S, E]; with a state, x continues the sequences that it holds."""
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self.conv1d(u, None if state is None else state.tail)
        u = F.silu(u)
        low, b, c = self.x_proj(u).split(self.splits, dim=-1)
        kind = accumulator(x.dtype)
        dt = F.softplus(linear(low, self.dt_proj.weight).to(kind) + self.dt_proj.bias.to(kind))
        A = -torch.exp(self.A_log.to(kind))
        before = None if state is None else state.h
        scan = self.way(u, dt, A, b, c) if self.scan == "auto" else self.scan
        if scan == "fused":
            from llmcourse.kernels.selective_scan import selective_scan as fused_scan

            y, h = fused_scan(u, dt, A, b, c, before)
        else:
            chunk = CHUNK if x.device.type == "cpu" else LARGE_CHUNK
            y, h = selective_scan(u.to(kind), dt, A, b.to(kind), c.to(kind), before, scan=scan, chunk=chunk)
        if state is not None:
            state.tail.copy_(tail.detach())
            state.h.copy_(h.detach())
        y = (y + self.D.to(kind) * u).to(x.dtype)
        return self.out_proj(y * F.silu(gate))

    @staticmethod
    def way(*tensors: Tensor) -> str:
        """The fastest scan of these tensors [B, S, …]: on a GPU the kernel, unless a gradient is wanted.

        One CPU core has nothing to run side by side, and the parallel scan does log₂ S times the work.
        """
        from llmcourse.kernels import language

        if tensors[0].device.type == "cpu" or tensors[0].shape[1] == 1:
            return "sequential"
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        wide = any(t.dtype == torch.float64 for t in tensors)
        plain = learns or wide or torch.compiler.is_compiling() or not language.INSTALLED
        return "parallel" if plain else "fused"

    @staticmethod
    def n_params(config: ModelConfig) -> int:
        e, c, n, rank = (
            config.d_model,
            config.ssm.expand * config.d_model,
            config.ssm.d_state,
            dt_rank(config),
        )
        projections = 3 * e * c + config.bias * (2 * c + e)
        return (
            projections
            + ShortConv.n_params(c, config.ssm.d_conv)
            + c * (rank + 2 * n)
            + c * (rank + 1)
            + c * (n + 1)
        )

    @staticmethod
    def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
        """C·((d_conv − 1) + N) numbers, whatever `tokens`."""
        channels = config.ssm.expand * config.d_model
        return channels * (
            (config.ssm.d_conv - 1) * itemsize + config.ssm.d_state * accumulator_size(itemsize)
        )

    @staticmethod
    def flops(config: ModelConfig, tokens: int) -> int:
        """Multiplications and additions of a whole sequence, projections included, scanned token by token.

        A channel and state: Δ·A, its exponential, (Δ·x)·B, a·h + b and C·h are 7.
        """
        e, c, n, rank = (
            config.d_model,
            config.ssm.expand * config.d_model,
            config.ssm.d_state,
            dt_rank(config),
        )
        projections = 2 * (3 * e * c + c * (rank + 2 * n) + rank * c)
        return tokens * (projections + 2 * c * config.ssm.d_conv + 7 * c * n)


def dt_rank(config: ModelConfig) -> int:
    return config.ssm.dt_rank or math.ceil(config.d_model / 16)
