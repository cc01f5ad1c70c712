"""The points of `llmcourse.autograd`: the pieces of a reverse-mode engine.

The engine's own functions know nodes and what each saved; a learner's know arrays, and a graph only
through the functions `parents` and `vjp` that they are given. The adapters translate, and hand out arrays
that cannot be written to: several nodes may have been sent the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcourse.plug.point import Array, LearnersCode, Point, kind, register

if TYPE_CHECKING:
    from llmcourse.autograd.function import Function, Grads, Node
    from llmcourse.autograd.ops.matmul import Matmul

AUTOGRAD = "llmcourse.autograd"


def read_only(array: Any) -> Array:
    """The same memory, without the permission to write."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def parents(node: Node) -> tuple[Node, ...]:
    """What `node` was computed from."""
    return node.parents


def named(node: Any) -> str:
    return f"{node.name or 'a leaf'} {node.shape}"


# ── the order of the backward pass, and the pass ─────────────────────────────────────────────────────


def topological_order(code: LearnersCode) -> Callable[[Node], list[Node]]:
    def topological_order(root: Node) -> list[Node]:
        order = code(root, parents)
        _check_order(code, order, root)
        return list(order)

    return topological_order


def _check_order(code: LearnersCode, order: Any, root: Node) -> None:
    """Refuse anything but all nodes, each once and after everything that consumed it.

    With a wrong order the gradients would be wrong without a word.
    """
    from llmcourse.autograd.function import Node

    why = "A node's gradient is complete only after every node that consumed its result has sent its part."
    if not isinstance(order, list | tuple) or not all(isinstance(n, Node) for n in order):
        code.refuse(f"it returned {kind(order)}, not a list of nodes", why, "a list that begins with root.")
    if not order or order[0] is not root:
        code.refuse("its list does not begin with root", why, "reversing the list, if it ends with root.")
    place = {node: i for i, node in enumerate(order)}
    if len(place) < len(order):
        twice = next(n for i, n in enumerate(order) if place[n] != i)
        code.refuse(f"its list has {named(twice)} twice", why, "a set of the nodes that were seen.")
    for i, node in enumerate(order):
        for parent in node.parents:
            if parent not in place:
                code.refuse(
                    f"its list leaves out {named(parent)}, a parent of {named(node)}", why, "every parent."
                )
            if place[parent] < i:
                code.refuse(
                    f"its list has {named(parent)} before {named(node)}, which was computed from it",
                    why,
                    "adding a node to the list after all that it was computed from, and reversing the list.",
                )


register(
    Point(
        "topological_order",
        ("root", "parents"),
        "list",
        "Every node that root was computed from, root first, consumers before what they consume.",
        (f"{AUTOGRAD}.reverse:topological_order", f"{AUTOGRAD}.graph:topological_order"),
        topological_order,
    )
)


def backward_pass(code: LearnersCode) -> Callable[..., dict[Node, Array]]:
    def backward_pass(order: Sequence[Node], grad: Array, vjp: Callable[..., Grads]) -> dict[Node, Array]:
        sent: set[Node] = set()

        def once(node: Node, grad: Any) -> Grads:
            if node in sent:
                code.refuse(
                    f"it called vjp twice for {named(node)}",
                    "What a node saved is let go as soon as its gradient was sent on.",
                    "adding up a node's gradient first, and calling vjp when its turn in `order` comes.",
                )
            sent.add(node)
            grad = code.array(grad, f"what it gave to vjp for {named(node)}", node.shape, node.dtype)
            return tuple(None if g is None else read_only(g) for g in vjp(node, grad))

        grads = code(list(order), read_only(grad), parents, once)
        if not isinstance(grads, dict):
            code.refuse(f"it returned {kind(grads)}", "Gradients are looked up by node.", "a dict.")
        for node in order:
            if node.keeps_grad:
                if node not in grads:
                    code.refuse(
                        f"it returned no gradient for {named(node)}",
                        f"It returned {len(grads)}, for an order of {len(order)} nodes.",
                        "entering each gradient from vjp under its node of parents(node).",
                    )
                code.array(grads[node], f"the gradient of {named(node)}", node.shape, node.dtype)
        return grads

    return backward_pass


register(
    Point(
        "backward_pass",
        ("order", "grad", "parents", "vjp"),
        "dict",
        "Each node's gradient: grad for the first of order; vjp(node, grad) gives its parents' parts.",
        (f"{AUTOGRAD}.reverse:backward_pass",),
        backward_pass,
    )
)


# ── the backward of single operations ────────────────────────────────────────────────────────────────


def sum_to(code: LearnersCode) -> Callable[..., Array]:
    def sum_to(grad: Array, shape: tuple[int, ...]) -> Array:
        return code.array(
            code(read_only(grad), shape),
            f"the result for grad {grad.shape}, shape {shape}",
            shape,
            grad.dtype,
        )

    return sum_to


register(
    Point(
        "sum_to",
        ("grad", "shape"),
        "array",
        "The backward of broadcasting: grad summed over the axes along which shape was repeated.",
        tuple(f"{AUTOGRAD}.ops.{module}:sum_to" for module in ("elementwise", "shape", "matmul")),
        sum_to,
    )
)


def matmul_backward(code: LearnersCode) -> Callable[..., Grads]:
    def backward(self: Matmul, grad: Array) -> Grads:
        a_shape, b_shape = self.shapes
        # A vector is a matrix of one row on the left, of one column on the right.
        matrices = (1, *a_shape)[-max(2, len(a_shape)) :], (*b_shape, 1)[: max(2, len(b_shape))]
        if len(a_shape) == 1:
            grad = np.expand_dims(grad, -1 if len(b_shape) == 1 else -2)
        if len(b_shape) == 1:
            grad = np.expand_dims(grad, -1)
        # What only an unwanted gradient needs was not saved; zeros that take no memory stand for it.
        a, b = (
            np.broadcast_to(grad.dtype.type(0), shape) if saved is None else saved.reshape(shape)
            for saved, shape in zip(self.saved, matrices, strict=True)
        )
        given = f"grad {grad.shape}, a {a.shape}, b {b.shape}"
        found = code.parts(code(read_only(grad), read_only(a), read_only(b)), ("grad_a", "grad_b"))

        def fitting(i: int, like: Array) -> Array | None:
            if not self.needs[i]:
                return None
            name = f"grad_{'ab'[i]} for {given}"
            return code.array(found[i], name, like.shape, grad.dtype, like.dtype).reshape(self.shapes[i])

        return fitting(0, a), fitting(1, b)

    return backward


register(
    Point(
        "matmul_backward",
        ("grad", "a", "b"),
        "(grad_a, grad_b)",
        "The gradients of both operands of a @ b, at least 2-D each, batch axes broadcast.",
        (f"{AUTOGRAD}.ops.matmul:Matmul.backward",),
        matmul_backward,
    )
)


def cross_entropy(code: LearnersCode) -> type[Function]:
    from llmcourse.autograd.ops import softmax

    class CrossEntropy(softmax.CrossEntropy):
        """Loss and gradient come together, so the gradient is what is saved."""

        def forward(self, z: Array) -> Array:
            labels, self.targets = self.targets, None
            self._check(z, labels)
            loss, grad = code.parts(code(read_only(z), read_only(labels)), ("loss", "grad_logits"))
            self.save(code.array(grad, f"grad_logits for logits {z.shape}", z.shape, z.dtype))
            return code.number(loss, f"loss for logits {z.shape}", z.dtype)

        def backward(self, grad: Array) -> Grads:
            (dz,) = self.saved
            return (dz * grad,)

    return CrossEntropy


register(
    Point(
        "cross_entropy",
        ("logits", "labels"),
        "(loss, grad_logits)",
        "The mean over rows of −log softmax(logits)[label], and its gradient.",
        (f"{AUTOGRAD}.ops.softmax:CrossEntropy", f"{AUTOGRAD}.functional:CrossEntropy"),
        cross_entropy,
    )
)


def numeric_gradient(code: LearnersCode) -> Callable[..., Array]:
    from llmcourse.autograd.check import STEP

    def numeric_gradient(f: Callable[[], float], x: Array, step: float = STEP) -> Array:
        def at(point: Any) -> float:
            kept = x.copy()
            x[...] = point
            try:
                return f()
            finally:
                x[...] = kept

        return code.array(code(at, x.copy(), step), f"the result for x {x.shape}", x.shape, x.dtype)

    return numeric_gradient


register(
    Point(
        "numeric_gradient",
        ("f", "x", "h=…"),
        "array",
        "The gradient of f at x by finite differences with step h; f takes an array and gives a number.",
        (f"{AUTOGRAD}.check:numeric_gradient", f"{AUTOGRAD}:numeric_gradient"),
        numeric_gradient,
    )
)
