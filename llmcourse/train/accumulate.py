"""Gradient accumulation: the gradient of a large batch from small pieces of it.

The loss of a batch is a mean over the tokens that are asked, and a mean of means is not the mean: a piece
with 3 tokens would weigh as much as one with 300. Pieces have unequal counts whenever the batch does not
divide, sequences are padded or prompts are masked. So each piece contributes the *sum* of its losses, divided
by the count of the *whole* batch, which must be known before the first piece goes backward:

    Σ_pieces ∇ (Σ_tokens loss) / n  =  ∇ (Σ_tokens loss / n),       n = tokens asked in the whole batch

Only one piece's activations are alive at a time. (Over several workers n is summed over the workers first.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.train.tasks import IGNORE, Batch

SumLoss = Callable[[nn.Module, Batch], Tensor]


def summed_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Sum, not mean, of the losses in nats over the asked positions of a batch."""
    logits = model(*batch.inputs).flatten(0, 1)
    return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")


def asked(batch: Batch) -> int:
    """Positions of a batch at which something is asked."""
    return int((batch.targets != IGNORE).sum())


def micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in pieces of `rows` sequences; the last one may be smaller."""
    if rows < 1:
        raise ShapeError(f"micro-batches of {rows} sequences.", "A piece holds at least one.", "rows = 1.")
    for start in range(0, len(batch.targets), rows):
        part = slice(start, start + rows)
        yield Batch(tuple(t[part] for t in batch.inputs), batch.targets[part])


def accumulate(
    model: nn.Module,
    pieces: Sequence[Batch],
    *,
    loss: SumLoss = summed_cross_entropy,
    count: int | None = None,
    scale: float = 1.0,
) -> float:
    """Add to every `.grad` the gradient of the mean loss over all pieces together; returns that mean.

    loss    of (model, piece): the *sum* over the piece's asked tokens
    count   asked tokens of the whole batch, where other workers have the rest of it
    scale   a factor on the gradients alone: a loss scaler's

    A piece in which nothing is asked is skipped. Raises ShapeError when nothing is asked in any.
    """
    counts = [asked(piece) for piece in pieces]
    total = sum(counts) if count is None else count
    if total < 1:
        raise ShapeError(
            f"nothing is asked in {len(pieces)} micro-batches.",
            f"The loss is a mean over asked tokens; every target is {IGNORE}.",
            "a batch with at least one target.",
        )
    mean = 0.0
    for piece, n in zip(pieces, counts, strict=True):
        if n:
            value = loss(model, piece) / total
            (value * scale).backward()
            mean += value.item()
    return mean
