"""Exercise `modal_step`: a filter without end as a recurrence, with a state of N numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

modal_step = Exercise(
    "modal_step",
    title="The same convolution, token by token",
    arguments=("modes", "u", "poles", "residues"),
    shapes=(
        "modes     complex64 tensor [B, C, N]: the state before this token, zeros before the first",
        "u         float32 tensor [B, C]: this token's input",
        "poles     complex64 tensor [C, N], |pole| < 1;  residues  complex64 tensor [C, N]",
        "returns   (y, modes): the output [B, C], float32, and the state after this token",
        "          so that y over all tokens is the convolution of u with the filter",
        "          h[c, t] = Re Σ_n residues[c, n] · poles[c, n]ᵗ,  t = 0, 1, …",
    ),
    formula="modes ← poles · modes + u;   y = Re Σ_n residues[n] · modes[n]",
    difficulty=2,
    importance=4,
    minutes=15,
    points=3,
    hints=(
        "Write Σ_{s ≤ t} λ^{t−s} u_s for t and for t − 1. What turns one into the other? And at t = 0, "
        "which value of the filter does the newest input meet?",
        "The old state is multiplied by the poles, then the input is added, to every mode alike: λ⁰ = 1, "
        "so the newest input meets h[0]. Only then the output is read, weighted by the residues. The state "
        "stays complex; the real part is taken of the output alone.",
        "modes = poles * modes + u[..., None]; y = (residues * modes).sum(-1).real; return y, modes.",
    ),
)


def taps(poles: Any, residues: Any, length: int) -> np.ndarray:
    """The filter [C, length], by powers, in complex128."""
    p, r = (x.to(torch.complex128).numpy() for x in (poles, residues))
    return np.stack([(r * p**t).sum(-1).real for t in range(length)], axis=-1)


def _draw(t: Trial, channels: int, n: int) -> tuple[Any, Any]:
    size, angle = t.rng.uniform(0.3, 0.95, (channels, n)), t.rng.uniform(0.3, 2.8, (channels, n))
    residues = t.normal(channels, n) + 1j * t.normal(channels, n)
    return tuple(torch.from_numpy(x).to(torch.complex64) for x in (size * np.exp(1j * angle), residues))


def _run(t: Trial, u: Any, poles: Any, residues: Any) -> np.ndarray:
    """Outputs [B, C, S] of inputs u [B, C, S], the state handed from call to call."""
    modes = torch.zeros(u.shape[0], *poles.shape, dtype=torch.complex64)
    out = []
    for i in range(u.shape[-1]):
        y, modes = t.pair(t.call(modes, u[..., i], poles, residues), 2, "a pair (y, modes)")
        t.equal(str(getattr(y, "dtype", type(y).__name__)), "torch.float32", "number format of y")
        t.equal(
            str(getattr(modes, "dtype", type(modes).__name__)), "torch.complex64", "number format of modes"
        )
        t.equal(list(y.shape), list(u.shape[:-1]), "shape of y")
        t.equal(list(modes.shape), [u.shape[0], *poles.shape], "shape of modes")
        out.append(y.double().numpy())
    return np.stack(out, axis=-1)


def convolved(u: Any, h: np.ndarray) -> np.ndarray:
    x = u.double().numpy()
    y = np.zeros_like(x)
    for s in range(x.shape[-1]):
        y[..., s:] += h[:, s : s + 1] * x[..., : x.shape[-1] - s]
    return y


@modal_step.check("the first output is the newest input times h[0]")
def first(t: Trial) -> None:
    u, (poles, residues) = tensor(t, 2, 3, 1), _draw(t, 3, t.size(2, 5))
    t.close(_run(t, u, poles, residues), convolved(u, taps(poles, residues, 1)), rtol=1e-5)


@modal_step.check("a single input of 1 brings out the filter, tap by tap")
def impulse(t: Trial) -> None:
    length, (poles, residues) = t.odd(7, 11), _draw(t, 2, t.size(2, 5))
    u = torch.zeros(1, 2, length)
    u[..., 0] = 1.0
    t.close(_run(t, u, poles, residues)[0], taps(poles, residues, length), rtol=1e-5)


@modal_step.check("it goes on from any state, and leaves the one of the formula")
def continued(t: Trial) -> None:
    for batch, channels, n in ((2, 3, 4), (1, 2, t.size(2, 6))):
        u, (poles, residues) = tensor(t, batch, channels), _draw(t, channels, n)
        modes = torch.from_numpy(t.normal(batch, channels, n) + 1j * t.normal(batch, channels, n))
        y, after = t.pair(t.call(modes.to(torch.complex64), u, poles, residues), 2, "a pair (y, modes)")
        want = poles.to(modes.dtype) * modes + u[..., None]
        t.close(after, want.numpy(), "modes", rtol=1e-5)
        t.close(y, (residues.to(modes.dtype) * want).sum(-1).real.numpy(), "y", rtol=1e-5)


@modal_step.check("all outputs together are the convolution of inputs and filter")
def convolution(t: Trial) -> None:
    length = t.odd(9, 15)
    for batch, channels, n in ((2, 3, 4), (1, 2, 1), (3, 1, t.size(2, 6))):
        u, (poles, residues) = tensor(t, batch, channels, length), _draw(t, channels, n)
        t.close(_run(t, u, poles, residues), convolved(u, taps(poles, residues, length)), rtol=1e-5)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _step(modes: Any, u: Any, poles: Any, residues: Any) -> tuple[Any, Any]:
    modes = poles * modes + u[..., None]
    return (residues * modes).sum(-1).real, modes


@modal_step.mistake(
    says="the output is read before the input is taken in: every tap comes one token late",
    tries="modes = poles * modes + u[..., None] first.",
    caught_by="first",
)
def read_first(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    return (residues * modes).sum(-1).real, poles * modes + u[..., None]


@modal_step.mistake(
    says="the input decays at once, with the state: the newest input meets h[1]",
    tries="poles * modes + u, not poles * (modes + u).",
    caught_by="first",
)
def decayed_at_once(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    modes = poles * (modes + u[..., None])
    return (residues * modes).sum(-1).real, modes


@modal_step.mistake(
    says="the residues are left out",
    tries="residues * modes, summed.",
    caught_by="first",
)
def no_residues(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    return _step(modes, u, poles, torch.ones_like(residues))


@modal_step.mistake(
    says="the size of the complex sum is taken, not its real part",
    tries=".real in place of .abs().",
    caught_by="first",
)
def absolute(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    modes = poles * modes + u[..., None]
    return (residues * modes).sum(-1).abs(), modes


@modal_step.mistake(
    says="the output is twice as large, as if every mode came without its conjugate",
    tries="Re Σ, as the filter is defined here.",
    caught_by="first",
)
def doubled(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    y, modes = _step(modes, u, poles, residues)
    return 2 * y, modes


@modal_step.mistake(
    says="real parts are multiplied, and the imaginary parts of residues and state are lost",
    tries="(residues * modes).sum(-1).real: the real part of the product.",
    caught_by="impulse",
)
def real_parts(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    modes = poles * modes + u[..., None]
    return (residues.real * modes.real).sum(-1), modes


@modal_step.mistake(
    says="the state is made real after every token, and the oscillation stops",
    tries="the complex state; .real is for the output.",
    caught_by="impulse",
)
def real_state(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    y, modes = _step(modes, u, poles, residues)
    return y, modes.real.to(modes.dtype)


@modal_step.mistake(
    says="the state does not decay: the poles are left out",
    tries="poles * modes + u[..., None].",
    caught_by="impulse",
)
def no_decay(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    return _step(modes, u, torch.ones_like(poles), residues)


@modal_step.mistake(
    says="the old state is forgotten: only the newest input is held",
    tries="poles * modes + u[..., None].",
    caught_by="impulse",
)
def forgotten(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    return _step(torch.zeros_like(modes), u, poles, residues)


@modal_step.mistake(
    says="the state before this token is returned, and never gets beyond zero",
    tries="the new modes as the second result.",
    caught_by="impulse",
)
def old_state(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    return _step(modes, u, poles, residues)[0], modes


@modal_step.mistake(
    says="the state is held weighted by the residues, and weighted again when it is read",
    tries="u into the state as it is; residues at the output.",
    caught_by="first",
)
def weighted_twice(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    modes = poles * modes + residues * u[..., None]
    return (residues * modes).sum(-1).real, modes


@modal_step.mistake(
    says="the state is held weighted by the residues: a prompt read by FFT leaves it unweighted",
    tries="u into the state as it is; residues at the output.",
    caught_by="continued",
)
def weighted_state(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    after = poles * modes + residues * u[..., None]
    return after.sum(-1).real, after


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@modal_step.alternative("real and imaginary parts apart")
def by_parts(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    a, b, c, d = modes.real, modes.imag, poles.real, poles.imag
    a, b = a * c - b * d + u.unsqueeze(-1), a * d + b * c
    return (residues.real * a - residues.imag * b).sum(dim=-1), torch.complex(a, b)


@modal_step.alternative("einsum, and the residues' weighting as one product")
def by_einsum(modes: Any, u: Any, poles: Any, residues: Any) -> Any:
    after = torch.einsum("bcn,cn->bcn", modes, poles) + u[:, :, None].to(modes.dtype)
    return [torch.einsum("bcn,cn->bc", after, residues).real, after]
