"""Operations that move or pick elements and compute nothing.

Reshape, transpose, broadcast_to and basic indexing return views: no byte is copied and none is saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmcourse.autograd.function import Array, Function, Grads
from llmcourse.autograd.ops.elementwise import sum_to
from llmcourse.autograd.ops.reduce import normalize_axis
from llmcourse.errors import ShapeError


class Reshape(Function):
    """The same elements in another shape; a view where the strides allow it. Saves nothing."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.to = tuple(shape)

    def forward(self, a: Array) -> Array:
        try:
            return a.reshape(self.to)
        except ValueError:
            raise ShapeError(
                f"reshape: {a.size} elements of shape {a.shape} do not fit into {self.to}.",
                "Reshaping keeps every element"
                + (
                    ", and at most one size may be -1."
                    if -1 in self.to
                    else f": {math.prod(self.to)} ≠ {a.size}."
                ),
                f"a shape whose product is {a.size}, with one -1 for the size to be worked out.",
            ) from None

    def backward(self, grad: Array) -> Grads:
        return (grad.reshape(self.shapes[0]),)


class Transpose(Function):
    """Axes in another order; a view. Saves nothing; backward is the inverse permutation."""

    def __init__(self, axes: Sequence[int] | None = None) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, a: Array) -> Array:
        ndim = a.ndim
        axes = tuple(range(ndim))[::-1] if self.axes is None else tuple(self.axes)
        if sorted(x % ndim if -ndim <= x < ndim else x for x in axes) != list(range(ndim)):
            raise ShapeError(
                f"transpose: axes {axes} are not an order of the {ndim} axes of shape {a.shape}.",
                "Each axis must appear exactly once.",
                f"an order of {tuple(range(ndim))}.",
            )
        self.order = tuple(x % ndim for x in axes)
        return a.transpose(self.order)

    def backward(self, grad: Array) -> Grads:
        return (grad.transpose(np.argsort(self.order)) if self.order else grad,)


class BroadcastTo(Function):
    """Elements repeated along new or size-1 axes, as a read-only view. Saves nothing."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.to = tuple(shape)

    def forward(self, a: Array) -> Array:
        try:
            return np.broadcast_to(a, self.to)
        except ValueError:
            raise ShapeError(
                f"broadcast_to: shape {a.shape} cannot be repeated to {self.to}.",
                "Shapes are aligned at the last axis, and only a missing axis or one of size 1 is repeated.",
                "reshape first, putting a 1 on each axis that should be repeated.",
            ) from None

    def backward(self, grad: Array) -> Grads:
        return (sum_to(grad, self.shapes[0]),)


class GetItem(Function):
    """a[index] as NumPy indexes. A view for numbers, slices, None and …; a copy for arrays.

    Saves the index arrays only. In backward an element that was picked k times receives k gradients.
    """

    def __init__(self, index: Any) -> None:
        super().__init__()
        parts = index if isinstance(index, tuple) else (index,)
        self.arrays = [np.asarray(p) for p in parts if isinstance(p, list | np.ndarray)]
        self.parts = tuple(_ARRAY if isinstance(p, list | np.ndarray) else p for p in parts)
        if not self.arrays and not any(p is Ellipsis for p in parts):
            self.parts += (Ellipsis,)  # so that a[i] of a vector is a view too, and not a copied number

    def forward(self, a: Array) -> Array:
        arrays, self.arrays = self.arrays, []  # from here on, kept through `save` or not at all
        if arrays:
            self.save(*arrays, role="input")
        try:
            return a[self._index(arrays)]
        except IndexError as error:
            raise ShapeError(
                f"get_item: {error}.",
                f"The tensor's shape is {a.shape}.",
                "an index inside that shape, with no more indices than it has axes.",
            ) from None

    def backward(self, grad: Array) -> Grads:
        out = np.zeros(self.shapes[0], grad.dtype)
        index = self._index(self.saved)
        if self.saved:
            np.add.at(out, index, grad)  # `out[index] += grad` would keep one of several repeats
        else:
            out[index] = grad
        return (out,)

    def _index(self, arrays: Sequence[Array]) -> tuple[Any, ...]:
        places = iter(arrays)
        return tuple(next(places) if part is _ARRAY else part for part in self.parts)


_ARRAY = object()  # stands for an index array in GetItem.parts


class Concat(Function):
    """Arrays put one after another along an axis. Saves nothing; backward cuts the gradient up again."""

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *arrays: Array) -> Array:
        first = arrays[0].shape
        (axis,) = normalize_axis(self.axis, first, self.name)
        for i, a in enumerate(arrays):
            if a.shape[:axis] + a.shape[axis + 1 :] != first[:axis] + first[axis + 1 :] or a.ndim != len(
                first
            ):
                raise ShapeError(
                    f"concat: array {i} has shape {a.shape}, and array 0 has {first}.",
                    f"All axes but the one they are joined along (axis {axis}) must be equal.",
                    "another axis, or reshape the arrays first.",
                )
        return np.concatenate(arrays, axis=axis)

    def backward(self, grad: Array) -> Grads:
        (axis,) = normalize_axis(self.axis, self.shapes[0], self.name)
        return tuple(np.split(grad, np.cumsum([s[axis] for s in self.shapes])[:-1], axis=axis))


class Stack(Function):
    """Arrays of one shape put beside one another along a new axis. Saves nothing."""

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *arrays: Array) -> Array:
        for i, a in enumerate(arrays):
            if a.shape != arrays[0].shape:
                raise ShapeError(
                    f"stack: array {i} has shape {a.shape}, and array 0 has {arrays[0].shape}.",
                    "Stacked arrays become slices of one array, so they must have one shape.",
                    "concat for arrays of different lengths.",
                )
        normalize_axis(self.axis, (*arrays[0].shape, len(arrays)), self.name)
        return np.stack(arrays, axis=self.axis)

    def backward(self, grad: Array) -> Grads:
        return tuple(np.moveaxis(grad, self.axis, 0))
