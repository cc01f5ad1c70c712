"""Matrix multiplication: vectors, matrices and broadcast batches of matrices, as NumPy's `@`.

For C = A·B with A [n, k] and B [k, m], the shapes alone leave one way to write each gradient:

    dA [n, k] = dC [n, m] · Bᵀ [m, k]        dB [k, m] = Aᵀ [k, n] · dC [n, m]

So each side needs the other one, and backward costs two multiplications for forward's one.
"""

from __future__ import annotations

from llmcourse.autograd.function import Array, Function, Grads
from llmcourse.autograd.ops.elementwise import check_broadcast, sum_to
from llmcourse.errors import ShapeError


class Matmul(Function):
    """A @ B. Saves A if B wants a gradient, and B if A does."""

    def forward(self, a: Array, b: Array) -> Array:
        self._check(a.shape, b.shape)
        self.save(a if self.needs[1] else None, b if self.needs[0] else None)
        return a @ b

    def backward(self, grad: Array) -> Grads:
        a, b = self.saved
        row, column = len(self.shapes[0]) == 1, len(self.shapes[1]) == 1
        if row:  # a vector on the left is a matrix of one row …
            a = None if a is None else a[None, :]
            grad = grad[None] if column else grad[..., None, :]
        if column:  # … and on the right a matrix of one column
            b = None if b is None else b[:, None]
            grad = grad[..., None]
        da = grad @ b.swapaxes(-1, -2) if self.needs[0] else None
        db = a.swapaxes(-1, -2) @ grad if self.needs[1] else None
        return self._fit(da, 0, (1, *self.shapes[0])), self._fit(db, 1, (*self.shapes[1], 1))

    def _fit(self, grad: Array | None, i: int, as_matrix: tuple[int, ...]) -> Array | None:
        """Sum over the batch axes along which input i was repeated, and drop a vector's extra axis."""
        if grad is None:
            return None
        shape = self.shapes[i]
        return sum_to(grad, as_matrix if len(shape) == 1 else shape).reshape(shape)

    def _check(self, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        if not a or not b:
            raise ShapeError(
                f"matmul: shapes {a} and {b}: one of them is a single number.",
                "A matrix product sums over an axis, and a number has none.",
                "a * b.",
            )
        inner = b[-2] if len(b) > 1 else b[0]
        if a[-1] != inner:
            raise ShapeError(
                f"matmul: shapes {a} and {b}: the inner sizes are {a[-1]} and {inner}.",
                "Each row of the left is multiplied element by element with a column of the right.",
                f"a right side of shape ({a[-1]}, …), or transpose one of the two.",
            )
        check_broadcast("matmul (batch axes)", a[:-2], b[:-2])
