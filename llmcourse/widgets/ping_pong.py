"""When tensor cores and exponential units work, in an attention whose warps take turns: a simulation, drawn.

A group of warps does for each block of keys: scores (tensor cores), softmax (exponential units), values
(tensor cores), each after the other. One group alone leaves each unit idle while the other works. Two groups
on the same multiprocessor can take turns (FlashAttention-3's ping-pong, Shah et al. 2024, arXiv:2407.08608):
while one computes its softmax, the other has the tensor cores. A group that computes the scores of the *next*
block before the softmax of this one overlaps even by itself.

Both units do one thing at a time, in the order in which it becomes ready. Times are whole numbers of one
unit: what counts here is their ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = ("tensor cores", "exponentials")
COLOURS = (("#0072B2", "#8EC6EA"), ("#E69F00", "#F5D9A0"))  # of a group: products, softmax


@dataclass(frozen=True)
class Span:
    """One stretch of work.

    unit    0 tensor cores, 1 exponentials;  group: whose
    name    S (scores), P (softmax) or O (values), and the block's number
    """

    unit: int
    group: int
    name: str
    start: float
    end: float


def schedule(
    blocks: int, product: float, softmax: float, *, groups: int = 2, ahead: bool = False
) -> list[Span]:
    """The work of `groups` groups of warps, `blocks` blocks of keys each.

    product   time of one product (scores, or values) of a block;  softmax  time of its exponentials
    ahead     scores of the next block are computed before the softmax of this one
    """
    free = [0.0, 0.0]
    spans: list[Span] = []
    ended: dict[tuple[int, str], float] = {}
    waiting = [_program(blocks, ahead) for _ in range(groups)]
    after = [0.0] * groups  # a group's tensor-core work is issued in order
    while any(waiting):
        ready = []
        for g, todo in enumerate(waiting):
            for place, (unit, _, needs) in enumerate(todo):
                if any(u == unit for u, _, _ in todo[:place]) or any((g, n) not in ended for n in needs):
                    continue
                at = max([after[g] if unit == 0 else 0.0, *(ended[g, n] for n in needs)])
                ready.append((max(at, free[unit]), at, g, place))
        start, _, g, place = min(ready)
        unit, name, _ = waiting[g].pop(place)
        end = start + (softmax if unit else product)
        free[unit] = ended[g, name] = end
        if unit == 0:
            after[g] = end
        spans.append(Span(unit, g, name, start, end))
    return spans


def _program(blocks: int, ahead: bool) -> list[tuple[int, str, tuple[str, ...]]]:
    """What one group does, in its order: (unit, name, what must have ended)."""
    work: list[tuple[int, str, tuple[str, ...]]] = []
    for j in range(blocks):
        if not ahead:
            before = (f"O{j - 1}",) if j else ()
            work += [(0, f"S{j}", before), (1, f"P{j}", (f"S{j}",)), (0, f"O{j}", (f"P{j}",))]
            continue
        if j == 0:
            work.append((0, "S0", ()))
        if j + 1 < blocks:
            work.append((0, f"S{j + 1}", ()))
        work += [(1, f"P{j}", (f"S{j}",)), (0, f"O{j}", (f"P{j}",))]
    return work


def makespan(spans: Sequence[Span]) -> float:
    """When the last work ends."""
    return max(s.end for s in spans)


def utilisation(spans: Sequence[Span], unit: int = 0) -> float:
    """Share of the makespan in which a unit works (0: tensor cores)."""
    return sum(s.end - s.start for s in spans if s.unit == unit) / makespan(spans)


def draw(figure: Figure, schedules: dict[str, Sequence[Span]]) -> None:
    """Draw a timeline for each schedule, one above the other, on one axis of time."""
    longest = max(makespan(spans) for spans in schedules.values())
    axes = figure.subplots(len(schedules), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, spans) in zip(axes, schedules.items(), strict=True):
        _lanes(ax, spans)
        ax.set_xlim(0, longest)
        ax.set_title(f"{name}: tensor cores busy {utilisation(spans):.0%}", fontsize=9, loc="left")
        ax.set_xticks([])  # only the ratio of times means something
    axes[-1].set_xlabel("time →   S scores, P softmax, O values; a colour is a group of warps", fontsize=9)


def _lanes(ax: Axes, spans: Sequence[Span]) -> None:
    for s in spans:
        colour = COLOURS[s.group][s.unit]
        ax.barh(s.unit, s.end - s.start, left=s.start, height=0.8, color=colour, edgecolor="white")
        ink = "white" if (s.group, s.unit) == (0, 0) else "black"
        middle = (s.start + s.end) / 2
        ax.text(middle, s.unit, s.name, ha="center", va="center", fontsize=7, color=ink, clip_on=True)
    ax.set_yticks((0, 1), UNITS, fontsize=8)
    ax.set_ylim(1.5, -0.5)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
