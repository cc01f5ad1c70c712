"""A tensor: a NumPy array that remembers the operation it came from.

    x = Tensor([[1.5, 1.0]])
    w = Tensor([[2.0], [0.0]], requires_grad=True, name="w")
    loss = (x @ w).relu().sum()
    loss.backward()
    w.grad                       # array([[1.5], [1. ]])

`data` is the array and `node` its place in the graph. Two tensors may share one array's memory
(reshape, transpose and slices are views, as in NumPy), each with its own node. Number formats are
NumPy's: float32 stays float32, also when a Python number is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmcourse.autograd import reverse
from llmcourse.autograd.buffers import bump, owner
from llmcourse.autograd.function import Function, Leaf, Node, Shape
from llmcourse.autograd.mode import grad_enabled
from llmcourse.autograd.ops import elementwise as ew
from llmcourse.autograd.ops import reduce, shape, softmax
from llmcourse.autograd.ops.matmul import Matmul
from llmcourse.autograd.ops.reduce import Axis
from llmcourse.errors import GraphError, ShapeError


class Tensor:
    """An n-dimensional array with a gradient.

    data            the numbers, a NumPy array (not copied if it already is one)
    requires_grad   whether backward() should leave a gradient in `.grad`; floats only
    name            shown in the drawn graph and in messages
    """

    __array_ufunc__ = None  # so that `array * tensor` comes to Tensor.__rmul__

    def __init__(self, data: Any, requires_grad: bool = False, dtype: Any = None, name: str = "") -> None:
        self.data = np.asarray(data, dtype=dtype)
        if requires_grad and not np.issubdtype(self.data.dtype, np.floating):
            raise GraphError(
                f"a tensor of {self.data.dtype} cannot have a gradient.",
                "A derivative needs numbers that can change by a little.",
                "dtype=np.float32.",
            )
        self.node: Node = Leaf(name, self.data.shape, self.data.dtype, requires_grad)
        self.role = "parameter" if requires_grad else "input"

    # what it is

    @property
    def shape(self) -> Shape:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def requires_grad(self) -> bool:
        return self.node.requires_grad

    @property
    def grad(self) -> np.ndarray | None:
        """What backward passes have left here, added up; None before the first."""
        return self.node.grad

    @grad.setter
    def grad(self, value: np.ndarray | None) -> None:
        self.node.grad = value

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        kind = "" if isinstance(self.node, Leaf) else f", from {self.node.name}"
        asks = ", requires_grad=True" if self.requires_grad and not kind else ""
        return f"Tensor({np.array2string(self.data, separator=', ', prefix='Tensor(')}{kind}{asks})"

    def item(self) -> float:
        """The number in a tensor of one element."""
        if self.size != 1:
            raise ShapeError(
                f"item() of a tensor of shape {self.shape}.",
                f"It holds {self.size} numbers, not one.",
                "sum(), mean() or an index first.",
            )
        return self.data.item()

    # gradients

    def backward(self, grad: Any = None, retain_graph: bool = False) -> None:
        """Add d(self)/d(leaf) to the `.grad` of every leaf that requires one.

        grad           the gradient of the final scalar with respect to this tensor, of this tensor's
                       shape; may be left out only if this tensor is that scalar
        retain_graph   keep what was saved, for another backward pass through the same graph
        """
        if not self.requires_grad:
            raise GraphError(
                f"backward() from a tensor {self.shape} that has no graph.",
                "Nothing it was computed from requires a gradient, or it was computed under no_grad().",
                "requires_grad=True on the tensors whose gradient you want.",
            )
        if grad is None:
            if self.size != 1:
                raise GraphError(
                    f"backward() from a tensor of shape {self.shape} without a gradient.",
                    f"A gradient belongs to one number, and there are {self.size} here.",
                    f"loss.sum().backward(), or backward(grad) with a gradient of shape {self.shape}.",
                )
            grad = np.ones(self.shape)
        grad = np.asarray(grad, dtype=self.dtype)
        if grad.shape != self.shape:
            raise ShapeError(
                f"backward() got a gradient of shape {grad.shape} for a tensor of shape {self.shape}.",
                "Each element of a tensor has one derivative.",
                f"a gradient of shape {self.shape}.",
            )
        reverse.backward(self.node, grad, retain_graph)

    def retain_grad(self) -> Tensor:
        """Keep the gradient of an intermediate result too; returns self."""
        self.node.keeps_grad = self.requires_grad
        return self

    def detach(self) -> Tensor:
        """The same memory, without a graph: a constant to whatever is computed next."""
        return Tensor(self.data)

    # writing in place (not recorded, so not allowed where a graph would have to know)

    def _write(self, index: Any, value: Any) -> None:
        if grad_enabled() and self.requires_grad:
            raise GraphError(
                f"writing in place into a tensor {self.shape} that requires a gradient.",
                "The write is not an operation of the graph, so no gradient could pass through it.",
                "`with no_grad():` around an update, or an operation that makes a new tensor.",
            )
        array = _array(value)
        try:
            self.data[index] = array
        except ValueError:
            raise ShapeError(
                f"writing values of shape {array.shape} into a tensor of shape {self.shape}.",
                "They must broadcast to the place they are written to.",
                f"values of the shape of that place, {self.data[index].shape}.",
            ) from None
        bump(self.data)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._write(index, value)

    def copy_(self, value: Any) -> Tensor:
        self._write(..., value)
        return self

    def add_(self, value: Any) -> Tensor:
        ew.check_broadcast("add_", self.shape, np.shape(_array(value)))
        self._write(..., self.data + _array(value))
        return self

    def mul_(self, value: Any) -> Tensor:
        ew.check_broadcast("mul_", self.shape, np.shape(_array(value)))
        self._write(..., self.data * _array(value))
        return self

    # arithmetic

    def __add__(self, other: Any) -> Tensor:
        return apply(ew.Add(), self, self._like(other))

    def __sub__(self, other: Any) -> Tensor:
        return apply(ew.Sub(), self, self._like(other))

    def __mul__(self, other: Any) -> Tensor:
        return apply(ew.Mul(), self, self._like(other))

    def __truediv__(self, other: Any) -> Tensor:
        return apply(ew.Div(), self, self._like(other))

    def __matmul__(self, other: Any) -> Tensor:
        return apply(Matmul(), self, self._like(other))

    def __radd__(self, other: Any) -> Tensor:
        return apply(ew.Add(), self._like(other), self)

    def __rsub__(self, other: Any) -> Tensor:
        return apply(ew.Sub(), self._like(other), self)

    def __rmul__(self, other: Any) -> Tensor:
        return apply(ew.Mul(), self._like(other), self)

    def __rtruediv__(self, other: Any) -> Tensor:
        return apply(ew.Div(), self._like(other), self)

    def __rmatmul__(self, other: Any) -> Tensor:
        return apply(Matmul(), self._like(other), self)

    def __neg__(self) -> Tensor:
        return apply(ew.Neg(), self)

    def __pow__(self, exponent: float) -> Tensor:
        return apply(ew.Pow(exponent), self)

    def exp(self) -> Tensor:
        return apply(ew.Exp(), self)

    def log(self) -> Tensor:
        return apply(ew.Log(), self)

    def relu(self) -> Tensor:
        return apply(ew.Relu(), self)

    def tanh(self) -> Tensor:
        return apply(ew.Tanh(), self)

    def sigmoid(self) -> Tensor:
        return apply(ew.Sigmoid(), self)

    # reductions

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return apply(reduce.Sum(axis, keepdims), self)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return apply(reduce.Mean(axis, keepdims), self)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return apply(reduce.Max(axis, keepdims), self)

    def softmax(self, axis: int = -1) -> Tensor:
        return apply(softmax.Softmax(axis), self)

    def log_softmax(self, axis: int = -1) -> Tensor:
        return apply(softmax.LogSoftmax(axis), self)

    # views

    def reshape(self, *to: Any) -> Tensor:
        return apply(shape.Reshape(_sizes(to)), self)

    def transpose(self, *axes: Any) -> Tensor:
        """Axes in the given order; without arguments, reversed."""
        return apply(shape.Transpose(_sizes(axes) or None), self)

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def broadcast_to(self, *to: Any) -> Tensor:
        return apply(shape.BroadcastTo(_sizes(to)), self)

    def __getitem__(self, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        plain = tuple(part.data if isinstance(part, Tensor) else part for part in parts)
        return apply(shape.GetItem(plain), self)

    def _like(self, value: Any) -> Tensor:
        """`value` as a tensor; a Python number takes this tensor's number format."""
        if isinstance(value, Tensor):
            return value
        number = isinstance(value, int | float)
        return Tensor(value, dtype=np.result_type(self.dtype, value) if number else None)


def _array(value: Any) -> np.ndarray:
    return value.data if isinstance(value, Tensor) else np.asarray(value)


def _sizes(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes given one by one or as one sequence."""
    single = len(arguments) == 1 and isinstance(arguments[0], Sequence)
    return tuple(arguments[0] if single else arguments)


def apply(function: Function, *inputs: Tensor) -> Tensor:
    """Run one operation and, if a gradient may be asked for, put it into the graph.

    This is the whole of recording: note who the parents are. What backward will need of the data
    was kept by the operation itself, during `forward`.
    """
    recording = grad_enabled()
    function.needs = tuple(recording and t.requires_grad for t in inputs)
    function.shapes = tuple(t.shape for t in inputs)
    function.roles = {id(owner(t.data)): t.role for t in inputs}
    result = Tensor(function.forward(*(t.data for t in inputs)))
    if any(function.needs):
        function.shape, function.dtype, function.requires_grad = result.shape, result.dtype, True
        function.parents = tuple(t.node for t in inputs)
        result.node = function
        result.role = function.roles.get(id(owner(result.data)), "activation")  # a view is what it views
    return result
