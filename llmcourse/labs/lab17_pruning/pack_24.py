"""Exercise `pack_24`: two values and two places of two bits for every four weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

pack_24 = Exercise(
    "pack_24",
    title="What stays, and where it was",
    arguments=("weight", "mask"),
    shapes=(
        "weight   tensor [N, K] in float32, float16 or bfloat16, K a multiple of 8",
        "mask     bool tensor [N, K]: exactly two of columns 4g … 4g+3 of each row stay",
        "returns  (values, places): values tensor [N, K/2] of the weight's format, the weights that stay, in",
        "         the order of their columns, a weight of 0 too; places uint8 tensor [N, K/8], two groups",
        "         a byte: bits 0–1 and 2–3 are the places (column − 4g) of group 2b's two values, bits",
        "         4–5 and 6–7 those of group 2b + 1",
    ),
    formula="places[n, b] = p₀ + 4·p₁ + 16·q₀ + 64·q₁,   p₀ < p₁ of group 2b, q₀ < q₁ of group 2b + 1",
    difficulty=3,
    importance=4,
    minutes=25,
    points=5,
    hints=(
        "How many bytes does a row of K 16-bit weights take now? Which of the numbers that you need does "
        "`mask.nonzero()` give, and in which order?",
        "A boolean index reads a row from left to right: weight[mask] is all values in order, and since "
        "every row keeps K/2, it is [N, K/2] after a view. The column of each, modulo 4, is its place; four "
        "places make a byte, shifted by 0, 2, 4 and 6 bits.",
        "values = weight[mask].view(N, -1); columns = mask.nonzero()[:, 1]; "
        "places = (columns % 4).view(N, -1, 4); "
        "byte = (places << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8); return values, byte.",
    ),
)


def expected(weight: Any, mask: Any) -> tuple[Any, np.ndarray]:
    """Row by row and group by group."""
    w, m = weight.double().numpy(), mask.numpy()
    rows, columns = w.shape
    values, places = np.zeros((rows, columns // 2)), np.zeros((rows, columns // 8), np.uint8)
    for n in range(rows):
        for g in range(columns // 4):
            stay = np.flatnonzero(m[n, 4 * g : 4 * g + 4])
            values[n, 2 * g : 2 * g + 2] = w[n, 4 * g + stay]
            places[n, g // 2] |= (stay[0] + 4 * stay[1]) << 4 * (g % 2)
    return values, places


def draw(t: Trial, rows: int, columns: int, dtype: str = "float32") -> tuple[Any, Any]:
    """A weight and any mask of two in four."""
    order = t.rng.random((rows, columns // 4, 4)).argsort(-1)
    return tensor(t, rows, columns, dtype=dtype), torch.from_numpy((order < 2).reshape(rows, columns))


def _agree(t: Trial, weight: Any, mask: Any) -> None:
    values, places = t.pair(t.call(weight, mask), 2, "(values, places)")
    want = expected(weight, mask)
    told = tuple(str(getattr(v, "dtype", "none")).removeprefix("torch.") for v in (values, places))
    t.equal(told, (str(weight.dtype).removeprefix("torch."), "uint8"), "number formats of values and places")
    t.equal(values, torch.from_numpy(want[0]).to(weight.dtype), "values")
    t.equal(places, torch.from_numpy(want[1]), "places")
    t.unchanged()


@pack_24.check("one byte: a row of eight weights")
def one_byte(t: Trial) -> None:
    for _ in range(8):
        _agree(t, *draw(t, 1, 8))


@pack_24.check("many rows and groups")
def many(t: Trial) -> None:
    _agree(t, *draw(t, t.odd(3, 9), 8 * t.odd(3, 9)))


@pack_24.check("a weight that stays may be zero")
def zeros(t: Trial) -> None:
    weight, mask = draw(t, 3, 24)
    weight[torch.from_numpy(t.rng.random((3, 24)) < 0.4)] = 0.0
    weight[1] = 0.0
    _agree(t, weight, mask)


@pack_24.check("float16 and bfloat16 keep their formats, and their bits")
def formats(t: Trial) -> None:
    for dtype in ("float16", "bfloat16"):
        _agree(t, *draw(t, 3, 16, dtype))


@pack_24.check("rows that do not touch")
def strided(t: Trial) -> None:
    weight, mask = draw(t, 4, 16)
    wide, wide_mask = torch.zeros(4, 24), torch.zeros(4, 24, dtype=torch.bool)
    wide[:, :16], wide_mask[:, :16] = weight, mask
    _agree(t, wide[:, :16], wide_mask[:, :16])


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _places(mask: Any) -> Any:
    """[N, K/8, 4]"""
    return (mask.nonzero()[:, 1] % 4).view(mask.shape[0], -1, 4)


def _bytes(places: Any, shifts: Any = (0, 2, 4, 6)) -> Any:
    return (places << torch.tensor(shifts)).sum(-1).to(torch.uint8)


def _values(weight: Any, mask: Any) -> Any:
    return weight[mask].view(weight.shape[0], -1)


@pack_24.mistake(
    says="the first place of a byte is in its highest bits",
    tries="shifts of 0, 2, 4, 6 bits for the first to the fourth.",
    caught_by="one_byte",
)
def high_first(weight: Any, mask: Any) -> Any:
    return _values(weight, mask), _bytes(_places(mask), (6, 4, 2, 0))


@pack_24.mistake(
    says="the two groups of a byte have changed places",
    tries="the even group in bits 0–3, the odd one in bits 4–7.",
    caught_by="one_byte",
)
def groups_swapped(weight: Any, mask: Any) -> Any:
    return _values(weight, mask), _bytes(_places(mask), (4, 6, 0, 2))


@pack_24.mistake(
    says="a place is counted from the right end of its group",
    tries="column % 4.",
    caught_by="one_byte",
)
def from_the_right(weight: Any, mask: Any) -> Any:
    return _values(weight, mask), _bytes(3 - _places(mask))


@pack_24.mistake(
    says="a weight that stays and is zero is lost, and with it the order of all that follow",
    tries="weight[mask], not weight[weight != 0].",
    caught_by="zeros",
)
def nonzero_only(weight: Any, mask: Any) -> Any:
    kept = (weight * mask)[(weight * mask) != 0]
    full = torch.zeros(weight.numel() // 2, dtype=weight.dtype)
    full[: len(kept)] = kept
    return full.view(weight.shape[0], -1), _bytes(_places(mask))


@pack_24.mistake(
    says="the larger of the two comes first: values must be in the order of their columns",
    tries="places sorted ascending after a topk, or a boolean index.",
    caught_by="one_byte",
)
def by_size(weight: Any, mask: Any) -> Any:
    rows = weight.shape[0]
    groups = weight.float().abs().masked_fill(~mask, -1).view(rows, -1, 4)
    places = groups.topk(2, dim=-1).indices
    values = weight.reshape(rows, -1, 4).gather(-1, places).reshape(rows, -1)
    return values, _bytes(places.reshape(rows, -1, 4))


@pack_24.mistake(
    says="places are one a byte: a quarter of each byte is used, and four times as many are read",
    tries="four places in each byte, shifted by 0, 2, 4 and 6.",
    caught_by="one_byte",
)
def a_byte_each(weight: Any, mask: Any) -> Any:
    return _values(weight, mask), _places(mask).flatten(1).to(torch.uint8)


@pack_24.mistake(
    says="the values come back in float32",
    tries="the weight's own format: no .float() on the way.",
    caught_by="formats",
)
def widened(weight: Any, mask: Any) -> Any:
    return _values(weight, mask).float(), _bytes(_places(mask))


@pack_24.mistake(
    says="the mask itself is packed, a bit for each weight",
    tries="2 bits for each weight that stays: its place in the group.",
    caught_by="one_byte",
)
def bit_mask(weight: Any, mask: Any) -> Any:
    bits = mask.reshape(mask.shape[0], -1, 8).long() << torch.arange(8)
    return _values(weight, mask), bits.sum(-1).to(torch.uint8)


@pack_24.mistake(
    says="first values of all groups come first, then all second ones",
    tries="the two values of a group side by side.",
    caught_by="one_byte",
)
def planes(weight: Any, mask: Any) -> Any:
    values = _values(weight, mask)
    return torch.cat((values[:, ::2], values[:, 1::2]), 1), _bytes(_places(mask))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@pack_24.alternative("a stable sort of each group's mask, and multiplications for shifts")
def by_sorting(weight: Any, mask: Any) -> Any:
    rows = weight.shape[0]
    order = mask.reshape(rows, -1, 4).int().argsort(dim=-1, descending=True, stable=True)[..., :2]
    values = weight.reshape(rows, -1, 4).gather(-1, order).flatten(1)
    places = order.reshape(rows, -1, 4)
    return values, (places * torch.tensor([1, 4, 16, 64])).sum(-1).byte()


@pack_24.alternative("NumPy, group by group")
def one_by_one(weight: Any, mask: Any) -> Any:
    rows, columns = weight.shape
    places = torch.zeros(rows, columns // 8, dtype=torch.uint8)
    values = []
    for n in range(rows):
        for g in range(columns // 4):
            first, second = (k for k in range(4) if mask[n, 4 * g + k])
            values += [weight[n, 4 * g + first], weight[n, 4 * g + second]]
            places[n, g // 2] += (first + 4 * second) * (16 if g % 2 else 1)
    return torch.stack(values).view(rows, -1), places


@pack_24.alternative("a product of bits: what lies in front in the group says which of the two it is")
def by_prefix(weight: Any, mask: Any) -> Any:
    rows = weight.shape[0]
    groups = mask.reshape(rows, -1, 4)
    rank = groups.long().cumsum(-1)
    place = torch.arange(4)
    first = (place * (groups & (rank == 1))).sum(-1)
    second = (place * (groups & (rank == 2))).sum(-1)
    code = (first | second << 2).view(rows, -1, 2)
    w = weight.reshape(rows, -1, 4)
    both = torch.stack((first, second), -1)
    return torch.take_along_dim(w, both, -1).reshape(rows, -1), (code[..., 0] | code[..., 1] << 4).to(
        torch.uint8
    )
