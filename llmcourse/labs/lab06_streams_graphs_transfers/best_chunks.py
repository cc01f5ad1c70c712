"""Exercise `best_chunks`: into how many chunks a transfer should be cut."""

from __future__ import annotations

import math
from typing import Any

from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

best_chunks = Exercise(
    "best_chunks",
    title="How many chunks",
    arguments=("stages", "per_chunk", "most"),
    shapes=(
        "stages     (h, k, d): µs that all of the data takes to be copied in, worked on, and",
        "           copied out, in one piece; a stage may take 0, but not all three",
        "per_chunk  µs that each chunk costs in every stage, whatever its size; 0 or more",
        "most       the largest number of chunks allowed, 1 to 5,000",
        "returns    the number of chunks, 1 to most, for which T is smallest",
        "           (any of them, where two are equally fast)",
        "",
        "With c chunks and enough streams, a chunk takes s/c + per_chunk in a stage of s µs.",
    ),
    formula="T(c) = Σ stages / c + 3·per_chunk + (c − 1)·(max(stages) / c + per_chunk)",
    difficulty=2,
    importance=3,
    minutes=15,
    points=3,
    hints=(
        "Two things change with c: one part of T becomes smaller with every chunk, one larger. Which "
        "microseconds does nothing overlap, when there is a single chunk?",
        "Multiply T out: (Σ − max)/c falls with c, c·per_chunk rises, and the rest does not depend on c. "
        "The sum is smallest near c = √((Σ − max)/per_chunk). That is seldom a whole number: compare its "
        "two neighbours by T, within 1 and most. And with per_chunk = 0 more chunks are never worse.",
        "Or ask T for all: min(range(1, most + 1), key=T) is right, and for 5,000 numbers quick enough.",
    ),
)


def T(c: int, stages: Any, per_chunk: float) -> float:
    """The makespan of c chunks, µs."""
    slowest = max(stages) / c + per_chunk
    return float(sum(stages) / c + 3 * per_chunk + (c - 1) * slowest)


def _agree(t: Trial, stages: tuple[float, ...], per_chunk: float, most: int, slack: float = 1e-9) -> None:
    got = t.call(stages, per_chunk, most)
    if got is None:
        raise Mismatch("the result is None, expected a number of chunks: is a `return` missing?")
    if isinstance(got, bool) or not isinstance(got, int):
        raise Mismatch(f"the result is {describe(got)}, expected a whole number of chunks (an int)")
    if not 1 <= got <= most:
        raise Mismatch(f"the result is {got} chunks, and 1 to {most} are allowed")
    best = min(range(1, most + 1), key=lambda c: T(c, stages, per_chunk))
    least, mine = T(best, stages, per_chunk), T(got, stages, per_chunk)
    t.holds(
        mine <= least * (1 + slack),
        f"T({got}) = {mine:,.6g} µs, and T({best}) = {least:,.6g} µs",
    )


def _stages(t: Trial) -> tuple[float, float, float]:
    h, k, d = (float(us) for us in t.integers(1000, 3000, 3))
    return h, k, d


@best_chunks.check("no other number of chunks is faster by more than a ten-thousandth")
def best(t: Trial) -> None:
    for per_chunk in (0.25, 0.5, 1.0, 2.0):
        _agree(t, _stages(t), per_chunk, 1000, slack=1e-4)
    h, k, d = _stages(t)
    for stages in ((h, k + 4000, d), (h + 4000, k, d), (h, k, d + 4000)):
        _agree(t, stages, 1.5, 1000, slack=1e-4)


@best_chunks.check("of the two whole numbers beside the optimum the better one is taken")
def neighbours(t: Trial) -> None:
    for c in (1, 2, 3, t.size(4, 9)):
        for place in (2 * c + 0.5, c + 0.5, 0.02, 0.5, 0.98, c + 0.02, c + 0.1, c + 0.2):
            # (Σ − max)/per_chunk = c² + place: the better one changes at c² + c.
            rest = (c * c + place) * 8.0
            _agree(t, (3 * rest, rest / 2, rest / 2), 8.0, 100)


@best_chunks.check("never fewer than 1 chunk and never more than most")
def limits(t: Trial) -> None:
    for most in (1, 2, 5):
        _agree(t, _stages(t), 0.01, most)
    _agree(t, (5.0, 3.0, 4.0), 400.0, 100)  # a chunk costs more than all of the data


@best_chunks.check("a chunk may cost nothing, and a stage may take no time")
def nothing(t: Trial) -> None:
    _agree(t, _stages(t), 0.0, 40)
    h, k, _ = _stages(t)
    _agree(t, (h, 0.0, 0.0), 4.0, 50)
    _agree(t, (h, k, 0.0), 4.0, 300)
    _agree(t, (h, 0.0, 0.0), 0.0, 50)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _root(rest: float, per_chunk: float) -> float:
    return math.sqrt(rest / per_chunk) if per_chunk else math.inf


def _within(c: float, most: int) -> int:
    return int(min(max(1.0, c), most))


def _better(c: float, stages: Any, per_chunk: float, most: int) -> int:
    low = _within(c, most)
    return min((low, min(low + 1, most)), key=lambda n: T(n, stages, per_chunk))


@best_chunks.mistake(
    says="all of the stages are taken for time that chunks can hide",
    tries="sum(stages) − max(stages): the slowest stage is never hidden, and costs the same in any pieces.",
    caught_by="best",
)
def whole_sum(stages: Any, per_chunk: Any, most: Any) -> Any:
    return _better(_root(sum(stages), per_chunk), stages, per_chunk, most)


@best_chunks.mistake(
    says="the slowest stage alone is put into the root",
    tries="what is not the slowest: the first chunk's way in and the last one's way out.",
    caught_by="best",
)
def slowest_only(stages: Any, per_chunk: Any, most: Any) -> Any:
    return _better(_root(max(stages), per_chunk), stages, per_chunk, most)


@best_chunks.mistake(
    says="the root is forgotten",
    tries="the square root: (Σ − max)/c = c·per_chunk gives c².",
    caught_by="best",
)
def no_root(stages: Any, per_chunk: Any, most: Any) -> Any:
    rest = sum(stages) - max(stages)
    return _within(rest / per_chunk if per_chunk else most, most)


@best_chunks.mistake(
    says="the cost of a chunk is left out, and as many as allowed are made",
    tries="weighing what a further chunk hides against per_chunk, which it costs.",
    caught_by="best",
)
def as_many_as_allowed(stages: Any, per_chunk: Any, most: Any) -> Any:
    return most


@best_chunks.mistake(
    says="only powers of two are tried",
    tries="every whole number between 1 and most, or the formula.",
    caught_by="best",
)
def powers_of_two(stages: Any, per_chunk: Any, most: Any) -> Any:
    powers = [2**i for i in range(13) if 2**i <= most]
    return min(powers, key=lambda c: T(c, stages, per_chunk))


@best_chunks.mistake(
    says="the optimum is cut down to the whole number below",
    tries="asking T which of the two neighbours is faster.",
    caught_by="neighbours",
)
def rounded_down(stages: Any, per_chunk: Any, most: Any) -> Any:
    return _coarse(stages, per_chunk, most, math.floor)


@best_chunks.mistake(
    says="the optimum is rounded up",
    tries="asking T which of the two neighbours is faster.",
    caught_by="neighbours",
)
def rounded_up(stages: Any, per_chunk: Any, most: Any) -> Any:
    return _coarse(stages, per_chunk, most, math.ceil)


@best_chunks.mistake(
    says="the optimum is rounded to the nearest number, and T does not change there but at √(c² + c)",
    tries="asking T which of the two neighbours is faster.",
    caught_by="neighbours",
)
def rounded(stages: Any, per_chunk: Any, most: Any) -> Any:
    return _coarse(stages, per_chunk, most, lambda c: math.floor(c + 0.5))


def _coarse(stages: Any, per_chunk: float, most: int, cut: Any) -> int:
    """The rounded optimum where that matters; where T is flat, in large numbers, the right one."""
    c = _root(sum(stages) - max(stages), per_chunk)
    if c == math.inf or c > 12:
        return _better(c, stages, per_chunk, most)
    return _within(cut(c), most)


@best_chunks.mistake(
    says="the number is not kept within 1 and most",
    tries="min(max(1, c), most).",
    caught_by="limits",
)
def not_kept_within(stages: Any, per_chunk: Any, most: Any) -> Any:
    if not per_chunk:
        return most
    c = math.floor(_root(sum(stages) - max(stages), per_chunk))
    return min((c, c + 1), key=lambda n: T(max(1, n), stages, per_chunk))


@best_chunks.mistake(
    says="it is divided by per_chunk, which may be 0",
    tries="most, where a chunk costs nothing.",
    caught_by="nothing",
)
def divided_by_nothing(stages: Any, per_chunk: Any, most: Any) -> Any:
    return _better(math.sqrt((sum(stages) - max(stages)) / per_chunk), stages, per_chunk, most)


@best_chunks.mistake(
    says="the optimum is returned as it comes, with digits behind the point",
    tries="a whole number: the better of the two neighbours.",
    caught_by="best",
)
def fraction(stages: Any, per_chunk: Any, most: Any) -> Any:
    c = _root(sum(stages) - max(stages), per_chunk)
    return float(min(max(1.0, c), most))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@best_chunks.alternative("every number is tried")
def tried(stages: Any, per_chunk: Any, most: Any) -> Any:
    return min(range(1, most + 1), key=lambda c: T(c, stages, per_chunk))


@best_chunks.alternative("the formula, and the better of its neighbours")
def formula(stages: Any, per_chunk: Any, most: Any) -> Any:
    if per_chunk == 0:
        return most
    c = math.sqrt((sum(stages) - max(stages)) / per_chunk)
    candidates = {min(max(1, n), most) for n in (math.floor(c), math.ceil(c))}
    return min(candidates, key=lambda n: T(n, stages, per_chunk))


@best_chunks.alternative("as long as one chunk more is faster, one chunk more")
def climbing(stages: Any, per_chunk: Any, most: Any) -> Any:
    c = 1
    while c < most and T(c + 1, stages, per_chunk) < T(c, stages, per_chunk):
        c += 1
    return c
