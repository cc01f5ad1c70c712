"""The graph as a picture: layered from left to right, with shapes and the bytes each node keeps.

A column holds what can be computed at the same step; leaves stand in the column before the
operation that first uses them. Draw before `backward()`, which lets the saved bytes go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcourse.autograd.function import Function, Leaf, Node
from llmcourse.autograd.reverse import topological_order
from llmcourse.autograd.tensor import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from networkx import DiGraph

# Okabe & Ito's colours, lightened to carry black text; told apart by colour-blind readers.
COLORS = {"input": "#FFFFFF", "parameter": "#FCE4B8", "keeps nothing": "#EDEDED", "keeps bytes": "#B9DDF3"}
BORDERS = {"input": "#666666", "parameter": "#E69F00", "keeps nothing": "#999999", "keeps bytes": "#0072B2"}
COLUMN, ROW, WIDTH, HEIGHT = 1.5, 1.0, 1.22, 0.7  # inches


def kind(node: Node) -> str:
    """input, parameter, or an operation that keeps bytes or keeps nothing."""
    if isinstance(node, Function):
        return "keeps bytes" if node.nbytes else "keeps nothing"
    return "parameter" if node.requires_grad else "input"


def to_networkx(tensor: Tensor) -> DiGraph:
    """The graph behind `tensor` as a networkx DiGraph; nodes carry name, shape, nbytes, kind and column."""
    import networkx as nx

    graph = nx.DiGraph()
    order = topological_order(tensor.node)[::-1]  # producers first
    column: dict[Node, int] = {}
    for node in order:
        if isinstance(node, Function):
            column[node] = 1 + max((column[p] for p in node.parents if p in column), default=0)
    for node in order:
        for parent in node.parents:
            if isinstance(parent, Leaf):
                column[parent] = min(column.get(parent, column[node] - 1), column[node] - 1)
    for node in order:
        about = {"name": node.name, "shape": node.shape, "nbytes": node.nbytes, "kind": kind(node)}
        graph.add_node(node, **about, column=column.get(node, 0))
        graph.add_edges_from((parent, node) for parent in node.parents)
    return graph


def positions(graph: DiGraph) -> dict[Node, tuple[float, float]]:
    """Column by column: operations at the height of what they come from, leaves below them."""
    columns: dict[int, list[Node]] = {}
    for node, data in graph.nodes(data=True):
        columns.setdefault(data["column"], []).append(node)
    place: dict[Node, tuple[float, float]] = {}

    def wish(node: Node) -> float:
        parents = [p for p in graph.predecessors(node) if p in place and isinstance(p, Function)]
        return max((place[p][1] for p in parents), default=0.0)

    for c in sorted(columns):
        operations = sorted((n for n in columns[c] if isinstance(n, Function)), key=wish, reverse=True)
        free = float("inf")
        for node in operations + [n for n in columns[c] if isinstance(n, Leaf)]:
            top = wish(node) if isinstance(node, Function) or (c == 0 and free == float("inf")) else -ROW
            y = min(top, free)
            place[node] = (c * COLUMN, y)
            free = y - ROW
    return place


def draw_graph(tensor: Tensor, title: str = "", ax: Axes | None = None) -> Figure:
    """Draw what `tensor` was computed from: on `ax`, or on a new figure that is sized to the graph."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

    graph = to_networkx(tensor)
    place = positions(graph)
    xs, ys = zip(*place.values(), strict=True)
    left, right = min(xs) - WIDTH / 2 - 0.1, max(xs) + WIDTH / 2 + 0.1
    bottom, top = min(ys) - HEIGHT / 2 - 0.15, max(ys) + HEIGHT / 2 + 0.15
    bend = 0.0
    for a, b in graph.edges:
        span = graph.nodes[b]["column"] - graph.nodes[a]["column"]
        bend = max(bend, 0.13 * span * COLUMN if span > 1 and place[a][1] == place[b][1] else 0.0)
    top += bend
    if ax is None:
        _, ax = plt.subplots(figsize=(max(right - left, 4), top - bottom + 0.55), layout="constrained")

    for a, b in graph.edges:
        (x0, y0), (x1, y1) = place[a], place[b]
        start, end, rad = (x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1), 0.0
        if graph.nodes[b]["column"] - graph.nodes[a]["column"] > 1:  # go round what stands between
            if y0 == y1:
                start, end, rad = (x0, y0 + HEIGHT / 2), (x1, y1 + HEIGHT / 2), -0.25
            else:
                end = (x1, y1 - HEIGHT / 2 if y0 < y1 else y1 + HEIGHT / 2)
        arrow = FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={rad}",
            arrowstyle="-|>",
            mutation_scale=10,
            color="#555555",
            linewidth=1.0,
            shrinkA=0,
            shrinkB=1,
        )
        ax.add_patch(arrow)
    for node, data in graph.nodes(data=True):
        x, y = place[node]
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=COLORS[data["kind"]],
            edgecolor=BORDERS[data["kind"]],
            linewidth=1.4,
        )
        ax.add_patch(box)
        size = " × ".join(map(str, data["shape"])) or "one number"
        name = data["name"] or "constant"
        fontsize = 10 if len(name) < 12 else 8.5
        ax.text(x, y + 0.19, name, ha="center", va="center", fontsize=fontsize, weight="bold")
        ax.text(x, y - 0.02, size, ha="center", va="center", fontsize=8.5)
        if data["nbytes"]:
            ax.text(x, y - 0.21, f"keeps {data['nbytes']:,} B", ha="center", va="center", fontsize=8.5)
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.axis("off")
    present = {data["kind"] for _, data in graph.nodes(data=True)}
    handles = [Patch(facecolor=COLORS[k], edgecolor=BORDERS[k], label=k) for k in COLORS if k in present]
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False, fontsize=9
    )
    if title:
        ax.set_title(title, fontsize=11)
    return ax.figure  # type: ignore[return-value]
