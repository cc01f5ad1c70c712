"""Exercise `top_k_error_feedback`: send the largest numbers, and keep account of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch, as_array, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

top_k_error_feedback = Exercise(
    "top_k_error_feedback",
    title="Top-k with error feedback",
    arguments=("grad", "error", "k"),
    shapes=(
        "grad     float32 tensor [n]: this step's gradient",
        "error    float32 tensor [n]: what earlier steps did not send; zeros at first",
        "k        numbers to send, 1 … n",
        "returns  (indices, values, error): indices int64 [k], each once, in any order; values float32 [k]",
        "         at those indices; error float32 [n], what is still to be sent. grad and error are left",
        "         as they were.",
    ),
    formula="e = grad + error;   send the k largest |e|;   error ← e, with 0 where it was sent",
    difficulty=2,
    importance=5,
    minutes=15,
    points=4,
    hints=(
        "Suppose an element's gradient is 0.01 in every step, and the others' are larger. When is it sent, "
        "without error feedback? And with it?",
        "Add what is owed before you choose, choose by magnitude, send the sums with their signs, and set to "
        "zero in the new error exactly what was sent. Then sent + error is always grad + old error.",
        "e = grad + error; indices = e.abs().topk(k).indices; values = e[indices]; error = e.clone(); "
        "error[indices] = 0; return indices, values, error.",
    ),
)


def _send(t: Trial, grad: Any, error: Any, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The learner's packet, whose form is right."""
    got = t.pair(t.call(grad, error, k), 3, "(indices, values, error)")
    indices, values, after = (as_array(part) for part in got)
    if indices.shape != (k,) or indices.dtype.kind != "i":
        raise Mismatch(f"indices are {describe(got[0])}, expected {k} whole numbers")
    if values.shape != (k,) or after.shape != (len(grad),):
        came = f"{describe(got[1])} and {describe(got[2])}"
        raise Mismatch(f"values and error are {came}, expected [{k}] and [{len(grad)}]")
    if indices.min() < 0 or indices.max() >= len(grad) or len(set(indices.tolist())) < k:
        came = describe(indices.tolist())
        raise Mismatch(f"indices are {came}, expected {k} different ones below {len(grad)}")
    return indices, values, after


def _spread(t: Trial, n: int) -> Any:
    """Numbers whose magnitudes all differ, half of them negative."""
    sizes = torch.from_numpy(t.rng.permutation(n).astype(np.float32)) * 0.25 + 0.5
    return sizes * (1 - 2 * torch.from_numpy(t.integers(0, 2, n).astype(np.float32)))


@top_k_error_feedback.check("at first: the k largest magnitudes, with their signs")
def first(t: Trial) -> None:
    for n, k in ((t.size(12, 20), 3), (t.size(30, 40), t.size(5, 9)), (5, 5), (7, 1)):
        grad = _spread(t, n)
        indices, values, _ = _send(t, grad, torch.zeros(n), k)
        want = sorted(np.argsort(-np.abs(grad.numpy()))[:k].tolist())
        t.equal(sorted(indices.tolist()), want, "indices")
        t.close(values, grad.numpy()[indices], "values", rtol=1e-6)


@top_k_error_feedback.check("the new error holds what was not sent, and nothing of what was")
def rest(t: Trial) -> None:
    for n, k in ((t.size(12, 20), 3), (t.size(30, 40), t.size(5, 9))):
        grad = _spread(t, n)
        indices, _, after = _send(t, grad, torch.zeros(n), k)
        want = grad.numpy().copy()
        want[indices] = 0
        t.close(after, want, "error", rtol=1e-6)


@top_k_error_feedback.check("what is owed counts: in the choice, in the values and in the new error")
def owed(t: Trial) -> None:
    for n, k in ((t.size(12, 20), 4), (t.size(30, 40), t.size(5, 9))):
        whole = _spread(t, n)
        error = tensor(t, n, scale=3.0)
        grad = whole - error
        indices, values, after = _send(t, grad, error, k)
        total = (grad + error).numpy()
        t.equal(sorted(indices.tolist()), sorted(np.argsort(-np.abs(total))[:k].tolist()), "indices")
        t.close(values, total[indices], "values", rtol=1e-5)
        total[indices] = 0
        t.close(after, total, "error", rtol=1e-5)


@top_k_error_feedback.check("over many steps nothing is lost: sent + error is the sum of all gradients")
def nothing_lost(t: Trial) -> None:
    n, k = t.size(10, 14), 2
    error, sent, total = torch.zeros(n), np.zeros(n), np.zeros(n)
    for _ in range(12):
        grad = tensor(t, n)
        indices, values, after = _send(t, grad, error, k)
        sent[indices] += values
        total += grad.numpy()
        error = torch.from_numpy(after.copy())
        t.close(sent + after, total, "sent + error", rtol=1e-5)


@top_k_error_feedback.check("equal numbers, zeros and k = n are no special cases")
def ties(t: Trial) -> None:
    n = t.size(6, 9)
    for grad, k in ((torch.ones(n), 2), (torch.zeros(n), 3), (-torch.ones(n), n)):
        indices, values, after = _send(t, grad, torch.zeros(n), k)
        want = grad.numpy().copy()
        t.close(values, want[indices], "values", rtol=1e-6)
        want[indices] = 0
        t.close(after, want, "error", rtol=1e-6)


@top_k_error_feedback.check("grad and error are left as they were")
def untouched(t: Trial) -> None:
    _send(t, tensor(t, 9), tensor(t, 9), 3)
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _packet(e: Any, k: int, by: Any = None) -> tuple[Any, Any, Any]:
    indices = (e.abs() if by is None else by).topk(k).indices
    after = e.clone()
    after[indices] = 0
    return indices, e[indices], after


@top_k_error_feedback.mistake(
    says="the largest numbers are chosen, not the largest magnitudes: negative ones never go",
    tries=".abs() before .topk.",
    caught_by="first",
)
def signed(grad: Any, error: Any, k: Any) -> Any:
    return _packet(grad + error, k, grad + error)


@top_k_error_feedback.mistake(
    says="the magnitudes are sent: the signs are lost",
    tries="e[indices], where e still has its signs.",
    caught_by="first",
)
def magnitudes(grad: Any, error: Any, k: Any) -> Any:
    indices, values, after = _packet(grad + error, k)
    return indices, values.abs(), after


@top_k_error_feedback.mistake(
    says="the smallest magnitudes are sent",
    tries=".topk(k) of the magnitudes, largest first, which is the default.",
    caught_by="first",
)
def smallest(grad: Any, error: Any, k: Any) -> Any:
    return _packet(grad + error, k, -(grad + error).abs())


@top_k_error_feedback.mistake(
    says="what was not sent is forgotten: there is no error feedback",
    tries="an error of grad + error, with zeros where it was sent.",
    caught_by="rest",
)
def forgotten(grad: Any, error: Any, k: Any) -> Any:
    indices, values, after = _packet(grad + error, k)
    return indices, values, torch.zeros_like(after)


@top_k_error_feedback.mistake(
    says="what was sent stays in the error, and is sent again and again",
    tries="error[indices] = 0.",
    caught_by="rest",
)
def not_cleared(grad: Any, error: Any, k: Any) -> Any:
    indices, values, _ = _packet(grad + error, k)
    return indices, values, grad + error


@top_k_error_feedback.mistake(
    says="the error is what was sent, where it should be what was not",
    tries="zeros at the indices, the rest kept.",
    caught_by="rest",
)
def the_wrong_half(grad: Any, error: Any, k: Any) -> Any:
    indices, values, after = _packet(grad + error, k)
    return indices, values, grad + error - after


@top_k_error_feedback.mistake(
    says="the choice is made by this step's gradient alone: small ones are never sent, however much is owed",
    tries="(grad + error).abs().topk(k).",
    caught_by="owed",
)
def chosen_by_grad(grad: Any, error: Any, k: Any) -> Any:
    return _packet(grad + error, k, grad.abs())


@top_k_error_feedback.mistake(
    says="this step's gradient is sent without what is owed, which is then lost",
    tries="values of grad + error.",
    caught_by="owed",
)
def grad_sent(grad: Any, error: Any, k: Any) -> Any:
    indices, _, after = _packet(grad + error, k)
    return indices, grad[indices], after


@top_k_error_feedback.mistake(
    says="the earlier error is never used",
    tries="e = grad + error.",
    caught_by="owed",
)
def error_ignored(grad: Any, error: Any, k: Any) -> Any:
    return _packet(grad, k)


@top_k_error_feedback.mistake(
    says="the earlier error is subtracted",
    tries="grad + error: the error is what is still to be sent.",
    caught_by="owed",
)
def subtracted(grad: Any, error: Any, k: Any) -> Any:
    return _packet(grad - error, k)


@top_k_error_feedback.mistake(
    says="a new error is made of this step alone, and what was owed before is dropped",
    tries="a new error from grad + error.",
    caught_by="owed",
)
def old_dropped(grad: Any, error: Any, k: Any) -> Any:
    indices, values, _ = _packet(grad + error, k)
    after = grad.clone()
    after[indices] = 0
    return indices, values, after


@top_k_error_feedback.mistake(
    says="the error decays from step to step, and a part of every gradient is lost",
    tries="the whole of what was not sent.",
    caught_by="rest",
)
def decayed(grad: Any, error: Any, k: Any) -> Any:
    indices, values, after = _packet(grad + error, k)
    return indices, values, 0.9 * after


@top_k_error_feedback.mistake(
    says="all that reaches the k-th magnitude is sent: where numbers are equal, more than k",
    tries=".topk(k).indices, which are always k.",
    caught_by="ties",
)
def by_threshold(grad: Any, error: Any, k: Any) -> Any:
    e = grad + error
    mask = e.abs() >= e.abs().topk(k).values[-1]
    indices = mask.nonzero().flatten()
    return indices, e[indices], torch.where(mask, 0, e)


@top_k_error_feedback.mistake(
    says="the gradient is added into the error that was given, which the caller still has",
    tries="e = grad + error, a new tensor, in place of error += grad.",
    caught_by="untouched",
)
def in_place(grad: Any, error: Any, k: Any) -> Any:
    error += grad
    indices = error.abs().topk(k).indices
    values = error[indices]
    error[indices] = 0
    return indices, values, error


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@top_k_error_feedback.alternative("indices by sorting, in rising order; the error by a mask")
def by_sorting(grad: Any, error: Any, k: Any) -> Any:
    e = grad + error
    indices = torch.argsort(e.abs(), descending=True)[:k].sort().values
    keep = torch.ones_like(e).index_fill(0, indices, 0.0)
    return indices, e.gather(0, indices), e * keep


@top_k_error_feedback.alternative("the sent numbers as a dense tensor, subtracted")
def subtracted_dense(grad: Any, error: Any, k: Any) -> Any:
    e = error.add(grad)
    indices = torch.topk(e**2, k).indices
    sent = torch.zeros_like(e).scatter(0, indices, e[indices])
    return [indices, sent[indices], e - sent]
