"""Activation checkpointing: keep little, compute it again.

A checkpointed piece of a network runs forward without recording a graph and keeps its *inputs*. When the
backward pass arrives, the piece runs once more, recording this time, goes backward, and lets go again. Memory
falls from everything inside to what stands at the borders; the price is one more forward pass of the piece, a
third of a training step's work at most (forward 1, backward 2, and 1 again).

**How large should a piece be?** With n blocks in pieces of k, there are n/k borders alive, and the inside of
one piece. Where both cost the same, n/k + k is least at k = √n (Chen et al. 2016, arXiv:1604.06174). In a
transformer the inside of a block costs some twenty times its border, and `best_segment` finds pieces of one
or two blocks: the √n of the paper is for chains whose steps keep one tensor each.

Written by hand below, with the two things that are easily forgotten: dropout must draw the *same* numbers the
second time, and autocast must be what it was. torch.utils.checkpoint does the same and more (`by="torch"`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from llmcourse.errors import GraphError, ShapeError
from llmcourse.models import Transformer
from llmcourse.train.saved import saved_tensors

By = Literal["hand", "torch"]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], conditions: Conditions, *inputs: Tensor) -> Tensor:
        ctx.run, ctx.conditions = run, conditions
        ctx.save_for_backward(*inputs)
        return run(*inputs)  # a Function's forward records nothing

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with ctx.conditions.again(), torch.enable_grad():
            output = ctx.run(*inputs)
        # Weights inside `run` are no inputs of this function: their gradients arrive in `.grad` here.
        torch.autograd.backward(output, grads[0])
        return None, None, *(t.grad for t in inputs)


class Conditions:
    """What a second run must find as the first did: random states and autocast."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)

    def again(self) -> _Again:
        return _Again(self)


class _Again:
    """Inside, random numbers and autocast are those of the first run; afterwards they go on as they were."""

    def __init__(self, first: Conditions) -> None:
        self.first = first
        self.fork = torch.random.fork_rng(devices=first.devices)
        self.autocast = torch.autocast(first.kind, dtype=first.autocast[1], enabled=first.autocast[0])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.set_rng_state(self.first.cpu)
        for device, state in zip(self.first.devices, self.first.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        self.autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.autocast.__exit__(*error)
        self.fork.__exit__(*error)


def checkpoint(run: Callable[..., Tensor], *inputs: Tensor, by: By = "hand") -> Tensor:
    """`run(*inputs)`, of which only the inputs are kept for backward, and the rest computed again.

    run   gives one tensor; may use weights of its own, and must give the same again for the same random state
    by    "hand": the function above; "torch": torch.utils.checkpoint, non-reentrant

    Raises GraphError when the graph is recorded and no input asks for a gradient: by hand, weights inside
    `run` would then silently get none.
    """
    if not torch.is_grad_enabled():
        return run(*inputs)
    if by == "torch":
        return torch_checkpoint(run, *inputs, use_reentrant=False)
    if not any(t.requires_grad for t in inputs):
        raise GraphError(
            "none of the inputs of a checkpointed piece asks for a gradient.",
            "The piece's backward pass is called through its inputs; weights inside it would get no "
            "gradient.",
            'x.requires_grad_() before the piece, or by="torch".',
        )
    return _Recomputed.apply(run, Conditions(inputs[0].device), *inputs)


def segments(count: int, length: int) -> list[range]:
    """`count` blocks in pieces of `length`; the last may be shorter."""
    if length < 1:
        raise ShapeError(f"pieces of {length} blocks.", "A piece holds at least one block.", "length = 1.")
    return [range(start, min(start + length, count)) for start in range(0, count, length)]


def kept_bytes(count: int, length: int, border: float, inside: float) -> float:
    """The most that is kept of `count` blocks in pieces of `length`: all borders, and the inside of a piece.

    border, inside   bytes of a block's input, and of all that its backward pass needs besides
    """
    return math.ceil(count / length) * border + min(length, count) * inside


def best_segment(count: int, border: float, inside: float) -> int:
    """The piece's length that keeps least; √(count · border / inside) up to rounding."""
    return min(range(1, count + 1), key=lambda length: (kept_bytes(count, length, border, inside), length))


def best_pieces(border: int, inside: Sequence[int]) -> list[int]:
    """The first block of each piece, for blocks of unequal size, so that least is kept.

    border   bytes of a block's input;  inside: bytes that each block keeps besides

    A piece may keep as much as the largest one does for free. So each sum of neighbours is tried as a limit:
    filling pieces up to it makes as few as possible, and kept is border · pieces + the largest.
    """
    if not inside:
        return []
    sums = {sum(inside[i:j]) for i in range(len(inside)) for j in range(i + 1, len(inside) + 1)}
    tried = (_filled(inside, limit) for limit in sorted(sums) if limit >= max(inside))
    return min(tried, key=lambda starts: kept_in_pieces(border, inside, starts))


def _filled(inside: Sequence[int], limit: int) -> list[int]:
    starts, held = [0], 0
    for i, size in enumerate(inside):
        if held + size > limit:
            starts.append(i)
            held = 0
        held += size
    return starts


def kept_in_pieces(border: int, inside: Sequence[int], starts: Sequence[int]) -> int:
    """Bytes kept at most: a border for each piece, and the inside of the largest."""
    ends = [*starts[1:], len(inside)]
    return border * len(starts) + max(sum(inside[i:j]) for i, j in zip(starts, ends, strict=True))


def measured_pieces(model: Transformer, tokens: Tensor) -> list[int]:
    """`best_pieces` for a model, by what each of its blocks keeps of these tokens [B, S]."""
    step = model.plan(tokens, None)
    x = model.positions(model.embedding(tokens), step.position_ids).detach()
    inside = []
    for block in model.blocks:
        with saved_tensors(model, x, *(t for t in (step.cos, step.sin) if t is not None)) as saved:
            y = block(x.requires_grad_(), step, None)
        inside.append(saved.bytes)
        x = y.detach()
    return best_pieces(x.nbytes, inside)


class Checkpointed(nn.Module):
    """A transformer whose blocks are checkpointed in pieces. Same weights, same logits, same gradients.

    every    blocks in a piece: 1 keeps each block's input, 0 checkpoints nothing
    starts   the first block of each piece, for pieces of unequal length; `every` then says nothing
    """

    def __init__(
        self, model: Transformer, every: int = 1, *, starts: Sequence[int] | None = None, by: By = "hand"
    ) -> None:
        super().__init__()
        self.model, self.every, self.starts, self.by = model, every, starts, by

    def pieces(self) -> list[range]:
        count = len(self.model.blocks)
        if self.starts is None:
            return segments(count, self.every or max(1, count))
        if list(self.starts[:1]) != [0] or sorted(set(self.starts)) != list(self.starts):
            raise ShapeError(
                f"pieces that begin at blocks {list(self.starts)}.",
                f"They cover blocks 0 to {count - 1} in order.",
                "starts = [0, 3, 6], for instance.",
            )
        return [range(a, b) for a, b in zip(self.starts, [*self.starts[1:], count], strict=True)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] for tokens [B, S]."""
        return self.model.head(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """What the output head reads, [B, S, E]: for a loss that never holds all logits."""
        model = self.model
        step = model.plan(tokens, None)
        x = model.positions(model.embedding(tokens), step.position_ids)
        checkpointed = self.starts is not None or self.every
        for piece in self.pieces():
            run = _through([model.blocks[i] for i in piece], step)
            x = checkpoint(run, x, by=self.by) if checkpointed else run(x)
        return model.norm(x)


def _through(blocks: Sequence[nn.Module], step: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x, step, None)
        return x

    return run
