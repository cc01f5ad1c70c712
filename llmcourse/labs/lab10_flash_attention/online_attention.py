"""Exercise `online_attention`: the softmax over keys that are seen one block at a time."""

from __future__ import annotations

import math
from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs.lab10_flash_attention.reference import attention, visible

online_attention = Exercise(
    "online_attention",
    title="Online softmax: attention, a block of keys at a time",
    arguments=("q", "k", "v", "mask", "block"),
    shapes=(
        "q         float32 tensor [S, D];  k, v  float32 tensors [T, D]",
        "mask      bool tensor [S, T], True where a query may look; a row of a block may be all False,",
        "          and so may a whole row",
        "block     how many keys are looked at at a time, 1 or more; T need not be a multiple of it",
        "returns   (out [S, D], lse [S]), float32; for a query that may look nowhere, 0 and −inf",
        "cost      no tensor is made with more elements than max(S, block) · max(D, block)",
    ),
    formula="s = q·kᵀ / √D     lse[i] = log Σ_j exp s[i, j]     out[i] = Σ_j exp(s[i, j] − lse[i]) · v[j]",
    difficulty=3,
    importance=5,
    minutes=30,
    points=5,
    hints=(
        "After three blocks you know the largest score so far, m, and hold Σ exp(s − m) and Σ exp(s − m)·v. "
        "The fourth block brings a larger score. By which one number must both sums be multiplied, so that "
        "they are what they would be with the new maximum?",
        "Keep for each query: m (begins at −inf), l (0) and acc (0, [S, D]). For a block: m_new = max(m, "
        "block's maximum); p = exp(s − m_new); l and acc are multiplied by exp(m − m_new) and get the "
        "block's sums added; out = acc / l and lse = m + log l at the end. As long as a query has seen "
        "nothing, m_new is −inf, and −inf − (−inf) is NaN: subtract 0 there.",
        "for start in range(0, T, block): s = (q @ k[start:stop].T) * D ** -0.5, masked_fill(~mask[:, "
        "start:stop], -inf); new = maximum(m, s.amax(1)); safe = where(new == -inf, 0, new); p = exp(s - "
        "safe[:, None]); keep = exp(m - safe); l = l * keep + p.sum(1); acc = acc * keep[:, None] + p @ "
        "v[start:stop]; m = new. Then where(l == 0, 1, l) as the divisor.",
    ),
)


def _agree(t: Trial, S: int, T: int, D: int, block: int, mask: Any = None, scale: float = 1.0) -> None:
    q, k, v = tensor(t, S, D, scale=scale), tensor(t, T, D, scale=scale), tensor(t, T, D)
    compare(t, q, k, v, mask, block)


def compare(
    t: Trial, q: Any, k: Any, v: Any, mask: Any, block: int, watch: tuple[str, ...] = (), rtol: float = 1e-4
) -> Any:
    """Held against float64. A score of 10⁴ has 10⁻³ of rounding in float32, and so have its weights."""
    import torch

    mask = torch.ones(len(q), len(k), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    call = t.perform(q, k, v, mask, block, watch=watch)
    out, lse = t.pair(call.value, 2, "(out, lse)")
    want, want_lse = attention(q, k, v, mask)
    t.close(out, want, f"out, block {block}", rtol=rtol, atol=rtol)
    t.close(lse, want_lse, f"lse, block {block}", rtol=rtol, atol=rtol)
    return call


@online_attention.check("with one block it is softmax(q·kᵀ/√D)·v, and lse the logarithm of its sum")
def one_block(t: Trial) -> None:
    for D in (4, 16):
        S, T = t.odd(3, 9), t.odd(5, 15)
        _agree(t, S, T, D, T)
    _agree(t, 1, 1, 1, 1)


@online_attention.check("the answer does not depend on the block")
def blocks(t: Trial) -> None:
    S, T = t.odd(3, 9), t.odd(23, 39)
    q, k, v = tensor(t, S, 8, scale=2), tensor(t, T, 8), tensor(t, T, 8)
    for block in (1, 4, 11, T + 3):
        compare(t, q, k, v, None, block)


@online_attention.check("scores in the thousands, and rows that have little in common")
def large(t: Trial) -> None:
    import torch

    T = t.odd(23, 39)
    q, k, v = tensor(t, 6, 8) * 8, tensor(t, T, 8) * 8, tensor(t, T, 8)
    q[0] *= 30
    compare(t, q, k, v, None, 5, rtol=2e-2)
    k = k.abs() + 1  # queries that like no key at all, beside others that like every one
    compare(t, torch.cat((-q.abs() - 20, q.abs() + 20)), k, v, None, 5, rtol=2e-2)


@online_attention.check("blocks, and whole rows, in which nothing may be seen")
def masked(t: Trial) -> None:
    S = t.odd(13, 21)
    _agree(t, S, S, 8, 4, visible(S, S))
    _agree(t, S, S, 8, 4, visible(S, S).T.copy())  # the first blocks of most rows are empty
    mask = t.rng.random((S, 3 * S)) < 0.3
    mask[:, 8:16] = mask[S // 2] = False
    _agree(t, S, 3 * S, 8, 8, mask)


@online_attention.check("the scores are never all in memory")
def memory(t: Trial) -> None:
    S, T, D, block = t.odd(35, 45), t.odd(151, 191), 16, 16
    q, k, v = tensor(t, S, D), tensor(t, T, D), tensor(t, T, D)
    call = compare(t, q, k, v, None, block, watch=("largest_intermediate",))
    most = 8 * max(S, block) * max(D, block)  # float64 will do as well
    t.at_most(
        call.costs["largest_intermediate"],
        most,
        "bytes of the largest tensor made",
        "scores of a block, [S, block], in a loop over the blocks.",
    )


# ── mistakes: one function, one fault at a time ──────────────────────────────────────────────────────


def online(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    block: int,
    *,
    fault: str = "",
    scale: Any = lambda D: D**-0.5,
    hidden: float = -math.inf,
    start: float = -math.inf,
) -> Any:
    """The loop that most solutions have, with one fault."""
    import torch

    (S, D), T = q.shape, len(k)
    exp = torch.exp2 if fault == "exp2" else torch.exp
    m, total, acc = torch.full((S,), start), torch.zeros(S), torch.zeros(S, D)
    for at in range(0, T // block * block if fault == "rounded_down" else T, block):
        part = slice(at, at + block)
        s = (q @ k[part].T * scale(D)).masked_fill(~mask[:, part], hidden)
        top = s.amax() if fault == "one_maximum" else s.amax(1)
        new = top.expand(S) if fault == "block_maximum" else torch.maximum(m, top)
        safe = new if fault == "nan_block" else torch.where(new == -math.inf, 0.0, new)
        p, keep = exp(s - safe[:, None]), exp(safe - m if fault == "upside_down" else m - safe)
        total = (total if fault == "l_kept" else total * keep) + p.sum(1)
        acc = (acc if fault == "acc_kept" else acc * keep[:, None]) + p @ v[part]
        m = new
    divisor = total if fault in ("nan_row", "nan_block") else torch.where(total == 0, 1.0, total)
    lse = torch.where(total == 0, -math.inf, total.log() + (0 if fault == "lse_without_m" else m))
    return acc / divisor[:, None], lse


@online_attention.mistake(
    says="the accumulator was not rescaled when the maximum changed",
    tries="acc * exp(m_old − m_new) before the block's p @ v is added.",
    caught_by="blocks",
)
def acc_not_rescaled(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="acc_kept")


@online_attention.mistake(
    says="the sum l was not rescaled when the maximum changed",
    tries="l * exp(m_old − m_new) before the block's sum is added.",
    caught_by="blocks",
)
def l_not_rescaled(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="l_kept")


@online_attention.mistake(
    says="the factor is upside down: exp(m_new − m_old)",
    tries="exp(m_old − m_new), which is at most 1: what was summed up shrinks when the maximum grows.",
    caught_by="one_block",
)
def upside_down(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="upside_down")


@online_attention.mistake(
    says="the scores are not scaled by 1/√D",
    tries="q @ kᵀ * D ** -0.5.",
    caught_by="one_block",
)
def unscaled(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, scale=lambda D: 1.0)


@online_attention.mistake(
    says="the scores are divided by D, which is the scale applied twice",
    tries="the square root: D ** -0.5.",
    caught_by="one_block",
)
def scaled_twice(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, scale=lambda D: 1 / D)


@online_attention.mistake(
    says="powers of two stand where powers of e belong",
    tries="torch.exp, or exp2 of scores times log2(e) ≈ 1.4427, and lse back to base e.",
    caught_by="one_block",
)
def base_two(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="exp2")


@online_attention.mistake(
    says="lse is log l alone, relative to a maximum that nobody knows later",
    tries="m + log total.",
    caught_by="one_block",
)
def lse_without_m(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="lse_without_m")


@online_attention.mistake(
    says="the last block is left out where T is not a multiple of the block",
    tries="range(0, T, block): a slice that ends past T is cut off.",
    caught_by="blocks",
)
def rounded_down(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="rounded_down")


@online_attention.mistake(
    says="each block has a softmax of its own, and the results are averaged",
    tries="sums that are divided once, at the end: a block of small scores counts for little.",
    caught_by="blocks",
)
def averaged(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    import torch

    starts = range(0, len(k), block)
    cut = [slice(at, at + block) for at in starts]
    found = [online(q, k[c], v[c], mask[:, c], block) for c in cut]
    lse = torch.stack([part[1] for part in found]).logsumexp(0)
    return torch.stack([part[0] for part in found]).mean(0), lse


@online_attention.mistake(
    says="no maximum is subtracted: exp overflows at 89",
    tries="exp(s − m_new), with the largest score seen so far.",
    caught_by="large",
)
def no_maximum(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    import torch

    total, acc = torch.zeros(len(q)), torch.zeros(q.shape)
    for at in range(0, len(k), block):
        part = slice(at, at + block)
        p = torch.exp((q @ k[part].T * q.shape[1] ** -0.5).masked_fill(~mask[:, part], -math.inf))
        total, acc = total + p.sum(1), acc + p @ v[part]
    return acc / torch.where(total == 0, 1.0, total)[:, None], total.log()


@online_attention.mistake(
    says="all rows share one maximum: a row of small scores underflows to nothing",
    tries="the maximum of each row: s.amax(1).",
    caught_by="large",
)
def one_maximum(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="one_maximum")


@online_attention.mistake(
    says="the new maximum is the block's, also where an earlier block had a larger one: the factor overflows",
    tries="torch.maximum(m, the block's maximum).",
    caught_by="large",
)
def block_maximum(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="block_maximum")


@online_attention.mistake(
    says="the maximum begins at 0: where all scores are far below it, everything underflows",
    tries="−inf, than which every score is larger.",
    caught_by="large",
)
def begins_at_zero(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, start=0.0)


@online_attention.mistake(
    says="−inf − (−inf) is computed, which is NaN, for a query that has seen nothing yet",
    tries="0 in the place of m_new, where m_new is −inf.",
    caught_by="masked",
)
def nan_block(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="nan_block")


@online_attention.mistake(
    says="0 is divided by 0 for a query that sees nothing at all",
    tries="1 as the divisor where l is 0.",
    caught_by="masked",
)
def nan_row(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, fault="nan_row")


@online_attention.mistake(
    says="scores that may not be seen are set to 0, and exp(0) is 1",
    tries="−inf, whose exponential is 0.",
    caught_by="masked",
)
def hidden_as_zero(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    return online(q, k, v, mask, block, hidden=0.0)


@online_attention.mistake(
    says="the whole S × T matrix of scores is made first",
    tries="q @ k[start:start + block].T in the loop.",
    caught_by="memory",
)
def whole(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    s = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~mask, -math.inf)
    lse = s.logsumexp(1)
    return s.softmax(1).nan_to_num(0.0) @ v, lse


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@online_attention.alternative("the accumulator is kept normalised, with lse alone beside it")
def normalised(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    import torch

    lse, out = torch.full((len(q),), -math.inf), torch.zeros(q.shape)
    for at in range(0, len(k), block):
        part = slice(at, at + block)
        s = (q @ k[part].T * q.shape[1] ** -0.5).masked_fill(~mask[:, part], -math.inf)
        new = torch.logaddexp(lse, s.logsumexp(1))
        safe = new.masked_fill(new == -math.inf, 0.0)
        out = out * (lse - safe).exp()[:, None] + (s - safe[:, None]).exp() @ v[part]
        lse = new
    return out, lse


@online_attention.alternative("two passes over the keys: first the maximum and the sum, then the output")
def two_passes(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    import torch

    def scores(at: int) -> Any:
        part = slice(at, at + block)
        return torch.where(mask[:, part], q @ k[part].T / math.sqrt(q.shape[1]), -math.inf)

    starts = range(0, len(k), block)
    m = torch.full((len(q),), -math.inf)
    for at in starts:
        m = torch.maximum(m, scores(at).amax(1))
    safe = m.nan_to_num(neginf=0.0)
    out, total = torch.zeros(q.shape), torch.zeros(len(q))
    for at in starts:
        p = (scores(at) - safe[:, None]).exp()
        total += p.sum(1)
        out += p @ v[at : at + block]
    return out / total.clamp(min=1e-30)[:, None], safe + total.log()


@online_attention.alternative("one query after another, in float64")
def by_rows(q: Any, k: Any, v: Any, mask: Any, block: int) -> Any:
    import torch

    out, lse = torch.zeros(q.shape), torch.full((len(q),), -math.inf)
    for i, row in enumerate(q.double()):
        m, total, acc = -math.inf, 0.0, torch.zeros(q.shape[1], dtype=torch.float64)
        for at in range(0, len(k), block):
            part = slice(at, at + block)
            seen = mask[i, part]
            if seen.any():
                s = k[part][seen].double() @ row * q.shape[1] ** -0.5
                new = max(m, float(s.max()))
                p, keep = (s - new).exp(), math.exp(m - new)
                total, acc, m = total * keep + float(p.sum()), acc * keep + p @ v[part][seen].double(), new
        if total:
            out[i], lse[i] = acc / total, m + math.log(total)
    return out, lse
