"""Exercise `backward_pass`: gradients sent from the root to everything that it was computed from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs.lab01_backprop.graphs import (
    Edges,
    Graph,
    Node,
    chain,
    dag,
    exact,
    graph,
    letters,
    uncounted,
    within,
)

backward_pass = Exercise(
    "backward_pass",
    title="The backward pass",
    arguments=("order", "grad", "parents", "vjp"),
    shapes=(
        "order   list of nodes, every consumer before what it consumes; order[0] is the root",
        "grad    number or array: the gradient of order[0]",
        "parents function: parents(node) is the list of nodes that node was computed from; a",
        "        node stands in it twice if it was used twice, as in x·x",
        "vjp     function: vjp(node, grad) is a list with one gradient for each of",
        "        parents(node), None where none is wanted; it wants the node's complete",
        "        gradient, and is called once for each node",
        "returns dict from node to gradient, for every node that received one, order[0] too;",
        "        no array that came in or was sent by vjp is written to",
    ),
    formula="grad[p] = Σ vjp(n, grad[n])[i] over all nodes n and places i with parents(n)[i] = p",
    difficulty=3,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "x is used by y and by z, and both send it a gradient. When y sends its part, is x's gradient "
        "complete? What in `order` tells you that it is, once you come to x?",
        "Keep a dict of gradients, with the root's in it from the start. Walk through order: a node that has "
        "a gradient when you come to it has all of it, since its consumers came first. Send it on with vjp "
        "and add each part to what its parent has so far. Add, not overwrite, and make a new array: one "
        "array may have been sent to two parents. What is None is not sent at all.",
        "grads = {order[0]: grad}. For each node of order that is in grads: for p, g in zip(parents(node), "
        "vjp(node, grads[node])): if g is not None, grads[p] = grads[p] + g if p in grads else g.",
    ),
)

Local = dict[Node, list[Any]]
RUNAWAY = 2000  # calls of vjp: enough for every route through the small graphs


def times(grad: Any, local: Any) -> Any:
    """`grad` times a local derivative: a Jacobian if grad has one axis and it has two, else elementwise."""
    return grad @ local if np.ndim(local) == 2 and np.ndim(grad) == 1 else grad * local


def path_sums(g: Graph, local: Local, grad: Any) -> dict[Node, Any]:
    """Each node's gradient as a sum over all routes from the root, of the product of the local derivatives.

    This is the chain rule written out, with no order and no accumulation; the routes of a small graph
    can be walked one by one.
    """
    sums: dict[Node, Any] = {}
    routes = [(g.root, grad)]
    while routes:
        node, product = routes.pop()
        sums[node] = sums[node] + product if node in sums else product
        for parent, derivative in zip(g.parents[node], local[node], strict=True):
            if derivative is not None:
                routes.append((parent, times(product, derivative)))
    return sums


class Asked:
    """The vjp of a graph, which notes for what node it was asked, and with which gradient."""

    def __init__(self, g: Graph, local: Local) -> None:
        self.graph, self.local = g, local
        self.seen: list[tuple[Node, Any]] = []

    def __call__(self, node: Any, grad: Any) -> list[Any]:
        self.graph.ask(node)
        self.seen.append((node, np.array(grad) if isinstance(grad, np.ndarray) else grad))
        if grad is None:
            raise ValueError(f"vjp({node!r}, None): there is no gradient to send on")
        return self.send(node, grad)

    def send(self, node: Node, grad: Any) -> list[Any]:
        return [None if d is None else times(grad, d) for d in self.local[node]]


def _grads(t: Trial, g: Graph, grad: Any, vjp: Asked) -> dict[Node, Any]:
    """The learner's dict. Mismatch unless it is one, of nodes of `g`."""
    parents = uncounted(g.ask, says=g.says, limit=RUNAWAY + 4 * len(g.nodes))
    oracle = uncounted(vjp, says=_shown(vjp.local))
    what, tries = "vjp was asked too often", "one visit to each node, in the order that `order` gives."
    limit = RUNAWAY + 2 * len(g.nodes)
    got = within(t, oracle, limit, what, tries, g.nodes, grad, parents, oracle)
    if not isinstance(got, dict):
        missing = ": is a `return` missing?" if got is None else ""
        raise Mismatch(f"the result is {describe(got)}, expected a dict from node to gradient{missing}")
    for node in got:
        t.holds(node in g.parents, f"the dict has the key {node!r}, which is no node of the graph")
    return got


def _shown(local: Local) -> str:
    text = str({n: d for n, d in local.items() if d})
    if text == "{}" or len(text) > 90 or "array" in text:
        return "of the graph"
    return f"with the local derivatives {text}"


def _agree(
    t: Trial, g: Graph, local: Local, grad: Any, vjp: Asked | None = None, rtol: float | None = None
) -> None:
    """The gradients of all nodes that receive one are the sums over routes."""
    expected = path_sums(g, local, grad)
    got = _grads(t, g, grad, vjp or Asked(g, local))
    for node in g.nodes:
        if node in expected:
            place = "the root, " if node == g.root else ""
            t.holds(
                node in got, f"the dict lacks {place}{node!r}, whose gradient is {describe(expected[node])}"
            )
            t.holds(
                got[node] is not None, f"the gradient of {node!r} is None, not {describe(expected[node])}"
            )
            t.close(got[node], expected[node], f"the gradient of {node!r}", rtol=rtol)
    for node in got:
        t.holds(
            node in expected,
            f"the dict has an entry for {node!r}, {describe(got[node])}; no gradient was sent to it",
            "leaving out what is None: no entry is something else than a gradient of 0.",
        )


def _locals(t: Trial, g: Graph) -> Local:
    """Whole numbers from 2 to 5: sums of products of them are exact, and never 0."""
    return {node: [float(t.integers(2, 6)) for _ in parents] for node, parents in g.parents.items()}


def _shaped(t: Trial, g: Graph, shape: tuple[int, ...]) -> Local:
    """Local derivatives of operations that work element by element on arrays of `shape`."""
    return {n: [exact(t.integers(-4, 5, *shape)) for _ in parents] for n, parents in g.parents.items()}


@backward_pass.check("along one route, each gradient is the one before times the local derivative")
def chain_rule(t: Trial) -> None:
    small: Edges = [[[1], []], [[]], [[1], [2], []], [[1, 2], [], []], [[1, 3], [2], [], [4], []]]
    for edges in small:
        g = graph(letters(t, len(edges)), edges)
        _agree(t, g, _locals(t, g), float(t.integers(2, 6)))


@backward_pass.check("a node that is used several times gets the sum of what its uses send")
def sums(t: Trial) -> None:
    small: Edges = [[[1, 2], [3], [3], []], [[1, 1], []], [[1, 2], [2], []], [[1, 1], [2, 3], [3, 3], []]]
    for edges in [*small, [[1, 3], [2], [3], [4], []]]:
        g = graph(letters(t, len(edges)), edges)
        _agree(t, g, _locals(t, g), float(t.integers(2, 6)))
    for _ in range(6):
        g = dag(t, 7)
        _agree(t, g, _locals(t, g), 1.0)
    g = graph([*letters(t, 1), 0, "", None, ("w", 1), 1], [[1, 2, 3], [4, 5], [4], [4, 5], [5, 5], []])
    _agree(t, g, _locals(t, g), 1.0)


@backward_pass.check("vjp is called once for each node, with the node's complete gradient")
def complete(t: Trial) -> None:
    small = [graph(letters(t, n), e) for n, e in [(3, [[1, 2], [2], []]), (4, [[1, 2], [3], [3], []])]]
    for g in [*small, graph(letters(t, 4), [[1, 1], [2], [3], []]), *(dag(t, 7) for _ in range(4))]:
        local = _locals(t, g)
        vjp, expected = Asked(g, local), path_sums(g, local, 1.0)
        _grads(t, g, 1.0, vjp)
        t.counts[-1] = sum(bool(g.parents[n]) for n, _ in vjp.seen)  # a leaf may be asked or not
        for node, grad in vjp.seen:
            t.close(grad, expected[node], f"vjp was called for {node!r} before its gradient was complete")
        asked = [node for node, _ in vjp.seen]
        for node in g.nodes:
            t.holds(asked.count(node) < 2, f"vjp was called {asked.count(node)} times for {node!r}")
            t.holds(node in asked or not g.parents[node], f"vjp was not called for {node!r}")


@backward_pass.check("None sends no gradient: no entry, no vjp; a gradient of 0 is one")
def none_wanted(t: Trial) -> None:
    edges = [[1, 2], [3, 4], [4], [5], [], []]
    for _ in range(2):
        g = graph(letters(t, 6), edges)
        for cut in [(1, 1), (2, 0), (1, 0), (0, 1), (0, 0)]:
            for value in (None, 0.0):
                local = _locals(t, g)
                local[g.nodes[cut[0]]][cut[1]] = value
                vjp, reached = Asked(g, local), path_sums(g, local, 3.0)
                _agree(t, g, local, 3.0, vjp)
                for node, _ in vjp.seen:
                    t.holds(
                        node in reached,
                        f"vjp was called for {node!r}, to which no gradient was sent",
                        "passing over the nodes that have no gradient when their turn comes.",
                    )


@backward_pass.check("gradients are numbers or arrays of any shape, and each node's has its own")
def shapes(t: Trial) -> None:
    n, m, k = t.odd(), t.size(), t.odd()
    for shape in [(n,), (n, m), (2, m, k), (1,), (), (0, m)]:
        g = dag(t, 5)
        _agree(t, g, _shaped(t, g, shape), exact(t.integers(1, 5, *shape)))
    for shape in [(1,), (1, n), (n, m)]:  # here with digits behind the point
        g = graph(letters(t, 3), [[1, 2], [2], []])
        local: Local = {node: [t.normal(*shape) for _ in parents] for node, parents in g.parents.items()}
        _agree(t, g, local, t.normal(*shape), rtol=1e-9)
    g = graph(letters(t, 4), [[1, 2], [2, 3], [3, 3], []])
    size = dict(zip(g.nodes, (n, m, k, 1), strict=True))
    jacobians: Local = {
        node: [exact(t.integers(-4, 5, size[node], size[p])) for p in parents]
        for node, parents in g.parents.items()
    }
    _agree(t, g, jacobians, exact(t.integers(1, 5, n)))


class Shared(Asked):
    """Additions send one and the same array to all of their parents, as `return grad, grad` does.

    It is a new array, so that the outcome is the same where the arrays that vjp is given are copies.
    """

    def send(self, node: Node, grad: Any) -> list[Any]:
        return [np.array(grad)] * len(self.local[node])


@backward_pass.check("no array that came in or was sent by vjp is written to")
def untouched(t: Trial) -> None:
    edges: Edges = [[[1, 2], [3, 4], [3], [], []], [[2, 1], [2], [3, 4], [4], []], [[1, 1], [2, 2], []]]
    edges += [[[1, 2], [2, 3], [3], []], [[2, 1], [3, 2], [], []]]
    for additions in edges:
        g = graph(letters(t, len(additions)), additions)
        ones: Local = {node: [1.0 for _ in parents] for node, parents in g.parents.items()}
        _agree(t, g, ones, exact(t.integers(1, 5, t.odd())), Shared(g, ones))
        t.unchanged()


@backward_pass.check("a chain of 1,200 operations works as well")
def deep(t: Trial) -> None:
    g = chain(t, 1200)
    signs = t.rng.choice([-1.0, 1.0], len(g.nodes))
    local: Local = {n: [float(s)] for n, s in zip(g.nodes, signs[1:], strict=False)} | {g.nodes[-1]: []}
    got = _grads(t, g, 3.0, Asked(g, local))
    for node in g.nodes:
        t.holds(node in got, f"the dict lacks {node!r}")
    signs[0] = 1.0
    t.close([got[node] for node in g.nodes], 3.0 * np.cumprod(signs), "the gradients along the chain")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


@backward_pass.mistake(
    says="a second gradient overwrites the first",
    tries="grads[p] + g where p has a gradient already: each use of a node moves the root on its own.",
    caught_by="sums",
)
def overwritten(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if sent is not None:
                    grads[parent] = sent
    return grads


@backward_pass.mistake(
    says="the first gradient that arrives is kept, and later ones are dropped",
    tries="grads[p] + g where p has a gradient already.",
    caught_by="sums",
)
def first_only(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if sent is not None:
                    grads.setdefault(parent, sent)
    return grads


@backward_pass.mistake(
    says="parents and gradients are paired in a dict, where x * x has one place for its two gradients",
    tries="a loop over zip(parents(node), …) itself, so that a parent can come twice.",
    caught_by="sums",
)
def paired_in_a_dict(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in dict(zip(parents(node), vjp(node, grads[node]), strict=True)).items():
                if sent is not None:
                    grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="the place of a parent is looked up by parents(node).index(p), which for x * x is twice the first",
    tries="a loop over zip(parents(node), …), which goes through the places themselves.",
    caught_by="sums",
)
def looked_up(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            above, parts = parents(node), vjp(node, grads[node])
            for parent in above:
                sent = parts[above.index(parent)]
                if sent is not None:
                    grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="the first gradient to arrive is added to itself",
    tries="grads.get(p, 0) + g: what p has so far, and 0 if that is nothing.",
    caught_by="chain_rule",
)
def doubled(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if sent is not None:
                    grads[parent] = grads.get(parent, sent) + sent
    return grads


@backward_pass.mistake(
    says="the root is missing from the result",
    tries="grads = {order[0]: grad} at the start: it received the gradient that it was called with.",
    caught_by="chain_rule",
)
def rootless(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = right(order, grad, parents, vjp)
    del grads[order[0]]
    return grads


@backward_pass.mistake(
    says="a node's gradient is taken out of the dict when it is sent on, so that only the leaves' are left",
    tries="grads[node], not grads.pop(node): the result has every node's gradient.",
    caught_by="chain_rule",
)
def popped(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads and parents(node):
            complete = grads.pop(node)
            for parent, sent in zip(parents(node), vjp(node, complete), strict=True):
                if sent is not None:
                    grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="the walk begins at the leaves: order is reversed, though its first node is the root",
    tries="for node in order, as it comes.",
    caught_by="chain_rule",
)
def from_the_leaves(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order[::-1]:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if sent is not None:
                    grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="vjp is called with the root's gradient for every node, not with the node's own",
    tries="vjp(node, grads[node]).",
    caught_by="chain_rule",
)
def roots_gradient(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grad), strict=True):
                if sent is not None:
                    grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="only the first parent of each node is sent its gradient",
    tries="a loop over all of zip(parents(node), vjp(node, grads[node])).",
    caught_by="chain_rule",
)
def one_parent(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        above = parents(node)
        if node in grads and above:
            sent = vjp(node, grads[node])[0]
            if sent is not None:
                grads[above[0]] = grads[above[0]] + sent if above[0] in grads else sent
    return grads


@backward_pass.mistake(
    says="a node sends every part on as it arrives, before the other parts are there",
    tries="the walk along `order`: when a node's turn comes, all of its consumers have sent their part.",
    caught_by="complete",
)
def sent_in_parts(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads: dict[Any, Any] = {}
    stack = [(order[0], grad)]
    while stack:
        node, part = stack.pop()
        grads[node] = grads[node] + part if node in grads else part
        stack += [(p, g) for p, g in zip(parents(node), vjp(node, part), strict=True) if g is not None]
    return grads


@backward_pass.mistake(
    says="vjp is called again for each parent, to take one gradient from its list",
    tries="one call for each node: zip(parents(node), vjp(node, grads[node])) has them all.",
    caught_by="complete",
)
def asked_for_each_parent(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for i, parent in enumerate(parents(node)):
                sent = vjp(node, grads[node])[i]
                if sent is not None:
                    grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="Nones are taken out before the gradients meet their parents, and later ones go to the wrong node",
    tries="`if g is not None` inside the loop over zip(parents(node), vjp(node, grads[node])).",
    caught_by="none_wanted",
)
def none_filtered_first(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            wanted = [sent for sent in vjp(node, grads[node]) if sent is not None]
            for parent, sent in zip(parents(node), wanted, strict=False):
                grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="nodes are visited as they are reached from the root, so one can be sent on before it is complete",
    tries="the walk along `order`: when a node's turn comes, all of its consumers have sent their part.",
    caught_by="sums",
)
def as_reached(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads, reached = {order[0]: grad}, [order[0]]
    for node in reached:
        for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
            if sent is None:
                continue
            grads[parent] = grads[parent] + sent if parent in grads else sent
            if parent not in reached:
                reached.append(parent)
    return grads


@backward_pass.mistake(
    says="None is added like a number",
    tries="`if g is not None` before it is added.",
    caught_by="none_wanted",
)
def none_added(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
            grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="the dict is asked for the gradient of a node to which none was sent",
    tries="passing over the nodes that are not in the dict when their turn comes.",
    caught_by="none_wanted",
)
def unreached(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
            if sent is not None:
                grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="vjp is called for a node to which no gradient was sent",
    tries="passing over the nodes that are not in the dict when their turn comes.",
    caught_by="none_wanted",
)
def sent_on_none(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        for parent, sent in zip(parents(node), vjp(node, grads.get(node)), strict=True):
            if sent is not None:
                grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="a node to which nothing but None was sent gets a gradient of 0",
    tries="starting with the root's entry alone, and leaving a parent as it is where its gradient is None.",
    caught_by="none_wanted",
)
def none_as_zero(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
            sent = 0.0 if sent is None else sent
            grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="a gradient of 0 counts as false and is dropped like None",
    tries="`if g is not None` instead of `if g`.",
    caught_by="none_wanted",
)
def zero_dropped(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if np.any(sent):
                    grads[parent] = grads[parent] + sent if parent in grads else sent
    return grads


@backward_pass.mistake(
    says="gradients are added in place, into an array that was sent to another node too",
    tries="grads[p] = grads[p] + g, which makes a new array; `+=` writes into the old one.",
    caught_by="untouched",
)
def in_place(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if sent is None:
                    continue
                if parent in grads:
                    grads[parent] += sent
                else:
                    grads[parent] = sent
    return grads


@backward_pass.mistake(
    says="the gradient that vjp sent is written to by `g +=`, and it was sent to another node too",
    tries="grads[p] = grads[p] + g, which makes a new array; `+=` writes into the old one.",
    caught_by="untouched",
)
def into_what_was_sent(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if sent is None:
                    continue
                if parent in grads:
                    sent += grads[parent]
                grads[parent] = sent
    return grads


@backward_pass.mistake(
    says="the function calls itself once for each node on the way down, and Python stops at 1,000 such calls",
    tries="a plain loop over `order`.",
    caught_by="deep",
)
def recursive(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}

    def visit(i: int) -> None:
        if i == len(order):
            return
        if order[i] in grads:
            for parent, sent in zip(parents(order[i]), vjp(order[i], grads[order[i]]), strict=True):
                if sent is not None:
                    grads[parent] = grads[parent] + sent if parent in grads else sent
        visit(i + 1)

    visit(0)
    return grads


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@backward_pass.alternative("a dict, and 0 for what is not there yet")
def right(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: grad}
    for node in order:
        if node in grads:
            for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
                if sent is not None:
                    grads[parent] = grads.get(parent, 0) + sent
    return grads


@backward_pass.alternative(
    "parts are collected in lists and summed when the node's turn comes; leaves are not asked"
)
def collected(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    parts: dict[Any, list[Any]] = {node: [] for node in order}
    parts[order[0]].append(grad)
    grads = {}
    for node in order:
        if not parts[node]:
            continue
        grads[node] = sum(parts[node][1:], start=parts[node][0])
        if above := parents(node):
            for parent, sent in zip(above, vjp(node, grads[node]), strict=True):
                if sent is not None:
                    parts[parent].append(sent)
    return grads


@backward_pass.alternative("a copy when the first gradient arrives, and sums in place in that copy")
def in_a_copy(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    grads = {order[0]: np.array(grad)}
    for node in order:
        if node not in grads:
            continue
        for parent, sent in zip(parents(node), vjp(node, grads[node]), strict=True):
            if sent is not None and parent in grads:
                grads[parent] += sent
            elif sent is not None:
                grads[parent] = np.array(sent)
    return grads


@backward_pass.alternative(
    "uses are counted down, and a node is sent on after its last one, whatever `order` says"
)
def counted(order: Any, grad: Any, parents: Any, vjp: Any) -> Any:
    uses = Counter(parent for node in order for parent in parents(node))
    grads, ready = {order[0]: grad}, [order[0]]
    while ready:
        node = ready.pop()
        above = parents(node)
        sent = vjp(node, grads[node]) if node in grads else [None] * len(above)
        for parent, part in zip(above, sent, strict=True):
            uses[parent] -= 1
            if part is not None:
                grads[parent] = grads[parent] + part if parent in grads else part
            if uses[parent] == 0:
                ready.append(parent)
    return grads
