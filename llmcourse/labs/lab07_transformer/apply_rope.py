"""Exercise `apply_rope`: positions as rotations, so that only distances count."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

apply_rope = Exercise(
    "apply_rope",
    title="Positions as rotations: RoPE",
    arguments=("x", "positions", "theta"),
    shapes=(
        "x          tensor [B, H, S, D] of queries or keys, D even; float32, float16 or bfloat16",
        "positions  int64 tensor [B, S]: where each token stands, in its own sequence",
        "theta      θ, a float: the base of the wavelengths (10,000 in Llama 2, 100,000 in SmolLM2)",
        "returns    tensor [B, H, S, D] of x's format; the angles are computed in float32",
        "",
        "A head's features are D/2 pairs: feature i < D/2 belongs to feature i + D/2. Pair i of a",
        "token at position p is turned by p·θ^(−2i/D) radians, counter-clockwise.",
    ),
    formula="a, b = halves of x:  (a, b) → (a·cos φ − b·sin φ, a·sin φ + b·cos φ),  φ[p, i] = p·θ^(−2i/D)",
    difficulty=2,
    importance=5,
    minutes=25,
    points=4,
    hints=(
        "There are D/2 angles for each token, the same for all heads. What shape must the table of angles "
        "have, so that it meets the halves of x, [B, H, S, D/2]?",
        "Exponents first: 2i/D for i = 0 … D/2 − 1, in float32. Angles are positions, as float32, times "
        "θ^(−2i/D): [B, S, D/2], with an axis of one for the heads in between. Split x in two halves, turn, "
        "and put the halves together again; go back to x's format at the end.",
        "freq = theta ** -(torch.arange(0, D, 2) / D); phi = positions[:, None, :, None].float() * freq; "
        "a, b = x.float().chunk(2, dim=-1); "
        "torch.cat((a * phi.cos() − b * phi.sin(), …), dim=-1).to(x.dtype)",
    ),
)


def expected(x: Any, positions: Any, theta: float) -> np.ndarray:
    """Each pair as a complex number, times e^{iφ}, in float64."""
    wide = x.double().numpy()
    half = wide.shape[-1] // 2
    phi = positions.numpy()[:, None, :, None] * theta ** (-np.arange(half) / half)
    turned = (wide[..., :half] + 1j * wide[..., half:]) * np.exp(1j * phi)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def places(t: Trial, starts: Any, length: int) -> Any:
    """Positions [B, S] of sequences that go on from `starts`."""
    return torch.from_numpy(np.asarray(starts, dtype=np.int64)[:, None] + np.arange(length))


def _agree(t: Trial, x: Any, positions: Any, theta: float = 10_000.0, what: str = "") -> Any:
    got = t.call(x, positions, theta)
    want = expected(x, positions, theta)
    # An angle of p radians in float32 is off by 6·10⁻⁸·p, and what is turned by it as much.
    slack = 2e-7 * float(positions.max()) + 1e-5 if x.itemsize == 4 else None
    t.close(got, want, what, atol=None if slack is None else slack * float(np.abs(want).max()))
    return got


@apply_rope.check("at position 0 nothing turns")
def origin(t: Trial) -> None:
    x = tensor(t, 1, 2, 1, 8)
    _agree(t, x, places(t, [0], 1))


@apply_rope.check("a query's product with a key depends on their distance, wherever they stand")
def relative(t: Trial) -> None:
    q, k = tensor(t, 1, 1, 1, 16), tensor(t, 1, 1, 1, 16)
    distance = t.size(2, 9)
    products = []
    for start in (0, t.size(10, 30)):
        turned = [t.call(x, places(t, [p], 1), 100.0) for x, p in ((q, start + distance), (k, start))]
        for value, x in zip(turned, (q, k), strict=True):
            t.equal(list(getattr(value, "shape", ())), list(x.shape), "shape")
        products.append((start, float((turned[0].double() * turned[1].double()).sum())))
    (_, near), (start, far) = products
    size = float(q.norm() * k.norm())
    t.holds(
        abs(near - far) <= 1e-4 * size,
        f"a query {distance} places behind its key: their product is {near:.4f} at the sequence's start, "
        f"and {far:.4f} at positions {start + distance} and {start}",
    )


@apply_rope.check("pair (i, i + D/2) at position p turns by p·θ^(−2i/D)")
def angles(t: Trial) -> None:
    _agree(t, tensor(t, 1, 1, 2, 2), places(t, [0], 2))
    for dim in (8, 2 * t.odd(3, 9)):
        _agree(t, tensor(t, 1, 3, 7, dim), places(t, [0], 7))


@apply_rope.check("another θ gives other wavelengths")
def bases(t: Trial) -> None:
    for theta in (100.0, 100_000.0):
        _agree(t, tensor(t, 1, 2, 5, 12), places(t, [0], 5), theta)


@apply_rope.check("any positions: behind a cache, in any order, each sequence its own")
def anywhere(t: Trial) -> None:
    _agree(t, tensor(t, 1, 2, 1, 8), places(t, [t.size(5, 90)], 1), what="one token behind a cache")
    _agree(t, tensor(t, 1, 2, 4, 8), places(t, [t.size(5, 90)], 4), what="four tokens behind a cache")
    starts = [t.size(0, 9), t.size(20, 40), t.size(1000, 1900)]
    _agree(t, tensor(t, 3, 2, 4, 8), places(t, starts, 4), what=f"sequences that go on at {starts}")
    x, positions = tensor(t, 2, 3, 5, 8), places(t, [3, 60], 5)
    _agree(t, x, positions.flip(1), what="positions that count down")


@apply_rope.check("16-bit formats come and go; angles are float32")
def formats(t: Trial) -> None:
    for dtype in ("float16", "bfloat16"):
        x = tensor(t, 2, 2, 3, 16, dtype=dtype)
        got = _agree(t, x, places(t, [t.odd(257, 999), 1], 3), what=dtype)
        told = str(getattr(got, "dtype", "none")).removeprefix("torch.")
        t.equal(told, dtype, "number format")


@apply_rope.check("x stays as it is")
def kept(t: Trial) -> None:
    t.call(tensor(t, 1, 2, 3, 8), places(t, [4], 3), 10_000.0)
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def angles_of(positions: Any, theta: float, dim: int) -> Any:
    """φ [B, 1, S, D/2], in float32."""
    freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return positions[:, None, :, None].float() * freq


def turned(x: Any, phi: Any) -> Any:
    """The halves of x turned by φ."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = phi.cos(), phi.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


@apply_rope.mistake(
    says="neighbours are paired, feature 2i with 2i + 1, as in the paper and in GGUF files",
    tries="the two halves of x, x.chunk(2, dim=-1): checkpoints of Hugging Face pair i with i + D/2.",
    caught_by="angles",
)
def neighbours(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1])
    a, b = x[..., ::2].float(), x[..., 1::2].float()
    pairs = torch.stack((a * phi.cos() - b * phi.sin(), a * phi.sin() + b * phi.cos()), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


@apply_rope.mistake(
    says="the pairs turn clockwise: the minus stands at the other sine",
    tries="a·cos − b·sin in the first half, a·sin + b·cos in the second.",
    caught_by="angles",
)
def clockwise(x: Any, positions: Any, theta: float) -> Any:
    return turned(x, -angles_of(positions, theta, x.shape[-1]))


@apply_rope.mistake(
    says="the exponent is −i/D: it runs from 0 to −1/2, not to −1",
    tries="theta ** -(torch.arange(0, D, 2) / D).",
    caught_by="angles",
)
def half_the_exponent(x: Any, positions: Any, theta: float) -> Any:
    half = x.shape[-1] // 2
    freq = theta ** -(torch.arange(half, dtype=torch.float32) / x.shape[-1])
    return turned(x, positions[:, None, :, None].float() * freq)


@apply_rope.mistake(
    says="the exponent has the wrong sign: later pairs turn faster, and should turn slower",
    tries="theta ** −(2i/D).",
    caught_by="angles",
)
def growing(x: Any, positions: Any, theta: float) -> Any:
    return turned(x, angles_of(positions, 1 / theta, x.shape[-1]))


@apply_rope.mistake(
    says="positions are counted from 0 in every call, and `positions` is not asked",
    tries="positions, where you have torch.arange(S).",
    caught_by="anywhere",
)
def from_zero(x: Any, positions: Any, theta: float) -> Any:
    counted = torch.arange(x.shape[2]).expand(len(x), -1)
    return turned(x, angles_of(counted, theta, x.shape[-1]))


@apply_rope.mistake(
    says="the positions of the first sequence are used for all",
    tries="positions[:, None, :, None]: the batch is an axis of the angles too.",
    caught_by="anywhere",
)
def first_for_all(x: Any, positions: Any, theta: float) -> Any:
    return turned(x, angles_of(positions[:1], theta, x.shape[-1]))


@apply_rope.mistake(
    says="only where a sequence begins is used, and its tokens are taken to follow each other",
    tries="every element of positions, not positions[:, 0] + torch.arange(S).",
    caught_by="anywhere",
)
def from_the_first(x: Any, positions: Any, theta: float) -> Any:
    counted = positions[:, :1] + torch.arange(x.shape[2])
    return turned(x, angles_of(counted, theta, x.shape[-1]))


@apply_rope.mistake(
    says="sine and cosine are exchanged",
    tries="cos where nothing turned yet: at angle 0 it is 1.",
    caught_by="origin",
)
def exchanged(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1])
    return turned(x, torch.pi / 2 - phi)


@apply_rope.mistake(
    says="positions are counted from 1",
    tries="positions as they are: the first token does not turn.",
    caught_by="origin",
)
def from_one(x: Any, positions: Any, theta: float) -> Any:
    return turned(x, angles_of(positions + 1, theta, x.shape[-1]))


@apply_rope.mistake(
    says="two conventions are mixed: frequencies repeated for neighbours, features paired by halves",
    tries="D/2 frequencies, used for both halves; torch.cat((freq, freq)) if you need D of them.",
    caught_by="relative",
)
def mixed(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1]).repeat_interleave(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * phi.cos() + torch.cat((-b, a), dim=-1) * phi.sin()).to(x.dtype)


@apply_rope.mistake(
    says="the minus is missing: that is no rotation, and lengths change",
    tries="a·cos − b·sin in the first half.",
    caught_by="relative",
)
def no_minus(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1])
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = phi.cos(), phi.sin()
    return torch.cat((a * cos + b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


@apply_rope.mistake(
    says="the second half stays as it was",
    tries="both halves, each from the old a and b.",
    caught_by="relative",
)
def one_half(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1])
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * phi.cos() - b * phi.sin(), b), dim=-1).to(x.dtype)


@apply_rope.mistake(
    says="the second half is computed from the first one after it was turned",
    tries="a new tensor for the first half: the second needs the old a.",
    caught_by="relative",
)
def one_after_the_other(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1])
    a, b = x.float().chunk(2, dim=-1)
    a = a * phi.cos() - b * phi.sin()
    return torch.cat((a, a * phi.sin() + b * phi.cos()), dim=-1).to(x.dtype)


@apply_rope.mistake(
    says="θ is 10,000 whatever the argument says",
    tries="the argument theta.",
    caught_by="bases",
)
def ten_thousand(x: Any, positions: Any, theta: float) -> Any:
    return turned(x, angles_of(positions, 10_000.0, x.shape[-1]))


@apply_rope.mistake(
    says="the angles are computed in x's format: bfloat16 cannot tell position 257 from 258",
    tries="positions.float(), and the format of x at the very end.",
    caught_by="formats",
)
def narrow_angles(x: Any, positions: Any, theta: float) -> Any:
    freq = theta ** -(torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1])
    phi = positions[:, None, :, None].to(x.dtype) * freq.to(x.dtype)
    return turned(x, phi)


@apply_rope.mistake(
    says="the result is float32, whatever came in",
    tries=".to(x.dtype) at the end.",
    caught_by="formats",
)
def widened(x: Any, positions: Any, theta: float) -> Any:
    return turned(x.float(), angles_of(positions, theta, x.shape[-1]))


@apply_rope.mistake(
    says="x itself is turned: whoever gave it away finds it changed",
    tries="torch.cat of two new halves, not x[…] = ….",
    caught_by="kept",
)
def in_place(x: Any, positions: Any, theta: float) -> Any:
    x[...] = turned(x, angles_of(positions, theta, x.shape[-1]))
    return x


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@apply_rope.alternative("pairs as complex numbers, multiplied by e^{iφ}")
def by_complex(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1])
    pairs = torch.complex(*x.float().chunk(2, dim=-1)) * torch.polar(torch.ones_like(phi), phi)
    return torch.cat((pairs.real, pairs.imag), dim=-1).to(x.dtype)


@apply_rope.alternative("tables of width D, and x with its halves exchanged")
def by_tables(x: Any, positions: Any, theta: float) -> Any:
    phi = angles_of(positions, theta, x.shape[-1])
    cos, sin = torch.cat((phi.cos(), phi.cos()), -1), torch.cat((-phi.sin(), phi.sin()), -1)
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


@apply_rope.alternative("a matrix of D × D for each position")
def by_matrices(x: Any, positions: Any, theta: float) -> Any:
    half = x.shape[-1] // 2
    phi = angles_of(positions, theta, x.shape[-1])[:, 0].double()
    turn = torch.diag_embed(torch.cat((phi.cos(), phi.cos()), -1))
    turn[..., range(half), range(half, 2 * half)] = -phi.sin()
    turn[..., range(half, 2 * half), range(half)] = phi.sin()
    return torch.einsum("bsij,bhsj->bhsi", turn, x.double()).to(x.dtype)
