"""Exercise `multi_lora`: one batch, and every row with its own adapter."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

multi_lora = Exercise(
    "multi_lora",
    title="A batch of many adapters",
    arguments=("x", "ids", "a", "b", "scale"),
    shapes=(
        "x        float32 tensor [N, K];  ids  int64 [N]: the adapter of each row, −1 for none",
        "a        [G, r, K], b [G, M, r], scale [G]: G adapters, scale already alpha / r",
        "returns  tensor [N, M]: what is added to the frozen layer's output, zero where ids is −1",
        "cost     no row gets a copy of its adapter, and no row meets another's: no intermediate",
        "         larger than x or the result",
    ),
    formula="y[i] = scale[g] · b[g] · (a[g] · x[i]),  g = ids[i]",
    difficulty=3,
    importance=4,
    minutes=30,
    points=5,
    hints=(
        "a[ids] looks like the answer, and copies an adapter for every row. Which rows could share one "
        "product? And what does Python do with an index of −1?",
        "Go through the adapters that occur. For each, pick its rows, send them down and up together, and "
        "put the result back where the rows were. Rows that nobody claims stay zero.",
        "y = x.new_zeros(len(x), b.shape[1]); for g in ids.unique().tolist(): if g >= 0: rows = (ids == "
        "g).nonzero()[:, 0]; y[rows] = scale[g] * (x[rows] @ a[g].T) @ b[g].T. Return y.",
    ),
)


def expected(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> np.ndarray:
    """Row by row in float64."""
    x, a, b, scale = (t.double().numpy() for t in (x, a, b, scale))
    y = np.zeros((len(x), b.shape[1]))
    for i, g in enumerate(ids.tolist()):
        if g >= 0:
            y[i] = scale[g] * (b[g] @ (a[g] @ x[i]))
    return y


def _draw(t: Trial, ids: list[int], g: int, k: int, m: int, r: int, order: str = "C") -> list[Any]:
    x = tensor(t, len(ids), k, order=order)
    factors = tensor(t, g, r, k, scale=k**-0.5), tensor(t, g, m, r)
    return [x, torch.tensor(ids, dtype=torch.long), *factors, 0.5 + tensor(t, g).abs()]


def _agree(t: Trial, *sizes: Any, **options: Any) -> None:
    given = _draw(t, *sizes, **options)
    t.close(t.call(*given), expected(*given), rtol=1e-4)
    t.unchanged()


@multi_lora.check("every row gets its own adapter's correction, in its own place")
def values(t: Trial) -> None:
    ids = [2, 0, 1, *t.integers(0, 3, t.size(4, 8)).tolist()]
    _agree(t, ids, 3, t.odd(5, 11), t.odd(5, 9), t.size(2, 4))
    _agree(t, t.integers(0, 5, 6).tolist(), 5, 7, 12, 3, order="T")


@multi_lora.check("rows without an adapter get zeros")
def without(t: Trial) -> None:
    _agree(t, [1, -1, 0, -1, 2, 2], 3, t.odd(5, 11), 6, 2)
    _agree(t, [-1, -1, -1], 2, 5, 4, 2)


@multi_lora.check("one row, one adapter, and adapters that nobody asks for")
def ends(t: Trial) -> None:
    _agree(t, [0], 1, 5, 4, 1)
    _agree(t, [6, 6, 3], 8, 5, 7, 2)


@multi_lora.check("no copies of adapters, and no products with those of others")
def cost(t: Trial) -> None:
    for n, g in ((24, 3), (6, 48)):
        given = _draw(t, [i % g for i in range(n)], g, 40, 32, 8)
        call = t.perform(*given, watch=("largest_intermediate",))
        t.close(call.value, expected(*given), rtol=1e-4)
        t.at_most(
            call.costs["largest_intermediate"],
            4 * n * 40 + 64,
            f"bytes of the largest intermediate, for {n} rows and {g} adapters (x has {given[0].nbytes:,})",
            "a loop over the adapters that occur; x[rows] @ a[g].T, and up with b[g].T.",
        )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _loop(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    y = x.new_zeros(len(x), b.shape[1])
    for g in ids.unique().tolist():
        if g >= 0:
            rows = (ids == g).nonzero()[:, 0]
            y[rows] = scale[g] * (x[rows] @ a[g].T) @ b[g].T
    return y


@multi_lora.mistake(
    says="every row gets a copy of its adapter: N·r·K numbers are written and read to use them once",
    tries="a loop over the adapters that occur, with all rows of each in one product.",
    caught_by="cost",
)
def gathered(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    at = ids.clamp(min=0)
    down = torch.bmm(a[at], x[:, :, None])
    return torch.bmm(b[at], down)[:, :, 0] * (scale[at] * (ids >= 0))[:, None]


@multi_lora.mistake(
    says="every row is multiplied by every adapter, and all but one result is thrown away",
    tries="each adapter's own rows alone.",
    caught_by="cost",
)
def everyone(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    down = torch.einsum("nk,grk->gnr", x, a)
    up = torch.einsum("gnr,gmr->gnm", down, b) * scale[:, None, None]
    y = up[ids.clamp(min=0), torch.arange(len(x))]
    return y * (ids >= 0)[:, None]


@multi_lora.mistake(
    says="an id of −1 takes the last adapter of the bank: Python counts from the end",
    tries="if g >= 0: around the product.",
    caught_by="without",
)
def wraps(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    return _loop(x, ids % len(a), a, b, scale)


@multi_lora.mistake(
    says="results come group by group, not in the places of their rows",
    tries="y[rows] = …, with the rows that were picked.",
    caught_by="values",
)
def out_of_order(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    y = _loop(x, ids, a, b, scale)
    return y[ids.argsort(stable=True)]


@multi_lora.mistake(says="scale is left out", tries="scale[g] times the product.", caught_by="values")
def no_scale(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    return _loop(x, ids, a, b, torch.ones_like(scale))


@multi_lora.mistake(
    says="all adapters are scaled as the first is", tries="scale[g], each adapter's own.", caught_by="values"
)
def first_scale(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    return _loop(x, ids, a, b, scale[:1].expand(len(scale)))


@multi_lora.mistake(
    says="the whole batch goes through the first row's adapter",
    tries="ids[i] for row i.",
    caught_by="values",
)
def one_for_all(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    return _loop(x, ids[:1].expand(len(ids)), a, b, scale)


@multi_lora.mistake(
    says="A of one adapter meets B of another: the ranks of the batch, not the ids, choose B",
    tries="b[g] with the g that chose a[g].",
    caught_by="values",
)
def crossed(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    return _loop(x, ids, a, b.roll(1, 0), scale)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@multi_lora.alternative("row by row: views of adapters, no copies")
def by_rows(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    y = x.new_zeros(len(x), b.shape[1])
    for i, g in enumerate(ids.tolist()):
        if g >= 0:
            y[i] = scale[g] * (b[g] @ (a[g] @ x[i]))
    return y


@multi_lora.alternative("sorted into stretches, and put back by index_copy")
def by_stretches(x: Any, ids: Any, a: Any, b: Any, scale: Any) -> Any:
    order = ids.argsort(stable=True)
    groups, lengths = ids[order].unique_consecutive(return_counts=True)
    y = x.new_zeros(len(x), b.shape[1])
    for g, rows in zip(groups.tolist(), order.split(lengths.tolist()), strict=True):
        if g >= 0:
            y.index_copy_(0, rows, (x[rows] @ a[g].T) @ (scale[g] * b[g]).T)
    return y
