"""Exercise `linear_attention_chunked`: tables inside of chunks, a state between them, nothing quadratic."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs import late_torch as torch
from llmcourse.labs.lab11_subquadratic.reference import draw, linear_attention

linear_attention_chunked = Exercise(
    "linear_attention_chunked",
    title="Linear attention in chunks",
    arguments=("q", "k", "v", "state", "total", "chunk"),
    shapes=(
        "q, k     tensors [B, H, S, D], positive;  v  tensor [B, H, S, Dv]",
        "state    tensor [B, H, D, Dv]: Σ k vᵀ over the tokens before these; total [B, H, D]: Σ k over them",
        "chunk    tokens that are worked on at once; S need not be a multiple of it",
        "returns  (y, state, total): outputs [B, H, S, Dv], and both sums with these tokens",
        "cost     no intermediate larger than 2·B·H·(S + chunk)·max(D, Dv, chunk, D·Dv / chunk) numbers:",
        "         no S × S table, and no state for every token",
    ),
    formula="y = ((q kᵀ)↓ v + q · state) / ((q kᵀ)↓ 1 + q · total) in each chunk, ↓ its lower triangle",
    difficulty=4,
    importance=5,
    minutes=30,
    points=6,
    hints=(
        "Cut the sum over s ≤ t in two: the tokens of t's own chunk, and all before. Which form suits "
        "which part? What has to be known when a chunk begins?",
        "Own chunk: the table q @ k.mT of chunk × chunk, lower triangle. All before: q @ state, where "
        "state holds earlier chunks only. Both parts have their part in the divisor: the table's row sums, "
        "and q · total. Add both numerators and both divisors before dividing. After a chunk its own k.mT @ "
        "v and k.sum(-2) go into the state.",
        "for a in range(0, S, chunk): part = slice(a, a + chunk); Q, K, V = q[:, :, part], …; w = (Q @ "
        "K.mT).tril(); top = w @ V + Q @ state; bottom = w.sum(-1, keepdim=True) + Q @ total[..., None]; "
        "y.append(top / bottom); state = state + K.mT @ V; total = total + K.sum(-2). Then torch.cat(y, 2).",
    ),
)


def _start(t: Trial, batch: int, heads: int, dim: int, v_dim: int, past: int) -> tuple[Any, Any, Any]:
    """Tokens before the first chunk, and their sums; `past` may be 0."""
    before = draw(t, batch, heads, past, dim, v_dim)
    _, state, total = linear_attention(*before)
    return before, torch.from_numpy(state).float(), torch.from_numpy(total).float()


def _judge(t: Trial, found: Any, before: Any, given: Any) -> None:
    whole = [torch.cat(pair, dim=2) for pair in zip(before, given, strict=True)]
    y, state, total = linear_attention(*whole)
    wanted = y[:, :, before[0].shape[2] :], state, total
    for name, got, want in zip(
        ("y", "state", "total"), t.pair(found, 3, "(y, state, total)"), wanted, strict=True
    ):
        t.close(got, want, name, rtol=2e-5)


def _agree(t: Trial, sizes: tuple[int, int, int, int, int], chunk: int, past: int = 0) -> None:
    batch, heads, _, dim, v_dim = sizes
    before, state, total = _start(t, batch, heads, dim, v_dim, past)
    given = draw(t, *sizes)
    _judge(t, t.call(*given, state, total, chunk), before, given)


@linear_attention_chunked.check("one chunk that holds everything is the parallel form")
def one_chunk(t: Trial) -> None:
    n = t.odd(5, 9)
    _agree(t, (2, 2, n, 4, 3), n)
    _agree(t, (1, 3, n, 3, 5), n)


@linear_attention_chunked.check("several chunks: each begins with what came before it")
def several(t: Trial) -> None:
    chunk = t.size(2, 4)
    _agree(t, (2, 2, 3 * chunk, 4, 3), chunk)
    _agree(t, (1, 2, 4 * chunk, 3, 3), chunk)
    _agree(t, (1, 2, t.size(4, 7), 3, 5), 1)


@linear_attention_chunked.check("the last chunk may be shorter, and a chunk longer than the sequence")
def ragged(t: Trial) -> None:
    chunk = t.size(3, 5)
    _agree(t, (2, 2, 2 * chunk + 1, 4, 3), chunk)
    _agree(t, (1, 2, 3 * chunk - 1, 4, 3), chunk)
    _agree(t, (1, 2, 3, 4, 3), chunk + 7)


@linear_attention_chunked.check("it goes on from the state that it is given")
def continued(t: Trial) -> None:
    chunk = t.size(2, 4)
    _agree(t, (2, 2, 3 * chunk, 4, 3), chunk, past=t.odd(3, 7))
    _agree(t, (1, 2, 2 * chunk + 1, 3, 5), chunk, past=2)
    _agree(t, (1, 2, 1, 3, 5), chunk, past=4)


@linear_attention_chunked.check("no table of all pairs, and no state for every token")
def cost(t: Trial) -> None:
    for batch, heads, length, dim, v_dim, chunk in ((1, 2, 256, 16, 16, 16), (2, 1, 203, 8, 16, 16)):
        before, state, total = _start(t, batch, heads, dim, v_dim, 3)
        given = draw(t, batch, heads, length, dim, v_dim)
        call = t.perform(*given, state, total, chunk, watch=("largest_intermediate",))
        _judge(t, call.value, before, given)
        widest = max(dim, v_dim, chunk, dim * v_dim // chunk)
        t.at_most(
            call.costs["largest_intermediate"],
            4 * 2 * batch * heads * (length + chunk) * widest,
            f"bytes of the largest intermediate; a table of all pairs has {4 * batch * heads * length**2:,}",
            "tables of chunk × chunk, and one state for each chunk at most.",
        )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def chunks(
    q: Any,
    k: Any,
    v: Any,
    state: Any,
    total: Any,
    chunk: int,
    *,
    masked: bool = True,
    early: bool = False,
    carried: bool = True,
    divisor: str = "both",
    apart: bool = False,
) -> Any:
    """The right solution, and what can be wrong with it."""
    out = []
    for a in range(0, q.shape[2], chunk):
        Q, K, V = (x[:, :, a : a + chunk] for x in (q, k, v))
        after, sums = (state + K.mT @ V, total + K.sum(-2)) if carried else (K.mT @ V, K.sum(-2))
        if early:
            state, total = after, sums
        w = (Q @ K.mT).tril() if masked else Q @ K.mT
        inside, past = w.sum(-1, keepdim=True), Q @ total[..., None]
        bottom = {"both": inside + past, "inside": inside, "past": past}[divisor]
        if apart:
            out.append(w @ V / inside + Q @ state / past.clamp_min(1e-6))
        else:
            out.append((w @ V + Q @ state) / bottom)
        state, total = after, sums
    return torch.cat(out, dim=2), state, total


@linear_attention_chunked.mistake(
    says="inside a chunk nothing is masked: tokens see those that follow in their chunk",
    tries="(Q @ K.mT).tril().",
    caught_by="one_chunk",
)
def not_masked(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, chunk, masked=False)


@linear_attention_chunked.mistake(
    says="a chunk is added to the state before it is read: its tokens are counted twice, future ones too",
    tries="state = state + K.mT @ V at the end of the loop.",
    caught_by="one_chunk",
)
def added_early(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, chunk, early=True)


@linear_attention_chunked.mistake(
    says="a chunk's products replace the state: what came before the last chunk is lost",
    tries="state + K.mT @ V.",
    caught_by="several",
)
def replaced(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, chunk, carried=False)


@linear_attention_chunked.mistake(
    says="the divisor holds the weights of the own chunk only",
    tries="w.sum(-1, keepdim=True) + Q @ total[..., None].",
    caught_by="several",
)
def divisor_inside(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, chunk, divisor="inside")


@linear_attention_chunked.mistake(
    says="the divisor holds the weights of earlier chunks only",
    tries="w.sum(-1, keepdim=True) + Q @ total[..., None].",
    caught_by="one_chunk",
)
def divisor_past(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, chunk, divisor="past")


@linear_attention_chunked.mistake(
    says="each part is divided by its own sum, then added: two means are no mean",
    tries="both numerators over both divisors: (top + top') / (bottom + bottom').",
    caught_by="several",
)
def divided_apart(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, chunk, apart=True)


@linear_attention_chunked.mistake(
    says="the tokens behind the last whole chunk are left out",
    tries="range(0, S, chunk), whose last slice may be shorter; or zeros behind the end.",
    caught_by="ragged",
)
def whole_chunks_only(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    whole = q.shape[2] // chunk * chunk
    found = chunks(q[:, :, :whole], k[:, :, :whole], v[:, :, :whole], state, total, chunk) if whole else None
    return found or (v[:, :, :0], state, total)


@linear_attention_chunked.mistake(
    says="the given state is not used: every call begins with zeros",
    tries="state and total as they come in.",
    caught_by="continued",
)
def from_zero(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, torch.zeros_like(state), torch.zeros_like(total), chunk)


@linear_attention_chunked.mistake(
    says="the states that were given come back, without these tokens",
    tries="the sums as they are after the last chunk.",
    caught_by="one_chunk",
)
def old_returned(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, chunk)[0], state, total


@linear_attention_chunked.mistake(
    says="the table of all pairs is made: right, and S² numbers",
    tries="a loop over chunks, each with a table of chunk × chunk.",
    caught_by="cost",
)
def one_table(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    return chunks(q, k, v, state, total, q.shape[2])


@linear_attention_chunked.mistake(
    says="a state is made for every token: right, and S · D · Dv numbers",
    tries="a state for each chunk; inside of it the table.",
    caught_by="cost",
)
def every_state(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    states = (k[..., :, None] * v[..., None, :]).cumsum(2) + state[:, :, None]
    totals = k.cumsum(2) + total[:, :, None]
    y = (q[..., None, :] @ states)[..., 0, :] / (q * totals).sum(-1, keepdim=True)
    return y, states[:, :, -1], totals[:, :, -1]


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@linear_attention_chunked.alternative(
    "all chunks at once, padded with zeros, their states by a cumulative sum"
)
def all_at_once(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    length = q.shape[2]
    pad = (0, 0, 0, -length % chunk)
    q, k, v = (torch.nn.functional.pad(x, pad).unflatten(2, (-1, chunk)) for x in (q, k, v))
    states = torch.cat((state[:, :, None], k.mT @ v), dim=2).cumsum(2)
    totals = torch.cat((total[:, :, None], k.sum(-2)), dim=2).cumsum(2)
    w = (q @ k.mT).tril()
    top = w @ v + q @ states[:, :, :-1]
    bottom = w.sum(-1, keepdim=True) + q @ totals[:, :, :-1, :, None]
    y = (top / bottom.clamp_min(1e-12)).flatten(2, 3)[:, :, :length]
    return y, states[:, :, -1], totals[:, :, -1]


@linear_attention_chunked.alternative("a column of ones beside the values carries the divisor")
def ones_beside(q: Any, k: Any, v: Any, state: Any, total: Any, chunk: Any) -> Any:
    v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    both = torch.cat((state, total[..., None]), dim=-1)
    out = []
    for Q, K, V in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):
        top = (Q @ K.mT).tril() @ V + Q @ both
        out.append(top[..., :-1] / top[..., -1:])
        both = both + K.mT @ V
    return [torch.cat(out, dim=2), both[..., :-1], both[..., -1]]
