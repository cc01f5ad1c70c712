"""Exercise `causal_mask`: which keys a query may see, with a cache and with padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.plain import is_tensor
from llmcourse.grading.trial import Trial
from llmcourse.labs import late_torch as torch

causal_mask = Exercise(
    "causal_mask",
    title="Who may see whom",
    arguments=("positions", "n_keys", "first"),
    shapes=(
        "positions  int64 tensor [B, S]: the slot of each new token in its own sequence's cache",
        "n_keys     T: the slots that attention looks at, 0 … T−1; those behind a token's own hold",
        "           nothing yet, or later tokens",
        "first      int64 tensor [B]: the slots before it hold padding (0: there is none)",
        "returns    bool tensor [B, 1, S, T]: True where a query may look; one axis for all heads",
    ),
    formula="mask[b, 0, s, t] = first[b] ≤ t ≤ positions[b, s]",
    difficulty=2,
    importance=5,
    minutes=15,
    points=3,
    hints=(
        "A triangle of ones is right for a whole sequence that starts at slot 0. What does the row of a "
        "single token look like, when the cache holds five before it?",
        "Compare numbers of slots, not of rows: the slots 0 … T−1 as a row, each token's own slot as a "
        "column. Broadcasting makes the table, for every sequence its own. Padding is one more comparison.",
        "slots = torch.arange(n_keys); "
        "(slots <= positions[:, None, :, None]) & (slots >= first[:, None, None, None])",
    ),
)


def expected(positions: Any, n_keys: int, first: Any) -> np.ndarray:
    """One element after the other."""
    batch, length = positions.shape
    seen = np.zeros((batch, 1, length, n_keys), dtype=bool)
    for b in range(batch):
        for s in range(length):
            seen[b, 0, s, int(first[b]) : int(positions[b, s]) + 1] = True
    return seen


def _agree(t: Trial, starts: list[int], length: int, n_keys: int, first: list[int] | None = None) -> None:
    positions = torch.tensor(starts)[:, None] + torch.arange(length)
    begins = torch.tensor(first or [0] * len(starts))
    got, want = t.call(positions, n_keys, begins), expected(positions, n_keys, begins)
    if got is None:
        raise Mismatch("the result is None, expected a tensor: is a `return` missing?")
    told = str(getattr(got, "dtype", type(got).__name__)).removeprefix("torch.")
    t.holds(
        is_tensor(got) and told == "bool",
        f"the result is of {told}, expected a tensor of bool: True where a query may look",
    )
    t.equal(list(got.shape), list(want.shape), "shape")
    if wrong := np.argwhere(got.numpy() != want).tolist():
        b, _, s, key = wrong[0]
        place = f"sequence {b}: the token in slot {int(positions[b, s])}"
        may = "may" if want[b, 0, s, key] else "must not"
        holds = f", where slots before {int(begins[b])} hold padding" if begins[b] else ""
        more = f"; {len(wrong) - 1} more of {want.size} are wrong" if len(wrong) > 1 else ""
        raise Mismatch(f"{place} {may} look at slot {key} of {n_keys}{holds}{more}")


@causal_mask.check("a whole sequence: each token sees itself and all before it")
def triangle(t: Trial) -> None:
    _agree(t, [0], 4, 4)
    n = t.odd(5, 11)
    _agree(t, [0, 0], n, n)


@causal_mask.check("new tokens behind a cache see all of it")
def cached(t: Trial) -> None:
    past = t.size(3, 9)
    _agree(t, [past], 1, past + 1)
    _agree(t, [past, past], 4, past + 4)


@causal_mask.check("a cache with room: slots that are not filled yet stay out of sight")
def room(t: Trial) -> None:
    past = t.size(3, 9)
    _agree(t, [0], 3, 3 + t.size(2, 6))
    _agree(t, [past, past], 3, past + 3 + t.size(2, 6))


@causal_mask.check("sequences of unequal length: each has slots of its own")
def ragged(t: Trial) -> None:
    start = t.size(1, 6)
    starts = [start, start + t.size(1, 2), 0, start + 3]
    _agree(t, starts, 1, start + 4)
    _agree(t, starts, 3, start + 6)


@causal_mask.check("nobody sees padding, and padding sees nothing")
def padding(t: Trial) -> None:
    first = [0, t.size(1, 2), t.size(3, 4)]
    _agree(t, [0, 0, 0], 6, 6, first)
    _agree(t, [6, 6, 6], 1, 9, first)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def mask(positions: Any, n_keys: int, first: Any) -> Any:
    slots = torch.arange(n_keys)
    return (slots <= positions[:, None, :, None]) & (slots >= first[:, None, None, None])


@causal_mask.mistake(
    says="the mask is inverted: True where a query may not look",
    tries="True for what is seen; masked_fill(~mask, −∞) comes later.",
    caught_by="triangle",
)
def inverted(positions: Any, n_keys: int, first: Any) -> Any:
    return ~mask(positions, n_keys, first)


@causal_mask.mistake(
    says="a token does not see itself",
    tries="≤ where you have <.",
    caught_by="triangle",
)
def strict(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions - 1, n_keys, first)


@causal_mask.mistake(
    says="a token sees the one after it, which it should predict",
    tries="t ≤ position, not t ≤ position + 1.",
    caught_by="triangle",
)
def one_ahead(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions + 1, n_keys, first)


@causal_mask.mistake(
    says="time runs backwards: a token sees itself and all behind it",
    tries="torch.tril where you have torch.triu, or t ≤ position.",
    caught_by="triangle",
)
def backwards(positions: Any, n_keys: int, first: Any) -> Any:
    return torch.arange(n_keys) >= positions[:, None, :, None]


@causal_mask.mistake(
    says="all tokens of a call see each other: the triangle is missing",
    tries="each token's own slot, not the last one's.",
    caught_by="triangle",
)
def no_triangle(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions[:, -1:].expand_as(positions), n_keys, first)


@causal_mask.mistake(
    says="the mask holds 0 and −∞, to be added to scores",
    tries="the comparison itself: a bool tensor.",
    caught_by="triangle",
)
def additive(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions, n_keys, first).float().log()


@causal_mask.mistake(
    says="the axis for the heads is missing: [B, S, T] would be stretched over the wrong axes",
    tries="positions[:, None, :, None].",
    caught_by="triangle",
)
def no_head_axis(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions, n_keys, first)[:, 0]


@causal_mask.mistake(
    says="the triangle begins in the top left corner: behind a cache, the first new token sees slot 0 alone",
    tries="slots, t ≤ positions[b, s], where you have torch.tril of rows and columns.",
    caught_by="cached",
)
def top_left(positions: Any, n_keys: int, first: Any) -> Any:
    rows = torch.arange(positions.shape[1]).expand_as(positions)
    return mask(rows, n_keys, first)


@causal_mask.mistake(
    says="the triangle ends in the bottom right corner: that is right only if the cache has no room left",
    tries="slots, t ≤ positions[b, s], where you have torch.tril(…, diagonal=T − S).",
    caught_by="room",
)
def bottom_right(positions: Any, n_keys: int, first: Any) -> Any:
    length = positions.shape[1]
    rows = (torch.arange(length) + n_keys - length).expand_as(positions)
    return mask(rows, n_keys, first)


@causal_mask.mistake(
    says="the slots of the first sequence are used for all",
    tries="positions with its batch axis: positions[:, None, :, None].",
    caught_by="ragged",
)
def first_for_all(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions[:1].expand_as(positions), n_keys, first)


@causal_mask.mistake(
    says="the slots of the longest sequence are used for all",
    tries="every sequence's own positions.",
    caught_by="ragged",
)
def longest_for_all(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions.amax(dim=0).expand_as(positions), n_keys, first)


@causal_mask.mistake(
    says="padding is seen",
    tries="& (slots >= first[:, None, None, None]).",
    caught_by="padding",
)
def padding_seen(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions, n_keys, first * 0)


@causal_mask.mistake(
    says="the last slot of the padding is seen",
    tries="t ≥ first: the slots before it hold padding.",
    caught_by="padding",
)
def padding_short(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions, n_keys, first - 1)


@causal_mask.mistake(
    says="slot `first` is taken for padding: it holds the first token",
    tries="t ≥ first where you have t > first.",
    caught_by="triangle",
)
def padding_long(positions: Any, n_keys: int, first: Any) -> Any:
    return mask(positions, n_keys, first + 1)


@causal_mask.mistake(
    says="the padding is taken to stand at the end of the row",
    tries="t ≥ first: these sequences end together, and their padding comes first.",
    caught_by="padding",
)
def padding_behind(positions: Any, n_keys: int, first: Any) -> Any:
    slots = torch.arange(n_keys)
    ends = n_keys - first[:, None, None, None]
    return (slots <= positions[:, None, :, None]) & (slots < ends)


@causal_mask.mistake(
    says="padding sees itself: its rows should be empty, and attention must cope with that",
    tries="first ≤ t as a condition for every row.",
    caught_by="padding",
)
def padding_sees_itself(positions: Any, n_keys: int, first: Any) -> Any:
    own = torch.arange(n_keys) == positions[:, None, :, None]
    return mask(positions, n_keys, first) | own


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@causal_mask.alternative("rows of a large triangle, fetched by slot")
def fetched(positions: Any, n_keys: int, first: Any) -> Any:
    longest = max(int(positions.max()) + 1, n_keys)
    square = torch.ones(longest, longest, dtype=torch.bool)
    seen, padded = square.tril()[positions], square.tril(-1)[first]
    return (seen & ~padded[:, None])[..., :n_keys].unsqueeze(1)


@causal_mask.alternative("one row after the other")
def row_by_row(positions: Any, n_keys: int, first: Any) -> Any:
    batch, length = positions.shape
    seen = torch.zeros(batch, 1, length, n_keys, dtype=torch.bool)
    for b in range(batch):
        for s in range(length):
            seen[b, 0, s, int(first[b]) : int(positions[b, s]) + 1] = True
    return seen


@causal_mask.alternative(
    "distances: a key is visible if it is 0 or more places back, but not before the first"
)
def by_distance(positions: Any, n_keys: int, first: Any) -> Any:
    back = positions.unsqueeze(-1) - torch.arange(n_keys)
    furthest = (positions - first[:, None]).unsqueeze(-1)
    return torch.logical_and(back >= 0, back <= furthest)[:, None]
