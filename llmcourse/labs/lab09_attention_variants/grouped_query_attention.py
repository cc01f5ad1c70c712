"""Exercise `grouped_query_attention`: query heads share keys and values, and nobody copies them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

grouped_query_attention = Exercise(
    "grouped_query_attention",
    title="Grouped-query attention, nothing copied",
    arguments=("q", "k", "v"),
    shapes=(
        "B sequences, Hq query heads, Hkv key/value heads (Hkv divides Hq), S queries, T ≥ S keys,",
        "D numbers a head",
        "q        tensor [B, Hq, S, D]: the queries of the last S of T tokens",
        "k, v     tensors [B, Hkv, T, D]; query head h uses key/value head h // (Hq / Hkv)",
        "returns  tensor [B, Hq, S, D], causal: query i sees keys 0 … T − S + i",
        "cost     no intermediate larger than q or the scores [B, Hq, S, T], whichever is larger",
    ),
    formula="y[h, i] = Σ_j softmax_j(q[h, i] · k[g, j] / √D) · v[g, j],  g = h // (Hq/Hkv),  j ≤ T − S + i",
    difficulty=3,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "Hq / Hkv heads ask the same keys. To a matrix product, is a query of another head any different "
        "from another query of the same head? And with T keys and S queries, which key is query 0's own?",
        "Give q the shape [B, Hkv, (Hq/Hkv)·S, D]: the queries of a group become rows of one product "
        "with k, and no key is repeated. (q.view(B, Hkv, g, S, D) @ k[:, :, None].mT looks as cheap; "
        "matmul broadcasts by copying.) For the mask, back to [B, Hkv, g, S, T]: its rows are S queries, "
        "and the last one sees everything.",
        "rows = q.reshape(B, Hkv, -1, D); scores = (rows @ k.mT * D**-0.5).view(B, Hkv, g, S, T); seen = "
        "torch.ones(S, T, dtype=torch.bool).tril(T - S); p = scores.masked_fill(~seen, -inf).softmax(-1); "
        "(p.view(B, Hkv, g * S, T) @ v).view(q.shape).",
    ),
)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention, head by head and query by query, in float64."""
    shared, last = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        keys, values = (x[b, h // shared, : last + i + 1] for x in (k, v))
        scores = keys @ q[b, h, i] / math.sqrt(q.shape[3])
        p = np.exp(scores - scores.max())
        y[b, h, i] = p @ values / p.sum()
    return y


def _draw(t: Trial, batch: int, heads: tuple[int, int], s: int, n: int, dim: int, **how: Any) -> list[Any]:
    q = tensor(t, batch, heads[0], s, dim, **how)
    return [q, *(tensor(t, batch, heads[1], n, dim, **how) for _ in range(2))]


def _agree(t: Trial, *sizes: Any, rtol: float | None = None, **how: Any) -> None:
    given = _draw(t, *sizes, **how)
    t.close(t.call(*given), attention(*(x.double().numpy() for x in given)), rtol=rtol)


@grouped_query_attention.check("with as many key/value heads as query heads it is multi-head attention")
def multi_head(t: Trial) -> None:
    n = t.odd(5, 9)
    _agree(t, 2, (3, 3), n, n, 8)
    _agree(t, 1, (2, 2), 4, 4, t.odd(5, 9), scale=3.0)


@grouped_query_attention.check("the query heads of a group are neighbours and share one key/value head")
def groups(t: Trial) -> None:
    n = t.odd(5, 9)
    _agree(t, 2, (6, 2), n, n, 8)
    _agree(t, 2, (6, 3), n, n, 4)
    _agree(t, 3, (4, 1), n, n, t.odd(5, 9))


@grouped_query_attention.check("the queries are those of the last tokens: the last one sees every key")
def continued(t: Trial) -> None:
    _agree(t, 2, (4, 2), 1, t.odd(5, 9), 8)
    _agree(t, 2, (6, 2), 3, t.odd(5, 9), 8)
    _agree(t, 1, (4, 2), 1, 1, 8)


@grouped_query_attention.check("the result is in the number format of q")
def formats(t: Trial) -> None:
    for dtype, rtol in (("bfloat16", 3e-2), ("float64", 1e-9)):
        given = _draw(t, 2, (4, 2), 3, 7, 8, dtype=dtype)
        got = t.call(*given)
        t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), dtype, "number format")
        t.close(got, attention(*(x.double().numpy() for x in given)), rtol=rtol)


@grouped_query_attention.check("no key and no value is copied: no intermediate exceeds q or the scores")
def cost(t: Trial) -> None:
    for batch, heads, s, n, dim in ((2, (8, 2), 1, 64, 32), (3, (6, 2), 2, 40, 32), (1, (4, 2), 3, 50, 16)):
        given = _draw(t, batch, heads, s, n, dim)
        call = t.perform(*given, watch=("largest_intermediate",))
        t.close(call.value, attention(*(x.double().numpy() for x in given)))
        t.at_most(
            call.costs["largest_intermediate"],
            4 * batch * heads[0] * s * max(n, dim),
            f"bytes of the largest intermediate, with keys of {given[1].nbytes:,} bytes",
            "q.reshape(B, Hkv, -1, D) @ k.mT: one product for all queries that share a head.",
        )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def seen_by(s: int, n: int) -> Any:
    """[S, T]: what each of the last S of T tokens may look at."""
    return torch.ones(s, n, dtype=torch.bool).tril(n - s)


def attend(
    q: Any, k: Any, v: Any, *, scale: float | None = None, seen: Any = None, hidden: Any = None
) -> Any:
    """The right solution, its scale, mask and what hidden scores become open to change."""
    (batch, _, s, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    scores = q.reshape(batch, kv_heads, -1, dim) @ k.mT * (dim**-0.5 if scale is None else scale)
    seen = seen_by(s, n) if seen is None else seen
    hidden = float("-inf") if hidden is None else hidden
    p = scores.view(batch, kv_heads, -1, s, n).masked_fill(~seen, hidden).softmax(-1)
    return (p.view(batch, kv_heads, -1, n) @ v).view(q.shape)


@grouped_query_attention.mistake(
    says="query head h takes key/value head h % Hkv: the heads are tiled, not grouped",
    tries="h // (Hq / Hkv): repeat_interleave's order, and that of q.reshape(B, Hkv, …).",
    caught_by="groups",
)
def tiled(q: Any, k: Any, v: Any) -> Any:
    shared = q.shape[1] // k.shape[1]
    y = attend(q.unflatten(1, (shared, -1)).transpose(1, 2).flatten(1, 2), k, v)
    return y.unflatten(1, (-1, shared)).transpose(1, 2).flatten(1, 2)


@grouped_query_attention.mistake(
    says="the scores are not scaled",
    tries="q @ k.mT * D ** -0.5.",
    caught_by="multi_head",
)
def unscaled(q: Any, k: Any, v: Any) -> Any:
    return attend(q, k, v, scale=1.0)


@grouped_query_attention.mistake(
    says="the scores are divided by D, not by its root",
    tries="D ** -0.5.",
    caught_by="multi_head",
)
def divided_by_dim(q: Any, k: Any, v: Any) -> Any:
    return attend(q, k, v, scale=1 / q.shape[-1])


@grouped_query_attention.mistake(
    says="the scale is taken from all heads together, Hq · D",
    tries="D, the numbers of one head: it is over these that q · k adds up.",
    caught_by="multi_head",
)
def model_width(q: Any, k: Any, v: Any) -> Any:
    return attend(q, k, v, scale=(q.shape[1] * q.shape[-1]) ** -0.5)


@grouped_query_attention.mistake(
    says="nothing is masked: queries see keys of tokens that come after them",
    tries="scores.masked_fill(~seen, -inf) before the softmax.",
    caught_by="multi_head",
)
def not_causal(q: Any, k: Any, v: Any) -> Any:
    return attend(q, k, v, seen=torch.ones(1, 1, dtype=torch.bool))


@grouped_query_attention.mistake(
    says="a query does not see the key of its own token",
    tries=".tril(T - S), whose diagonal is included.",
    caught_by="multi_head",
)
def strictly_before(q: Any, k: Any, v: Any) -> Any:
    s, n = q.shape[2], k.shape[2]
    return attend(q, k, v, seen=torch.ones(s, n, dtype=torch.bool).tril(n - s - 1))


@grouped_query_attention.mistake(
    says="the mask is aligned at the first key: with a cache, query 0 is not token 0",
    tries=".tril(T - S): the last query sees the last key.",
    caught_by="continued",
)
def aligned_at_first(q: Any, k: Any, v: Any) -> Any:
    return attend(q, k, v, seen=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril())


@grouped_query_attention.mistake(
    says="masked scores are set to 0, which is a score like any other",
    tries="float('-inf'): exp(−∞) is 0.",
    caught_by="multi_head",
)
def masked_with_zero(q: Any, k: Any, v: Any) -> Any:
    return attend(q, k, v, hidden=0.0)


@grouped_query_attention.mistake(
    says="the weights are masked after the softmax, whose sum still holds the hidden keys",
    tries="the mask on the scores.",
    caught_by="multi_head",
)
def masked_late(q: Any, k: Any, v: Any) -> Any:
    (batch, _, s, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    p = (q.reshape(batch, kv_heads, -1, dim) @ k.mT * dim**-0.5).softmax(-1)
    p = p.view(batch, kv_heads, -1, s, n) * seen_by(s, n)
    return (p.view(batch, kv_heads, -1, n) @ v).view(q.shape)


@grouped_query_attention.mistake(
    says="the mask is laid over the rows of a whole group, as if its heads' queries were one long sequence",
    tries="scores.view(B, Hkv, Hq // Hkv, S, T) for the mask [S, T].",
    caught_by="groups",
)
def mask_over_group(q: Any, k: Any, v: Any) -> Any:
    batch, kv_heads, n, dim = k.shape
    rows = q.reshape(batch, kv_heads, -1, dim)
    seen = torch.ones(rows.shape[2], n, dtype=torch.bool).tril(n - q.shape[2])
    p = (rows @ k.mT * dim**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    return (p @ v).view(q.shape)


@grouped_query_attention.mistake(
    says="the softmax runs over the queries, not over the keys",
    tries=".softmax(-1): the weights of one query add up to 1.",
    caught_by="multi_head",
)
def softmax_over_queries(q: Any, k: Any, v: Any) -> Any:
    (batch, _, s, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    scores = (q.reshape(batch, kv_heads, -1, dim) @ k.mT * dim**-0.5).view(batch, kv_heads, -1, s, n)
    p = scores.masked_fill(~seen_by(s, n), float("-inf")).softmax(-2)
    return (p.view(batch, kv_heads, -1, n) @ v).view(q.shape)


@grouped_query_attention.mistake(
    says="the result is float32, whatever came in",
    tries="the number format of q at the end, or no .float() at all.",
    caught_by="formats",
)
def widened(q: Any, k: Any, v: Any) -> Any:
    return attend(q.float(), k.float(), v.float())


@grouped_query_attention.mistake(
    says="keys and values are repeated for every query head: Hq / Hkv times the memory that was saved",
    tries="q.reshape(B, Hkv, -1, D) @ k.mT: one product for all queries that share a head.",
    caught_by="cost",
)
def repeated(q: Any, k: Any, v: Any) -> Any:
    shared = q.shape[1] // k.shape[1]
    return attend(q, k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1))


@grouped_query_attention.mistake(
    says="matmul broadcasts keys and values over the group, which copies them",
    tries="the group's queries as rows of one product: q.reshape(B, Hkv, -1, D); or torch.einsum.",
    caught_by="cost",
)
def broadcast(q: Any, k: Any, v: Any) -> Any:
    (batch, _, s, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    grouped = q.view(batch, kv_heads, -1, s, dim)
    scores = grouped @ k[:, :, None].mT * dim**-0.5
    p = scores.masked_fill(~seen_by(s, n), float("-inf")).softmax(-1)
    return (p @ v[:, :, None]).view(q.shape)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@grouped_query_attention.alternative("einsum over named axes")
def by_einsum(q: Any, k: Any, v: Any) -> Any:
    (batch, _, s, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, -1, s, dim)
    scores = torch.einsum("bhgsd,bhtd->bhgst", grouped, k) / math.sqrt(dim)
    p = torch.softmax(scores + torch.zeros(s, n).masked_fill(~seen_by(s, n), -math.inf).to(q.dtype), dim=-1)
    return torch.einsum("bhgst,bhtd->bhgsd", p, v).reshape(q.shape)


@grouped_query_attention.alternative("one key/value head after another, by exponentials and their sum")
def head_by_head(q: Any, k: Any, v: Any) -> Any:
    s, n, shared = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    hidden, y = ~seen_by(s, n), torch.empty_like(q)
    for h in range(k.shape[1]):
        for i in range(h * shared, (h + 1) * shared):
            scores = torch.bmm(q[:, i], k[:, h].mT) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(hidden, -math.inf)
            e = torch.exp(scores - scores.amax(-1, keepdim=True))
            y[:, i] = torch.bmm(e / e.sum(-1, keepdim=True), v[:, h])
    return y
