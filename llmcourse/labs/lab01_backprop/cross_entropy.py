"""Exercise `cross_entropy`: the loss of a classifier and its gradient, in one step and without overflow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmcourse.grading.compare import as_array
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

cross_entropy = Exercise(
    "cross_entropy",
    title="Softmax and cross-entropy in one step",
    arguments=("logits", "labels"),
    shapes=(
        "logits  array [B, C] of floats: a row for each example, a column for each class",
        "labels  array [B] of integers of any width: the right class of each row, 0 … C−1",
        "returns (loss, grad): a single number, and its gradient with respect to logits, [B,",
        "        C] in the logits' number format",
    ),
    formula="loss = 1/B · Σ_i −log softmax(logits[i])[labels[i]],  softmax(z)[j] = exp z[j] / Σ_k exp z[k]",
    difficulty=3,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "−log softmax(z)[t] is log Σ exp(z) − z[t]. What is the derivative of each of the two terms with "
        "respect to z[j]? And what happens to exp(z) when z is 1000?",
        "The gradient of a row is p − onehot(t), divided by B because the loss is a mean. Subtracting a "
        "row's maximum from the row changes neither p nor the loss, and then the largest exponent is 0. "
        "Never take the logarithm of a probability that may have become 0: subtract log Σ exp instead.",
        "z = logits - logits.max(axis=1, keepdims=True); logp = z - np.log(np.exp(z).sum(axis=1, "
        "keepdims=True)). With rows = np.arange(B), the loss is the mean of -logp[rows, labels]; grad is "
        "np.exp(logp) with 1 taken away at [rows, labels], over B.",
    ),
)


def expected(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Row by row in Python's floats, with exactly rounded sums and log Σ exp taken from the maximum."""
    count, grad, losses = len(logits), np.zeros(logits.shape), []
    for i, (row, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        top = max(row)
        weights = [math.exp(z - top) for z in row]
        total = math.fsum(weights)
        losses.append(math.fsum([top, -row[label], math.log(total)]))
        for j, weight in enumerate(weights):
            grad[i, j] = (weight / total - (j == label)) / count
    return math.fsum(losses) / count, grad


def _both(t: Trial, logits: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    return t.pair(t.call(logits, labels), 2, "a pair (loss, grad)")


def _agree(
    t: Trial, logits: np.ndarray, labels: np.ndarray, rtol: float = 1e-9, atol: float | None = None
) -> tuple[Any, ...]:
    pair = _both(t, logits, labels)
    for name, got, want in zip(("loss", "grad"), pair, expected(logits, labels), strict=True):
        t.close(got, want, name, rtol=rtol, atol=atol)
    return pair


def _drawn(t: Trial, rows: int, classes: int, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    return t.normal(rows, classes, dtype=dtype, scale=1.5), t.integers(0, classes, rows)


def _batches(t: Trial) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Fewer rows than classes, more, as many, and float32: each with the tolerance that it needs."""
    n = t.odd(5, 9)
    few = t.size(2, 4)
    logits, _ = _drawn(t, few, n)
    yield logits, t.integers(0, n - 1, few), 1e-7  # of the last class there is no example
    for rows, classes in [(n, t.size(2, 4)), (n, n)]:
        yield *_drawn(t, rows, classes), 1e-7
    yield *_drawn(t, n, t.size(2, 4), np.float32), 2e-5


@cross_entropy.check("the loss is the mean over the rows of −log softmax(logits)[label]")
def loss(t: Trial) -> None:
    for logits, labels, rtol in _batches(t):
        got, _ = _both(t, logits, labels)
        t.close(got, expected(logits, labels)[0], "loss", rtol=rtol)


@cross_entropy.check("grad is the loss's gradient with respect to the logits")
def gradient(t: Trial) -> None:
    for logits, labels, rtol in _batches(t):
        _, got = _both(t, logits, labels)
        t.close(got, expected(logits, labels)[1], "grad", rtol=rtol)


@cross_entropy.check("one row, one class, two classes and a class that all rows share work")
def small(t: Trial) -> None:
    n = t.odd()
    for rows, classes in [(1, n), (n, 1), (1, 1), (n, 2), (1, 2)]:
        _agree(t, *_drawn(t, rows, classes), rtol=1e-7, atol=1e-9)
    _agree(t, t.normal(n, 3), np.full(n, t.rng.integers(3)), rtol=1e-7)
    _agree(t, t.integers(-1, 2, n, 4).astype(np.float64), t.integers(0, 4, n), rtol=1e-7)
    _agree(t, np.zeros((2, n)), np.array([0, n - 1]), rtol=1e-7)


@cross_entropy.check("a constant added to a row changes nothing, and each row of grad sums to 0")
def shifted(t: Trial) -> None:
    logits, labels = _drawn(t, t.odd(), t.size())
    _agree(t, logits + t.normal(len(logits), 1, scale=5), labels, rtol=1e-7)
    _, grad = _agree(t, logits, labels, rtol=1e-7)
    t.close(as_array(grad).sum(axis=1), np.zeros(len(logits)), "the rows' sums of grad", atol=1e-12)


@cross_entropy.check("logits of any size work: no overflow, and no logarithm of 0")
def extreme(t: Trial) -> None:
    rows, classes = t.odd(), t.size(3)
    far = t.normal(rows, classes, scale=1e4)
    _agree(t, far, t.integers(0, classes, rows), rtol=1e-7, atol=1e-7)
    _agree(t, far, far.argmin(axis=1), rtol=1e-7, atol=1e-7)
    apart, labels = _drawn(t, rows, classes)
    apart += 1e4 * (-1.0) ** np.arange(rows)[:, None]
    _agree(t, apart, labels, rtol=1e-7)
    _agree(t, np.array([[1e4, -1e4]]), np.array([1]), rtol=1e-9)
    single = t.normal(rows, classes, dtype=np.float32, scale=200)
    _agree(t, single, t.integers(0, classes, rows), rtol=1e-4, atol=1e-4)


@cross_entropy.check("labels of any integer format work, in batches of many rows")
def label_formats(t: Trial) -> None:
    rows, classes = t.odd(41, 61), t.odd(11, 15)
    for dtype in (np.uint8, np.int8, np.int32, np.int64):
        logits, labels = _drawn(t, rows, classes)
        _agree(t, logits, labels.astype(dtype), rtol=1e-7)
    for wide in (np.uint16, np.int64):
        _agree(t, t.normal(3, 300), np.array([299, 130, 0], wide), rtol=1e-7)


@cross_entropy.check("transposed arrays and arrays with gaps work")
def layouts(t: Trial) -> None:
    logits, labels = _drawn(t, t.odd(), t.size())
    for z, at in zip(t.layouts(logits), t.layouts(labels), strict=True):
        _agree(t, z, at, rtol=1e-7)


@cross_entropy.check("grad has the logits' number format, and the digits that come with it")
def formats(t: Trial) -> None:
    for dtype in (np.float64, np.float32):
        logits, labels = _drawn(t, t.odd(), t.size(), dtype)
        rtol = 1e-9 if dtype is np.float64 else 2e-5
        _, grad = _agree(t, logits, labels, rtol=rtol)
        t.equal(str(as_array(grad).dtype), np.dtype(dtype).name, "number format of grad")


@cross_entropy.check("logits and labels are left as they were")
def unchanged(t: Trial) -> None:
    for dtype in (np.int64, np.uint8):
        logits, labels = _drawn(t, t.odd(), t.size())
        t.call(logits, labels.astype(dtype))
        t.unchanged()


# What the mistakes and alternatives below share, so that each shows its own idea.


def _log_softmax(z: Any) -> Any:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _picked(logp: Any, labels: Any) -> Any:
    return logp[np.arange(len(logp)), labels]


def _minus_onehot(p: Any, labels: Any) -> Any:
    grad = p.copy()
    grad[np.arange(len(p)), labels] -= 1
    return grad


def _from_log(logp: Any, labels: Any) -> tuple[Any, Any]:
    return -_picked(logp, labels).mean(), _minus_onehot(np.exp(logp), labels) / len(logp)


def _from_weights(weights: Any, labels: Any) -> tuple[Any, Any]:
    p = weights / weights.sum(axis=1, keepdims=True)
    return -np.log(_picked(p, labels)).mean(), _minus_onehot(p, labels) / len(p)


@cross_entropy.mistake(
    says="loss and gradient are summed over the rows, not averaged",
    tries="dividing both by B, the number of rows: the loss of a larger batch should not be larger.",
    caught_by="loss",
)
def summed(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    return value * len(logits), grad * len(logits)


@cross_entropy.mistake(
    says="the mean runs over all B·C places of onehot · log p, not over the B rows",
    tries="the sum over each row first, then the mean over the rows: dividing by B alone.",
    caught_by="loss",
)
def mean_of_all(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    return value / logits.shape[1], grad / logits.shape[1]


@cross_entropy.mistake(
    says="loss and gradient are divided by C, the number of classes",
    tries="dividing by B, len(logits).",
    caught_by="loss",
)
def divided_by_classes(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    scale = len(logits) / logits.shape[1]
    return value * scale, grad * scale


@cross_entropy.mistake(
    says="the loss of each row is returned, not their mean",
    tries=".mean() over the rows.",
    caught_by="loss",
)
def row_losses(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    return -_picked(logp, labels), _from_log(logp, labels)[1]


@cross_entropy.mistake(
    says="the logarithm is taken of the mean probability, not the mean of the logarithms",
    tries="the logarithm of each row's probability first, then the mean.",
    caught_by="loss",
)
def log_of_mean(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    return -np.log(np.exp(_picked(logp, labels)).mean()), _from_log(logp, labels)[1]


@cross_entropy.mistake(
    says="the softmax is taken over the examples (axis 0), not over the classes",
    tries="axis=1, keepdims=True in both the maximum and the sum.",
    caught_by="loss",
)
def over_examples(logits: Any, labels: Any) -> Any:
    return _from_log(_log_softmax(logits.T).T, labels)


@cross_entropy.mistake(
    says="the maximum of each column is subtracted, by another number in each place of a row",
    tries="logits.max(axis=1, keepdims=True): one number for a whole row leaves its softmax as it is.",
    caught_by="loss",
)
def maximum_of_columns(logits: Any, labels: Any) -> Any:
    z = logits - logits.max(axis=0)
    return _from_log(z - np.log(np.exp(z).sum(axis=1, keepdims=True)), labels)


@cross_entropy.mistake(
    says="the number of classes is taken from the labels, and the last class need not be among them",
    tries="C = logits.shape[1].",
    caught_by="loss",
)
def classes_from_labels(logits: Any, labels: Any) -> Any:
    onehot = np.eye(int(labels.max()) + 1, dtype=logits.dtype)[labels]
    logp = _log_softmax(logits)
    return -(onehot * logp).sum(axis=1).mean(), (np.exp(logp) - onehot) / len(logits)


@cross_entropy.mistake(
    says="the logarithm has base 2",
    tries="np.log, the natural logarithm: it is the one that undoes exp.",
    caught_by="loss",
)
def base_two(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    return value / math.log(2), grad


@cross_entropy.mistake(
    says="the loss has no minus: it is the mean of log p, which falls as the model gets worse",
    tries="-logp[rows, labels].mean().",
    caught_by="loss",
)
def log_likelihood(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    return -value, grad


@cross_entropy.mistake(
    says="logp[:, labels] takes every label's column from every row",
    tries="logp[np.arange(B), labels], which takes one place from each row.",
    caught_by="loss",
)
def columns(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    return -logp[:, labels].mean(), _from_log(logp, labels)[1]


@cross_entropy.mistake(
    says="the 1 is taken away in the label's column of every row, not in its own row alone",
    tries="grad[np.arange(B), labels] -= 1, which changes one place in each row.",
    caught_by="gradient",
)
def columns_of_grad(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    grad = np.exp(logp)
    grad[:, labels] -= 1
    return _from_log(logp, labels)[0], grad / len(logits)


@cross_entropy.mistake(
    says="the loss is a mean, but its gradient is that of the sum",
    tries="dividing grad by B, as the loss is.",
    caught_by="gradient",
)
def grad_not_divided(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    return value, grad * len(logits)


@cross_entropy.mistake(
    says="p is divided by B, and the 1 that is taken away from it is not",
    tries="taking the 1 away first, then dividing: (p − onehot) / B.",
    caught_by="gradient",
)
def onehot_not_divided(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    return _from_log(logp, labels)[0], _minus_onehot(np.exp(logp) / len(logits), labels)


@cross_entropy.mistake(
    says="the gradient has the wrong sign: onehot − p",
    tries="p − onehot: a step against the gradient must raise the right class's logit.",
    caught_by="gradient",
)
def wrong_sign(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    return value, -grad


@cross_entropy.mistake(
    says="the gradient is p / B: the label's own term is missing",
    tries="taking 1 away from p at [row, label] before dividing by B.",
    caught_by="gradient",
)
def no_onehot(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    return _from_log(logp, labels)[0], np.exp(logp) / len(logits)


@cross_entropy.mistake(
    says="the gradient is with respect to the probabilities, −onehot / p, not to the logits",
    tries="carrying it on through the softmax: −1/p meets p and cancels, and p − onehot is left.",
    caught_by="gradient",
)
def to_probabilities(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    grad = np.zeros_like(logits)
    grad[np.arange(len(logits)), labels] = -1 / np.exp(_picked(logp, labels)) / len(logits)
    return _from_log(logp, labels)[0], grad


@cross_entropy.mistake(
    says="exp is taken of the logits as they come, and for large ones p is ∞ / ∞",
    tries="subtracting each row's maximum first; the probabilities stay the same.",
    caught_by="extreme",
)
def no_maximum(logits: Any, labels: Any) -> Any:
    return _from_weights(np.exp(logits), labels)


@cross_entropy.mistake(
    says="log Σ exp is taken of the logits as they come: it is infinite as soon as one of them passes 709",
    tries="z = logits − the row's maximum, then z − log Σ exp z; the probabilities stay the same.",
    caught_by="extreme",
)
def no_maximum_in_log(logits: Any, labels: Any) -> Any:
    return _from_log(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), labels)


@cross_entropy.mistake(
    says="the maximum of the whole array is subtracted, and a row far below it becomes 0 / 0",
    tries="logits.max(axis=1, keepdims=True), the maximum of each row.",
    caught_by="extreme",
)
def global_quotient(logits: Any, labels: Any) -> Any:
    return _from_weights(np.exp(logits - logits.max()), labels)


@cross_entropy.mistake(
    says="the maximum of the whole array is subtracted: in rows far below it every exp is 0",
    tries="logits.max(axis=1, keepdims=True), the maximum of each row.",
    caught_by="extreme",
)
def global_maximum(logits: Any, labels: Any) -> Any:
    z = logits - logits.max()
    return _from_log(z - np.log(np.exp(z).sum(axis=1, keepdims=True)), labels)


@cross_entropy.mistake(
    says="the logarithm is taken of a probability that has become 0",
    tries="log p = z − log Σ exp z with z = logits − maximum: no logarithm of p is needed.",
    caught_by="extreme",
)
def log_of_zero(logits: Any, labels: Any) -> Any:
    return _from_weights(np.exp(logits - logits.max(axis=1, keepdims=True)), labels)


@cross_entropy.mistake(
    says="onehot · log p is summed, and where p has become 0 that is 0 · −∞, which is NaN",
    tries="log p = z − log Σ exp z with z = logits − maximum: no logarithm of p is needed.",
    caught_by="extreme",
)
def zero_times_log(logits: Any, labels: Any) -> Any:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = weights / weights.sum(axis=1, keepdims=True)
    onehot = np.eye(logits.shape[1], dtype=logits.dtype)[labels]
    return -(onehot * np.log(p)).sum() / len(p), (p - onehot) / len(p)


@cross_entropy.mistake(
    says="p is kept above a small number before the logarithm, which caps the loss near 28",
    tries="log p = z − log Σ exp z with z = logits − maximum: no logarithm of p, nothing to protect.",
    caught_by="extreme",
)
def clipped(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    return -np.log(np.exp(_picked(logp, labels)) + 1e-12).mean(), _from_log(logp, labels)[1]


@cross_entropy.mistake(
    says="row · C + label is computed in the labels' own format, and 8 bits end at 127 or 255",
    tries="the two indices apart, [rows, labels], or labels.astype(np.int64) first.",
    caught_by="label_formats",
)
def index_wrapped(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    flat = np.arange(len(labels)).astype(labels.dtype) * np.array(logits.shape[1], labels.dtype) + labels
    grad = np.exp(logp).reshape(-1)
    grad[flat] -= 1
    return -logp.reshape(-1)[flat].mean(), grad.reshape(logits.shape) / len(logits)


@cross_entropy.mistake(
    says="the gradient is float64 whatever came in, as a one-hot matrix from np.eye(C) makes it",
    tries="np.eye(C, dtype=logits.dtype), or taking 1 away in place: grad[rows, labels] -= 1.",
    caught_by="formats",
)
def widened(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    return value, grad.astype(np.float64)


@cross_entropy.mistake(
    says="the maximum is subtracted from the logits in place",
    tries="z = logits - …, a new array, where you have logits -= ….",
    caught_by="unchanged",
)
def in_place(logits: Any, labels: Any) -> Any:
    value, grad = _from_log(_log_softmax(logits), labels)
    logits -= logits.max(axis=1, keepdims=True)
    return value, grad


@cross_entropy.alternative("log-softmax, then exp of it for the gradient")
def by_log_softmax(logits: Any, labels: Any) -> Any:
    return _from_log(_log_softmax(logits), labels)


@cross_entropy.alternative("log Σ exp by logaddexp, which needs no maximum")
def by_logaddexp(logits: Any, labels: Any) -> Any:
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return float(-_picked(logp, labels).mean()), _minus_onehot(np.exp(logp), labels) / len(logits)


@cross_entropy.alternative("a one-hot matrix in place of indices")
def by_onehot(logits: Any, labels: Any) -> Any:
    onehot = (labels[:, None] == np.arange(logits.shape[1])).astype(logits.dtype)
    logp = _log_softmax(logits)
    return -(onehot * logp).sum() / len(logits), (np.exp(logp) - onehot) / len(logits)


@cross_entropy.alternative("row by row, with the softmax's own quotient")
def by_rows(logits: Any, labels: Any) -> Any:
    total, grad = 0.0, np.empty_like(logits)
    for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
        weights = np.exp(row - row.max())
        total += math.log(weights.sum()) + row.max() - row[label]
        grad[i] = weights / weights.sum()
        grad[i, label] -= 1
    return total / len(logits), grad / len(logits)


@cross_entropy.alternative("subtract.at and take_along_axis")
def by_ufunc_at(logits: Any, labels: Any) -> Any:
    labels = labels.astype(np.int64)
    logp = _log_softmax(logits)
    grad = np.exp(logp)
    np.subtract.at(grad, (np.arange(len(labels)), labels), 1)
    return -np.take_along_axis(logp, labels[:, None], axis=1).mean(), grad / len(labels)


@cross_entropy.alternative("through the Jacobian of log softmax, one matrix [C, C] for each row")
def by_jacobian(logits: Any, labels: Any) -> Any:
    logp = _log_softmax(logits)
    p = np.exp(logp)
    onehot = np.eye(logits.shape[1], dtype=logits.dtype)[labels]
    jacobian = np.eye(logits.shape[1], dtype=logits.dtype) - p[:, None, :]  # of log p, [B, C, C]
    return -(onehot * logp).sum(axis=1).mean(), -np.einsum("bc,bcd->bd", onehot, jacobian) / len(logits)
