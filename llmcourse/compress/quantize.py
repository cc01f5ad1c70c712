"""Weights as small integers: a grid of few values, one scale for many weights.

A weight matrix [N, K] is cut into groups that share a scale; a group's weights become the nearest points of
an evenly spaced grid:

    symmetric    w ≈ scale · code                    codes −2^(b−1) … 2^(b−1)−1, zero is a point of the grid
    asymmetric   w ≈ scale · (code − zero)           codes 0 … 2^b−1, the grid is shifted to cover min … max
    codebook     w ≈ scale · values[code]            values that are not evenly spaced: NF4, FP4, FP8

The smaller the group, the smaller the largest weight that sets its scale, and the finer the grid; the price
is a scale (and a zero) for each group. This is *round to nearest* (RTN), the baseline that needs no data.
What GPTQ, AWQ and training with quantization in the loop change is which code is chosen, never this form.

Scales are bfloat16: the codes are chosen after the scale was rounded, so every kernel that later reads a
scale in 16 bits computes with exactly the weights that were measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcourse.compress.formats import CODEBOOKS
from llmcourse.errors import ShapeError

SCALE = torch.bfloat16
TENSOR = -1  # group=TENSOR: one scale for the whole matrix


@dataclass(frozen=True)
class Scheme:
    """How a weight [N, K] is stored.

    bits        of a code, 2 … 8
    group       weights of a row that share a scale; None: the row (output channel); −1: the whole matrix.
                Where it does not divide K, a row's last group is shorter
    symmetric   zero is in the middle of the grid; otherwise each group keeps its own zero
    codes       int: evenly spaced; nf4, fp4 (4 bits), fp8_e4m3, fp8_e5m2 (8 bits): see `compress.formats`

    Raises ShapeError for bits, a group or a combination that does not exist.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    codes: str = "int"

    def __post_init__(self) -> None:
        if self.codes != "int" and self.codes not in CODEBOOKS:
            raise ShapeError(
                f"codes = {self.codes!r} is not a way to store numbers.",
                "Codes stand for evenly spaced numbers (int) or for those of a table.",
                f"one of int, {', '.join(CODEBOOKS)}.",
            )
        if not 2 <= self.bits <= 8:
            raise ShapeError(
                f"codes of {self.bits} bits.",
                "One bit leaves a symmetric grid no step; above 8 a float format is as small.",
                "bits from 2 to 8.",
            )
        if self.group is not None and self.group != TENSOR and self.group < 1:
            raise ShapeError(
                f"groups of {self.group} weights.",
                "A scale belongs to one weight or more.",
                "group = 32, 64 or 128; None for a row; −1 for the whole matrix.",
            )
        if self.codes != "int" and (self.bits != CODEBOOKS[self.codes].bits or not self.symmetric):
            raise ShapeError(
                f"{self.codes} codes came with bits = {self.bits}, symmetric = {self.symmetric}.",
                f"Its table has {1 << CODEBOOKS[self.codes].bits} values around zero.",
                f"Scheme({CODEBOOKS[self.codes].bits}, group, codes={self.codes!r}).",
            )

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.codes == "int" and self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Scales in a row of so many weights (one for all rows together where group is −1)."""
        return 1 if self.group in (None, TENSOR) else -(-columns // self.group)

    def __str__(self) -> str:
        name = f"INT{self.bits}" if self.codes == "int" else self.codes.upper()
        where = {None: "row", TENSOR: "tensor"}.get(self.group, f"g{self.group}")
        return f"{name} {where}" + ("" if self.symmetric else " asymmetric")


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight [N, K].

    codes   [N, K]: int8 (symmetric integers), else uint8
    scale   [N, G], or [1, 1] where one scale serves the matrix; floating point
    zero    [N, G] (or [1, 1]) uint8, of an asymmetric scheme; else None
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    shape: tuple[int, int]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the codes stand for, [N, K], computed in float32 and rounded once."""
        # An integer of 8 bits and its difference to a zero are exact in bfloat16, and PyTorch multiplies in
        # float32: with a scale in the format that is asked for, one pass over the codes is enough.
        wide = dtype if self.scale.dtype == dtype == torch.bfloat16 else torch.float32
        if self.scheme.codes != "int":
            table = CODEBOOKS[self.scheme.codes].table().to(self.codes.device, torch.float32)
            return by_group(torch.mul, table[self.codes.int()], self.scale.float(), self.scheme).to(dtype)
        points = self.codes
        if self.zero is not None:
            points = by_group(torch.sub, points.short(), self.zero.short(), self.scheme)
        return by_group(torch.mul, points, self.scale.to(wide), self.scheme).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: packed codes, scales and zeros."""
        rows, columns = self.shape
        codes = rows * packed_columns(columns, self.scheme.bits)
        return codes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def packed(self) -> Tensor:
        """Codes without gaps, uint8 [N, ⌈K·bits/8⌉], low bits first. Signed codes are stored + 2^(b−1)."""
        return pack((self.codes.int() - self.scheme.low).to(torch.uint8), self.scheme.bits)

    @classmethod
    def from_packed(
        cls, packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: tuple[int, int]
    ) -> Quantized:
        """The inverse of `packed`."""
        codes = unpack(packed, scheme.bits, shape[1])
        if scheme.low:  # stored + 2^(b−1); of 8 bits that is the highest bit, turned over
            codes = (codes ^ 128 if scheme.bits == 8 else codes + (256 + scheme.low)).view(torch.int8)
        return cls(codes, scale, zero, scheme, shape)

    def to(self, device: torch.device | str) -> Quantized:
        zero = None if self.zero is None else self.zero.to(device)
        return Quantized(self.codes.to(device), self.scale.to(device), zero, self.scheme, self.shape)


def quantize(weight: Tensor, scheme: Scheme) -> Quantized:
    """Round a weight [N, K] to the nearest points of its grids. Raises ShapeError where it is no matrix."""
    scale, zero = grid(weight, scheme)
    return Quantized(
        encode(weight, scale, zero, scheme), scale, zero, scheme, (weight.shape[0], weight.shape[1])
    )


def grid(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of every group of a weight [N, K], from its largest (and smallest) values."""
    require_matrix(weight)
    groups = grouped(weight.float(), scheme)
    if scheme.symmetric:
        top = scheme.high if scheme.codes == "int" else CODEBOOKS[scheme.codes].largest
        return rounded(groups.abs().amax(-1) / top), None
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = rounded((most - least) / scheme.high)
    return scale, (-least / scale.float()).round().clamp(0, scheme.high).to(torch.uint8)


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes [N, K] of the grid points nearest to a weight [N, K]; a value beyond the grid gets its end."""
    columns = weight.shape[1]
    points = weight.float() / spread(scale.float(), scheme, columns)
    if scheme.codes != "int":
        return CODEBOOKS[scheme.codes].nearest(points)
    if zero is not None:
        points = points + spread(zero.float(), scheme, columns)
    return points.round().clamp(scheme.low, scheme.high).to(torch.int8 if scheme.low else torch.uint8)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[N, K] → [N, G, group], or [1, 1, N·K]; a short last group is filled with zeros."""
    if scheme.group == TENSOR:
        return weight.reshape(1, 1, -1)
    size = scheme.group or weight.shape[1]
    missing = -weight.shape[1] % size
    return torch.nn.functional.pad(weight, (0, missing)).unflatten(1, (-1, size))


def spread(per_group: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """[N, G] → what multiplies [N, K]: each group's number for each of its columns."""
    if scheme.group in (None, TENSOR):
        return per_group
    return per_group.repeat_interleave(scheme.group, dim=1)[:, :columns]


def by_group(
    op: Callable[[Tensor, Tensor], Tensor], weight: Tensor, per_group: Tensor, scheme: Scheme
) -> Tensor:
    """op(weight [N, K], each group's number [N, G] for each of its columns): [N, K]."""
    groups = per_group.shape[1]
    if groups == 1 or weight.shape[1] % groups or weight.shape[1] // groups != scheme.group:
        return op(weight, spread(per_group, scheme, weight.shape[1]))
    return op(weight.unflatten(1, (groups, -1)), per_group[:, :, None]).flatten(1)  # nothing is repeated


def rounded(scale: Tensor) -> Tensor:
    """A scale in its stored format; that of a group of zeros is 1 (0/0 is no number)."""
    scale = scale.to(SCALE)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def packed_columns(columns: int, bits: int) -> int:
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] < 2^bits → uint8 [N, ⌈K·bits/8⌉]; code i takes bits i·b … i·b+b−1 of its row."""
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        return codes[:, ::2] | (codes[:, 1::2] << 4)
    stream = (codes[..., None] >> torch.arange(bits, device=codes.device, dtype=torch.uint8)) & 1
    stream = torch.nn.functional.pad(stream.flatten(1), (0, -codes.shape[1] * bits % 8)).unflatten(1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 codes [N, columns]."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]
    stream = (packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    stream = stream.flatten(1)[:, : columns * bits].unflatten(1, (columns, bits))
    return (stream << torch.arange(bits, device=packed.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def require_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ShapeError(
            f"a weight of shape {list(weight.shape)}, {str(weight.dtype).removeprefix('torch.')}.",
            "Scales belong to the rows, or to groups in the rows, of a matrix [N, K] of floats.",
            "weight.flatten(1), with one row for each output.",
        )
    if not bool(weight.isfinite().all()):
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        raise ShapeError(
            f"the weight holds {weight[row, column].item()} at [{row}, {column}].",
            "A scale is set by the largest number of its group, and no grid reaches this one.",
            "looking for the training step that made it, or weight.nan_to_num().",
        )
