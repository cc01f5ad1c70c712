"""Small computational graphs for the checks: which node was computed from which.

A node is any hashable value, mostly a word; `parents[node]` lists what it was computed from, twice for
x·x. The graphs made here have their nodes in a right order, every consumer first; of a graph given by
its edges only the first node is known, the root.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.trial import Oracle, RaisedError, Trial

Node = Hashable
Edges = list[list[list[int]]]  # of several graphs: what each node consumes, by place


@dataclass(frozen=True)
class Graph:
    """The parents of every node; the first node is the root, and has been computed from all others."""

    parents: dict[Node, list[Node]]
    says: str

    @property
    def nodes(self) -> list[Node]:
        return list(self.parents)

    @property
    def root(self) -> Node:
        return self.nodes[0]

    def ask(self, node: Any) -> list[Node]:
        """What `node` was computed from, in a list of the caller's own."""
        if node not in self.parents:
            raise ValueError(f"parents({node!r}): the graph has no such node")
        return [_anew(parent) for parent in self.parents[node]]

    def consumer(self, node: Node) -> Node:
        """A node that was computed from `node`. StopIteration for the root, from which none was."""
        return next(n for n, parents in self.parents.items() if node in parents)


def _anew(node: Node) -> Node:
    """`node`, and where it is a tuple another one: equal nodes are one node, whichever object they are."""
    return tuple([*node]) if isinstance(node, tuple) else node


def graph(names: Sequence[Node], edges: Sequence[Sequence[int]], says: str = "") -> Graph:
    """The graph whose node i is called names[i] and was computed from the nodes edges[i]."""
    parents = {names[i]: [names[j] for j in consumed] for i, consumed in enumerate(edges)}
    return Graph(parents, says or str(parents))


def letters(t: Trial, count: int) -> list[Node]:
    """Names of nodes in random order, so that sorting them gives nothing away."""
    return [ascii_lowercase[i] for i in t.rng.permutation(26)[:count]]


def words(t: Trial, count: int) -> list[Node]:
    return [f"n{i}" for i in t.rng.permutation(count)]


def dag(t: Trial, count: int, twice: float = 0.15) -> Graph:
    """A random graph: each node but the root has one to three consumers, or one consumer twice."""
    edges: list[list[int]] = [[] for _ in range(count)]
    for j in range(1, count):
        for i in t.rng.choice(j, size=min(j, int(t.rng.integers(1, 4))), replace=False):
            edges[i] += [j, j] if t.rng.random() < twice else [j]
    shuffled = [[consumed[k] for k in t.rng.permutation(len(consumed))] for consumed in edges]
    if count <= 26:
        return graph(letters(t, count), shuffled)
    return graph(words(t, count), shuffled, f"a random graph of {count} nodes")


def chain(t: Trial, count: int) -> Graph:
    """Each node was computed from the next one."""
    edges = [[i + 1] for i in range(count - 1)] + [[]]
    return graph(words(t, count), edges, f"a chain of {count:,} nodes")


def ladder(t: Trial, rungs: int) -> Graph:
    """Diamonds, one below the other: 2**rungs routes lead from the root to the last node."""
    edges: list[list[int]] = []
    for i in range(rungs):
        edges += [[3 * i + 1, 3 * i + 2], [3 * i + 3], [3 * i + 3]]
    return graph(words(t, 3 * rungs + 1), [*edges, []], f"{rungs} diamonds, one below the other")


def residual(t: Trial, layers: int) -> Graph:
    """x + f(x), again and again: each sum consumes the layer's result and, past it, the layer's input."""
    edges: list[list[int]] = []
    for i in range(layers):
        edges += [[2 * i + 1, 2 * i + 2], [2 * i + 2]]
    return graph(words(t, 2 * layers + 1), [*edges, []], f"{layers} residual layers, one after the other")


def uncounted(fn: Callable[..., Any], says: str, limit: int | None = None) -> Oracle:
    """A function for the learner's function to call, with a limit, whose calls are no part of the result.

    Where several numbers of calls are right, a mistake is the same mistake with each of them.
    """
    return Oracle(fn, says, limit)


def within(t: Trial, oracle: Oracle, limit: int, what: str, tries: str, *args: Any) -> Any:
    """The function's value for `args`. Mismatch if it asks `oracle` more than `limit` times."""
    oracle.limit = limit
    try:
        return t.call(*args)
    except RaisedError:
        if oracle.calls <= limit:
            raise
    finally:
        if oracle.calls > limit:
            raise Mismatch(f"{what}: {limit:,} calls are enough, and there were more", tries=tries) from None


def exact(numbers: Any) -> Any:
    """Whole numbers as floats: sums and products of them are exact in any order."""
    return float(numbers) if np.ndim(numbers) == 0 else np.asarray(numbers, np.float64)
