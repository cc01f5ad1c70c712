"""The 2:4 format: of every four neighbours of a row two stay, written as two values and two places of 2 bits.

    dense     0  a  0  b   c  d  0  0   …                      [N, K]      2·K bytes a row in 16 bits
    values    a  b   c  d   …                                  [N, K/2]      K
    indices   1 3   0 1   …   2 bits each, 4 a group           [N, K/16]   K/8      together 9/16 of dense

A word of 16 bits holds the places of four groups, the first group in its lowest bits, and within a group the
first place in the lower two. Places of a group ascend, so that the first is 0, 1 or 2 and the second 1, 2 or
3. A group with fewer than two non-zero weights keeps zeros too. Rows are filled up to a multiple of 16
columns with groups of zeros, so that every row begins where 16-byte loads may.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import check_float

GROUP, KEPT, WORD = 4, 2, 16  # columns of a group, of which so many stay; columns of an index word


@dataclass(frozen=True)
class Sparse24:
    """A 2:4 matrix of `shape` [N, K], packed.

    values   [N, P/2] the weights that stay, P being K filled up to a multiple of 16
    indices  int16 [N, P/16] where they were: bits 4g … 4g+1 and 4g+2 … 4g+3 of a word belong to its group g
    """

    values: Tensor
    indices: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        return self.values.nbytes + self.indices.nbytes

    def to(self, *args: object, **kwargs: object) -> Sparse24:
        """With the values elsewhere, or in another number format; arguments as `Tensor.to` takes them."""
        values = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        return Sparse24(values, self.indices.to(values.device), self.shape)

    @cached_property
    def columns(self) -> Tensor:
        """Column of each value in its row, int64 [N, P/2]: what the indices say, spelled out."""
        words = self.indices.to(torch.int64) & 0xFFFF
        places = (words[..., None] >> torch.arange(0, WORD, 2, device=words.device)) & 3
        group = torch.arange(places[0].numel(), device=words.device) // KEPT
        return places.flatten(1) + GROUP * group

    def dense(self) -> Tensor:
        """The matrix [N, K] with its zeros."""
        rows, columns = self.shape
        full = self.values.new_zeros(rows, GROUP // KEPT * self.values.shape[1])
        return full.scatter_(1, self.columns, self.values)[:, :columns]


def mask24(weight: Tensor) -> Tensor:
    """Which weights of [N, K] stay if of every four neighbours the two largest in magnitude do; bool."""
    rows, columns = weight.shape
    # What is not there is smaller than every magnitude.
    groups = pad(weight.abs(), (0, -columns % GROUP), value=-1).view(rows, -1, GROUP)
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, _first(groups), True)
    return chosen.view(rows, -1)[:, :columns]


def pack24(weight: Tensor, mask: Tensor | None = None) -> Sparse24:
    """Pack a weight [N, K] in float32, float16 or bfloat16 of which at most two of every four are not zero.

    mask   bool [N, K]: the weights to keep; None: those that are not zero

    Raises   ShapeError that names the first group with more than two, DtypeError.
    """
    check_float("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape or (mask is not None and mask.shape != weight.shape):
        raise ShapeError(
            f"a weight of shape {list(weight.shape)}"
            + ("." if mask is None else f" with a mask of {list(mask.shape)}."),
            "A 2:4 matrix has rows and columns, and a mask says of each entry whether it stays.",
            "`layer.weight`, and a mask of its shape.",
        )
    stay = weight != 0 if mask is None else mask
    rows, columns = weight.shape
    spare = -columns % WORD
    groups = pad(weight * stay, (0, spare)).view(rows, -1, GROUP)
    chosen = pad(stay, (0, spare)).view(rows, -1, GROUP)
    counts = chosen.sum(-1)
    if bool((counts > KEPT).any()):
        row, group = (int(i) for i in (counts > KEPT).nonzero()[0])
        raise ShapeError(
            f"columns {GROUP * group} to {GROUP * group + GROUP - 1} of row {row} keep "
            f"{int(counts[row, group])} weights.",
            "In the 2:4 format there is room for two of four.",
            "pruning first: weight * mask24(weight), or Pattern(n=2, m=4).",
        )
    places = _first(chosen.to(torch.int8))
    values = groups.gather(-1, places).reshape(rows, -1).contiguous()
    bits = places.reshape(rows, -1, WORD // KEPT) << torch.arange(0, WORD, 2, device=weight.device)
    return Sparse24(values, _int16(bits.sum(-1)), (rows, columns))


def _first(order: Tensor) -> Tensor:
    """Places of the two largest of each group, of equal ones the first, in ascending order."""
    return order.argsort(dim=-1, descending=True, stable=True)[..., :KEPT].sort(dim=-1).values


def _int16(words: Tensor) -> Tensor:
    """Numbers of 16 bits as int16: those from 32768 on are the negative ones."""
    return torch.where(words < 2**15, words, words - 2**16).to(torch.int16)


def packed_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a packed [rows, columns]: 9/16 of the dense ones in 16 bits."""
    filled = columns + -columns % WORD
    return rows * (filled // 2 * itemsize + filled // 8)
