"""Exercise `causal_fft_conv`: a convolution as long as the sequence, without its square."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

causal_fft_conv = Exercise(
    "causal_fft_conv",
    title="A long convolution by FFT",
    arguments=("u", "h"),
    shapes=(
        "u        tensor [B, C, S]: S inputs of each of C channels",
        "h        tensor [C, K]: each channel's filter; K may be less than S, equal, or more",
        "returns  tensor [B, C, S] in the number format of u, computed in float32 at least (torch has no",
        "         FFT of 16-bit numbers)",
        "cost     no intermediate larger than B · C · 4(S + K) complex numbers: no S × S matrix",
    ),
    formula="y[b, c, t] = Σ_{s ≤ t} h[c, t − s] · u[b, c, s],  h = 0 from K on",
    difficulty=3,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "A product of two spectra of length n is a convolution on a ring of n places. With n = S, where "
        "does the part of u[S − 1] go that h[1] moves on by one? How long is everything that comes out, "
        "S inputs and K taps?",
        "S + K − 1 places are enough for all that comes out, so nothing reaches the beginning again. The "
        "FFT pads with zeros itself: rfft(x, n=…). Take the first S of what comes back, and tell irfft "
        "the length: from n // 2 + 1 frequencies it can't know whether n was odd.",
        "n = u.shape[-1] + h.shape[-1] - 1 (or more); spectrum = torch.fft.rfft(u.float(), n=n) * "
        "torch.fft.rfft(h.float(), n=n); torch.fft.irfft(spectrum, n=n)[..., : u.shape[-1]].to(u.dtype).",
    ),
)


def expected(u: Any, h: Any) -> np.ndarray:
    """Tap by tap, in float64."""
    x, taps = u.double().numpy(), h.double().numpy()
    y, length = np.zeros_like(x), x.shape[-1]
    for s in range(min(length, taps.shape[-1])):
        y[..., s:] += taps[:, s : s + 1] * x[..., : length - s]
    return y


def _agree(
    t: Trial, batch: int, channels: int, length: int, taps: int, rtol: float = 1e-5, **how: Any
) -> None:
    u, h = tensor(t, batch, channels, length, **how), tensor(t, channels, taps, **how)
    t.close(t.call(u, h), expected(u, h), rtol=rtol)


@causal_fft_conv.check("a filter as long as the sequence: each output holds its own and earlier inputs")
def values(t: Trial) -> None:
    n = t.odd(7, 15)
    _agree(t, 2, 3, n, n)
    _agree(t, 1, 2, n + 1, n + 1)


@causal_fft_conv.check("shorter filters and longer ones")
def lengths(t: Trial) -> None:
    n = t.odd(9, 15)
    for taps in (1, 2, t.size(3, n - 1), n + t.size(1, 9)):
        _agree(t, 2, 3, n, taps)
    for size in ((1, 1), (1, 5), (2, 2)):
        _agree(t, 1, 2, *size)


@causal_fft_conv.check("any length, odd, prime or a power of 2, to float32's accuracy")
def long(t: Trial) -> None:
    for n in (64, t.odd(301, 501), 509, 1000):
        _agree(t, 1, 2, n, n, rtol=5e-6)


@causal_fft_conv.check("an output does not change when a later input does")
def causal(t: Trial) -> None:
    n = t.odd(9, 15)
    u, h = tensor(t, 1, 2, n), tensor(t, 2, n)
    u[..., n // 2 :] *= 1e3
    t.close(t.call(u, h)[..., : n // 2], expected(u, h)[..., : n // 2], atol=0.02)


@causal_fft_conv.check("16-bit numbers come and go, float32 computes")
def formats(t: Trial) -> None:
    for dtype, rtol in (("bfloat16", 8e-3), ("float16", 2e-3)):
        n = t.odd(21, 35)
        u, h = tensor(t, 2, 3, n, dtype=dtype), tensor(t, 3, n, dtype=dtype)
        got = t.call(u, h)
        t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), dtype, "number format")
        t.close(got, expected(u, h), rtol=rtol)
    u, h = tensor(t, 1, 2, 9, dtype="float64"), tensor(t, 2, 9, dtype="float64")
    t.close(t.call(u, h), expected(u, h), rtol=1e-10)


@causal_fft_conv.check("no intermediate grows with the square of the length")
def cost(t: Trial) -> None:
    for batch, channels, n, taps in ((2, 3, 256, 256), (1, 2, 300, 41)):
        u, h = tensor(t, batch, channels, n), tensor(t, channels, taps)
        call = t.perform(u, h, watch=("largest_intermediate",))
        t.close(call.value, expected(u, h), rtol=1e-5)
        t.at_most(
            call.costs["largest_intermediate"],
            8 * batch * channels * 4 * (n + taps),
            f"bytes of the largest intermediate, with inputs of {u.nbytes:,} bytes",
            "spectra: rfft, a product, irfft.",
        )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _wide(x: Any) -> Any:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolve(u: Any, h: Any, n: int, *, first: int = 0, conj: bool = False, back: Any = None) -> Any:
    """Through spectra of length n, in u's number format: `first` is the first place that is read."""
    a, b = torch.fft.rfft(_wide(u), n=n), torch.fft.rfft(_wide(h), n=n)
    y = torch.fft.irfft(a * (b.conj() if conj else b), n=n if back is None else back(n))
    return y[..., first : first + u.shape[-1]].to(u.dtype)


def _n(u: Any, h: Any) -> int:
    return int(u.shape[-1] + h.shape[-1] - 1)


@causal_fft_conv.mistake(
    says="nothing is padded: what runs out at the end comes in again at the beginning",
    tries="n = S + K − 1 or more, in all three transforms.",
    caught_by="values",
)
def circular(u: Any, h: Any) -> Any:
    return convolve(u, h, max(u.shape[-1], h.shape[-1]))


@causal_fft_conv.mistake(
    says="the padding is half as long as it must be, n = S + K // 2: the rest comes round",
    tries="n = S + K − 1 or more.",
    caught_by="values",
)
def half_padded(u: Any, h: Any) -> Any:
    return convolve(u, h, max(u.shape[-1] + h.shape[-1] // 2, h.shape[-1]))


@causal_fft_conv.mistake(
    says="n = 2·K: enough where both are equally long; where the filter is short, inputs are cut off",
    tries="n from both lengths: S + K − 1.",
    caught_by="lengths",
)
def twice_the_filter(u: Any, h: Any) -> Any:
    return convolve(u, h, 2 * h.shape[-1])


@causal_fft_conv.mistake(
    says="the filter is reversed: h[K − 1] meets the newest input",
    tries="h as it is: h[0] is the weight of the input at the same time.",
    caught_by="values",
)
def reversed_filter(u: Any, h: Any) -> Any:
    return convolve(u, h.flip(-1), _n(u, h))


@causal_fft_conv.mistake(
    says="this is a correlation: outputs hold later inputs in place of earlier ones",
    tries="the product of the spectra without .conj().",
    caught_by="values",
)
def correlated(u: Any, h: Any) -> Any:
    return convolve(u, h, _n(u, h), conj=True)


@causal_fft_conv.mistake(
    says="the middle S of the outputs are taken, as in padding 'same': outputs hold later inputs",
    tries="[..., :S]: the first output is made of the first input alone.",
    caught_by="values",
)
def centred(u: Any, h: Any) -> Any:
    return convolve(u, h, _n(u, h), first=(h.shape[-1] - 1) // 2)


@causal_fft_conv.mistake(
    says="the last S of the outputs are taken",
    tries="[..., :S]: the first output is made of the first input alone.",
    caught_by="values",
)
def last_taken(u: Any, h: Any) -> Any:
    return convolve(u, h, _n(u, h), first=h.shape[-1] - 1)


@causal_fft_conv.mistake(
    says="everything comes back, S + K − 1 outputs",
    tries="[..., : u.shape[-1]].",
    caught_by="values",
)
def not_cut(u: Any, h: Any) -> Any:
    n = _n(u, h)
    return torch.fft.irfft(torch.fft.rfft(_wide(u), n=n) * torch.fft.rfft(_wide(h), n=n), n=n).to(u.dtype)


@causal_fft_conv.mistake(
    says="irfft is not told the length and makes it even: for an odd n all outputs move",
    tries="torch.fft.irfft(spectrum, n=n).",
    caught_by="values",
)
def even_inverse(u: Any, h: Any) -> Any:
    return convolve(u, h, _n(u, h), back=lambda n: 2 * (n // 2))


@causal_fft_conv.mistake(
    says="the transform runs along the channels",
    tries="the last axis, which is the default: dim=-1.",
    caught_by="values",
)
def over_channels(u: Any, h: Any) -> Any:
    if h.shape[-1] < u.shape[-1]:
        h = torch.nn.functional.pad(h, (0, u.shape[-1] - h.shape[-1]))
    n = 2 * u.shape[1]
    spectrum = torch.fft.rfft(_wide(u), n=n, dim=1) * torch.fft.rfft(_wide(h[:, : u.shape[-1]]), n=n, dim=0)
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, : u.shape[1]].to(u.dtype)


@causal_fft_conv.mistake(
    says="the spectra are added, not multiplied",
    tries="a product for every frequency.",
    caught_by="values",
)
def added(u: Any, h: Any) -> Any:
    n = _n(u, h)
    y = torch.fft.irfft(torch.fft.rfft(_wide(u), n=n) + torch.fft.rfft(_wide(h), n=n), n=n)
    return y[..., : u.shape[-1]].to(u.dtype)


@causal_fft_conv.mistake(
    says="the result is complex: fft and ifft were taken and the imaginary part was kept",
    tries="rfft and irfft, or .real.",
    caught_by="formats",
)
def complex_result(u: Any, h: Any) -> Any:
    n = _n(u, h)
    return torch.fft.ifft(torch.fft.fft(_wide(u), n=n) * torch.fft.fft(_wide(h), n=n))[..., : u.shape[-1]]


@causal_fft_conv.mistake(
    says="the FFT gets 16-bit numbers, which it does not take",
    tries=".float() before the FFT, .to(u.dtype) after it.",
    caught_by="formats",
)
def not_widened(u: Any, h: Any) -> Any:
    n = _n(u, h)
    if u.dtype == torch.bfloat16:  # what torch says of it
        raise RuntimeError("Unsupported dtype BFloat16")
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(h, n=n), n=n)[..., : u.shape[-1]]


@causal_fft_conv.mistake(
    says="the result stays float32, whatever came in",
    tries=".to(u.dtype) at the end.",
    caught_by="formats",
)
def stays_wide(u: Any, h: Any) -> Any:
    return convolve(_wide(u), _wide(h), _n(u, h))


@causal_fft_conv.mistake(
    says="float32 is asked for even where float64 came in",
    tries="torch.promote_types(u.dtype, torch.float32).",
    caught_by="formats",
)
def narrowed(u: Any, h: Any) -> Any:
    return convolve(u.float(), h.float(), _n(u, h)).to(u.dtype)


@causal_fft_conv.mistake(
    says="the convolution is a product with an S × S matrix",
    tries="spectra: S · log S operations, and memory for a few sequences.",
    caught_by="cost",
)
def by_matrix(u: Any, h: Any) -> Any:
    n = u.shape[-1]
    lag = torch.arange(n)[:, None] - torch.arange(n)
    taps = torch.nn.functional.pad(_wide(h), (0, max(0, n - h.shape[-1])))
    matrix = torch.where(lag >= 0, taps[:, lag.clamp_min(0)], 0)
    return (matrix @ _wide(u)[..., None])[..., 0].to(u.dtype)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@causal_fft_conv.alternative("padded by hand to a power of two, complex transforms")
def padded(u: Any, h: Any) -> Any:
    n = 1 << (u.shape[-1] + h.shape[-1]).bit_length()
    a, b = (torch.nn.functional.pad(_wide(x), (0, n - x.shape[-1])) for x in (u, h))
    y = torch.fft.ifft(torch.fft.fft(a) * torch.fft.fft(b)).real
    return y[..., : u.shape[-1]].to(u.dtype)


@causal_fft_conv.alternative("taps beyond the sequence dropped first")
def dropped(u: Any, h: Any) -> Any:
    h = h[:, : u.shape[-1]]
    return convolve(u, h, 2 * u.shape[-1] - 1)


@causal_fft_conv.alternative("one tap after another, each a shifted input")
def tap_by_tap(u: Any, h: Any) -> Any:
    y, length, wide = torch.zeros_like(_wide(u)), u.shape[-1], _wide(u)
    for s in range(min(length, h.shape[-1])):
        y[..., s:] += _wide(h)[:, s : s + 1] * wide[..., : length - s]
    return y.to(u.dtype)
