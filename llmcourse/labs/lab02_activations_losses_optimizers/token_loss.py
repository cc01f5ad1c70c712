"""Exercise `token_loss`: the loss of a language model and its gradient, over the tokens that count."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

IGNORE = -100

token_loss = Exercise(
    "token_loss",
    title="Cross-entropy over tokens",
    arguments=("logits", "targets"),
    shapes=(
        "logits   tensor [N, V], float32 or bfloat16: N positions, V words",
        "targets  int64 tensor [N]: the right word of each position, or −100 where nothing is asked;",
        "         at least one is asked",
        "returns  (loss, grad): a float32 number, the mean over the positions that are asked, and its",
        "         gradient [N, V] in the number format of logits, 0 where nothing is asked",
        "cost     computed in float32; no intermediate larger than N · V numbers of 4 bytes",
    ),
    formula="loss = 1/M · Σ_asked (log Σ_j exp z_j − z_target);   grad = (softmax(z) − onehot) / M",
    difficulty=3,
    importance=5,
    minutes=25,
    points=6,
    hints=(
        "How many positions does the mean divide by, when some of them are not asked? Which rows of the "
        "gradient must be 0? And what happens to exp(z) when z is 200?",
        "Widen first: z = logits.float(). torch.logsumexp takes the maximum out by itself (or do: "
        "m = z.amax(1), m + log Σ exp(z − m)). Pick targets by gather or by [rows, targets], but only among "
        "the asked rows: −100 is no column. The gradient is exp(z − lse), minus 1 at the target, 0 in rows "
        "that are not asked, all over M.",
        "asked = targets != -100; rows = asked.nonzero()[:, 0]; lse = torch.logsumexp(z, 1); loss = "
        "(lse[rows] - z[rows, targets[rows]]).mean(); grad = torch.exp(z - lse[:, None]); "
        "grad[rows, targets[rows]] -= 1; grad[~asked] = 0; return loss, (grad / len(rows)).to(logits.dtype).",
    ),
)


def expected(logits: Any, targets: Any) -> tuple[float, np.ndarray]:
    """Row by row in float64."""
    z, asked = logits.double().numpy(), [i for i, k in enumerate(targets.tolist()) if k != IGNORE]
    loss, grad = 0.0, np.zeros_like(z)
    for i in asked:
        k, top = int(targets[i]), z[i].max()
        weights = np.exp(z[i] - top)
        loss += top + np.log(weights.sum()) - z[i, k]
        grad[i] = weights / weights.sum()
        grad[i, k] -= 1
    return loss / len(asked), grad / len(asked)


def _targets(t: Trial, n: int, words: int, ignored: int = 0) -> Any:
    targets = torch.from_numpy(t.integers(0, words, n))
    targets[torch.from_numpy(t.rng.permutation(n)[:ignored])] = IGNORE
    return targets


def _loss(t: Trial, got: Any, logits: Any, targets: Any) -> None:
    """The loss is a difference of numbers as large as the logits, and no more exact than they are."""
    size = float(logits.float().abs().max())
    t.close(got, expected(logits, targets)[0], "loss", rtol=1e-5, atol=1e-6 * (1 + size))


def _agree(t: Trial, logits: Any, targets: Any, **tolerance: float) -> None:
    value, grad = t.pair(t.call(logits, targets), 2, "a pair (loss, grad)")
    _loss(t, value, logits, targets)
    t.close(grad, expected(logits, targets)[1], "grad", **tolerance)


@token_loss.check("with every position asked, the loss is the mean of −log softmax at the targets")
def loss(t: Trial) -> None:
    for n, words in ((t.odd(5, 11), t.odd(7, 15)), (1, 2), (2, 33)):
        logits, targets = tensor(t, n, words, scale=2.0), _targets(t, n, words)
        got = t.pair(t.call(logits, targets), 2, "a pair (loss, grad)")[0]
        _loss(t, got, logits, targets)


@token_loss.check("the gradient is (softmax − onehot) over the number of positions")
def gradient(t: Trial) -> None:
    for n, words in ((t.odd(5, 11), t.odd(7, 15)), (1, 2), (3, 33)):
        logits, targets = tensor(t, n, words, scale=2.0), _targets(t, n, words)
        got = t.pair(t.call(logits, targets), 2, "a pair (loss, grad)")[1]
        t.close(got, expected(logits, targets)[1], "grad")


@token_loss.check("positions that are not asked neither count nor get a gradient")
def ignored(t: Trial) -> None:
    for n, words, left_out in ((t.odd(7, 11), 150, 3), (9, t.odd(5, 9), 4), (4, 5, 3)):
        logits = tensor(t, n, words)
        _agree(t, logits, _targets(t, n, words, left_out))


@token_loss.check("no logit is too large or too small")
def extreme(t: Trial) -> None:
    n, words = 6, t.odd(5, 9)
    logits = tensor(t, n, words, scale=60.0)
    logits[0] += 500
    logits[1] -= 500
    logits[2, 0] = 300.0
    targets = _targets(t, n, words)
    targets[2] = words - 1
    _agree(t, logits, targets, rtol=1e-4)


@token_loss.check("16-bit logits: computed in float32, the gradient in their own format")
def formats(t: Trial) -> None:
    n, words = t.odd(15, 21), t.odd(301, 401)
    logits, targets = tensor(t, n, words, dtype="bfloat16", scale=3.0), _targets(t, n, words, 2)
    call = t.pair(t.call(logits, targets), 2, "a pair (loss, grad)")
    t.equal(
        str(getattr(call[1], "dtype", "none")).removeprefix("torch."), "bfloat16", "number format of grad"
    )
    _loss(t, call[0], logits, targets)
    t.close(call[1], expected(logits, targets)[1], "grad", rtol=8e-3)


@token_loss.check("nothing larger than the logits is made, and they stay as they were")
def cost(t: Trial) -> None:
    n, words = 24, 130
    logits, targets = tensor(t, n, words), _targets(t, n, words, 5)
    call = t.perform(logits, targets, watch=("largest_intermediate",))
    t.unchanged()
    t.at_most(
        call.costs["largest_intermediate"],
        4 * n * words,
        f"bytes of the largest intermediate, with logits of {logits.nbytes:,} bytes",
        "one row of logits and one row of gradient for each position: no matrix [V, V] for each of them.",
    )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _parts(logits: Any, targets: Any) -> tuple[Any, Any, Any, Any]:
    """(z in float32, asked, rows that are asked, their targets)."""
    asked = targets != IGNORE
    rows = asked.nonzero()[:, 0]
    return logits.float(), asked, rows, targets[rows]


def solved(logits: Any, targets: Any) -> tuple[Any, Any, int]:
    """(sum of the losses, their gradient [N, V] in float32, positions asked)."""
    z, asked, rows, picked = _parts(logits, targets)
    lse = torch.logsumexp(z, dim=1)
    grad = torch.exp(z - lse[:, None])
    grad[rows, picked] -= 1
    grad[~asked] = 0
    return (lse[rows] - z[rows, picked]).sum(), grad, len(rows)


def _mean(total: Any, grad: Any, count: int, dtype: Any) -> tuple[Any, Any]:
    return total / count, (grad / count).to(dtype)


@token_loss.mistake(
    says="the loss has no minus: it is the mean of log p",
    tries="log Σ exp z − z_target, which is −log p.",
    caught_by="loss",
)
def log_likelihood(logits: Any, targets: Any) -> Any:
    value, grad = _mean(*solved(logits, targets), logits.dtype)
    return -value, grad


@token_loss.mistake(
    says="the loss is a sum over the positions, not their mean",
    tries="dividing by the number of positions that are asked.",
    caught_by="loss",
)
def summed(logits: Any, targets: Any) -> Any:
    total, grad, _ = solved(logits, targets)
    return total, grad.to(logits.dtype)


@token_loss.mistake(
    says="softmax and its sum run down the positions, not along the words",
    tries="dim=1, or dim=-1: a row is one position.",
    caught_by="loss",
)
def over_positions(logits: Any, targets: Any) -> Any:
    z, asked, rows, picked = _parts(logits, targets)
    lse = torch.logsumexp(z, dim=0)
    grad = torch.exp(z - lse)
    value = (lse[picked] - z[rows, picked]).mean()
    grad[rows, picked] -= 1
    grad[~asked] = 0
    return value, (grad / len(rows)).to(logits.dtype)


@token_loss.mistake(
    says="the gradient is that of the sum, the loss a mean",
    tries="dividing grad by the number of positions too.",
    caught_by="gradient",
)
def grad_not_divided(logits: Any, targets: Any) -> Any:
    total, grad, count = solved(logits, targets)
    return total / count, grad.to(logits.dtype)


@token_loss.mistake(
    says="the gradient is p / M: the 1 at the target is missing",
    tries="grad[rows, targets] -= 1.",
    caught_by="gradient",
)
def no_onehot(logits: Any, targets: Any) -> Any:
    total, _, count = solved(logits, targets)
    _, asked, *_ = _parts(logits, targets)
    return _mean(total, logits.float().softmax(1) * asked[:, None], count, logits.dtype)


@token_loss.mistake(
    says="the gradient has the wrong sign: onehot − p",
    tries="p − onehot.",
    caught_by="gradient",
)
def wrong_sign(logits: Any, targets: Any) -> Any:
    total, grad, count = solved(logits, targets)
    return _mean(total, -grad, count, logits.dtype)


@token_loss.mistake(
    says="grad[:, targets] -= 1 takes 1 away in every row",
    tries="grad[rows, targets] -= 1: one place in each row.",
    caught_by="gradient",
)
def columns(logits: Any, targets: Any) -> Any:
    total, _, count = solved(logits, targets)
    _, asked, _, picked = _parts(logits, targets)
    grad = logits.float().softmax(1)
    grad[:, picked] -= 1
    return _mean(total, grad * asked[:, None], count, logits.dtype)


@token_loss.mistake(
    says="the mean is over all N positions, also those that are not asked",
    tries="dividing by (targets != -100).sum().",
    caught_by="ignored",
)
def divided_by_all(logits: Any, targets: Any) -> Any:
    total, grad, _ = solved(logits, targets)
    return _mean(total, grad, len(targets), logits.dtype)


@token_loss.mistake(
    says="rows that are not asked get a gradient: their softmax",
    tries="grad[targets == -100] = 0.",
    caught_by="ignored",
)
def ignored_get_gradient(logits: Any, targets: Any) -> Any:
    total, grad, count = solved(logits, targets)
    asked = targets != IGNORE
    return _mean(total, torch.where(asked[:, None], grad, logits.float().softmax(1)), count, logits.dtype)


@token_loss.mistake(
    says="−100 is taken for word 0, by clamp, and counts",
    tries="a mask of the asked positions before anything is summed.",
    caught_by="ignored",
)
def clamped(logits: Any, targets: Any) -> Any:
    return _mean(*solved(logits, targets.clamp_min(0)), logits.dtype)


@token_loss.mistake(
    says="−100 is used as a column, counted from the end",
    tries="a mask of the asked positions before anything is picked.",
    caught_by="ignored",
)
def from_the_end(logits: Any, targets: Any) -> Any:
    z, rows = logits.float(), torch.arange(len(targets))
    lse = torch.logsumexp(z, 1)
    grad = torch.exp(z - lse[:, None])
    grad[rows, targets] -= 1
    return (lse - z[rows, targets]).mean(), (grad / len(rows)).to(logits.dtype)


@token_loss.mistake(
    says="exp is taken of the logits as they come, and for large ones p is ∞ / ∞",
    tries="torch.logsumexp, or taking each row's maximum away first.",
    caught_by="extreme",
)
def no_maximum(logits: Any, targets: Any) -> Any:
    z, asked, rows, picked = _parts(logits, targets)
    p = z.exp() / z.exp().sum(1, keepdim=True)
    grad = p.clone()
    grad[rows, picked] -= 1
    grad[~asked] = 0
    return -p[rows, picked].log().mean(), (grad / len(rows)).to(logits.dtype)


@token_loss.mistake(
    says="the logarithm is taken of a probability that has become 0",
    tries="log Σ exp z − z_target: no logarithm of p is needed.",
    caught_by="extreme",
)
def log_of_zero(logits: Any, targets: Any) -> Any:
    _, grad, count = solved(logits, targets)
    z, _, rows, picked = _parts(logits, targets)
    return -z.softmax(1)[rows, picked].log().mean(), (grad / count).to(logits.dtype)


@token_loss.mistake(
    says="p is kept above a small number before the logarithm, which caps the loss",
    tries="log Σ exp z − z_target: nothing to protect.",
    caught_by="extreme",
)
def capped(logits: Any, targets: Any) -> Any:
    _, grad, count = solved(logits, targets)
    z, _, rows, picked = _parts(logits, targets)
    return -(z.softmax(1)[rows, picked] + 1e-20).log().mean(), (grad / count).to(logits.dtype)


@token_loss.mistake(
    says="everything is computed in the 16 bits that came in: three digits of loss",
    tries="z = logits.float() first.",
    caught_by="formats",
)
def narrow(logits: Any, targets: Any) -> Any:
    asked = targets != IGNORE
    rows = asked.nonzero()[:, 0]
    lse = torch.logsumexp(logits, dim=1)
    grad = torch.exp(logits - lse[:, None])
    grad[rows, targets[rows]] -= 1
    grad[~asked] = 0
    return (lse[rows] - logits[rows, targets[rows]]).mean(), grad / len(rows)


@token_loss.mistake(
    says="the gradient is float32, whatever came in",
    tries=".to(logits.dtype) at the end.",
    caught_by="formats",
)
def stays_wide(logits: Any, targets: Any) -> Any:
    return _mean(*solved(logits, targets), torch.float32)


@token_loss.mistake(
    says="the gradient is computed in the logits' own memory",
    tries="a new tensor: torch.exp(z - lse[:, None]), without sub_ or exp_ on what came in.",
    caught_by="cost",
)
def in_place(logits: Any, targets: Any) -> Any:
    value, grad = _mean(*solved(logits, targets), logits.dtype)
    return value, logits.copy_(grad)


@token_loss.mistake(
    says="a matrix [V, V] is made for every position, softmax's Jacobian: right, and V times too large",
    tries="(p − onehot) / M: most of that matrix cancels.",
    caught_by="cost",
)
def by_jacobian(logits: Any, targets: Any) -> Any:
    total, _, count = solved(logits, targets)
    p = logits.float().softmax(1)
    eye = torch.eye(logits.shape[1])
    onehot = eye[targets.clamp_min(0)] * (targets != IGNORE)[:, None]
    jacobian = eye - p[:, None, :]  # of log p: [N, V, V]
    return _mean(total, -torch.einsum("nv,nvw->nw", onehot, jacobian), count, logits.dtype)


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@token_loss.alternative("logsumexp and indices")
def by_index(logits: Any, targets: Any) -> Any:
    return _mean(*solved(logits, targets), logits.dtype)


@token_loss.alternative("log_softmax, gather and a mask")
def by_mask(logits: Any, targets: Any) -> Any:
    asked = (targets != IGNORE).float()
    count, logp = asked.sum(), torch.log_softmax(logits.float(), dim=-1)
    places = targets.clamp_min(0)[:, None]
    value = -(logp.gather(1, places)[:, 0] * asked).sum() / count
    grad = logp.exp().scatter_add(1, places, -torch.ones_like(logp[:, :1])) * asked[:, None] / count
    return [value, grad.to(logits.dtype)]


@token_loss.alternative("the asked rows alone, the maximum taken out by hand")
def asked_rows(logits: Any, targets: Any) -> Any:
    keep = targets >= 0
    z, picked = logits[keep].float(), targets[keep]
    z = z - z.max(dim=1, keepdim=True).values
    weights, at = z.exp(), torch.arange(len(picked))
    total = weights.sum(1, keepdim=True)
    grad = torch.zeros_like(logits)
    p = weights / total
    p[at, picked] -= 1
    grad[keep] = (p / len(picked)).to(logits.dtype)
    return (total.log()[:, 0] - z[at, picked]).mean().item(), grad


@token_loss.alternative("PyTorch's own loss, and autograd")
def by_autograd(logits: Any, targets: Any) -> Any:
    with torch.enable_grad():
        z = logits.detach().float().requires_grad_()
        value = torch.nn.functional.cross_entropy(z, targets)
        (grad,) = torch.autograd.grad(value, z)
    return value.detach(), grad.to(logits.dtype)
