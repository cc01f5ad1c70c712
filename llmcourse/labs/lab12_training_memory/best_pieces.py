"""Exercise `best_pieces`: where to cut a stack of unequal blocks so that least is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

best_pieces = Exercise(
    "best_pieces",
    title="Where to cut",
    arguments=("border", "inside"),
    shapes=(
        "border   int: bytes of any block's input (the residual stream is equally wide everywhere)",
        "inside   list of n ints: bytes that the backward pass of each block needs besides",
        "returns  list of ints: the first block of each checkpointed piece, from 0, ascending: [0, 4, 7] are",
        "         blocks 0–3, 4–6 and 7 to the end",
        "graded   on the bytes kept: no choice of pieces keeps fewer",
    ),
    formula="kept = border · pieces + largest sum of `inside` over the blocks of one piece",
    difficulty=4,
    importance=3,
    minutes=35,
    points=5,
    hints=(
        "Only the largest piece counts, besides the number of pieces. If you knew how large the largest "
        "may be, "
        "how would you make as few pieces as possible?",
        "With a limit given, fill each piece from the left until the next block would not fit: no way "
        "has fewer "
        "pieces. The right limit is the sum of some run of neighbouring blocks, of which there are n·(n "
        "+ 1) / 2: "
        "try them all, those at least as large as the largest block.",
        "limits = {sum(inside[i:j]) for i in range(n) for j in range(i + 1, n + 1)}; for limit in limits "
        "if limit "
        ">= max(inside): starts, held = [0], 0; for i, size in enumerate(inside): if held + size > limit: "
        "starts.append(i), held = 0; held += size. Keep the starts with the least border * len(starts) + the "
        "largest piece's sum.",
    ),
)


def kept(border: int, inside: Sequence[int], starts: Sequence[int]) -> int:
    ends = [*starts[1:], len(inside)]
    return border * len(starts) + max(sum(inside[i:j]) for i, j in zip(starts, ends, strict=True))


def least(border: int, inside: Sequence[int]) -> int:
    """By all limits; `tests` holds it equal to trying all ways to cut."""
    sums = {sum(inside[i:j]) for i in range(len(inside)) for j in range(i + 1, len(inside) + 1)}
    return min(kept(border, inside, _filled(inside, s)) for s in sums if s >= max(inside))


def by_all_cuts(border: int, inside: Sequence[int]) -> int:
    n = len(inside)
    cuts = (c for k in range(n) for c in combinations(range(1, n), k))
    return min(kept(border, inside, [0, *c]) for c in cuts)


def _filled(inside: Sequence[int], limit: float) -> list[int]:
    starts, held = [0], 0
    for i, size in enumerate(inside):
        if held + size > limit and i:
            starts.append(i)
            held = 0
        held += size
    return starts


def _judge(t: Trial, border: int, inside: list[int]) -> None:
    got = t.call(border, inside)
    fine = isinstance(got, list | tuple) and all(type(i) is int for i in got) and len(got) > 0
    t.holds(fine, f"the result is no list of whole numbers, but {str(got)[:60]}", "a list such as [0, 4, 7].")
    t.holds(got[0] == 0, f"the first piece begins at block {got[0]}, not 0: {list(got)[:8]}")
    ordered = all(a < b for a, b in pairwise(got)) and got[-1] < len(inside)
    t.holds(ordered, f"{list(got)[:8]} are not ascending blocks of {len(inside)}")
    t.at_most(
        kept(border, inside, got), least(border, inside), f"bytes kept with pieces from {list(got)[:12]}"
    )
    t.unchanged()


@best_pieces.check("one block is one piece")
def one(t: Trial) -> None:
    _judge(t, t.size(1, 9), [t.size(5, 50)])


@best_pieces.check("equal blocks whose inside is as large as their border: pieces of about √n")
def square_root(t: Trial) -> None:
    for n in (9, 16, t.size(20, 30)):
        size = t.size(5, 9)
        _judge(t, size, [size] * n)


@best_pieces.check("equal blocks whose inside is much larger, as a transformer's, or much smaller")
def other_ratios(t: Trial) -> None:
    n = t.size(8, 16)
    _judge(t, 10, [200 + t.size(0, 9)] * n)
    _judge(t, 1000, [t.size(2, 9)] * n)
    _judge(t, 10, [40] * 30)


@best_pieces.check("blocks of unequal size")
def unequal(t: Trial) -> None:
    for _ in range(6):
        n = t.size(5, 12)
        _judge(t, t.size(5, 40), [int(s) for s in t.integers(1, 60, n)])
    # Attention, and mixers with states, as in a hybrid.
    _judge(t, 30, [25, 25, 25, 90] * 4)


@best_pieces.check("many blocks")
def many(t: Trial) -> None:
    _judge(t, 64, [int(s) for s in t.integers(20, 200, 48)])


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _by_length(n: int, length: int) -> list[int]:
    return list(range(0, n, max(1, length)))


def _best_of(border: int, inside: Sequence[int], ways: Any) -> list[int]:
    found: list[list[int]] = list(ways)
    return min(found, key=lambda starts: kept(border, inside, starts))


@best_pieces.mistake(
    says="pieces of √n blocks, whatever they hold: right only where inside and border are equal",
    tries="counting what is kept: border · pieces + the largest piece.",
    caught_by="other_ratios",
)
def always_root(border: int, inside: list[int]) -> list[int]:
    n = len(inside)
    return _best_of(1, [1] * n, (_by_length(n, k) for k in range(1, n + 1)))


@best_pieces.mistake(
    says="every block is a piece: the borders alone are many",
    tries="longer pieces where the inside is small against the border.",
    caught_by="square_root",
)
def each_alone(border: int, inside: list[int]) -> list[int]:
    return list(range(len(inside)))


@best_pieces.mistake(
    says="all blocks are one piece: everything is alive at once when it runs again",
    tries="several pieces, of which one is alive at a time.",
    caught_by="square_root",
)
def one_piece(border: int, inside: list[int]) -> list[int]:
    return [0]


@best_pieces.mistake(
    says="pieces hold equally many blocks, the best such number: unequal blocks want unequal pieces",
    tries="pieces of about equal sums of `inside`.",
    caught_by="unequal",
)
def equal_lengths(border: int, inside: list[int]) -> list[int]:
    n = len(inside)
    return _best_of(border, inside, (_by_length(n, k) for k in range(1, n + 1)))


@best_pieces.mistake(
    says="one limit is computed, √(border · total), and pieces are filled up to it: near, and not the least",
    tries="trying the sums of all runs of neighbouring blocks as the limit.",
    caught_by="unequal",
)
def one_limit(border: int, inside: list[int]) -> list[int]:
    return _filled(inside, 1.15 * math.sqrt(border * sum(inside)))


@best_pieces.mistake(
    says="a piece is closed only after it has passed the limit, so the largest is larger than planned",
    tries="closing it *before* the block that would not fit.",
    caught_by="unequal",
)
def one_too_many(border: int, inside: list[int]) -> list[int]:
    def filled(limit: int) -> list[int]:
        starts, held = [0], 0
        for i, size in enumerate(inside[:-1]):
            held += size
            if held > limit:
                starts.append(i + 1)
                held = 0
        return starts

    sums = {sum(inside[:j]) for j in range(len(inside) + 1)}
    return _best_of(border, inside, (filled(s) for s in sums))


@best_pieces.mistake(
    says="the lengths of the pieces come back, not the blocks at which they begin",
    tries="the running sum of the lengths, from 0.",
    caught_by="one",
)
def lengths(border: int, inside: list[int]) -> list[int]:
    starts = _exact(border, inside)
    return [b - a for a, b in zip(starts, [*starts[1:], len(inside)], strict=True)]


@best_pieces.mistake(
    says="the first piece is not named: block 0 begins one too",
    tries="starts = [0] to begin with.",
    caught_by="one",
)
def without_zero(border: int, inside: list[int]) -> list[int]:
    return _exact(border, inside)[1:]


def _exact(border: int, inside: list[int]) -> list[int]:
    sums = {sum(inside[i:j]) for i in range(len(inside)) for j in range(i + 1, len(inside) + 1)}
    return _best_of(border, inside, (_filled(inside, s) for s in sums if s >= max(inside)))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@best_pieces.alternative("every sum of neighbours as a limit")
def all_limits(border: int, inside: list[int]) -> list[int]:
    return _exact(border, inside)


@best_pieces.alternative("for each number of pieces the smallest limit that allows it, by bisection")
def bisected(border: int, inside: list[int]) -> list[int]:
    ways = []
    for pieces in range(1, len(inside) + 1):
        low, high = max(inside), sum(inside)
        while low < high:
            limit = (low + high) // 2
            low, high = (low, limit) if len(_filled(inside, limit)) <= pieces else (limit + 1, high)
        ways.append(_filled(inside, low))
    return _best_of(border, inside, ways)


@best_pieces.alternative("dynamic programming over the number of pieces")
def programmed(border: int, inside: list[int]) -> list[int]:
    n = len(inside)
    before = [0]
    for size in inside:
        before.append(before[-1] + size)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0, [])}
    for pieces in range(1, n + 1):
        for end in range(pieces, n + 1):
            found = (
                (max(best[pieces - 1, i][0], before[end] - before[i]), i)
                for i in range(pieces - 1, end)
                if (pieces - 1, i) in best
            )
            worst, i = min(found)
            best[pieces, end] = worst, [*best[pieces - 1, i][1], i]
    totals: Callable[[int], float] = lambda pieces: border * pieces + best[pieces, n][0]  # noqa: E731
    return best[min(range(1, n + 1), key=totals), n][1]
