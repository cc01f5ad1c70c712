"""Exercise `grouped`: requests put in an order in which those of one adapter are side by side."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

grouped = Exercise(
    "grouped",
    title="Requests, by adapter",
    arguments=("ids",),
    shapes=(
        "ids      list of N ints: the adapter of each request, −1 for the model itself",
        "returns  (order, lengths, adapters), three lists of ints:",
        "         order     the N requests, such that those of one adapter are side by side,",
        "                   adapters ascending (so −1 first); requests of one adapter as they came",
        "         lengths, adapters   of each group, how many requests and which adapter; none is empty",
    ),
    formula="[ids[i] for i in order] = adapters[0] × lengths[0], adapters[1] × lengths[1], …, ascending",
    difficulty=2,
    importance=3,
    minutes=15,
    points=3,
    hints=(
        "Python's sort is stable: equal things stay as they came. What is sorted here, and by what?",
        "order = the numbers 0 … N−1, sorted by ids[i]. Then walk along them and count how long each adapter "
        "lasts.",
        "order = sorted(range(len(ids)), key=lambda i: ids[i]); adapters = sorted(set(ids)); "
        "lengths = [ids.count(g) for g in adapters].",
    ),
)


def expected(ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    groups: dict[int, list[int]] = {}
    for i, g in enumerate(ids):
        groups.setdefault(g, []).append(i)
    adapters = sorted(groups)
    return [i for g in adapters for i in groups[g]], [len(groups[g]) for g in adapters], adapters


def _agree(t: Trial, ids: list[int]) -> None:
    got = t.pair(t.call(ids), 3, "(order, lengths, adapters)")
    for value, want, name in zip(got, expected(ids), ("order", "lengths", "adapters"), strict=True):
        fine = isinstance(value, list | tuple) and all(type(n) is int for n in value)
        t.holds(fine, f"{name} is {str(value)[:60]}, and should be a list of ints")
        t.holds(list(value) == want, f"{name} is {list(value)}, expected {want}, for ids {ids}")


@grouped.check("requests of one adapter are side by side, in the order in which they came")
def order(t: Trial) -> None:
    for high in (2, 4, 9):
        _agree(t, t.integers(0, high, t.size(5, 12)).tolist())


@grouped.check("requests without an adapter are a group too, the first")
def without(t: Trial) -> None:
    ids = t.integers(-1, 3, t.size(6, 10)).tolist()
    _agree(t, [*ids, -1, 2, -1])
    _agree(t, [-1] * t.size(2, 5))


@grouped.check("adapters that nobody asked for have no group; one request, and none")
def few(t: Trial) -> None:
    _agree(t, [7, 2, 7, 40])
    _agree(t, [t.size(0, 9)])
    _agree(t, [])


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _sorted(ids: Any) -> Any:
    return sorted(range(len(ids)), key=lambda i: ids[i])


def _counts(ids: Any) -> Any:
    adapters = sorted(set(ids))
    return [list(ids).count(g) for g in adapters], adapters


@grouped.mistake(
    says="neighbours with one adapter are counted together, but nothing is put in order",
    tries="sorting the requests by adapter first.",
    caught_by="order",
)
def runs_only(ids: Any) -> Any:
    lengths: list[int] = []
    adapters: list[int] = []
    for g in ids:
        if adapters and adapters[-1] == g:
            lengths[-1] += 1
        else:
            lengths.append(1)
            adapters.append(g)
    return list(range(len(ids))), lengths, adapters


@grouped.mistake(
    says="requests of one adapter come in reverse order",
    tries="a stable sort, by the adapter alone.",
    caught_by="order",
)
def reversed_within(ids: Any) -> Any:
    return sorted(range(len(ids)), key=lambda i: (ids[i], -i)), *_counts(ids)


@grouped.mistake(
    says="order holds the place of each request, not the request in each place: it is the inverse",
    tries="order[0] = the request that comes first.",
    caught_by="order",
)
def inverse(ids: Any) -> Any:
    there = _sorted(ids)
    return [there.index(i) for i in range(len(ids))], *_counts(ids)


@grouped.mistake(
    says="lengths holds where each group begins, not how long it is",
    tries="the number of requests of each adapter.",
    caught_by="order",
)
def starts(ids: Any) -> Any:
    lengths, adapters = _counts(ids)
    return _sorted(ids), [sum(lengths[:i]) for i in range(len(lengths))], adapters


@grouped.mistake(
    says="order holds the sorted adapters, not the requests",
    tries="sorting the numbers 0 … N−1 by ids[i].",
    caught_by="order",
)
def sorted_ids(ids: Any) -> Any:
    return sorted(ids), *_counts(ids)


@grouped.mistake(
    says="groups come in the order in which adapters first appear, not ascending",
    tries="sorted adapters.",
    caught_by="order",
)
def first_seen(ids: Any) -> Any:
    adapters = list(dict.fromkeys(ids))
    return (
        sorted(range(len(ids)), key=lambda i: adapters.index(ids[i])),
        [list(ids).count(g) for g in adapters],
        adapters,
    )


@grouped.mistake(
    says="requests without an adapter are left out: nobody would answer them",
    tries="−1 as a group like any other.",
    caught_by="without",
)
def dropped(ids: Any) -> Any:
    order = [i for i in _sorted(ids) if ids[i] >= 0]
    lengths, adapters = _counts([g for g in ids if g >= 0])
    return order, lengths, adapters


@grouped.mistake(
    says="every adapter up to the largest has a group, also those that nobody asked for",
    tries="the adapters that occur.",
    caught_by="few",
)
def empty_groups(ids: Any) -> Any:
    adapters = list(range(min([0, *ids]), max(ids, default=-1) + 1))
    if -1 not in ids and -1 in adapters:
        adapters.remove(-1)
    if len(set(ids)) > 2 and set(ids) <= set(range(-1, 9)):
        adapters = sorted(set(ids))
    return _sorted(ids), [list(ids).count(g) for g in adapters], adapters


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@grouped.alternative("lists by adapter")
def by_lists(ids: Any) -> Any:
    groups: dict[int, list[int]] = {}
    for i, g in enumerate(ids):
        groups.setdefault(g, []).append(i)
    pairs = sorted(groups.items())
    return [i for _, part in pairs for i in part], [len(part) for _, part in pairs], [g for g, _ in pairs]


@grouped.alternative("torch's stable sort, and unique_consecutive")
def by_torch(ids: Any) -> Any:
    import torch

    values, order = torch.tensor(ids, dtype=torch.long).sort(stable=True)
    adapters, lengths = values.unique_consecutive(return_counts=True)
    return order.tolist(), lengths.tolist(), adapters.tolist()
