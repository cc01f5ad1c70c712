"""Exercise `topological_order`: in which order the backward pass visits the graph."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs.lab01_backprop.graphs import (
    Edges,
    Graph,
    Node,
    chain,
    dag,
    graph,
    ladder,
    letters,
    residual,
    uncounted,
    within,
)

topological_order = Exercise(
    "topological_order",
    title="The order of the backward pass",
    arguments=("root", "parents"),
    shapes=(
        "root    a node: any hashable value, 0 and '' too",
        "parents function: parents(node) is the list of nodes that node was computed from,",
        "        empty for a leaf; a node stands in it twice if it was used twice, as in x·x",
        "returns list of root and all that it was computed from, each node once, every",
        "        consumer before what it consumes; at most 2 calls of parents for each node,",
        "        chains of any length",
    ),
    formula="place[n] < place[p] for every node n and every p in parents(n)",
    difficulty=3,
    importance=4,
    minutes=25,
    points=4,
    hints=(
        "In y = f(x); z = x + y, the root z was computed from x and from y. If the order were z, x, y, "
        "what would x have received by the time it is visited, and what would still be on its way?",
        "Turn the question round: when may a node be put at the end of a list whose reverse you want? As "
        "soon as everything that it was computed from is in the list. A depth-first walk that notes a node "
        "when it leaves it, not when it enters it, does just that. A set of nodes already entered keeps "
        "the walk from going down the same way twice. Python calls nest only 1,000 deep, so keep the "
        "nodes that you are inside of on a list of your own, each with what is left of its parents.",
        "seen = {root}; stack = [(root, iter(parents(root)))]. While there is a stack: take the next "
        "parent from the iterator on its top. One that is not in seen is added to it and pushed with an "
        "iterator of its own. If the iterator is used up, pop it and append its node to order. At the "
        "end: order[::-1].",
    ),
)

ONCE_EACH = "a set of the nodes seen so far: a node that is in it is not walked again."
KEPT = "keeping the list that parents(node) gave, where you need it again."
RUNAWAY = 1000  # calls of parents: enough for every route through the small graphs


def _list(t: Trial, g: Graph, limit: int = RUNAWAY, enough: int | None = None) -> list[Node]:
    """The learner's list for `g`. Mismatch unless it is one, of nodes of `g`.

    After `limit` calls of parents the function is stopped; it should need no more than `enough`.
    """
    oracle = uncounted(g.ask, says=g.says)
    what = f"parents was asked too often for {len(g.nodes)} nodes"
    got = within(t, oracle, limit, what, ONCE_EACH, g.root, oracle)
    if enough is not None and oracle.calls > enough:
        raise Mismatch(f"{what}: {enough:,} calls are enough, and there were {oracle.calls:,}", tries=KEPT)
    if got is None:
        raise Mismatch("the result is None, expected a list of nodes: is a `return` missing?")
    if not isinstance(got, list | tuple):
        raise Mismatch(f"the result is {describe(got)}, expected a list of nodes")
    kinds = {type(node) for node in g.nodes}
    for item in got:
        if type(item) not in kinds or not any(item == node for node in g.nodes):
            raise Mismatch(f"the list {describe(got)} holds {describe(item)}, which is no node of the graph")
    return list(got)


def _all(g: Graph, got: list[Node]) -> None:
    """Root is in the list, and so is everything that a node in it was computed from."""
    have = set(got)
    for node in g.nodes:
        if node not in have:
            why = "the root" if node == g.root else f"from which {g.consumer(node)!r} was computed"
            raise Mismatch(f"the list {describe(got)} lacks {node!r}, {why}")


def _once(g: Graph, got: list[Node]) -> None:
    place: dict[Node, int] = {}
    for i, node in enumerate(got):
        if node in place:
            raise Mismatch(
                f"the list {describe(got)} holds {node!r} more than once, at places {place[node]} and {i}",
                tries=ONCE_EACH,
            )
        place[node] = i


def _one_of_each(t: Trial, g: Graph, limit: int = RUNAWAY) -> list[Node]:
    got = _list(t, g, limit)
    _all(g, got)
    _once(g, got)
    return got


def _ordered(t: Trial, g: Graph) -> None:
    got = _one_of_each(t, g)
    wrong = _too_early(g, got)
    if wrong is None:
        return
    parent, node = wrong
    raise Mismatch(
        f"in {describe(got)}, {parent!r} (place {got.index(parent)}) comes before {node!r} (place "
        f"{got.index(node)}), which was computed from it and has yet to send it a gradient",
        tries="the same list, reversed." if _too_early(g, got[::-1]) is None else "",
    )


def _too_early(g: Graph, order: list[Node]) -> tuple[Node, Node] | None:
    """A parent and its consumer that stand in the wrong order; None if there are none."""
    place = {node: i for i, node in enumerate(order)}
    pairs = ((parent, node) for node, parents in g.parents.items() for parent in parents)
    return next(((parent, node) for parent, node in pairs if place[parent] < place[node]), None)


@topological_order.check("root is in the list, and so is all that it was computed from")
def complete(t: Trial) -> None:
    small: Edges = [[[]], [[1], []], [[1], [2], []], [[1, 2], [], []], [[1, 4], [2, 3], [], [], []]]
    for edges in small:
        g = graph(letters(t, len(edges)), edges)
        _all(g, _list(t, g))
    for _ in range(3):
        g = dag(t, t.size(5, 9), twice=0)
        _all(g, _list(t, g))


@topological_order.check("each node is there once, however many routes lead to it")
def once(t: Trial) -> None:
    small: Edges = [[[1, 2], [3], [3], [4], []], [[1, 1], []], [[1, 1, 2], [2, 2], []]]
    for edges in small:
        _one_of_each(t, graph(letters(t, len(edges)), edges))
    for _ in range(4):
        _one_of_each(t, dag(t, 7, twice=0.4))


@topological_order.check("parents is asked at most twice for each node, not once for each route")
def frugal(t: Trial) -> None:
    for g in (ladder(t, 30), residual(t, 40), dag(t, 80)):
        _list(t, g, limit=20 * len(g.nodes), enough=2 * len(g.nodes))


@topological_order.check("each node comes before everything that it was computed from")
def consumers_first(t: Trial) -> None:
    short: Edges = [
        [[1, 3, 2], [3], [3], []],
        [[1], [2], []],
        [[1, 2], [2], []],
        [[2, 1], [2], []],
        [[1, 2, 3], [3], [1], []],
    ]
    long_way: Edges = [[[1, 3], [2], [3], []], [[3, 1], [2], [3], []], [[3, 1], [2], [4], [4], []]]
    for edges in short + long_way:
        _ordered(t, graph(letters(t, len(edges)), edges))
    for _ in range(8):
        _ordered(t, dag(t, t.size(6, 12)))
    for g in (ladder(t, 12), residual(t, 12), dag(t, 60)):
        _ordered(t, g)


@topological_order.check("any hashable value can be a node: 0, the empty string, None, a tuple")
def any_value(t: Trial) -> None:
    for zero in range(4):
        for empty in (0, ""):
            others = [int(n) for n in t.rng.permutation(9)[:3] + 1] if empty == 0 else letters(t, 3)
            _one_of_each(t, graph([*others[:zero], empty, *others[zero:]], [[1, 2], [2, 3], [3], []]))
    for odd in (None, ("w", 0), (), -1, False):
        a, b, c = letters(t, 3)
        for names in ([odd, a, b, c], [a, b, odd, c]):
            _one_of_each(t, graph(names, [[1, 2], [2, 3], [3], []]))
    _one_of_each(t, graph([1, "1", "-2", -2], [[1, 2], [2, 3], [3], []]))


@topological_order.check("a chain of 1,200 operations works as well")
def deep(t: Trial) -> None:
    _one_of_each(t, chain(t, 1200), limit=3600)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


@topological_order.mistake(
    says="the function calls itself once for each node on the way down, and Python stops at 1,000 such calls",
    tries="a list of your own as the stack: pairs of a node and an iterator over its parents.",
    caught_by="deep",
)
def recursive(root: Any, parents: Any) -> Any:
    order, seen = [], set()

    def visit(node: Any) -> None:
        seen.add(node)
        for parent in parents(node):
            if parent not in seen:
                visit(parent)
        order.append(node)

    visit(root)
    return order[::-1]


@topological_order.mistake(
    says="the nodes are listed breadth first, by their distance from the root",
    tries="noting a node when all of its parents have been noted, and reversing the list at the end.",
    caught_by="consumers_first",
)
def breadth_first(root: Any, parents: Any) -> Any:
    order, seen = [root], {root}
    for node in order:
        for parent in parents(node):
            if parent not in seen:
                seen.add(parent)
                order.append(parent)
    return order


@topological_order.mistake(
    says="a node is noted when the walk enters it, before what it was computed from has been walked",
    tries="noting it when the walk leaves it, and reversing the list at the end.",
    caught_by="consumers_first",
)
def pre_order(root: Any, parents: Any) -> Any:
    order, seen = [], set()

    def visit(node: Any) -> None:
        if node not in seen:
            seen.add(node)
            order.append(node)
            for parent in parents(node):
                visit(parent)

    visit(root)
    return order


@topological_order.mistake(
    says="a node is noted when it is taken from the stack, so a short route to it comes before a long one",
    tries="leaving the node on the stack until all of its parents are noted; then note it, and reverse.",
    caught_by="consumers_first",
)
def stack_order(root: Any, parents: Any) -> Any:
    order, seen, stack = [], set(), [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
            stack.extend(parents(node))
    return order


@topological_order.mistake(
    says="the list is not reversed at the end: it has parents before their consumers, as a forward pass",
    tries="return order[::-1].",
    caught_by="consumers_first",
)
def forward_order(root: Any, parents: Any) -> Any:
    order, seen = [], {root}
    stack = [(root, iter(parents(root)))]
    while stack:
        node, rest = stack[-1]
        for parent in rest:
            if parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(parents(parent))))
                break
        else:
            order.append(node)
            stack.pop()
    return order


@topological_order.mistake(
    says="a node is marked as seen when it is pushed, long before the walk enters it",
    tries="marking it when it is taken from the stack to be walked: a deeper route may need it first.",
    caught_by="consumers_first",
)
def marked_too_early(root: Any, parents: Any) -> Any:
    order, seen, stack = [], {root}, [(root, False)]
    while stack:
        node, leaving = stack.pop()
        if leaving:
            order.append(node)
            continue
        stack.append((node, True))
        for parent in parents(node):
            if parent not in seen:
                seen.add(parent)
                stack.append((parent, False))
    return order[::-1]


@topological_order.mistake(
    says="no note is kept of the nodes already seen, and a node is listed once for each route to it",
    tries=ONCE_EACH,
    caught_by="once",
)
def not_seen(root: Any, parents: Any) -> Any:
    order = []

    def visit(node: Any) -> None:
        for parent in parents(node):
            visit(parent)
        order.append(node)

    visit(root)
    return order[::-1]


@topological_order.mistake(
    says="every route is walked, and the repetitions are only thrown out at the end",
    tries="a set of the nodes seen so far, asked before the walk goes down: each diamond doubles the routes.",
    caught_by="frugal",
)
def every_route(root: Any, parents: Any) -> Any:
    order = []

    def visit(node: Any) -> None:
        for parent in parents(node):
            visit(parent)
        order.append(node)

    visit(root)
    return list(dict.fromkeys(order))[::-1]


@topological_order.mistake(
    says="a node that is on the stack several times is listed each time it is taken off",
    tries="asking, when a node is taken off, whether it is in the list already.",
    caught_by="once",
)
def listed_each_time(root: Any, parents: Any) -> Any:
    order, entered, stack = [], set(), [root]
    while stack:
        node = stack[-1]
        if node in entered:
            order.append(stack.pop())
        else:
            entered.add(node)
            stack.extend(p for p in parents(node) if p not in entered)
    return order[::-1]


@topological_order.mistake(
    says="parents is asked for the same node in each of three passes over the graph",
    tries=KEPT,
    caught_by="frugal",
)
def three_passes(root: Any, parents: Any) -> Any:
    nodes = {root: 0}
    pending = [root]
    for node in pending:
        new = [p for p in dict.fromkeys(parents(node)) if p not in nodes]
        nodes.update(dict.fromkeys(new, 0))
        pending += new
    for node in nodes:
        for parent in parents(node):
            nodes[parent] += 1
    order = [root]
    for node in order:
        for parent in parents(node):
            nodes[parent] -= 1
            if nodes[parent] == 0:
                order.append(parent)
    return order


@topological_order.mistake(
    says="None is taken for the end of the parents, and it can be a node",
    tries="a for loop over the iterator, or an object of your own for the end: end = object().",
    caught_by="any_value",
)
def none_is_the_end(root: Any, parents: Any) -> Any:
    order, seen = [], {root}
    stack = [(root, iter(parents(root)))]
    while stack:
        node, rest = stack[-1]
        parent = next(rest, None)
        if parent is None:
            order.append(node)
            stack.pop()
        elif parent not in seen:
            seen.add(parent)
            stack.append((parent, iter(parents(parent))))
    return order[::-1]


@topological_order.mistake(
    says="a node that counts as false, such as 0 or '', is passed over",
    tries="`node not in seen`, with no question whether the node itself is true.",
    caught_by="any_value",
)
def truthiness(root: Any, parents: Any) -> Any:
    order, seen = [], {root}
    stack = [(root, iter(parents(root)))]
    while stack:
        node, rest = stack[-1]
        for parent in rest:
            if parent and parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(parents(parent))))
                break
        else:
            order.append(node)
            stack.pop()
    return order[::-1]


@topological_order.mistake(
    says="the root is left out",
    tries="starting the walk at root itself, not at its parents.",
    caught_by="complete",
)
def rootless(root: Any, parents: Any) -> Any:
    return depth_first(root, parents)[1:]


@topological_order.mistake(
    says="the leaves are left out",
    tries="noting every node; those that were computed from nothing receive gradients too.",
    caught_by="complete",
)
def leafless(root: Any, parents: Any) -> Any:
    return [node for node in depth_first(root, parents) if parents(node)]


@topological_order.mistake(
    says="only the first parent of each node is followed",
    tries="a loop over all of parents(node).",
    caught_by="complete",
)
def one_parent(root: Any, parents: Any) -> Any:
    order = [root]
    while above := parents(order[-1]):
        order.append(above[0])
    return order


@topological_order.mistake(
    says="a node that one consumer used twice, as in x * x, is waited for twice and counted down once",
    tries="counting and counting down over the same list: both over parents(node), or both over its set.",
    caught_by="once",
)
def miscounted(root: Any, parents: Any) -> Any:
    waiting, pending = {root: 0}, [root]
    while pending:
        for parent in parents(pending.pop()):
            if parent not in waiting:
                pending.append(parent)
            waiting[parent] = waiting.get(parent, 0) + 1
    order, ready = [], [root]
    while ready:
        order.append(ready.pop())
        for parent in dict.fromkeys(parents(order[-1])):
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
    return order


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@topological_order.alternative("depth first, with enter and leave marks on one stack")
def depth_first(root: Any, parents: Any) -> Any:
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, leaving = stack.pop()
        if leaving:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in parents(node))
    return order[::-1]


@topological_order.alternative(
    "a node leaves the stack when none of its parents is unlisted (two looks at each)"
)
def peeking(root: Any, parents: Any) -> Any:
    order: dict[Any, None] = {}
    known: dict[Any, Any] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        above = known.setdefault(node, None)
        if above is None:
            above = known[node] = parents(node)
        open_parents = [p for p in above if p not in order]
        if open_parents:
            stack.append(open_parents[0])
        else:
            order[node] = None
            stack.pop()
    return list(reversed(order))


@topological_order.alternative("Kahn's algorithm: a node is listed when its last consumer is, breadth first")
def kahn(root: Any, parents: Any) -> Any:
    waiting, pending = {root: 0}, [root]
    while pending:
        for parent in parents(pending.pop()):
            if parent not in waiting:
                waiting[parent] = 0
                pending.append(parent)
            waiting[parent] += 1
    order = [root]
    for node in order:
        for parent in parents(node):
            waiting[parent] -= 1
            if waiting[parent] == 0:
                order.append(parent)
    return order


@topological_order.alternative("the standard library's sorter")
def library(root: Any, parents: Any) -> Any:
    from graphlib import TopologicalSorter

    known, pending = {}, [root]
    while pending:
        node = pending.pop()
        if node not in known:
            known[node] = parents(node)
            pending.extend(known[node])
    return list(TopologicalSorter(known).static_order())[::-1]
