"""Exercise `linear_attention_step`: the same attention from a state that does not grow."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs import late_torch as torch
from llmcourse.labs.lab11_subquadratic.reference import draw, linear_attention

linear_attention_step = Exercise(
    "linear_attention_step",
    title="Linear attention, token by token",
    arguments=("state", "total", "q", "k", "v"),
    shapes=(
        "state    tensor [B, H, D, Dv]: Σ k vᵀ over the tokens before this one, zeros before the first",
        "total    tensor [B, H, D]: Σ k over the tokens before this one",
        "q, k     tensors [B, H, D], positive: this token's features;  v  tensor [B, H, Dv]",
        "returns  (y, state, total): the output [B, H, Dv], and both sums with this token",
    ),
    formula="state ← state + k vᵀ,  total ← total + k;   y = qᵀ state / (q · total)",
    difficulty=2,
    importance=5,
    minutes=15,
    points=4,
    hints=(
        "Σ_s (q · k_s) v_s has q in every term. Take it out of the sum: what is left, and what is its "
        "shape? Which tokens does it have to hold when y is read?",
        "k vᵀ is an outer product, k[..., :, None] * v[..., None, :], one D × Dv matrix a head. A token "
        "sees itself, so add first and read then; the divisor q · total belongs to the same tokens.",
        "state = state + k[..., :, None] * v[..., None, :]; total = total + k; y = (q[..., None, :] @ "
        "state)[..., 0, :] / (q * total).sum(-1, keepdim=True); return y, state, total.",
    ),
)


def _run(t: Trial, q: Any, k: Any, v: Any) -> tuple[np.ndarray, Any, Any]:
    """Outputs [B, H, S, Dv], the state handed from call to call, and what it is in the end."""
    state, total = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3]), torch.zeros(*k.shape[:2], k.shape[3])
    out = []
    for i in range(q.shape[2]):
        found = t.call(state, total, q[:, :, i], k[:, :, i], v[:, :, i])
        y, after, sums = t.pair(found, 3, "(y, state, total)")
        for name, got, like in (("y", y, v[:, :, i]), ("state", after, state), ("total", sums, total)):
            t.equal(list(getattr(got, "shape", ())), list(like.shape), f"shape of {name}")
        state, total = (torch.as_tensor(x).float() for x in (after, sums))
        out.append(torch.as_tensor(y).double().numpy())
    return np.stack(out, axis=2), state, total


def _agree(t: Trial, *sizes: int) -> None:
    q, k, v = draw(t, *sizes)
    for name, got, want in zip(
        ("y", "state", "total"), _run(t, q, k, v), linear_attention(q, k, v), strict=True
    ):
        t.close(got, want, name, rtol=2e-5)


@linear_attention_step.check("the first token's output is its own value")
def first(t: Trial) -> None:
    _agree(t, 2, 3, 1, 4, t.odd(3, 7))


@linear_attention_step.check("the outputs are those of the parallel form")
def parallel(t: Trial) -> None:
    _agree(t, 2, 2, t.odd(5, 9), 4, 3)
    _agree(t, 1, 3, t.odd(5, 9), t.size(2, 5), 6)


@linear_attention_step.check("square heads and single numbers")
def square(t: Trial) -> None:
    _agree(t, 2, 1, 4, 4, 4)
    _agree(t, 1, 1, 5, 1, 1)
    _agree(t, 3, 3, 3, 3, 3)


@linear_attention_step.check("it goes on from any state")
def continued(t: Trial) -> None:
    q, k, v = draw(t, 2, 2, t.odd(5, 9), 3, 4)
    want = linear_attention(q, k, v)
    before = linear_attention(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
    state, total = (torch.from_numpy(x).float() for x in before[1:])
    got = t.pair(t.call(state, total, q[:, :, -1], k[:, :, -1], v[:, :, -1]), 3, "(y, state, total)")
    for name, have, expected in zip(
        ("y", "state", "total"), got, (want[0][:, :, -1], *want[1:]), strict=True
    ):
        t.close(have, expected, name, rtol=2e-5)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _added(state: Any, total: Any, k: Any, v: Any) -> tuple[Any, Any]:
    return state + k[..., :, None] * v[..., None, :], total + k


def _read(state: Any, total: Any, q: Any) -> Any:
    return (q[..., None, :] @ state)[..., 0, :] / (q * total).sum(-1, keepdim=True)


@linear_attention_step.mistake(
    says="the state is read before this token is in it: the first output is 0 / 0",
    tries="adding first: a token sees itself.",
    caught_by="first",
)
def read_first(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    return _read(state, total, q), *_added(state, total, k, v)


@linear_attention_step.mistake(
    says="nothing is divided: the outputs grow with the number of tokens",
    tries="/ (q * total).sum(-1, keepdim=True).",
    caught_by="first",
)
def not_normalised(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    state, total = _added(state, total, k, v)
    return (q[..., None, :] @ state)[..., 0, :], state, total


@linear_attention_step.mistake(
    says="total is not carried on, and the divisor holds the newest key alone",
    tries="total = total + k, and total as the third result.",
    caught_by="first",
)
def total_forgotten(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    state, sums = _added(state, total, k, v)
    return _read(state, sums, q), state, torch.zeros_like(total)


@linear_attention_step.mistake(
    says="total is used as it was before this token: the divisor lacks a term that the sum has",
    tries="total = total + k before the division.",
    caught_by="first",
)
def total_too_early(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    after, sums = _added(state, total, k, v)
    return _read(after, total, q), after, sums


@linear_attention_step.mistake(
    says="the state is replaced by this token's product, not added to",
    tries="state + k[..., :, None] * v[..., None, :].",
    caught_by="parallel",
)
def replaced(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    after, sums = _added(torch.zeros_like(state), total, k, v)
    return _read(after, sums, q), after, sums


@linear_attention_step.mistake(
    says="the old state is returned, and every token begins anew",
    tries="the new state as the second result.",
    caught_by="first",
)
def old_returned(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    after, sums = _added(state, total, k, v)
    return _read(after, sums, q), state, total


@linear_attention_step.mistake(
    says="the outer product is v kᵀ: it doesn't fit heads that are not square, and is wrong in square ones",
    tries="k[..., :, None] * v[..., None, :]: rows are features of the key.",
    caught_by="first",
)
def outer_exchanged(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    after = state + v[..., :, None] * k[..., None, :]
    return _read(after, total + k, q), after, total + k


@linear_attention_step.mistake(
    says="q is used as the key that is written",
    tries="k vᵀ: q only reads.",
    caught_by="first",
)
def query_written(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    after, sums = _added(state, total, q, v)
    return _read(after, sums, k), after, sums


@linear_attention_step.mistake(
    says="the divisor is one number for all features, Σ total, without q",
    tries="q · total: the sum of this query's weights.",
    caught_by="first",
)
def query_left_out(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    state, total = _added(state, total, k, v)
    return (q[..., None, :] @ state)[..., 0, :] / total.sum(-1, keepdim=True), state, total


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@linear_attention_step.alternative("einsum")
def by_einsum(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    state = state + torch.einsum("bhd,bhe->bhde", k, v)
    total = total + k
    top = torch.einsum("bhd,bhde->bhe", q, state)
    return top / torch.einsum("bhd,bhd->bh", q, total)[..., None], state, total


@linear_attention_step.alternative("in place, with the old tokens and the new one weighted apart")
def in_place(state: Any, total: Any, q: Any, k: Any, v: Any) -> Any:
    weight = (q * k).sum(-1, keepdim=True)
    top = (q.unsqueeze(-1) * state).sum(-2) + weight * v
    y = top / ((q * total).sum(-1, keepdim=True) + weight)
    state.add_(k.unsqueeze(-1) * v.unsqueeze(-2))
    total += k
    return [y, state, total]
