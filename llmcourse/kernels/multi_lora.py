"""Many LoRA adapters in one batch: every row of a decode step has its own (Punica, Chen et al. 2023,
arXiv:2310.18547; S-LoRA, Sheng et al. 2023, arXiv:2311.03285).

    y[i] += s[id_i] · B[id_i] · (A[id_i] · x[i])          id_i < 0: nothing is added

    N rows   K in   M out   R rank   P projections in y   G adapters   S splits of K   b bytes a number

A server of fine-tuned models holds one copy of the base model and a bank of adapters. In a batch of N
requests the frozen product is shared; what is left is thin and different for each row. Ways to do it:

    way            adapters' bytes moved                launches
    a loop         each adapter once                    several for each adapter in the batch: grows with G
    gather + bmm   N·R·(P·K + M)·b, three times over    4: every row's A and B copied, written, read again
    grouped        N·R·(P·K + M)·b at most              2: a row finds its adapter by its id

The grouped kernels (BGMV) give each program one row and a piece of the work. Rows of the same adapter read
the same bytes, which the L2 cache serves; nothing else depends on who shares what, so that the time is nearly
the same for 1 and for N adapters in the batch.

*Shrink*: K numbers to R, in S·P programs a row, since one program could not keep a GPU's memory busy. Each
writes a partial sum, no atomics: the same bits every time. *Expand*: adds up the S partial sums of its row,
a few hundred bytes, and takes BLOCK rows of B, which lie side by side in memory.

Prefill has many rows of one adapter: `multi_lora_segments`, on tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import (
    Backend,
    DtypeError,
    check_float,
    check_rows,
    check_shape,
    check_together,
    choose,
    row_stride,
)
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import ceil_div, launch, power_of_two

# the adapters


@dataclass(frozen=True)
class Bank:
    """G adapters of one layer, side by side.

    a      [G, P, R, K]: the As of P projections;  b  [G, Σ columns, R]: their Bs, one below the other
    scale  [G] float32: s of each adapter
    parts  (first, end) columns of y that each projection adds to, P of them, at most 3
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    parts: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        check_float("a", self.a)
        if self.a.dim() != 4 or not 1 <= len(self.parts) <= 3 or min(self.a.shape) < 1:
            raise ShapeError(
                f"a has shape {tuple(self.a.shape)}, for {len(self.parts)} parts.",
                "A bank holds [adapters, projections, rank, features], of one to three projections.",
                "a 4-dimensional tensor, and a (first, end) for each projection.",
            )
        adapters, _, rank, _ = self.a.shape
        check_shape("a", self.a, (adapters, len(self.parts), *self.a.shape[2:]), "One A for each projection.")
        check_shape("b", self.b, (adapters, self.columns, rank), "One row of B for each column of y.")
        check_shape("scale", self.scale, (adapters,), "One factor for each adapter.")
        check_together(a=self.a, b=self.b, scale=self.scale)
        ends = [0, *(n for part in self.parts for n in part)]
        if ends != sorted(ends) or any(first == end for first, end in self.parts):
            raise ShapeError(
                f"the parts are {self.parts}.", "They are columns of y, in order and apart.", "((0, M),)."
            )
        if self.a.dtype != self.b.dtype or self.scale.dtype != torch.float32:
            raise DtypeError(
                f"a is {self.a.dtype}, b {self.b.dtype} and scale {self.scale.dtype}.",
                "Both factors are read in one number format, and scale in float32.",
                "b.to(a.dtype), scale.float().",
            )
        if not (self.a.is_contiguous() and self.b.is_contiguous()):
            raise ShapeError(
                "a or b is not contiguous.", "A row finds its adapter at id times its size.", ".contiguous()."
            )

    @property
    def columns(self) -> int:
        """Columns of y that anything is added to."""
        return sum(end - first for first, end in self.parts)

    @property
    def rank(self) -> int:
        return self.a.shape[2]

    @property
    def row_bytes(self) -> int:
        """Bytes of one adapter: what a row must read."""
        return self.a[0].nbytes + self.b[0].nbytes


def stack(
    adapters: Sequence[tuple[Tensor, Tensor, float]], parts: Sequence[tuple[int, int]] | None = None
) -> Bank:
    """A bank of (A [P, r, K] or [r, K], B [columns, r], s), with zeros up to the largest rank r."""
    pairs = [(a if a.dim() == 3 else a[None], b, s) for a, b, s in adapters]
    most = max(a.shape[1] for a, _, _ in pairs)
    a0, b0, _ = pairs[0]
    a_all = a0.new_zeros(len(pairs), a0.shape[0], most, a0.shape[2])
    b_all = b0.new_zeros(len(pairs), b0.shape[0], most)
    for i, (a, b, _) in enumerate(pairs):
        a_all[i, :, : a.shape[1]], b_all[i, :, : b.shape[1]] = a, b
    scale = torch.tensor([s for _, _, s in pairs], dtype=torch.float32, device=a0.device)
    return Bank(a_all, b_all, scale, tuple(parts or ((0, b0.shape[0]),)))


def minimum_bytes(n: int, adapters: int, bank: Bank) -> int:
    """Bytes of N rows of that many different adapters: x read, y read and written, each adapter once."""
    size = bank.a.element_size()
    return n * (bank.a.shape[3] + 2 * bank.columns) * size + adapters * bank.row_bytes + 8 * n


# references and peers


def reference(y: Tensor, x: Tensor, ids: Tensor, bank: Bank) -> Tensor:
    """y with every row's correction added, in a loop over the adapters that occur."""
    for g in ids.unique().tolist():
        if g >= 0:
            rows = (ids == g).nonzero()[:, 0]
            y[rows] = corrected(y[rows], x[rows], g, bank)
    return y


def corrected(y: Tensor, x: Tensor, adapter: int, bank: Bank) -> Tensor:
    """y plus one adapter's correction of x, for rows that all have it. Sums in float32."""
    y, offset = y.clone(), 0
    for p, (first, end) in enumerate(bank.parts):
        down = x.float() @ bank.a[adapter, p].float().T
        b = bank.b[adapter, offset : offset + end - first].float()
        delta = down @ b.T * bank.scale[adapter]
        y[..., first:end] = (y[..., first:end].float() + delta).to(y.dtype)
        offset += end - first
    return y


def gather_bmm(y: Tensor, x: Tensor, ids: Tensor, bank: Bank) -> Tensor:
    """The same by copying every row's A and B beside each other, and batched products. ids ≥ 0."""
    a, b, offset = bank.a[ids], bank.b[ids], 0
    down = torch.bmm(a.flatten(1, 2), x[:, :, None]).unflatten(1, a.shape[1:3])  # [N, P, R, 1]
    down = down * bank.scale[ids].to(x.dtype)[:, None, None, None]
    for p, (first, end) in enumerate(bank.parts):
        y[:, first:end] += torch.bmm(b[:, offset : offset + end - first], down[:, p])[..., 0]
        offset += end - first
    return y


# good: two launches


@triton.jit
def shrink_kernel(
    x, ids, a, v, x_stride, N, K,
    RANK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """v[split, row, part, :] = A[id, part] over one split of K, CHUNK features, times x there."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    adapter = tl.load(ids + row)
    if adapter >= 0:
        a += (adapter.to(tl.int64) * parts + part) * RANK * K
        x += row.to(tl.int64) * x_stride
        r = tl.arange(0, BLOCK_R)[:, None]
        k = split * CHUNK + tl.arange(0, BLOCK_K)[None, :]
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(0, CHUNK, BLOCK_K):
            inside = start + k < K
            features = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
            weights = tl.load(a + r * K + start + k, mask=(r < RANK) & inside, other=0.0)
            acc += weights.to(tl.float32) * features
        to = ((split * N + row) * parts + part).to(tl.int64) * RANK + tl.arange(0, BLOCK_R)
        tl.store(v + to, tl.sum(acc, axis=1), mask=tl.arange(0, BLOCK_R) < RANK)


@triton.jit
def expand_kernel(
    v, ids, b, scale, y, y_stride, N, COLUMNS, first0, end0, first1, end1, first2, end2,
    RANK: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y[row, BLOCK_M columns of one part] += s·B·(sum of v over its splits)."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    adapter = tl.load(ids + row)
    if adapter >= 0:
        # Tiles are numbered through the parts; none reaches over a border.
        tiles0 = tl.cdiv(end0 - first0, BLOCK_M)
        tiles1 = tl.cdiv(end1 - first1, BLOCK_M)
        part = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
        first = tl.where(part == 0, first0, tl.where(part == 1, first1, first2))
        end = tl.where(part == 0, end0, tl.where(part == 1, end1, end2))
        above = tl.where(part > 0, end0 - first0, 0) + tl.where(part > 1, end1 - first1, 0)
        at = (tile - tl.where(part > 0, tiles0, 0) - tl.where(part > 1, tiles1, 0)) * BLOCK_M
        r = tl.arange(0, BLOCK_R)[None, :]
        s = tl.arange(0, BLOCK_S)[:, None]
        m = at + tl.arange(0, BLOCK_M)
        inside = m < end - first
        from_ = ((s * N + row) * PARTS + part).to(tl.int64) * RANK + r
        down = tl.sum(tl.load(v + from_, mask=(s < SPLITS) & (r < RANK), other=0.0), axis=0)[None, :]
        b += (adapter.to(tl.int64) * COLUMNS + above) * RANK
        weights = tl.load(b + m[:, None] * RANK + r, mask=inside[:, None] & (r < RANK), other=0.0)
        delta = tl.sum(weights.to(tl.float32) * down, axis=1) * tl.load(scale + adapter)
        to = y + row.to(tl.int64) * y_stride + first + m
        old = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, (old + delta).to(y.dtype.element_ty), mask=inside)


# wrapper


class Plan(NamedTuple):
    """How the two kernels are launched: numbers that change the speed, and the order of sums.

    splits    programs that share the K features of a row and a projection
    block_k   features that one holds at a time;  block_m  columns of y in a program of the second kernel
    """

    splits: int = 4
    block_k: int = 512
    block_m: int = 256
    shrink_warps: int = 4
    expand_warps: int = 4


PROGRAMS = 512
"""Shrink programs to aim at: about four for each multiprocessor of a large GPU."""


def plan_for(rows: int, bank: Bank) -> Plan:
    """Tiles of 8192 numbers of A and 4096 of B; as many splits as keep all multiprocessors reading."""
    rank, features = power_of_two(bank.rank), bank.a.shape[3]
    block_k = max(16, min(power_of_two(features), 8192 // rank))
    wanted = ceil_div(PROGRAMS, max(1, rows * len(bank.parts)))
    splits = max(1, min(wanted, ceil_div(features, block_k), 16))
    block_m = max(16, min(power_of_two(bank.columns), 4096 // rank))
    return Plan(splits, block_k, block_m)


def run(y: Tensor, x: Tensor, ids: Tensor, bank: Bank, plan: Plan, interpret: bool) -> Tensor:
    """Both launches, without checks. y is changed in place."""
    n, features = x.shape
    _, parts, rank, _ = bank.a.shape
    chunk = ceil_div(ceil_div(features, plan.splits), plan.block_k) * plan.block_k
    splits = ceil_div(features, chunk)
    v = torch.empty(splits, n, parts, rank, dtype=torch.float32, device=x.device)
    block_r = power_of_two(rank)
    launch(
        shrink_kernel, (n, splits, parts), x, ids, bank.a, v, row_stride(x), n, features,
        RANK=rank, CHUNK=chunk, BLOCK_R=block_r, BLOCK_K=plan.block_k, num_warps=plan.shrink_warps,
        interpret=interpret,
    )  # fmt: skip
    tiles = sum(ceil_div(end - first, plan.block_m) for first, end in bank.parts)
    ends = [n for part in (*bank.parts, (0, 0), (0, 0))[:3] for n in part]
    launch(
        expand_kernel, (n, tiles), v, ids, bank.b, bank.scale, y, row_stride(y), n, bank.columns, *ends,
        RANK=rank, PARTS=parts, SPLITS=splits, BLOCK_S=power_of_two(splits), BLOCK_R=block_r,
        BLOCK_M=plan.block_m, num_warps=plan.expand_warps, interpret=interpret,
    )  # fmt: skip
    return y


def multi_lora(
    y: Tensor, x: Tensor, ids: Tensor, bank: Bank, *, backend: Backend = "auto", plan: Plan | None = None
) -> Tensor:
    """Add to each row of y the correction of its own adapter; returns y, changed in place. No gradient.

    Shapes   y [N, M] (what the frozen layer gave), x [N, K], ids [N] int32 or int64: a number of `bank`, or
             −1 for none. Not looked at on a GPU: an id beyond the bank reads what lies there.
    Moves    each row's adapter once, N·R·(P·K + columns)·itemsize bytes, of which the L2 cache serves those
             that rows share (see `minimum_bytes` for the least)
    Raises   ShapeError, DtypeError, StrideError, DeviceError.
    """
    check(y, x, bank)
    check_shape("ids", ids, (x.shape[0],), "Every row names its adapter.")
    check_together(x=x, ids=ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"ids is {ids.dtype}.", "Ids are whole numbers.", "ids.long().")
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= bank.a.shape[0]:
        raise ShapeError(
            f"a row asks for adapter {int(ids.max())} of a bank of {bank.a.shape[0]}.",
            "Ids count from 0.",
            "ids below the number of adapters, and −1 for rows without one.",
        )
    chosen = choose(backend, x, y, bank.a)
    if chosen == "reference":
        return reference(y, x, ids, bank)
    if not len(x):
        return y
    return run(y, x, ids.contiguous(), bank, plan or plan_for(len(x), bank), chosen == "interpret")


def check(y: Tensor, x: Tensor, bank: Bank) -> None:
    """x [N, K] and y [N, M] are rows that the kernels can read, and fit the bank."""
    for name, t in (("x", x), ("y", y)):
        check_float(name, t)
        check_rows(name, t)
    check_together(x=x, y=y, a=bank.a)
    check_shape("x", x, (x.shape[0], bank.a.shape[3]), "A has one column for each feature of x.")
    if y.dim() != 2 or len(y) != len(x) or y.shape[1] < bank.parts[-1][1]:
        raise ShapeError(
            f"y has shape {tuple(y.shape)}, for x {tuple(x.shape)} and a bank of parts {bank.parts}.",
            "Every row of x has a row of y, with the columns that the bank's parts name.",
            f"y of shape ({len(x)}, {bank.parts[-1][1]}) or wider.",
        )
