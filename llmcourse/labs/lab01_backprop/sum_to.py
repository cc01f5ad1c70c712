"""Exercise `sum_to`: the backward of broadcasting is a sum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmcourse.grading.compare import as_array
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

sum_to = Exercise(
    "sum_to",
    title="The backward of broadcasting",
    arguments=("grad", "shape"),
    shapes=(
        "grad    array: the gradient of the result, to whose shape the operand was broadcast",
        "shape   tuple of ints: the shape the operand had before it was broadcast; () for a",
        "        single number",
        "returns array of that shape, in grad's number format",
    ),
    formula="out[i] = Σ grad[j] over all places j to which element i was copied",
    difficulty=2,
    importance=4,
    minutes=15,
    points=4,
    hints=(
        "Take bias [3] added to x [2, 3]. Element 0 of bias lands in two places of the result. "
        "What does the loss feel when that element moves by a little?",
        "Broadcasting does two things: it adds axes in front until the ranks agree, and it stretches axes "
        "of size 1. Both are undone by a sum. After summing over the added axes they must be gone; after "
        "summing over a stretched axis it must still be there, with size 1.",
        "added = grad.ndim - len(shape). Sum over axes 0 … added-1, and over each axis added+i where "
        "shape[i] == 1 and grad is larger; keep the dimensions, then .reshape(shape).",
    ),
)


def expected(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every element of `grad` is added, in float64, to the place that it was copied from."""
    out = np.zeros(math.prod(shape))
    source = np.broadcast_to(np.arange(out.size).reshape(shape), grad.shape)
    np.add.at(out, source.reshape(-1), grad.astype(np.float64).reshape(-1))
    return out.reshape(shape)


def _agree(t: Trial, grad: np.ndarray, shape: tuple[int, ...]) -> None:
    t.close(t.call(grad, shape), expected(grad, shape))


@sum_to.check("an axis that was added in front is summed away")
def added(t: Trial) -> None:
    n, m, k = t.odd(), t.size(), t.odd()
    _agree(t, t.normal(n, m), (m,))
    _agree(t, t.normal(k, n, m), (m,))
    _agree(t, t.normal(k, n, m), (n, m))
    _agree(t, t.normal(n), ())
    _agree(t, t.normal(m, m), (m,))
    _agree(t, t.normal(1, m), (m,))
    _agree(t, t.normal(1, 1, n, m), (n, m))
    _agree(t, t.normal(1, 1), ())


@sum_to.check("an axis of size 1 that was stretched is summed and stays, with size 1")
def stretched(t: Trial) -> None:
    n, m, k = t.odd(), t.size(), t.odd()
    _agree(t, t.normal(n, m), (n, 1))
    _agree(t, t.normal(n, m), (1, m))
    _agree(t, t.normal(n, k, m), (n, 1, m))
    _agree(t, t.normal(m, m), (m, 1))


@sum_to.check("added and stretched axes can come together")
def both(t: Trial) -> None:
    n, m, k = t.odd(), t.size(), t.odd()
    _agree(t, t.normal(k, n, m), (n, 1))
    _agree(t, t.normal(k, n, m), (1, 1))
    _agree(t, t.normal(m, m, n), (m, 1))
    _agree(t, t.normal(m, 2, n, m), (1, 1, n, 1))
    _agree(t, t.normal(2, k, n, m), (1, n, 1))
    _agree(t, t.normal(k, n, m), ())


@sum_to.check("where nothing was broadcast the gradient passes as it is")
def untouched(t: Trial) -> None:
    n, m = t.odd(), t.size()
    for shape in [(n, m), (1, m), (1, 1), (1,), (), (n, 1, m)]:
        _agree(t, t.normal(*shape), shape)


@sum_to.check("axes of size 0 and arrays in any memory layout work")
def degenerate(t: Trial) -> None:
    n, m = t.odd(), t.size()
    _agree(t, t.normal(0, m), (m,))
    _agree(t, t.normal(0, m), (1, m))
    _agree(t, t.normal(n, 0), (n, 1))
    _agree(t, t.normal(n, 0), (0,))
    _agree(t, t.normal(0, m), (0, 1))
    for grad in t.layouts(t.normal(n, m)):
        _agree(t, grad, (1, m))
        _agree(t, grad, (m,))
        _agree(t, grad, (n, m))
    for grad in t.layouts(t.normal(2, n, m)):
        _agree(t, grad, (n, m))


@sum_to.check("the result has grad's number format, and grad is left as it was")
def formats(t: Trial) -> None:
    n, m = t.odd(), t.size()
    for dtype in (np.float64, np.float32):
        for shape in [(m,), (n, 1), (n, m)]:
            got = t.call(t.normal(n, m, dtype=dtype), shape)
            t.equal(str(as_array(got).dtype), np.dtype(dtype).name, "number format")
            t.unchanged()


@sum_to.mistake(
    says="the gradient is passed on as it came, not summed",
    tries="a sum over every axis along which the operand was repeated.",
    caught_by="added",
)
def not_summed(grad: Any, shape: Any) -> Any:
    return grad


@sum_to.mistake(
    says="the copies' gradients are averaged, not summed",
    tries="sum instead of mean: each copy adds its own influence to the loss.",
    caught_by="added",
)
def averaged(grad: Any, shape: Any) -> Any:
    added_axes = grad.ndim - len(shape)
    axes = tuple(range(added_axes)) + tuple(
        i + added_axes for i, n in enumerate(shape) if n == 1 and grad.shape[i + added_axes] != 1
    )
    return grad.mean(axis=axes, keepdims=True).reshape(shape) if axes else grad


@sum_to.mistake(
    says="the axes added in front are summed, but a stretched one is not",
    tries="a second sum, over every axis where shape has 1 and grad has more.",
    caught_by="stretched",
)
def only_added(grad: Any, shape: Any) -> Any:
    return grad.sum(axis=tuple(range(grad.ndim - len(shape))))


@sum_to.mistake(
    says="only the stretched axes are summed, not those that were added in front",
    tries="summing over the first grad.ndim - len(shape) axes as well.",
    caught_by="added",
)
def only_stretched(grad: Any, shape: Any) -> Any:
    front = grad.ndim - len(shape)
    for i, n in enumerate(shape):
        if n == 1:
            grad = grad.sum(axis=front + i, keepdims=True)
    return grad


@sum_to.mistake(
    says="the summed axis of size 1 is dropped",
    tries="keepdims=True for the stretched axes, or .reshape(shape) at the end.",
    caught_by="stretched",
)
def dropped(grad: Any, shape: Any) -> Any:
    front = grad.ndim - len(shape)
    axes = tuple(range(front)) + tuple(
        i + front for i, n in enumerate(shape) if n == 1 and grad.shape[i + front] != 1
    )
    return grad.sum(axis=axes) if axes else grad


@sum_to.mistake(
    says="axes are matched from the left, while broadcasting aligns them at the right",
    tries="offset = grad.ndim - len(shape): axis i of shape is axis offset + i of grad.",
    caught_by="added",
)
def from_the_left(grad: Any, shape: Any) -> Any:
    for i, n in enumerate(shape):
        if n == 1:
            grad = grad.sum(axis=i, keepdims=True)
    while grad.ndim > len(shape):
        grad = grad.sum(axis=-1)
    return grad


@sum_to.mistake(
    says="only one of the axes added in front is summed",
    tries="a while loop, or all of them at once: axis=tuple(range(grad.ndim - len(shape))).",
    caught_by="added",
)
def one_axis(grad: Any, shape: Any) -> Any:
    front = grad.ndim - len(shape)
    if front:
        grad = grad.sum(axis=0)
        front -= 1
    for i, n in enumerate(shape):
        if n == 1 and grad.shape[i + front] != 1:
            grad = grad.sum(axis=i + front, keepdims=True)
    return grad


@sum_to.mistake(
    says="of several stretched axes only the first is summed: the loop is left after it",
    tries="going on with the loop over the axes: return after it, not in it.",
    caught_by="both",
)
def one_stretched(grad: Any, shape: Any) -> Any:
    while grad.ndim > len(shape):
        grad = grad.sum(axis=0)
    for axis, n in enumerate(shape):
        if n == 1 and grad.shape[axis] != 1:
            return grad.sum(axis=axis, keepdims=True)
    return grad


@sum_to.mistake(
    says="the axes that were added in front are summed and stay, with size 1",
    tries=".reshape(shape) at the end; keepdims=True keeps all of the summed axes.",
    caught_by="added",
)
def kept(grad: Any, shape: Any) -> Any:
    front = grad.ndim - len(shape)
    axes = tuple(i for i in range(grad.ndim) if i < front or shape[i - front] == 1)
    return grad.sum(axis=axes, keepdims=True)


@sum_to.mistake(
    says="an axis added in front is left where its size is 1",
    tries="asking how many axes are too many, grad.ndim - len(shape), not how long they are.",
    caught_by="added",
)
def single_in_front(grad: Any, shape: Any) -> Any:
    while grad.ndim > len(shape) and grad.shape[0] != 1:
        grad = grad.sum(axis=0)
    front = grad.ndim - len(shape)
    axes = tuple(i for i in range(front, grad.ndim) if shape[i - front] == 1)
    return grad.sum(axis=axes, keepdims=True)


@sum_to.mistake(
    says="the first copy's gradient is taken for all of them",
    tries="adding the copies up: every one of them changes the loss.",
    caught_by="added",
)
def first_copy(grad: Any, shape: Any) -> Any:
    front = grad.ndim - len(shape)
    grad = grad[(0,) * front]
    return grad[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]


@sum_to.mistake(
    says="the gradient is only reshaped or resized to fit, so its numbers land in the wrong places",
    tries="summing over axes first; a reshape may only drop axes of size 1.",
    caught_by="added",
)
def resized(grad: Any, shape: Any) -> Any:
    return np.resize(grad, shape)


@sum_to.mistake(
    says="float64 comes out, whatever came in",
    tries="no dtype= in the sum, np.zeros(shape, grad.dtype), or .astype(grad.dtype) at the end.",
    caught_by="formats",
)
def widened(grad: Any, shape: Any) -> Any:
    front = grad.ndim - len(shape)
    axes = tuple(range(front)) + tuple(
        i + front for i, n in enumerate(shape) if n == 1 and grad.shape[i + front] != 1
    )
    return grad.astype(np.float64).sum(axis=axes, keepdims=True).reshape(shape)


@sum_to.alternative("axis by axis, in a loop")
def loop(grad: Any, shape: Any) -> Any:
    while grad.ndim > len(shape):
        grad = grad.sum(axis=0)
    for axis, n in enumerate(shape):
        if n == 1 and grad.shape[axis] != 1:
            grad = grad.sum(axis=axis, keepdims=True)
    return grad


@sum_to.alternative("einsum over the axes that stay")
def einsum(grad: Any, shape: Any) -> Any:
    front = grad.ndim - len(shape)
    kept = [front + i for i, n in enumerate(shape) if n != 1]
    return np.einsum(grad, list(range(grad.ndim)), kept).reshape(shape)


@sum_to.alternative("adding every element to the place it was copied from")
def scatter(grad: Any, shape: Any) -> Any:
    out = np.zeros(shape, grad.dtype)
    where = np.indices(grad.shape).reshape(grad.ndim, grad.size)[grad.ndim - len(shape) :]
    source = tuple(np.zeros_like(w) if n == 1 else w for w, n in zip(where, shape, strict=True))
    np.add.at(out, source, grad.reshape(-1) if shape else grad.sum())
    return out
