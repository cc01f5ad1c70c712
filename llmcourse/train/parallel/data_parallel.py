"""Data parallel training: every rank has the whole model and a part of the batch; gradients are averaged.

The mean of the ranks' gradients is the gradient of the mean loss over all parts (when the parts are of equal
size), so that every rank takes the step that one process would have taken with the whole batch.

Two things make it fast (Li et al. 2020, arXiv:2006.15704).

**Buckets.** A collective costs a fixed time besides the time for its bytes, and a model has hundreds of small
tensors. Gradients are packed into buckets of some megabytes, one collective each.

**Overlap.** Backward makes the last layers' gradients first. A bucket is on its way as soon as its last
gradient is there, while backward goes on to earlier layers; only the bucket that is filled last has nothing
left to hide behind. Buckets are therefore filled in reverse order of the parameters, and they start in the
same order on every rank, whatever order they fill up in: collectives are matched by order alone.

    parallel = DataParallel(model, Wire())
    loss = cross_entropy(model, shard_batch(batch, rank, n))
    loss.backward()              # buckets leave from hooks
    parallel.finish()            # wait for them: .grad is now the mean over the ranks
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmcourse.errors import GraphError, ShapeError
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.tasks import Batch

BUCKET_BYTES = 4 << 20


class Handle(Protocol):
    """A collective that is under way."""

    def wait(self) -> object: ...


class Bucket:
    """Gradients of some parameters, side by side in one buffer.

    flat      [elements], zero where no gradient has come
    started   gradients of the whole model that were still to come when it left (0: nothing to hide behind)
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        sizes = [p.numel() for p in parameters]
        self.views = [part.view_as(p) for part, p in zip(self.flat.split(sizes), parameters, strict=True)]
        self.reset()

    def reset(self) -> None:
        self.missing = set(range(len(self.parameters)))
        self.handle: Handle | None = None
        self.started: int | None = None

    def fill(self, i: int) -> None:
        """Take the gradient of parameter i over; `.grad` becomes a view of the bucket."""
        gradient = self.parameters[i].grad
        assert gradient is not None
        if gradient.data_ptr() != self.views[i].data_ptr():
            self.views[i].copy_(gradient)
            self.parameters[i].grad = self.views[i]
        self.missing.discard(i)


class DataParallel:
    """Averages the gradients of `model` over the ranks of `wire`, in buckets, during backward.

    bucket_bytes   a bucket is closed when it reaches this size
    overlap        False: nothing leaves before `finish` (to see what overlapping gains)
    exchange       (index, flat) → handle: after its wait() `flat` must hold the mean over the ranks.
                   By default an all-reduce; a compressed exchange goes here

    The weights and buffers of rank 0 are copied to all ranks at the start. A parameter that took no part in
    the loss counts as having gradient zero.
    """

    def __init__(
        self,
        model: nn.Module,
        wire: Wire,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        overlap: bool = True,
        exchange: Callable[[int, Tensor], Handle] | None = None,
    ) -> None:
        self.model, self.wire, self.overlap = model, wire, overlap
        self.exchange = exchange or self._mean
        copy_from_rank_0(model, wire)
        self.buckets = [Bucket(group) for group in _groups(model, bucket_bytes)]
        if not self.buckets:
            raise GraphError(
                f"no weight of this {type(model).__name__} wants a gradient.",
                "There is nothing to average.",
                "model.requires_grad_(True).",
            )
        self._next = 0  # the bucket that leaves next
        self._to_come = self._total = sum(len(b.parameters) for b in self.buckets)
        self._syncing = True
        for bucket in self.buckets:
            for i, p in enumerate(bucket.parameters):
                p.register_post_accumulate_grad_hook(self._hook(bucket, i))

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self.model(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only add to `.grad`: for all micro-batches of a step but the last."""
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    def finish(self) -> None:
        """Send what has not left yet, and wait: then every `.grad` is the mean over the ranks."""
        for bucket in self.buckets:
            for i in sorted(bucket.missing):
                if bucket.parameters[i].grad is None:
                    bucket.views[i].zero_()
                    bucket.parameters[i].grad = bucket.views[i]
                bucket.fill(i)
        self._to_come = 0
        self._send_full()
        for bucket in self.buckets:
            assert bucket.handle is not None
            bucket.handle.wait()
        self.left_during_backward = sum(bool(b.started) for b in self.buckets)
        for bucket in self.buckets:
            bucket.reset()
        self._next, self._to_come = 0, self._total

    left_during_backward: int = 0

    def _hook(self, bucket: Bucket, i: int) -> Callable[[Tensor], None]:
        def gradient_is_there(_: Tensor) -> None:
            if not self._syncing:
                return
            if i not in bucket.missing:
                raise GraphError(
                    "a second backward pass came before the gradients of the first were finished.",
                    "The buckets of the first are on their way, and would be changed under it.",
                    "parallel.finish() after each backward, or parallel.no_sync() around all but the last.",
                )
            bucket.fill(i)
            self._to_come -= 1
            if self.overlap:
                self._send_full()

        return gradient_is_there

    def _send_full(self) -> None:
        """Start the buckets that are full, but none before those that come earlier in the list."""
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            bucket = self.buckets[self._next]
            bucket.started = self._to_come
            bucket.handle = self.exchange(self._next, bucket.flat)
            self._next += 1

    def _mean(self, index: int, flat: Tensor) -> Handle:
        if self.wire.averages:
            return self.wire.all_reduce(flat, op=dist.ReduceOp.AVG, async_op=True)
        flat /= self.wire.size
        return self.wire.all_reduce(flat, async_op=True)


def _groups(model: nn.Module, bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in reverse order, cut where a bucket is full or the type changes."""
    group: list[nn.Parameter] = []
    for p in reversed([p for p in model.parameters() if p.requires_grad]):
        if group and (p.dtype != group[0].dtype or sum(q.nbytes for q in group) >= bucket_bytes):
            yield group
            group = []
        group.append(p)
    if group:
        yield group


@torch.no_grad()
def copy_from_rank_0(model: nn.Module, wire: Wire) -> None:
    """Give every rank the weights and buffers of rank 0."""
    for tensor in [*model.parameters(), *model.buffers()]:
        whole = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
        wire.broadcast(whole)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


def shard_batch(batch: Batch, rank: int, size: int) -> Batch:
    """The rows of a batch that are this rank's: every rank gets as many.

    Raises ShapeError when the rows cannot be dealt out evenly: the mean of the ranks' losses would then not
    be the loss of the batch.
    """
    rows = len(batch.targets)
    if rows % size:
        raise ShapeError(
            f"a batch of {rows} sequences for {size} ranks.",
            "The mean of the ranks' losses is the batch's loss only where the parts are of equal size.",
            f"a batch of {rows - rows % size or size} sequences.",
        )
    mine = slice(rank * rows // size, (rank + 1) * rows // size)
    return Batch(tuple(t[mine] for t in batch.inputs), batch.targets[mine])
