"""Exercise `selective_scan`: a recurrence whose forgetting depends on what is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

selective_scan = Exercise(
    "selective_scan",
    title="A selective scan",
    arguments=("x", "dt", "A", "B", "C", "h"),
    shapes=(
        "x, dt    tensors [B, S, E]: E channels' inputs, and their positive step sizes Δ",
        "A        tensor [E, N], negative: the N rates at which a channel forgets",
        "B, C     tensors [B, S, N]: how a token is written into the N numbers, and how they are read",
        "h        tensor [B, E, N]: the state before the first of these tokens",
        "returns  (y, h): outputs [B, S, E], and the state after the last token [B, E, N]",
    ),
    formula="h ← exp(Δ_t · A) · h + Δ_t · B_t · x_t;   y_t = Σ_n C_t[n] · h[n]",
    difficulty=3,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "For one token and one channel everything is N numbers. Which of the arguments have a channel "
        "axis, which an axis of N, and which of both must be given the one that is missing?",
        "For each token: decay [B, E, N] = exp(Δ[..., None] · A), written [B, E, N] = (Δ · x)[..., None] · "
        "B[:, None, :]. Add, then read with C: y = Σ over N. A loop over S is right. (To divide by a "
        "product of decays, which turns the loop into one cumulative sum, underflows: exp(−100) many "
        "times over is 0.)",
        "for t in range(x.shape[1]): h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., "
        "None] * B[:, t, None, :]; y.append((h * C[:, t, None, :]).sum(-1)); return torch.stack(y, 1), h.",
    ),
)


def expected(*given: Any) -> tuple[np.ndarray, np.ndarray]:
    """Number by number in the state's N, in float64."""
    x, dt, A, B, C, h = (a.double().numpy() for a in given)
    y, h = np.zeros(x.shape), h.copy()
    for t in range(x.shape[1]):
        for n in range(A.shape[1]):
            h[:, :, n] = np.exp(dt[:, t] * A[:, n]) * h[:, :, n] + dt[:, t] * B[:, t, n, None] * x[:, t]
            y[:, t] += C[:, t, n, None] * h[:, :, n]
    return y, h


def _draw(t: Trial, batch: int, length: int, channels: int, n: int, step: float = 1.0) -> list[Any]:
    return [
        tensor(t, batch, length, channels),
        tensor(t, batch, length, channels, scale=0.5).exp() * step,
        -tensor(t, channels, n, scale=0.5).exp(),
        tensor(t, batch, length, n),
        tensor(t, batch, length, n),
        torch.zeros(batch, channels, n),
    ]


def _judge(t: Trial, given: list[Any], rtol: float = 2e-5) -> None:
    got = t.pair(t.call(*given), 2, "a pair (y, h)")
    for name, have, want in zip(("y", "h"), got, expected(*given), strict=True):
        t.close(have, want, name, rtol=rtol)


@selective_scan.check("the first token: written with Δ · B, read with C")
def first(t: Trial) -> None:
    _judge(t, _draw(t, 2, 1, 3, t.size(4, 6)))


@selective_scan.check("the state decays by exp(Δ · A) from token to token")
def several(t: Trial) -> None:
    _judge(t, _draw(t, 2, t.odd(5, 9), 3, 4))
    _judge(t, _draw(t, 1, t.odd(5, 9), t.size(2, 5), 6))
    _judge(t, _draw(t, 2, t.odd(5, 9), 4, 4))


@selective_scan.check("it goes on from the state that it is given")
def continued(t: Trial) -> None:
    given = _draw(t, 2, t.odd(3, 7), 3, 4)
    given[5] = tensor(t, 2, 3, 4)
    _judge(t, given)
    given = _draw(t, 1, 1, 2, 3)
    given[5] = tensor(t, 1, 2, 3)
    _judge(t, given)


@selective_scan.check("many tokens, some that wipe the state out, stay finite and exact")
def long(t: Trial) -> None:
    given = _draw(t, 1, t.odd(151, 201), 2, 3)
    given[1][:, ::7] *= 40.0
    _judge(t, given, rtol=1e-4)
    _judge(t, _draw(t, 1, t.odd(151, 201), 2, 3, step=0.01), rtol=1e-4)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def scan(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    h: Any,
    *,
    decay: Any = None,
    write: Any = None,
    before: bool = False,
) -> Any:
    """The right solution; `decay` and `write` say otherwise what a token forgets and writes."""
    out = []
    for t in range(x.shape[1]):
        d, u = dt[:, t, :, None], x[:, t, :, None]
        kept = torch.exp(d * A) if decay is None else decay(d)
        new = kept * h + (d * u * B[:, t, None, :] if write is None else write(d, u, B[:, t, None, :]))
        out.append(((h if before else new) * C[:, t, None, :]).sum(-1))
        h = new
    return torch.stack(out, dim=1), h


@selective_scan.mistake(
    says="the decay is exp(A), the same for every token: Δ is left out",
    tries="torch.exp(dt[:, t, :, None] * A).",
    caught_by="several",
)
def decay_without_step(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h, decay=lambda d: torch.exp(A))


@selective_scan.mistake(
    says="the decay is 1 + Δ·A, exp's first two terms, which turns negative where Δ is large",
    tries="torch.exp.",
    caught_by="several",
)
def decay_linear(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h, decay=lambda d: 1 + d * A)


@selective_scan.mistake(
    says="the decay is Δ·A itself, without the exponential",
    tries="torch.exp(dt · A), between 0 and 1.",
    caught_by="several",
)
def decay_raw(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h, decay=lambda d: d * A)


@selective_scan.mistake(
    says="the decay has the wrong sign, and the state grows",
    tries="exp(Δ · A): A is negative already.",
    caught_by="several",
)
def decay_sign(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h, decay=lambda d: torch.exp(-d * A))


@selective_scan.mistake(
    says="tokens are written with B alone, whatever their step size",
    tries="Δ · B · x: a small step writes little.",
    caught_by="first",
)
def written_without_step(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h, write=lambda d, u, b: u * b)


@selective_scan.mistake(
    says="tokens are written with (exp(Δ·A) − 1) / A · B, the exact hold, where Mamba takes Δ · B",
    tries="Δ · B · x, as in the formula.",
    caught_by="first",
)
def exact_hold(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h, write=lambda d, u, b: torch.expm1(d * A) / A * b * u)


@selective_scan.mistake(
    says="the state is read before the token is written into it",
    tries="y_t from the new state.",
    caught_by="first",
)
def read_first(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h, before=True)


@selective_scan.mistake(
    says="B and C have changed places: tokens are written with C and read with B",
    tries="B where the state is written, C where it is read.",
    caught_by="first",
)
def exchanged(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, C, B, h)


@selective_scan.mistake(
    says="the state is read by a plain sum, without C",
    tries="(h * C[:, t, None, :]).sum(-1).",
    caught_by="first",
)
def unread(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, torch.ones_like(C), h)


@selective_scan.mistake(
    says="the state begins with zeros, whatever was given",
    tries="h as it comes in.",
    caught_by="continued",
)
def from_zero(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, torch.zeros_like(h))


@selective_scan.mistake(
    says="the state that was given is returned, not the one after the last token",
    tries="h after the loop.",
    caught_by="first",
)
def old_returned(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    return scan(x, dt, A, B, C, h)[0], h


@selective_scan.mistake(
    says="sums are divided by cumulative products of decays, which underflow to 0: 0 / 0 after some tokens",
    tries="a loop over the tokens, or a scan that only multiplies decays.",
    caught_by="long",
)
def divided_products(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    kept = torch.exp((dt[..., None] * A).cumsum(1))
    written = (dt * x)[..., None] * B[:, :, None, :]
    states = kept * (h[:, None] + (written / kept).cumsum(1))
    return (states * C[:, :, None, :]).sum(-1), states[:, -1]


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@selective_scan.alternative("in log₂ S rounds: neighbours joined, then pairs, then fours")
def doubling(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    a, b = torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None, :]
    b[:, 0] += a[:, 0] * h
    reach = 1
    while reach < x.shape[1]:
        b = torch.cat((b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]), dim=1)
        a = torch.cat((a[:, :reach], a[:, reach:] * a[:, :-reach]), dim=1)
        reach *= 2
    return torch.einsum("bsen,bsn->bse", b, C), b[:, -1]


@selective_scan.alternative("the loop by einsum, outputs written where they belong")
def by_einsum(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        kept = torch.exp(torch.einsum("be,en->ben", dt[:, t], A))
        h = torch.addcmul(torch.einsum("be,bn->ben", dt[:, t] * x[:, t], B[:, t]), kept, h)
        y[:, t] = torch.einsum("ben,bn->be", h, C[:, t])
    return [y, h]
