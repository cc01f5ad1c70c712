"""Exercise `matmul_backward`: the gradient of a matrix product is two matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmcourse.grading.compare import RTOL, as_array
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

matmul_backward = Exercise(
    "matmul_backward",
    title="The backward of a matrix product",
    arguments=("grad", "a", "b"),
    shapes=(
        "a, b    arrays [..., n, k] and [..., k, m], the operands of c = a @ b, each with two",
        "        axes or more",
        "grad    array [..., n, m]: the gradient of c; its axes in front are those of a and",
        "        b, broadcast",
        "returns (grad_a, grad_b), each with the shape and the number format of its operand;",
        "        any size may be 1 or 0",
    ),
    formula="grad_a[i, j] = Σ_l grad[i, l]·b[j, l]     grad_b[j, l] = Σ_i a[i, j]·grad[i, l]",
    difficulty=3,
    importance=5,
    minutes=20,
    points=5,
    hints=(
        "Let a be [2, 3] and b [3, 4], so grad is [2, 4]. Which products of grad with one of the operands, "
        "transposed or not, have the shapes [2, 3] and [3, 4]? And if a batch of 5 matrices b shares this "
        "one a, how many products does each element of a act through?",
        "Each element a[i, j] meets the whole row j of b, and acts on row i of c: grad_a is grad times b "
        "transposed. In the same way grad_b is a transposed times grad. Transposing concerns the last two "
        "axes only; the axes in front number the products. Where an operand was broadcast along one of "
        "them, its gradient is a sum along it: you have a function for that.",
        "grad_a = grad @ b.swapaxes(-1, -2) and grad_b = a.swapaxes(-1, -2) @ grad. Then sum_to(grad_a, "
        "a.shape), and the same for b.",
    ),
)

NAMES = ("grad_a", "grad_b")


def expected(grad: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One element of c after another: a row of a times a column of b, each the other's derivative."""
    grad, a, b = (x.astype(np.float64) for x in (grad, a, b))
    grad_a, grad_b = np.zeros(a.shape), np.zeros(b.shape)
    for *batch, i, j in np.ndindex(grad.shape):
        row, column = (*_own(batch, a), i), (*_own(batch, b), slice(None), j)
        grad_a[row] += grad[*batch, i, j] * b[column]
        grad_b[column] += grad[*batch, i, j] * a[row]
    return grad_a, grad_b


def _own(batch: Sequence[int], operand: np.ndarray) -> tuple[int, ...]:
    """The place in `operand`'s own batch axes that was used at `batch` of the result."""
    sizes = operand.shape[:-2]
    return tuple(
        0 if size == 1 else i for i, size in zip(batch[len(batch) - len(sizes) :], sizes, strict=True)
    )


def _pair(t: Trial, *args: np.ndarray) -> tuple[Any, ...]:
    return t.pair(t.call(*args), 2, "a pair (grad_a, grad_b)")


def _judge(t: Trial, grad: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    rtol = RTOL[str(grad.dtype)]
    for name, got, want in zip(NAMES, _pair(t, grad, a, b), expected(grad, a, b), strict=True):
        t.close(got, want, name, rtol=rtol)


def _agree(t: Trial, a: np.ndarray, b: np.ndarray) -> None:
    _judge(t, _grad(t, a, b), a, b)


def _grad(t: Trial, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A gradient for a @ b."""
    front = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return t.normal(*front, a.shape[-2], b.shape[-1], dtype=a.dtype)


def _sizes(t: Trial) -> tuple[int, int, int]:
    """Three sizes that differ, so that no wrong product fits by accident."""
    n, k, m = t.rng.choice(np.arange(2, 8), 3, replace=False)
    return int(n), int(k), int(m)


@matmul_backward.check("each gradient has its operand's shape, and the values of the formula")
def rectangular(t: Trial) -> None:
    n, k, m = _sizes(t)
    for dtype in (np.float64, np.float64, np.float32):  # the same sizes: what was kept would show
        _agree(t, t.normal(n, k, dtype=dtype), t.normal(k, m, dtype=dtype))


@matmul_backward.check("square matrices work too, whose shapes fit in any order")
def square(t: Trial) -> None:
    n, m = t.odd(3, 7), t.size(4, 6)
    _agree(t, t.normal(n, n), t.normal(n, n))
    _agree(t, t.normal(n, n), t.normal(n, m))
    _agree(t, t.normal(m, n), t.normal(n, n))
    x = t.normal(n, n)
    _agree(t, x, x)


@matmul_backward.check("in a batch every product has gradients of its own")
def batch(t: Trial) -> None:
    n, k, m = _sizes(t)
    size = t.odd(3, 5)
    _agree(t, t.normal(size, n, k), t.normal(size, k, m))
    _agree(t, t.normal(2, size, n, k), t.normal(2, size, k, m))
    _agree(t, t.normal(size, size, size), t.normal(size, size, size))
    _agree(t, t.normal(2, size, size, size), t.normal(2, size, size, size))


@matmul_backward.check("an operand that all products of a batch share gets the sum of their gradients")
def shared(t: Trial) -> None:
    n, k, m = _sizes(t)
    size = t.odd(3, 5)
    _agree(t, t.normal(size, n, k), t.normal(k, m))
    _agree(t, t.normal(n, k), t.normal(size, k, m))
    _agree(t, t.normal(2, size, n, k), t.normal(k, m))


@matmul_backward.check("a batch axis of size 1 that was stretched is summed and stays, with size 1")
def stretched(t: Trial) -> None:
    n, k, m = _sizes(t)
    size = t.odd(3, 5)
    _agree(t, t.normal(1, n, k), t.normal(size, k, m))
    _agree(t, t.normal(size, n, k), t.normal(1, k, m))
    _agree(t, t.normal(2, 1, n, k), t.normal(size, k, m))
    _agree(t, t.normal(1, n, k), t.normal(k, m))
    _agree(t, t.normal(1, 1, n, k), t.normal(2, size, k, m))


@matmul_backward.check("sizes of 1 and 0 work")
def thin(t: Trial) -> None:
    n, k, m = _sizes(t)
    for sizes in [(1, k, m), (n, 1, m), (n, k, 1), (1, 1, 1), (n, 0, m), (0, k, m), (n, k, 0)]:
        _agree(t, t.normal(sizes[0], sizes[1]), t.normal(sizes[1], sizes[2]))
    _agree(t, t.normal(2, 1, k), t.normal(k, 1))
    _agree(t, t.normal(0, n, k), t.normal(k, m))
    _agree(t, t.normal(2, 0, k), t.normal(k, m))


@matmul_backward.check("transposed arrays and arrays with gaps work")
def layouts(t: Trial) -> None:
    n, k, m = _sizes(t)
    arrays = (t.normal(2, n, m), t.normal(2, n, k), t.normal(k, m))
    for grad, a, b in zip(*(t.layouts(x) for x in arrays), strict=True):
        _judge(t, grad, a, b)


@matmul_backward.check("the gradients have the operands' number format")
def formats(t: Trial) -> None:
    n, k, m = _sizes(t)
    for dtype in (np.float64, np.float32):
        for front in [(), (3,)]:
            a, b = t.normal(*front, n, k, dtype=dtype), t.normal(k, m, dtype=dtype)
            for name, got in zip(NAMES, _pair(t, _grad(t, a, b), a, b), strict=True):
                t.equal(str(as_array(got).dtype), np.dtype(dtype).name, f"number format of {name}")


@matmul_backward.check("grad, a and b are left as they were")
def unchanged(t: Trial) -> None:
    n, k, m = _sizes(t)
    for front, own in [((), ()), ((3,), ()), ((3,), (3,))]:
        t.call(t.normal(*front, n, m), t.normal(*front, n, k), t.normal(*own, k, m))
        t.unchanged()


def _fit(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum `grad` to `shape`: the mistakes and alternatives below get this part right unless they say so."""
    front = grad.ndim - len(shape)
    axes = [i for i in range(grad.ndim) if i < front or (shape[i - front] == 1 and grad.shape[i] != 1)]
    return grad.sum(axis=tuple(axes), keepdims=True).reshape(shape)


def _full(grad: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """The gradients before the sum over broadcast axes."""
    return grad @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ grad


@matmul_backward.mistake(
    says="the two gradients are returned in the other order",
    tries="return grad_a, grad_b: first the gradient of the left operand.",
    caught_by="rectangular",
)
def swapped(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(grad, a, b)
    return _fit(grad_b, b.shape), _fit(grad_a, a.shape)


@matmul_backward.mistake(
    says="the operands are multiplied as they are, without transposing them",
    tries="writing down the shapes: grad [n, m] and b [k, m] give [n, k] only if b is transposed.",
    caught_by="rectangular",
)
def not_transposed(grad: Any, a: Any, b: Any) -> Any:
    return _fit(grad @ b, a.shape), _fit(a @ grad, b.shape)


@matmul_backward.mistake(
    says="grad is transposed instead of the other operand",
    tries="grad @ bᵀ and aᵀ @ grad: grad itself stays as it is.",
    caught_by="rectangular",
)
def grad_transposed(grad: Any, a: Any, b: Any) -> Any:
    turned = grad.swapaxes(-1, -2)
    return _fit(turned @ b, a.shape), _fit(a @ turned, b.shape)


@matmul_backward.mistake(
    says="the factors of both products are in the other order",
    tries="grad @ bᵀ and aᵀ @ grad: grad stands where the operand stood whose gradient it gives.",
    caught_by="rectangular",
)
def reversed_order(grad: Any, a: Any, b: Any) -> Any:
    return _fit(b.swapaxes(-1, -2) @ grad, a.shape), _fit(grad @ a.swapaxes(-1, -2), b.shape)


@matmul_backward.mistake(
    says="each gradient comes out transposed",
    tries="(x @ y)ᵀ = yᵀ @ xᵀ: b @ gradᵀ is grad_a transposed, and grad @ bᵀ is grad_a.",
    caught_by="rectangular",
)
def result_transposed(grad: Any, a: Any, b: Any) -> Any:
    turned = grad.swapaxes(-1, -2)
    return b @ turned, turned @ a


@matmul_backward.mistake(
    says="the indices of grad_b are in the wrong order: [..., m, k] instead of [..., k, m]",
    tries="np.einsum('...nk,...nm->...km', a, grad): the letters behind the arrow are b's own.",
    caught_by="rectangular",
)
def wrong_index(grad: Any, a: Any, b: Any) -> Any:
    grad_a = np.einsum("...nm,...km->...nk", grad, b)
    grad_b = np.einsum("...nk,...nm->...mk", a, grad)
    return _fit(grad_a, a.shape), grad_b if b.ndim == grad_b.ndim else grad_b.sum(axis=0)


@matmul_backward.mistake(
    says="grad is not used: these are the derivatives of the sum of c",
    tries="multiplying with grad where you multiply with ones; it says how much each element of c matters.",
    caught_by="rectangular",
)
def ones(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(np.ones_like(grad), a, b)
    return _fit(grad_a, a.shape), _fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="grad_b is divided by the number of rows",
    tries="no division: if the loss is a mean, grad has the division in it already.",
    caught_by="rectangular",
)
def averaged_rows(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(grad, a, b)
    return _fit(grad_a, a.shape), _fit(grad_b, b.shape) / max(a.shape[-2], 1)


@matmul_backward.mistake(
    says="the first product whose shape fits is taken, and with square matrices several fit",
    tries="deriving which operand is transposed from the formula; the shapes are the proof, not the reason.",
    caught_by="square",
)
def by_shape(grad: Any, a: Any, b: Any) -> Any:
    def first(shape: Any, *pairs: Any) -> Any:
        for x, y in pairs:
            if x.shape[-1] == y.shape[-2] and (x.shape[-2], y.shape[-1]) == shape[-2:]:
                return _fit(x @ y, shape)
        return None

    a_t, b_t = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    grad_a = first(a.shape, (grad, b), (b, grad), (grad, b_t), (b_t, grad))
    return grad_a, first(b.shape, (grad, a), (a, grad), (grad, a_t), (a_t, grad))


@matmul_backward.mistake(
    says="both operands are transposed by .T, which reverses the batch axes too",
    tries=".swapaxes(-1, -2), which exchanges the last two axes and leaves those in front.",
    caught_by="batch",
)
def all_axes(grad: Any, a: Any, b: Any) -> Any:
    return _fit(grad @ b.T, a.shape), _fit(a.T @ grad, b.shape)


@matmul_backward.mistake(
    says="the gradient of b is summed over the batch even where each product has its own b",
    tries="summing only along axes that b does not have, or has with size 1.",
    caught_by="batch",
)
def always_summed(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(grad, a, b)
    return _fit(grad_a, a.shape), grad_b.sum(axis=tuple(range(grad_b.ndim - 2)))


@matmul_backward.mistake(
    says="the gradient of a shared operand is not summed over the batch",
    tries="sum_to(grad_a, a.shape), and the same for b.",
    caught_by="shared",
)
def not_summed(grad: Any, a: Any, b: Any) -> Any:
    return _full(grad, a, b)


@matmul_backward.mistake(
    says="grad_b is summed over the batch where b is shared, and grad_a is not where a is",
    tries="sum_to(grad_a, a.shape) too: either operand can be the one that is shared.",
    caught_by="shared",
)
def only_b_summed(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(grad, a, b)
    return grad_a, _fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="the sum over the batch takes one axis, and a batch can have several",
    tries="a while loop, or all of them at once: axis=tuple(range(grad_b.ndim - b.ndim)).",
    caught_by="shared",
)
def one_axis(grad: Any, a: Any, b: Any) -> Any:
    def fit(g: Any, shape: Any) -> Any:
        g = g.sum(axis=0) if g.ndim > len(shape) else g
        return _fit(g, shape) if g.ndim == len(shape) else g

    grad_a, grad_b = _full(grad, a, b)
    return fit(grad_a, a.shape), fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="np.dot multiplies every matrix of one batch with every matrix of the other",
    tries="@ or np.matmul, which pair the matrices of the two batches.",
    caught_by="batch",
)
def dotted(grad: Any, a: Any, b: Any) -> Any:
    return np.dot(grad, b.swapaxes(-1, -2)), np.dot(a.swapaxes(-1, -2), grad)


@matmul_backward.mistake(
    says="the gradient of a shared operand is averaged over the batch, not summed",
    tries="sum instead of mean: the operand acts on the loss through every product.",
    caught_by="shared",
)
def averaged(grad: Any, a: Any, b: Any) -> Any:
    def fit(g: Any, shape: Any) -> Any:
        return _fit(g, shape) * (np.prod(shape) / max(g.size, 1))

    grad_a, grad_b = _full(grad, a, b)
    return fit(grad_a, a.shape), fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="the gradient of a shared operand is taken from the first product alone",
    tries="summing over the batch: every product changes the loss.",
    caught_by="shared",
)
def first_product(grad: Any, a: Any, b: Any) -> Any:
    def fit(g: Any, shape: Any) -> Any:
        g = g[(0,) * (g.ndim - len(shape))]
        return g[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]

    grad_a, grad_b = _full(grad, a, b)
    return fit(grad_a, a.shape), fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="batch axes that an operand does not have are summed, those that it has with size 1 are not",
    tries="a sum with keepdims=True where the operand's axis has size 1 and grad's is longer.",
    caught_by="stretched",
)
def only_added(grad: Any, a: Any, b: Any) -> Any:
    def fit(g: Any, shape: Any) -> Any:
        return g.sum(axis=tuple(range(g.ndim - len(shape))))

    grad_a, grad_b = _full(grad, a, b)
    return fit(grad_a, a.shape), fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="a batch axis of size 1 is summed away and does not stay",
    tries="keepdims=True, or .reshape(a.shape) at the end.",
    caught_by="stretched",
)
def dropped(grad: Any, a: Any, b: Any) -> Any:
    def fit(g: Any, shape: Any) -> Any:
        front = g.ndim - len(shape)
        return g.sum(axis=tuple(i for i in range(g.ndim - 2) if i < front or shape[i - front] == 1))

    grad_a, grad_b = _full(grad, a, b)
    return fit(grad_a, a.shape), fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="float64 comes out, whatever came in, as from np.zeros(shape)",
    tries="np.zeros_like(a), or no array of your own at all; and no dtype= or .astype to float64.",
    caught_by="formats",
)
def widened(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(grad, a, b)
    return np.zeros(a.shape) + _fit(grad_a, a.shape), np.zeros(b.shape) + _fit(grad_b, b.shape)


@matmul_backward.mistake(
    says="the gradients are written into the operands themselves",
    tries="new arrays for the results: the caller's a and b are the network's activations and weights.",
    caught_by="unchanged",
)
def in_place(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(grad, a, b)
    a[...], b[...] = _fit(grad_a, a.shape), _fit(grad_b, b.shape)
    return a, b


@matmul_backward.alternative("the last two axes exchanged, then a sum over the broadcast axes")
def exchanged(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = _full(grad, a, b)
    return _fit(grad_a, a.shape), _fit(grad_b, b.shape)


@matmul_backward.alternative("einsum, with the broadcast axes summed one by one")
def einsum(grad: Any, a: Any, b: Any) -> Any:
    def fit(g: Any, like: Any) -> Any:
        while g.ndim > like.ndim:
            g = g.sum(axis=0)
        for axis, n in enumerate(like.shape):
            if n == 1 and g.shape[axis] != 1:
                g = g.sum(axis=axis, keepdims=True)
        return g

    return fit(np.einsum("...nm,...km->...nk", grad, b), a), fit(np.einsum("...nk,...nm->...km", a, grad), b)


@matmul_backward.alternative(
    "one product of the batch after another, each added where its operands came from"
)
def product_by_product(grad: Any, a: Any, b: Any) -> Any:
    grad_a, grad_b = np.zeros_like(a), np.zeros_like(b)
    for place in np.ndindex(grad.shape[:-2]):
        at_a, at_b = _own(place, a), _own(place, b)
        grad_a[at_a] += grad[place] @ b[at_b].T
        grad_b[at_b] += a[at_a].T @ grad[place]
    return grad_a, grad_b


@matmul_backward.alternative("outer products of rows and columns, added up, and a list for the pair")
def outer_products(grad: Any, a: Any, b: Any) -> Any:
    grad_a = (grad[..., :, None, :] * b[..., None, :, :]).sum(axis=-1)
    grad_b = (a[..., :, :, None] * grad[..., :, None, :]).sum(axis=-3)
    return [_fit(grad_a, a.shape), _fit(grad_b, b.shape)]
