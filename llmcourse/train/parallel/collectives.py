"""Collectives that count: how often each is called, and how many bytes this rank puts on the wire.

For n ranks and a tensor of S bytes a rank must send at least

| collective | bytes sent by each rank | why |
|---|---|---|
| `all_reduce` | 2·(n−1)/n·S | every element is reduced once and spread once |
| `reduce_scatter` (S in) | (n−1)/n·S | all but its own share leaves the rank |
| `all_gather` (S out) | (n−1)/n·S | its share reaches n−1 others, by way of each other |
| `broadcast` | S, except at the end of the chain | each passes on what it got |
| `all_to_all` (S in) | (n−1)/n·S | all but its own part leaves |
| `send` | S | |

and a ring attains each of them. `Wire` charges these; how the back end really sends is its own affair (for
small tensors a tree takes fewer steps for more bytes). `ring_all_reduce` is the ring itself, made of sends
that are counted one by one: the tests hold its sum to the first line of the table (Patarasuk & Yuan 2009,
doi:10.1016/j.jpdc.2008.09.002).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmcourse.errors import ShapeError

Work = Any  # what torch.distributed returns for a collective that is under way: .wait()

# Renamed in PyTorch 2.13.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Call:
    """One collective: its name, the elements of its tensor, and the bytes that this rank sends for it."""

    name: str
    elements: int
    bytes_sent: int


class Wire:
    """Collectives of one process group, counted.

    calls        how often each was called, by name
    bytes_sent   bytes that this rank sends, by name (the least that the collective needs)
    sequence     every call in order
    averages     whether the back end can average while it sums (NCCL)

    Tensors must be contiguous, of the same shape and type on all ranks. Ranks are those of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.averages = dist.get_backend(group) == "nccl"  # has ReduceOp.AVG
        self.calls: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.sequence: list[Call] = []

    # ── the counters ─────────────────────────────────────────────────────────────────────────────

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_sent.values())

    def reset(self) -> None:
        self.calls.clear()
        self.bytes_sent.clear()
        self.sequence.clear()

    def summary(self) -> str:
        """The calls in order, repetitions folded: "all_gather ×4, reduce_scatter ×2"."""
        runs = [(name, len(list(calls))) for name, calls in groupby(c.name for c in self.sequence)]
        return ", ".join(name if n == 1 else f"{name} ×{n}" for name, n in runs)

    def count(self, name: str, tensor: Tensor, bytes_sent: int) -> None:
        """Enter one call. A subclass may do more here, such as wait as long as a slow link would take."""
        self.calls[name] += 1
        self.bytes_sent[name] += bytes_sent
        self.sequence.append(Call(name, tensor.numel(), bytes_sent))

    # ── all ranks together ───────────────────────────────────────────────────────────────────────

    def all_reduce(self, tensor: Tensor, *, op: Any = dist.ReduceOp.SUM, async_op: bool = False) -> Work:
        """Sum `tensor` over the ranks, in place on each. With `async_op`, wait for what comes back."""
        self.count("all_reduce", tensor, 2 * self._others_share(tensor))
        return dist.all_reduce(tensor, op=op, group=self.group, async_op=async_op)

    def reduce_scatter(
        self, output: Tensor, tensor: Tensor, *, op: Any = dist.ReduceOp.SUM, async_op: bool = False
    ) -> Work:
        """Sum `tensor` [n·k, …] over the ranks; rank r gets rows r·k … (r+1)·k in `output` [k, …]."""
        self._require_shares(output, tensor, "reduce_scatter")
        self.count("reduce_scatter", tensor, self._others_share(tensor))
        return _REDUCE_SCATTER(output, tensor, op=op, group=self.group, async_op=async_op)

    def all_gather(self, output: Tensor, tensor: Tensor, *, async_op: bool = False) -> Work:
        """Put every rank's `tensor` [k, …] into `output` [n·k, …], in order of rank, on every rank."""
        self._require_shares(tensor, output, "all_gather")
        self.count("all_gather", output, (self.size - 1) * tensor.nbytes)
        return _ALL_GATHER(output, tensor, group=self.group, async_op=async_op)

    def broadcast(self, tensor: Tensor, src: int = 0, *, async_op: bool = False) -> Work:
        """Overwrite `tensor` with rank `src`'s. Along a chain from `src`, the last rank sends nothing."""
        last = (src - 1) % self.size
        self.count("broadcast", tensor, 0 if self.rank == last else tensor.nbytes)
        return dist.broadcast(tensor, group=self.group, group_src=src, async_op=async_op)

    def all_to_all(self, output: Tensor, tensor: Tensor, *, async_op: bool = False) -> Work:
        """Row block i of `tensor` [n·k, …] goes to rank i, where it becomes row block `rank` of `output`."""
        if output.shape != tensor.shape or tensor.shape[0] % self.size:
            raise ShapeError(
                f"all_to_all of {list(tensor.shape)} into {list(output.shape)} among {self.size} ranks.",
                "Each rank gives and gets one block of rows for every rank.",
                f"equal shapes with a multiple of {self.size} rows.",
            )
        self.count("all_to_all", tensor, self._others_share(tensor))
        return dist.all_to_all_single(output, tensor, group=self.group, async_op=async_op)

    def barrier(self) -> None:
        """Wait for all ranks. No data, hence no bytes."""
        self.count("barrier", torch.empty(0), 0)
        dist.barrier(group=self.group)

    # ── one to one ───────────────────────────────────────────────────────────────────────────────

    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        """Send to rank `dst`, which must `recv` that shape and type; returns when `tensor` may change."""
        self.count("send", tensor, tensor.nbytes)
        dist.send(tensor, group=self.group, group_dst=dst, tag=tag)

    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> Tensor:
        """Overwrite `tensor` with what rank `src` sends, and return it."""
        self.count("recv", tensor, 0)
        dist.recv(tensor, group=self.group, group_src=src, tag=tag)
        return tensor

    def isend(self, tensor: Tensor, dst: int, *, tag: int = 0) -> Work:
        """`send` that goes on in the background: `tensor` must stay as it is until `.wait()`."""
        self.count("send", tensor, tensor.nbytes)
        return dist.isend(tensor, group=self.group, group_dst=dst, tag=tag)

    def irecv(self, tensor: Tensor, src: int, *, tag: int = 0) -> Work:
        """`recv` that goes on in the background: `tensor` is there after `.wait()`."""
        self.count("recv", tensor, 0)
        return dist.irecv(tensor, group=self.group, group_src=src, tag=tag)

    def exchange(self, outgoing: Tensor, dst: int, incoming: Tensor, src: int) -> Tensor:
        """Send and receive at the same time: no rank waits for another to receive first."""
        if self.size == 1:
            return incoming.copy_(outgoing)
        self.count("send", outgoing, outgoing.nbytes)
        self.count("recv", incoming, 0)
        swap = [
            dist.P2POp(dist.isend, outgoing, group=self.group, group_peer=dst),
            dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=src),
        ]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        return incoming

    # ── sizes ────────────────────────────────────────────────────────────────────────────────────

    def _others_share(self, tensor: Tensor) -> int:
        """(n−1)/n of the bytes of `tensor`."""
        return tensor.nbytes * (self.size - 1) // self.size

    def _require_shares(self, share: Tensor, whole: Tensor, name: str) -> None:
        if share.numel() * self.size != whole.numel() or share.dtype != whole.dtype:
            raise ShapeError(
                f"{name} between a share of {share.numel()} elements and a whole of {whole.numel()}.",
                f"{self.size} ranks have {self.size} equal shares of one type.",
                f"padding the whole to a multiple of {self.size}.",
            )


def ring_all_reduce(tensor: Tensor, wire: Wire) -> Tensor:
    """Sum `tensor` over the ranks, in place on each, by sends to the next rank alone.

    The tensor is cut into n chunks. In n−1 steps each rank passes a chunk on to its right neighbour, which
    adds its own: after them rank r holds the finished chunk r+1 (mod n). In n−1 more steps the finished
    chunks go round. Each step moves S/n bytes on every link at once: 2·(n−1)/n·S bytes for each rank, fewer
    than 2·S however many ranks there are.

    Shapes   any, contiguous; where n does not divide the number of elements, chunks differ by one element.
    """
    n, rank = wire.size, wire.rank
    flat = tensor.view(-1)
    chunks = list(flat.tensor_split(n))
    right, left = (rank + 1) % n, (rank - 1) % n
    for step in range(n - 1):  # reduce-scatter
        outgoing, mine = chunks[(rank - step) % n], chunks[(rank - step - 1) % n]
        mine += wire.exchange(outgoing, right, torch.empty_like(mine), left)
    for step in range(n - 1):  # all-gather
        outgoing, into = chunks[(rank + 1 - step) % n], chunks[(rank - step) % n]
        wire.exchange(outgoing, right, into, left)
    return tensor
