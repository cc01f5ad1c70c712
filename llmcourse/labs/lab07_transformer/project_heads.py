"""Exercise `project_heads`: queries, keys and values of every head, from one product each."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

project_heads = Exercise(
    "project_heads",
    title="Queries, keys and values, head by head",
    arguments=("x", "wq", "wk", "wv", "head_dim"),
    shapes=(
        "x         tensor [B, S, E]: B sequences of S tokens, E features each",
        "wq        tensor [Hq·D, E], as torch.nn.Linear keeps its weight: row h·D + d makes feature d",
        "          of head h;  wk, wv [Hkv·D, E], where Hkv may be less than Hq",
        "head_dim  D; neither Hq·D nor Hkv·D need be E",
        "returns   (q, k, v): q [B, Hq, S, D], k and v [B, Hkv, S, D], of x's format",
    ),
    formula="q[b, h, s, d] = Σ_e x[b, s, e] · wq[h·D + d, e], and alike k with wk, v with wv",
    difficulty=1,
    importance=4,
    minutes=15,
    points=3,
    hints=(
        "x @ wq.T has shape [B, S, Hq·D]. Which of its axes holds both head and feature, and in which order "
        "do they lie in it? And where does the head stand in the result?",
        "Split the last axis in two, [B, S, H, D], where the number of heads follows from the weight and D; "
        "then exchange the axes of token and head. A view straight to [B, H, S, D] has the right shape and "
        "mixes tokens with heads.",
        "(x @ w.T).view(B, S, -1, head_dim).transpose(1, 2), for each of wq, wk, wv.",
    ),
)


def expected(x: Any, weights: tuple[Any, ...], dim: int) -> list[np.ndarray]:
    """Each head from its own rows of the weight, in float64."""
    wide = x.double().numpy()
    made = []
    for weight in weights:
        heads = weight.double().numpy().reshape(-1, dim, weight.shape[1])
        made.append(np.einsum("bse,hde->bhsd", wide, heads))
    return made


def _agree(
    t: Trial, sizes: tuple[int, int, int], heads: tuple[int, int], dim: int, dtype: str = "float32"
) -> None:
    """`sizes` B, S, E; `heads` Hq, Hkv."""
    x = tensor(t, *sizes, dtype=dtype)
    weights = tuple(
        tensor(t, n * dim, sizes[2], dtype=dtype, scale=sizes[2] ** -0.5) for n in (heads[0], *2 * heads[1:])
    )
    got = t.pair(t.call(x, *weights, dim), 3, "(q, k, v)")
    for name, value, want in zip("qkv", got, expected(x, weights, dim), strict=True):
        t.close(value, want, name)
        told = str(getattr(value, "dtype", "none")).removeprefix("torch.")
        t.equal(told, dtype, f"number format of {name}")


@project_heads.check("one head and one token: three products")
def single(t: Trial) -> None:
    _agree(t, (1, 1, 8), (1, 1), 8)


@project_heads.check("every token of every head keeps its own features")
def heads(t: Trial) -> None:
    _agree(t, (1, 5, 12), (3, 3), 4)
    _agree(t, (2, t.odd(3, 9), 24), (4, 4), 6)


@project_heads.check("fewer key and value heads than query heads")
def groups(t: Trial) -> None:
    for n, shared in ((6, 2), (4, 1)):
        _agree(t, (2, t.odd(3, 9), n * 4), (n, shared), 4)


@project_heads.check("heads that are together wider or narrower than the stream")
def widths(t: Trial) -> None:
    _agree(t, (2, t.size(), 16), (3, 1), 8)
    _agree(t, (1, 1, 40), (2, 2), 6)


@project_heads.check("16-bit formats come and go")
def formats(t: Trial) -> None:
    for dtype in ("float16", "bfloat16"):
        _agree(t, (2, t.size(3, 7), 24), (4, 2), 6, dtype)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _split(y: Any, dim: int) -> Any:
    """[B, S, H·D] → [B, H, S, D]."""
    return y.view(*y.shape[:2], -1, dim).transpose(1, 2)


@project_heads.mistake(
    says="the product is viewed as [B, H, S, D] at once, which mixes tokens with heads",
    tries=".view(B, S, H, D), then .transpose(1, 2).",
    caught_by="heads",
)
def viewed_at_once(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    batch, length, _ = x.shape
    return tuple((x @ w.T).view(batch, -1, length, head_dim) for w in (wq, wk, wv))


@project_heads.mistake(
    says="the weight is not transposed: x @ w multiplies with columns that belong to no feature",
    tries="x @ w.T: a weight is kept as [outputs, inputs].",
    caught_by="single",
)
def not_transposed(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    return tuple(_split(x @ w, head_dim) for w in (wq, wk, wv))


@project_heads.mistake(
    says="the heads are taken as the last axis: feature d of head h is looked for in row d·H + h",
    tries=".view(B, S, H, D): the features of a head lie side by side.",
    caught_by="heads",
)
def heads_innermost(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    return tuple(
        (x @ w.T).view(*x.shape[:2], head_dim, -1).permute(0, 3, 1, 2).contiguous() for w in (wq, wk, wv)
    )


@project_heads.mistake(
    says="keys and values are exchanged",
    tries="k with wk and v with wv, returned as (q, k, v).",
    caught_by="single",
)
def exchanged(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    return tuple(_split(x @ w.T, head_dim) for w in (wq, wv, wk))


@project_heads.mistake(
    says="the keys are made with the weight of the queries",
    tries="k from wk.",
    caught_by="single",
)
def keys_from_wq(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    return tuple(_split(x @ w.T, head_dim) for w in (wq, wq, wv))


@project_heads.mistake(
    says="keys and values are split into as many heads as queries, and each head is too narrow",
    tries="as many heads as the weight has rows, over D: .view(B, S, -1, head_dim).",
    caught_by="groups",
)
def one_count(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    n_heads = len(wq) // head_dim
    return tuple((x @ w.T).view(*x.shape[:2], n_heads, -1).transpose(1, 2) for w in (wq, wk, wv))


@project_heads.mistake(
    says="the head stays behind the token: [B, S, H, D]",
    tries=".transpose(1, 2) at the end.",
    caught_by="heads",
)
def head_behind(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    return tuple((x @ w.T).view(*x.shape[:2], -1, head_dim) for w in (wq, wk, wv))


@project_heads.mistake(
    says="the number of heads is taken to be E / D",
    tries="the number of rows of each weight, over D.",
    caught_by="widths",
)
def heads_from_the_stream(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    batch, length, width = x.shape
    n_heads = width // head_dim
    shared = n_heads * len(wk) // len(wq)
    return tuple(
        (x @ w.T).view(batch, length, n, head_dim).transpose(1, 2)
        for w, n in ((wq, n_heads), (wk, shared), (wv, shared))
    )


@project_heads.mistake(
    says="the queries are divided by √D here, and attention will do it again",
    tries="the product as it is: the scale belongs to the scores.",
    caught_by="single",
)
def scaled(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    q, k, v = (_split(x @ w.T, head_dim) for w in (wq, wk, wv))
    return q / head_dim**0.5, k, v


@project_heads.mistake(
    says="the results are float32, whatever came in",
    tries="the products in x's own format.",
    caught_by="formats",
)
def widened(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    return tuple(_split(x.float() @ w.float().T, head_dim) for w in (wq, wk, wv))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@project_heads.alternative("einsum, with the weight split into heads")
def by_einsum(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    weights = (w.reshape(-1, head_dim, w.shape[1]) for w in (wq, wk, wv))
    return tuple(torch.einsum("bse,hde->bhsd", x, w) for w in weights)


@project_heads.alternative("one product with the three weights stacked, split afterwards")
def stacked(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    heads = (x @ torch.cat((wq, wk, wv)).T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads.split([len(w) // head_dim for w in (wq, wk, wv)], dim=1)


@project_heads.alternative("a product for each head, put side by side")
def head_by_head(x: Any, wq: Any, wk: Any, wv: Any, head_dim: int) -> Any:
    return [torch.stack([x @ rows.T for rows in w.split(head_dim)], dim=1) for w in (wq, wk, wv)]
