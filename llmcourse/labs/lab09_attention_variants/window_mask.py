"""Exercise `window_mask`: who may look at whom, from positions alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs import late_torch as torch

window_mask = Exercise(
    "window_mask",
    title="A sliding window and attention sinks",
    arguments=("queries", "keys", "window", "sinks"),
    shapes=(
        "queries  integer tensor [S]: the positions of the tokens that look",
        "keys     integer tensor [C]: the position of the token in each slot of the cache, in any order;",
        "         −1: the slot is empty",
        "window   tokens that a query sees, its own included;  sinks  the first tokens, always seen",
        "returns  boolean tensor [S, C]: True where the query may look at the slot",
    ),
    formula="seen[i, j] = 0 ≤ keys[j] ≤ queries[i] and (queries[i] − keys[j] < window or keys[j] < sinks)",
    difficulty=2,
    importance=4,
    minutes=15,
    points=3,
    hints=(
        "With window = 1, which keys does a query see? With window = 2? And what must hold for a sink as "
        "well as for any other key?",
        "One subtraction gives all distances: queries[:, None] − keys[None, :], 0 for a token itself, "
        "negative for what lies ahead. Filled and not ahead holds for all; then near enough, or a sink. "
        "A slot tells its token by its position, not by its place in the cache.",
        "apart = queries[:, None] - keys; (keys >= 0) & (apart >= 0) & ((apart < window) | (keys < sinks)).",
    ),
)


def expected(queries: np.ndarray, keys: np.ndarray, window: int, sinks: int) -> np.ndarray:
    seen = np.zeros((len(queries), len(keys)), bool)
    for i, p in enumerate(queries.tolist()):
        near = set(range(max(0, p - window + 1), p + 1)) | set(range(min(sinks, p + 1)))
        seen[i] = [j in near for j in keys.tolist()]
    return seen


def _agree(t: Trial, queries: Any, keys: Any, window: int, sinks: int = 0) -> None:
    queries, keys = np.asarray(queries), np.asarray(keys)
    got = t.call(torch.from_numpy(queries), torch.from_numpy(keys), window, sinks)
    dtype = str(getattr(got, "dtype", type(got).__name__)).removeprefix("torch.")
    t.equal(dtype, "bool", "number format")
    want = expected(queries, keys, window, sinks)
    have = got.numpy()
    if have.shape != want.shape:
        raise Mismatch(f"the result has shape {have.shape}, expected {want.shape}")
    if (have != want).any():
        i, j = (int(n) for n in np.argwhere(have != want)[0])
        what = f"the key of position {keys[j]}" if keys[j] >= 0 else "an empty slot"
        word = "sees" if have[i, j] else "does not see"
        raise Mismatch(f"with window {window} and {sinks} sinks, the query at {queries[i]} {word} {what}")


@window_mask.check("a query sees `window` tokens: its own and those before it")
def whole(t: Trial) -> None:
    n = t.odd(7, 13)
    for window in (1, 2, t.size(3, 5)):
        _agree(t, np.arange(n), np.arange(n), window)


@window_mask.check("a window as long as the sequence is causal attention")
def wide(t: Trial) -> None:
    n = t.odd(5, 9)
    for window in (n, n + 1, 1000):
        _agree(t, np.arange(n), np.arange(n), window)


@window_mask.check("queries that come later have a window of their own")
def continued(t: Trial) -> None:
    start = t.size(8, 20)
    _agree(t, np.arange(start, start + t.size(3, 5)), np.arange(start + 5), 4)
    _agree(t, [start], np.arange(start + 1), 3)


@window_mask.check("sinks are seen from anywhere behind them, and count once where the window holds them")
def sinks(t: Trial) -> None:
    n = t.odd(9, 13)
    for count in (1, 2, 4):
        _agree(t, np.arange(n), np.arange(n), t.size(2, 4), count)
    _agree(t, [0, 1, 2], np.arange(4), 2, 3)


@window_mask.check("slots lie in any order, and the empty ones are not seen")
def slots(t: Trial) -> None:
    for count in (0, 2):
        start = t.size(12, 20)
        held = t.rng.permutation(np.concatenate([np.arange(3), np.arange(start - 4, start + 2), [-1, -1]]))
        _agree(t, np.arange(start, start + 2), held, 4, count)
        _agree(t, [0], [0, -1, -1, -1], 2, count)


@window_mask.check("positions are left as they were")
def unchanged(t: Trial) -> None:
    t.call(torch.arange(5), torch.arange(5), 2, 1)
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _mask(queries: Any, keys: Any, window: int, sinks: int, **wrong: Any) -> Any:
    """The right solution; a keyword replaces one of its four conditions."""
    apart = queries[:, None] - keys
    filled = wrong.get("filled", keys >= 0)
    behind = wrong.get("behind", apart >= 0)
    near = wrong.get("near", apart < window)
    sink = wrong.get("sink", keys < sinks)
    return filled & behind & (near | sink)


@window_mask.mistake(
    says="the window holds one token too many: `window` tokens before the query's own",
    tries="queries − keys < window: the query's own token counts.",
    caught_by="whole",
)
def one_too_many(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window + 1, sinks)


@window_mask.mistake(
    says="the query's own token is left out",
    tries="keys ≤ queries.",
    caught_by="whole",
)
def not_itself(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks, behind=queries[:, None] > keys)


@window_mask.mistake(
    says="the window has no causality: whatever lies ahead is near, too",
    tries="… & (keys ≤ queries).",
    caught_by="whole",
)
def not_causal(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks, behind=torch.tensor(True))


@window_mask.mistake(
    says="the window reaches to both sides, as in an encoder",
    tries="queries − keys without its absolute value.",
    caught_by="whole",
)
def both_sides(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    apart = queries[:, None] - keys
    return (keys >= 0) & ((apart.abs() < window) | ((apart >= 0) & (keys < sinks)))


@window_mask.mistake(
    says="there is no window: all tokens before the query are seen",
    tries="… & (queries − keys < window).",
    caught_by="whole",
)
def causal_only(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks, near=torch.tensor(True))


@window_mask.mistake(
    says="one window, that of the last query, serves them all",
    tries="queries[:, None] − keys: a distance for each query.",
    caught_by="whole",
)
def one_window(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks, near=queries.max() - keys < window)


@window_mask.mistake(
    says="rows are keys and columns are queries",
    tries="queries[:, None] − keys[None, :]: a row for each query.",
    caught_by="whole",
)
def transposed(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks).T


@window_mask.mistake(
    says="queries are taken to begin at position 0",
    tries="the argument queries; with a cache its first element is not 0.",
    caught_by="continued",
)
def from_zero(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(torch.arange(len(queries)), keys, window, sinks)


@window_mask.mistake(
    says="sinks are not seen beyond the window",
    tries="… | (keys < sinks).",
    caught_by="sinks",
)
def no_sinks(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, 0)


@window_mask.mistake(
    says="sinks are seen by queries that come before them",
    tries="causality for all keys: behind & (near | sink), not (behind & near) | sink.",
    caught_by="sinks",
)
def sinks_from_before(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    apart = queries[:, None] - keys
    return (keys >= 0) & (((apart >= 0) & (apart < window)) | (keys < sinks))


@window_mask.mistake(
    says="the sinks are taken out of the window: it holds `sinks` tokens less",
    tries="the whole window, and the sinks beside it.",
    caught_by="sinks",
)
def shorter_window(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window - sinks, sinks)


@window_mask.mistake(
    says="there is one sink too many",
    tries="keys < sinks: positions count from 0.",
    caught_by="whole",
)
def sink_too_many(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks + 1)


@window_mask.mistake(
    says="a slot's place in the cache is taken for its token's position",
    tries="the values of keys.",
    caught_by="slots",
)
def slot_as_position(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, torch.arange(len(keys)), window, sinks, filled=keys >= 0)


@window_mask.mistake(
    says="the first slots are taken for the sinks, whatever they hold",
    tries="keys < sinks, which asks for the position.",
    caught_by="slots",
)
def sinks_by_slot(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks, sink=torch.arange(len(keys)) < sinks)


@window_mask.mistake(
    says="empty slots are seen: −1 is less than any query's position, and less than `sinks`",
    tries="… & (keys ≥ 0).",
    caught_by="slots",
)
def empty_seen(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    return _mask(queries, keys, window, sinks, filled=torch.tensor(True))


@window_mask.mistake(
    says="the result holds 0 and −∞ to be added to scores",
    tries="the boolean tensor itself; masked_fill makes the other from it.",
    caught_by="whole",
)
def additive(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    seen = _mask(queries, keys, window, sinks)
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@window_mask.alternative("what is hidden, turned round")
def what_is_hidden(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    rows = queries.unsqueeze(1)
    too_far = (keys <= rows - window) & (keys >= sinks)
    return ~((keys < 0) | (keys > rows) | too_far)


@window_mask.alternative("row by row, with torch.where")
def row_by_row(queries: Any, keys: Any, window: Any, sinks: Any) -> Any:
    rows = []
    for p in queries.tolist():
        first = torch.where(keys < sinks, 0, max(0, p - window + 1))
        rows.append((keys >= first) & (keys <= p))
    return torch.stack(rows)
