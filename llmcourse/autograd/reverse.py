"""The backward pass: walk the graph from the result to the leaves, each node once.

A node may be sent to its parents only when its own gradient is complete, that is after every node
that consumed its result. Any topological order has that property. It is found with an explicit
stack: Python's own would overflow at a chain of a thousand operations.
"""

from __future__ import annotations

import numpy as np

from llmcourse.autograd.function import Array, Function, Node
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


def backward(root: Node, grad: Array, retain_graph: bool = False) -> None:
    """Send `grad`, the gradient of some scalar with respect to `root`, to every leaf that asked for one.

    Leaves' `.grad` change only at the end: if anything raises on the way, none of them has.
    """
    order = [node for node in topological_order(root) if node.requires_grad]
    for node in order:
        if isinstance(node, Function):
            node.check()
    grads = {root: grad}
    arrived: list[tuple[Node, Array]] = []
    for node in order:
        grad = grads.pop(node)
        if node.keeps_grad:
            arrived.append((node, grad))
        if isinstance(node, Function):
            for i, parent_grad in enumerate(node.backward(grad)):
                if node.needs[i]:
                    accumulate(grads, node.parents[i], _fitting(parent_grad, node, i))
            if not retain_graph:
                node.release()
    for node, grad in arrived:
        node.accumulate(grad)


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
