"""Exercise `linear_attention_parallel`: attention whose weights are products, all tokens at once."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs import late_torch as torch
from llmcourse.labs.lab11_subquadratic.reference import draw, linear_attention

linear_attention_parallel = Exercise(
    "linear_attention_parallel",
    title="Linear attention, as a table",
    arguments=("q", "k", "v"),
    shapes=(
        "q, k     tensors [B, H, S, D], all elements positive: features φ(·) of queries and keys",
        "v        tensor [B, H, S, Dv]",
        "returns  tensor [B, H, S, Dv]: causal linear attention, by the S × S table of weights",
    ),
    formula="y[t] = Σ_{s ≤ t} (q[t] · k[s]) v[s]  /  Σ_{s ≤ t} (q[t] · k[s])",
    difficulty=1,
    importance=4,
    minutes=10,
    points=2,
    hints=(
        "What stands where softmax attention has exp(q·k / √D)? What makes the weights of one query add "
        "up to 1?",
        "The table is q @ k.mT; future keys get weight 0 (there is no exponential behind that would turn "
        "−∞ into it). Each row is divided by its own sum, which plays the part of softmax's.",
        "w = (q @ k.mT).tril(); return w @ v / w.sum(-1, keepdim=True).",
    ),
)


def _agree(t: Trial, *sizes: int) -> None:
    q, k, v = draw(t, *sizes)
    t.close(t.call(q, k, v), linear_attention(q, k, v)[0], rtol=1e-5)


@linear_attention_parallel.check("each output is the mean of the values so far, weighted by q · k")
def values(t: Trial) -> None:
    _agree(t, 2, 3, t.odd(5, 9), 4, 6)
    _agree(t, 1, 2, t.odd(5, 9), t.size(2, 5), 3)


@linear_attention_parallel.check("values that are all alike come out as they are")
def constant(t: Trial) -> None:
    q, k, v = draw(t, 1, 2, t.odd(5, 9), 4, 3)
    v[:] = v[0, 0, 0]
    t.close(t.call(q, k, v), v.double().numpy(), rtol=1e-5)


@linear_attention_parallel.check("one token, one feature, square heads")
def small(t: Trial) -> None:
    for sizes in ((2, 2, 1, 4, 3), (1, 1, 5, 1, 1), (2, 1, 4, 4, 4)):
        _agree(t, *sizes)


@linear_attention_parallel.check("a long sequence")
def long(t: Trial) -> None:
    _agree(t, 1, 1, t.odd(151, 201), 8, 8)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


@linear_attention_parallel.mistake(
    says="the weights are not divided by their sum, and outputs grow with the position",
    tries="/ w.sum(-1, keepdim=True).",
    caught_by="values",
)
def not_normalised(q: Any, k: Any, v: Any) -> Any:
    return (q @ k.mT).tril() @ v


@linear_attention_parallel.mistake(
    says="nothing is masked: every output holds all values",
    tries=".tril() on the table.",
    caught_by="values",
)
def not_causal(q: Any, k: Any, v: Any) -> Any:
    w = q @ k.mT
    return w @ v / w.sum(-1, keepdim=True)


@linear_attention_parallel.mistake(
    says="the mask stands on the product with the values, and the divisor holds the future's weights",
    tries="one masked table for both the values and the sum.",
    caught_by="values",
)
def divisor_not_masked(q: Any, k: Any, v: Any) -> Any:
    w = q @ k.mT
    return w.tril() @ v / w.sum(-1, keepdim=True)


@linear_attention_parallel.mistake(
    says="a token's own key and value are left out",
    tries=".tril(), whose diagonal is included: s ≤ t.",
    caught_by="values",
)
def strictly_before(q: Any, k: Any, v: Any) -> Any:
    w = (q @ k.mT).tril(-1)
    return w @ v / w.sum(-1, keepdim=True)


@linear_attention_parallel.mistake(
    says="a softmax is taken: exp(q · k) is no product of features",
    tries="the products themselves as weights.",
    caught_by="values",
)
def softmaxed(q: Any, k: Any, v: Any) -> Any:
    w = q @ k.mT
    hidden = torch.ones(w.shape[-2:], dtype=torch.bool).triu(1)
    return w.masked_fill(hidden, float("-inf")).softmax(-1) @ v


@linear_attention_parallel.mistake(
    says="the weights are divided by the number of tokens",
    tries="their sum: / w.sum(-1, keepdim=True).",
    caught_by="values",
)
def counted(q: Any, k: Any, v: Any) -> Any:
    steps = torch.arange(1, q.shape[2] + 1)[:, None]
    return (q @ k.mT).tril() @ v / steps


@linear_attention_parallel.mistake(
    says="the sum runs over the queries, a column at a time",
    tries=".sum(-1, keepdim=True): the weights of one query add up to 1.",
    caught_by="values",
)
def columns_normalised(q: Any, k: Any, v: Any) -> Any:
    w = (q @ k.mT).tril()
    return (w / w.sum(-2, keepdim=True)) @ v


@linear_attention_parallel.mistake(
    says="queries and keys have changed places in the table",
    tries="q @ k.mT: a row for each query.",
    caught_by="values",
)
def exchanged(q: Any, k: Any, v: Any) -> Any:
    w = (k @ q.mT).tril()
    return w @ v / w.sum(-1, keepdim=True)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@linear_attention_parallel.alternative("einsum and a mask that is multiplied")
def by_einsum(q: Any, k: Any, v: Any) -> Any:
    seen = torch.tril(torch.ones(q.shape[2], q.shape[2]))
    w = torch.einsum("bhtd,bhsd->bhts", q, k) * seen
    return torch.einsum("bhts,bhse->bhte", w / w.sum(dim=3)[..., None], v)


@linear_attention_parallel.alternative("running sums of outer products, no table at all")
def running_sums(q: Any, k: Any, v: Any) -> Any:
    state = (k[..., :, None] * v[..., None, :]).cumsum(dim=2)
    top = (q[..., None, :] @ state)[..., 0, :]
    return top / (q * k.cumsum(dim=2)).sum(-1, keepdim=True)
