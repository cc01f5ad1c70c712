"""Exercise `flash_backward`: gradients from one number a query, the weights computed anew."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.perform import Call
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs.lab10_flash_attention.reference import attention, gradients, visible

flash_backward = Exercise(
    "flash_backward",
    title="FlashAttention, backward: recompute, don't remember",
    arguments=("q", "k", "v", "out", "lse", "dout", "causal", "block"),
    shapes=(
        "q, out, dout   float32 tensors [S, D];  k, v  float32 tensors [T, D], S ≤ T;  lse  [S]",
        "               out and lse as the forward pass returned them, dout the gradient of out",
        "causal         if True, query i saw keys 0 … i + T − S, else all",
        "block          how many keys are looked at at a time; T need not be a multiple of it",
        "returns        (dq [S, D], dk [T, D], dv [T, D])",
        "cost           no tensor is made with more elements than max(S, T) · max(D, block)",
        "",
        "k and v may be a part of the keys that out and lse were taken over (as when the keys of a long",
        "sequence are shared out among GPUs): the weights are what lse says, not what these keys add up to.",
    ),
    formula="p = exp(s − lse)   dv = pᵀ·dout   ds = p ⊙ (dout·vᵀ − δ)   dq = ds·k/√D   dk = dsᵀ·q/√D   "
    "δ[i] = dout[i]·out[i]",
    difficulty=4,
    importance=4,
    minutes=45,
    points=6,
    hints=(
        "The backward of softmax is ds = p ⊙ (dp − Σ_j p·dp). That sum runs over all keys, of which a block "
        "has only some. Put dp[i, j] = dout[i]·v[j] into it: what is Σ_j p[i, j]·v[j], and so the whole sum?",
        "delta = (dout * out).sum(1), once, before the loop. Then for each block of keys: the scores again, "
        "p = exp(s − lse) (0 where hidden), dv of the block = pᵀ @ dout, dp = dout @ vᵀ, ds = p * (dp − "
        "delta) · D ** -0.5, dk of the block = dsᵀ @ q. A block of keys has its own rows of dk and dv; dq "
        "gets a contribution of every block.",
        "for at in range(0, T, block): stop = min(at + block, T); s = q @ k[at:stop].T * scale; p = exp(s - "
        "lse[:, None]); if causal: p = p.masked_fill(arange(at, stop) > arange(S)[:, None] + T - S, 0); "
        "dv[at:stop] = p.T @ dout; ds = p * (dout @ v[at:stop].T - delta[:, None]) * scale; dk[at:stop] = "
        "ds.T @ q; dq += ds @ k[at:stop].",
    ),
)

NAMES = ("dq", "dk", "dv")


def _agree(
    t: Trial,
    S: int,
    T: int,
    causal: bool,
    block: int,
    *,
    D: int = 8,
    scale: float = 1.0,
    shard: slice | None = None,
    watch: tuple[str, ...] = (),
    rtol: float = 1e-4,
) -> Call:
    """Gradients against float64; with `shard`, for some of the keys that the forward pass saw."""
    import torch

    q, k = (tensor(t, n, D, scale=scale) for n in (S, T))
    v, dout = tensor(t, T, D), tensor(t, S, D)
    mask = visible(S, T, causal)
    out, lse = (torch.from_numpy(x).float() for x in attention(q, k, v, mask))
    part = slice(0, T) if shard is None else shard
    k, v, mask = k[part], v[part], mask[:, part]
    call = t.perform(q, k, v, out, lse, dout, causal, block, watch=watch)
    want = gradients(q, k, v, out, lse, dout, mask)
    for name, got, right in zip(NAMES, t.pair(call.value, 3, "(dq, dk, dv)"), want, strict=True):
        size = max(1.0, float(abs(right).max()))  # where all cancels, rounding is left of numbers like 1
        t.close(got, right, f"{name}, block {block}", rtol=rtol, atol=rtol * size)
    return call


@flash_backward.check("with one block they are the gradients of attention")
def one_block(t: Trial) -> None:
    for D in (4, 16):
        S, T = t.odd(3, 9), t.odd(9, 17)
        _agree(t, S, T, False, T, D=D)
    _agree(t, 1, 1, False, 1)


@flash_backward.check("they do not depend on the block")
def blocks(t: Trial) -> None:
    S, T = t.odd(5, 9), t.odd(23, 39)
    for block in (1, 4, 11):
        _agree(t, S, T, False, block)


@flash_backward.check("causal: hidden scores send nothing back")
def causal(t: Trial) -> None:
    S = t.odd(13, 21)
    for block in (4, 32):
        _agree(t, S, S, True, block)


@flash_backward.check("causal behind a cache: fewer queries than keys")
def cached(t: Trial) -> None:
    S = t.odd(5, 9)
    _agree(t, S, S + t.odd(3, 15), True, 4)
    _agree(t, 1, t.odd(13, 21), True, 8)


@flash_backward.check("scores in the hundreds")
def large(t: Trial) -> None:
    _agree(t, t.odd(5, 9), t.odd(13, 21), False, 4, scale=10, rtol=2e-2)


@flash_backward.check("the weights come from lse, also where k and v are a part of the keys")
def shard(t: Trial) -> None:
    T = t.odd(23, 39)
    _agree(t, t.odd(5, 9), T, False, 8, shard=slice(T // 3, T - 4))


@flash_backward.check("no S × T tensor is made")
def memory(t: Trial) -> None:
    S, T, D, block = t.odd(91, 111), t.odd(151, 191), 16, 16
    call = _agree(t, S, T, False, block, D=D, watch=("largest_intermediate",))
    most = 8 * T * max(D, block)  # float64 will do as well
    t.at_most(
        call.costs["largest_intermediate"],
        most,
        "bytes of the largest tensor made",
        "scores and weights of a block, [S, block], in a loop over the blocks.",
    )


# ── mistakes: one function, one fault at a time ──────────────────────────────────────────────────────


def backward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, causal: bool, block: int, fault: str = ""
) -> Any:
    """The loop that most solutions have, with one fault."""
    import torch

    (S, D), T = q.shape, len(k)
    scale = D**-0.5
    delta = ((dout if fault == "delta_dout" else out) * dout).sum(1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at in range(0, T // block * block if fault == "rounded_down" else T, block):
        part = slice(at, min(at + block, T))
        s = q @ k[part].T * (1.0 if fault == "unscaled_scores" else scale)
        hidden = torch.arange(part.start, part.stop) > torch.arange(S)[:, None] + (
            0 if fault == "top_left" else T - S
        )
        if causal and fault == "strict":
            hidden = hidden | (torch.arange(part.start, part.stop) == torch.arange(S)[:, None] + T - S)
        if not causal or fault == "unmasked":
            hidden = torch.zeros_like(s, dtype=torch.bool)
        if fault == "block_softmax":
            p = s.masked_fill(hidden, -1e30).softmax(1)
        elif fault == "maximum":
            p = (s - s.amax(1, keepdim=True)).exp().masked_fill(hidden, 0.0)
        elif fault == "overflowing":
            p = (s.exp() / lse.exp()[:, None]).masked_fill(hidden, 0.0)
        elif fault == "base_two":
            p = (s - lse[:, None]).exp2().masked_fill(hidden, 0.0)
        else:
            p = (s - lse[:, None]).exp().masked_fill(hidden, 0.0)
        dp = dout @ v[part].T
        if fault == "no_delta":
            ds = p * dp
        elif fault == "block_delta":
            ds = p * (dp - (p * dp).sum(1, keepdim=True))
        else:
            ds = p * (dp - delta)
        dv[part] = p.T @ (out if fault == "dv_of_out" else dout)
        dk[part] = (p if fault == "dk_of_p" else ds).T @ q * (1.0 if fault == "dk_unscaled" else scale)
        step = ds @ k[part] * (1.0 if fault == "dq_unscaled" else scale)
        dq = step if fault == "dq_overwritten" else dq + step
    return dq, dk, dv


def _mistake(fault: str, says: str, tries: str, caught_by: str) -> None:
    def wrong(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, causal: bool, block: int) -> Any:
        return backward(q, k, v, out, lse, dout, causal, block, fault)

    wrong.__name__ = fault
    flash_backward.mistake(says=says, tries=tries, caught_by=caught_by)(wrong)


_mistake(
    "no_delta",
    "delta is forgotten: ds = p ⊙ dp is not the backward of a softmax",
    "p * (dp − delta), delta = (dout * out).sum(1).",
    "one_block",
)
_mistake("delta_dout", "delta is made of dout alone: dout·dout", "delta = (dout * out).sum(1).", "one_block")
_mistake("dk_unscaled", "dk lacks the factor 1/√D", "the scale that the scores had, on dk too.", "one_block")
_mistake("dq_unscaled", "dq lacks the factor 1/√D", "the scale that the scores had, on dq too.", "one_block")
_mistake(
    "unscaled_scores",
    "the scores are computed again without the scale, and no longer fit lse",
    "q @ kᵀ * D ** -0.5, exactly as forward.",
    "one_block",
)
_mistake("dv_of_out", "dv is pᵀ·out", "pᵀ @ dout: what arrives at out goes to v by its weight.", "one_block")
_mistake("dk_of_p", "dk is made of p, and not of ds", "dsᵀ @ q.", "one_block")
_mistake(
    "maximum",
    "p is computed with the maximum, as on the way forward, and never divided",
    "exp(s − lse), which is the finished weight: lse = m + log l.",
    "one_block",
)
_mistake("base_two", "p is a power of two", "torch.exp: lse is a natural logarithm.", "one_block")
_mistake(
    "block_softmax",
    "each block has a softmax of its own",
    "exp(s − lse), with the lse of all keys.",
    "blocks",
)
_mistake(
    "block_delta",
    "Σ_j p·dp is taken over the block alone",
    "delta = (dout * out).sum(1), which is the sum over all keys.",
    "blocks",
)
_mistake(
    "dq_overwritten",
    "each block overwrites dq: only the last one counts",
    "dq += …: every block of keys contributes to a query.",
    "blocks",
)
_mistake(
    "rounded_down",
    "the last block is left out where T is not a multiple of the block",
    "range(0, T, block).",
    "blocks",
)
_mistake(
    "unmasked",
    "the mask is forgotten: hidden scores get a weight exp(s − lse) of their own",
    "p = 0 where key j > i + T − S.",
    "causal",
)
_mistake(
    "strict",
    "a query does not see its own key",
    "j <= i + T − S: the key at the query's own position is visible.",
    "causal",
)
_mistake(
    "top_left",
    "query i is taken to see keys 0 … i, though T − S keys lie in front of the first query's own",
    "j <= i + T − S.",
    "cached",
)
_mistake(
    "overflowing",
    "exp(s) is divided by exp(lse): both overflow at 89",
    "the difference first: exp(s − lse).",
    "large",
)


@flash_backward.mistake(
    says="the weights are a softmax over the keys at hand, and lse is not used",
    tries="exp(s − lse), which needs no other block.",
    caught_by="shard",
)
def own_softmax(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, causal: bool, block: int) -> Any:
    import torch

    sums = []
    for at in range(0, len(k), block):
        s = q @ k[at : at + block].T * q.shape[1] ** -0.5
        j = torch.arange(at, at + s.shape[1])
        hidden = (j > torch.arange(len(q))[:, None] + len(k) - len(q)) & causal
        sums.append(s.masked_fill(hidden, -float("inf")).logsumexp(1))
    return backward(q, k, v, out, torch.stack(sums).logsumexp(0), dout, causal, block)


@flash_backward.mistake(
    says="the whole S × T matrix of weights is made",
    tries="a loop over blocks of keys; dk and dv of a block are complete at once.",
    caught_by="memory",
)
def whole(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, causal: bool, block: int) -> Any:
    return backward(q, k, v, out, lse, dout, causal, len(k))


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@flash_backward.alternative("block by block of keys")
def by_keys(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, causal: bool, block: int) -> Any:
    return backward(q, k, v, out, lse, dout, causal, block)


@flash_backward.alternative("block by block of queries: dq is complete at once, dk and dv add up")
def by_queries(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, causal: bool, block: int) -> Any:
    import torch

    (S, D), T = q.shape, len(k)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q = q * D**-0.5
    for at in range(0, S, block):
        rows = slice(at, min(at + block, S))
        p = (q[rows] @ k.T - lse[rows, None]).exp()
        if causal:
            p = p.tril(at + T - S)
        ds = p * (dout[rows] @ v.T - (dout[rows] * out[rows]).sum(1)[:, None])
        dq[rows] = ds @ k * D**-0.5
        dk += ds.T @ q[rows]
        dv += p.T @ dout[rows]
    return dq, dk, dv


@flash_backward.alternative("two passes: one over the queries for dq, one over the keys for dk and dv")
def two_passes(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, causal: bool, block: int) -> Any:
    import torch

    (S, D), T = q.shape, len(k)
    delta = torch.einsum("sd,sd->s", out, dout)

    def weights(rows: slice, part: slice) -> tuple[Any, Any]:
        p = torch.exp(q[rows] @ k[part].T / D**0.5 - lse[rows, None])
        if causal:
            i, j = torch.arange(rows.start, rows.stop), torch.arange(part.start, part.stop)
            p = p * (j <= i[:, None] + T - S)
        return p, p * (dout[rows] @ v[part].T - delta[rows, None]) / D**0.5

    tiles = [slice(a, min(a + block, S)) for a in range(0, S, block)]
    spans = [slice(a, min(a + block, T)) for a in range(0, T, block)]
    dq = torch.cat([sum(weights(r, c)[1] @ k[c] for c in spans) for r in tiles])
    both = [[weights(r, c) for r in tiles] for c in spans]
    dk = torch.cat([sum(x[1].T @ q[r] for x, r in zip(row, tiles, strict=True)) for row in both])
    dv = torch.cat([sum(x[0].T @ dout[r] for x, r in zip(row, tiles, strict=True)) for row in both])
    return dq, dk, dv
