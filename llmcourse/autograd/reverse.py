"""The backward pass: walk the graph from the result to the leaves, each node once.

A node may be sent to its parents only when its own gradient is complete, that is after every node
that consumed its result. Any topological order has that property. It is found with an explicit
stack: Python's own would overflow at a chain of a thousand operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmcourse.autograd.function import Array, Function, Grads, Node
from llmcourse.errors import ShapeError


def topological_order(root: Node) -> list[Node]:
    """Every node that `root` was computed from, consumers before what they consume; `root` first."""
    order: list[Node] = []
    seen = {root}
    stack = [(root, iter(root.parents))]
    while stack:
        node, unvisited = stack[-1]
        for parent in unvisited:
            if parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(parent.parents)))
                break
        else:
            order.append(node)  # all that it was computed from is already in the list
            stack.pop()
    return order[::-1]


def accumulate(grads: dict[Node, Array], node: Node, grad: Array) -> None:
    """A tensor used twice receives two gradients, and its gradient is their sum."""
    grads[node] = grads[node] + grad if node in grads else grad


def backward_pass(
    order: Sequence[Node], grad: Array, vjp: Callable[[Node, Array], Sequence[Array | None]]
) -> dict[Node, Array]:
    """Send `grad`, the gradient of `order[0]`, through the nodes of a topological order.

    `vjp(node, grad)` gives the gradients of the node's parents, None where none is wanted (it is a
    vector-Jacobian product: the Jacobian itself is never built). A node's own gradient is let go once
    it has been sent on, except where the node keeps it: those are returned.
    """
    grads = {order[0]: grad}
    for node in order:
        grad = grads[node] if node.keeps_grad else grads.pop(node)
        for parent, parent_grad in zip(node.parents, vjp(node, grad), strict=True):
            if parent_grad is not None:
                accumulate(grads, parent, parent_grad)
    return grads


def backward(root: Node, grad: Array, retain_graph: bool = False) -> None:
    """Send `grad`, the gradient of some scalar with respect to `root`, to every leaf that asked for one.

    Leaves' `.grad` change only at the end: if anything raises on the way, none of them has.
    """
    order = [node for node in topological_order(root) if node.requires_grad]
    for node in order:
        if isinstance(node, Function):
            node.check()

    def vjp(node: Node, grad: Array) -> Grads:
        if not isinstance(node, Function):
            return ()
        sent = node.backward(grad)
        grads = tuple(_fitting(g, node, i) if node.needs[i] else None for i, g in enumerate(sent))
        if not retain_graph:
            node.release()
        return grads

    grads = backward_pass(order, grad, vjp)
    for node in order:
        if node.keeps_grad:
            node.accumulate(grads[node])


def _fitting(grad: Array | None, node: Function, i: int) -> Array:
    """A gradient has exactly the shape of what it is the gradient of."""
    shape = None if grad is None else np.shape(grad)
    if grad is None or shape != node.shapes[i]:
        raise ShapeError(
            f"{type(node).__name__}.backward gave {shape} for input {i}, whose shape is {node.shapes[i]}.",
            "Each element of an input has one derivative; where it was broadcast, its copies' are summed.",
            "sum_to(grad, self.shapes[i]) on every gradient that backward returns.",
        )
    return np.asarray(grad, dtype=node.parents[i].dtype)
