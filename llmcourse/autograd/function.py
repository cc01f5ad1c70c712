"""One operation as an object: what it computes, what it keeps, and how it sends a gradient back.

The graph is made of nodes, and a node holds *no data*: its name, the shape it produced and its
parents are enough to walk it. Data that backward will need must be kept explicitly with `save`. An
intermediate result that no operation saved is freed as soon as the forward pass drops it, so the
bytes that are counted are the bytes that are held.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from llmcourse.autograd.buffers import owner, version
from llmcourse.autograd.memory import Saved
from llmcourse.errors import GraphError

Array = np.ndarray
Shape = tuple[int, ...]
Grads = tuple[Array | None, ...]  # one for each input


class Node:
    """Where a tensor came from: a leaf (someone made it) or a `Function` (it was computed)."""

    def __init__(self, name: str, shape: Shape = (), dtype: Any = None, requires_grad: bool = False) -> None:
        self.name, self.shape, self.dtype, self.requires_grad = name, shape, dtype, requires_grad
        self.parents: tuple[Node, ...] = ()
        self.grad: Array | None = None
        self.keeps_grad = False

    @property
    def nbytes(self) -> int:
        """Bytes this node alone keeps alive for backward, each buffer once; a leaf keeps none."""
        return 0

    def accumulate(self, grad: Array) -> None:
        """Add to `.grad`. The first gradient is copied: two leaves may have been sent one array."""
        if self.grad is None:
            self.grad = np.array(grad, dtype=self.dtype)
        else:
            self.grad = self.grad + grad.astype(self.dtype, copy=False)


class Leaf(Node):
    """A parameter or an input: the end of the line for a gradient."""

    def __init__(self, name: str, shape: Shape, dtype: Any, requires_grad: bool) -> None:
        super().__init__(name, shape, dtype, requires_grad)
        self.keeps_grad = requires_grad


class Function(Node):
    """An operation on arrays. A subclass writes `forward` and `backward`.

    needs    for each input, whether a gradient must be sent to it (all False: nothing is recorded)
    shapes   the inputs' shapes
    roles    during forward: the role of each input's memory, by id (see `memory`)
    """

    needs: tuple[bool, ...] = ()
    shapes: tuple[Shape, ...] = ()

    label = "function"

    def __init_subclass__(cls) -> None:
        """CrossEntropy is called cross_entropy in pictures and messages."""
        cls.label = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self) -> None:
        super().__init__(self.label)
        self.roles: dict[int, str] = {}
        self.freed = False
        self._saved: tuple[Saved | None, ...] = ()

    def forward(self, *arrays: Any, **_: Any) -> Array:
        """The result. A subclass names its arrays, and keeps what `backward` will need with `self.save`."""
        raise NotImplementedError

    def backward(self, grad: Array) -> Grads:
        """One gradient for each input (None where `needs` is False), from the gradient of the result."""
        raise NotImplementedError

    def save(self, *arrays: Any, role: str = "activation") -> Any:
        """Keep arrays for backward, and hand back the first one. None keeps an empty place.

        Does nothing when no gradient will be asked for: inference keeps none of it.
        `role` is that of memory which is not an input's (an input's is known: see `roles`).
        """
        kept = tuple(None if a is None else np.asarray(a) for a in arrays)
        if any(self.needs):
            self._saved += tuple(a if a is None else self._keep(a, role) for a in kept)
        return kept[0]

    def _keep(self, array: Array, role: str) -> Saved:
        return Saved(array, self.name, self.roles.get(id(owner(array)), role))

    @property
    def saved(self) -> tuple[Any, ...]:
        """The arrays kept by `save`, in its order."""
        return tuple(None if s is None else s.array for s in self._saved)

    @property
    def nbytes(self) -> int:
        return sum({id(owner(s.array)): s.nbytes for s in self._saved if s is not None}.values())

    def check(self) -> None:
        """Raise `GraphError` if what backward needs is gone or no longer what it was."""
        if self.freed:
            raise GraphError(
                f"this graph was already used: {self.name} {self.shape} has let go of what it saved.",
                "A backward pass frees every buffer as soon as it is done with it.",
                "backward(retain_graph=True) the first time, or compute the forward pass again.",
            )
        for s in self._saved:
            if s is not None and version(s.array) != s.version:
                raise GraphError(
                    f"{self.name} saved an array {s.array.shape} at version {s.version}, "
                    f"and it is now at version {version(s.array)}.",
                    "It was written in place since: the gradient would be that of other numbers.",
                    "an operation that makes a new tensor, or call backward() before writing in place.",
                )

    def release(self) -> None:
        """Let go of everything that was saved."""
        self._saved = ()
        self.freed = True
