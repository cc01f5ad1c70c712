"""Control flow: basic blocks, and the order that makes diverged lanes meet again.

When lanes of a warp take different sides of a branch, the warp runs one side, then the other, and goes on
together where both lead. A GPU's compiler marks those meeting points. Here they follow from an order of the
blocks: the machine always runs the lowest block in which a lane waits, so lanes that are ahead wait for
those behind them (*thread frontiers*: Diamos et al., MICRO 2011). Lanes meet as early as the program allows
if every block stands before its successors, loops aside, and a loop's blocks stand before all that follows
the loop. `order` is such an order; the text's own is not (the compiler may place a loop's exit before it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmcourse.vgpu.isa import Kernel, Label

ENDS = ("bra", "brx", "ret", "exit", "trap", "bar", "barrier")


@dataclass(frozen=True)
class Block:
    """Instructions start..stop of the kernel's code, entered at the first and left after the last only.

    taken   the blocks that a branch at the end may lead to, one for `bra`
    next    the block that follows, None where the lanes end or always branch
    """

    start: int
    stop: int
    taken: tuple[int, ...]
    next: int | None

    @property
    def successors(self) -> tuple[int, ...]:
        return self.taken if self.next is None else (*self.taken, self.next)


def blocks_of(kernel: Kernel) -> list[Block]:
    """The kernel's basic blocks in the machine's order: block 0 is the entry.

    A barrier ends its block, so that lanes can wait between two blocks.
    """
    code = kernel.code
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, instruction in enumerate(code) if instruction.opcode in ENDS}
    cuts = sorted(s for s in starts if s < len(code))
    index = {start: n for n, start in enumerate(cuts)}
    blocks = []
    for start, stop in zip(cuts, [*cuts[1:], len(code)], strict=True):
        last = code[stop - 1]
        branches = last.opcode in ("bra", "brx")
        taken = tuple(
            index[kernel.labels[o.name]] for o in last.operands if branches and isinstance(o, Label)
        )
        leaves = last.opcode in ("bra", "brx", "ret", "exit", "trap") and last.guard is None
        blocks.append(Block(start, stop, taken, None if leaves else index[stop]))
    ranks = order([b.successors for b in blocks])
    place = {old: new for new, old in enumerate(ranks)}
    return [
        Block(b.start, b.stop, tuple(place[t] for t in b.taken), None if b.next is None else place[b.next])
        for b in (blocks[old] for old in ranks)
    ]


def order(successors: Sequence[Sequence[int]]) -> list[int]:
    """The nodes of a flow graph, entry 0 first: each before its successors, a loop before what follows it.

    Nodes that cannot be reached come last. A graph with a loop of two entries (no compiler makes one from
    structured code) still gets an order; lanes then meet later than they could.
    """
    count = len(successors)
    dominators = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in range(count)]
    loops: dict[int, set[int]] = {}
    backward = _retreating(successors)
    for a in range(count):
        for b in successors[a]:
            predecessors[b].append(a)
    for a, b in backward:
        if b in dominators[a]:
            loops.setdefault(b, {b}).update(_reaching(a, b, predecessors))
    inside = [sorted((h for h in loops if n in loops[h]), key=lambda h: -len(loops[h])) for n in range(count)]
    waiting = [0] * count
    for a in range(count):
        for b in set(successors[a]):
            waiting[b] += (a, b) not in backward
    ready = [n for n in range(count) if n == 0 or not waiting[n]]
    placed: list[int] = []
    nest: list[int] = []
    while ready:
        # Stay in the innermost loop of the last block; among equals keep the text's order.
        best = min(ready, key=lambda n: (-_common(inside[n], nest), n))
        ready.remove(best)
        placed.append(best)
        nest = inside[best]
        for b in set(successors[best]):
            if (best, b) not in backward:
                waiting[b] -= 1
                if not waiting[b]:
                    ready.append(b)
    return placed + [n for n in range(count) if n not in set(placed)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for header in a if header in b)


def _dominators(successors: Sequence[Sequence[int]]) -> list[set[int]]:
    everything = set(range(len(successors)))
    found = [{0}] + [set(everything) for _ in successors[1:]]
    predecessors: list[list[int]] = [[] for _ in successors]
    for a, nexts in enumerate(successors):
        for b in nexts:
            predecessors[b].append(a)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(successors)):
            above = [found[p] for p in predecessors[n]]
            new = {n} | (set.intersection(*above) if above else set())
            if new != found[n]:
                found[n], changed = new, True
    return found


def _retreating(successors: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    """Edges to a node that is still open in a depth-first walk from the entry."""
    edges: set[tuple[int, int]] = set()
    state = [0] * len(successors)
    for root in range(len(successors)):
        stack = [(root, iter(successors[root]))] if state[root] == 0 else []
        if stack:
            state[root] = 1
        while stack:
            node, rest = stack[-1]
            for b in rest:
                if state[b] == 1:
                    edges.add((node, b))
                elif state[b] == 0:
                    state[b] = 1
                    stack.append((b, iter(successors[b])))
                    break
            else:
                state[node] = 2
                stack.pop()
    return edges


def _reaching(node: int, header: int, predecessors: Sequence[Sequence[int]]) -> set[int]:
    """All nodes from which `node` is reached without passing `header`."""
    found, todo = {node}, [node]
    while todo:
        n = todo.pop()
        if n != header:
            new = [p for p in predecessors[n] if p not in found]
            found.update(new)
            todo += new
    return found
