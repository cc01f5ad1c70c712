"""The points of training in little memory: the loss scaler, the checkpointed half of a block, where to cut.

A learner's layer knows the norm without a weight; the package's norms have one, which is multiplied into the
matrix behind it. The learner's part must carry gradients: `train.lean.fit_lean` trains through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from llmcourse.plug.kernels import MODELS, tensor
from llmcourse.plug.point import LearnersCode, Point, kind, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmcourse.models.block import Block
    from llmcourse.models.mlp import MLP
    from llmcourse.models.state import State
    from llmcourse.models.step import Step
    from llmcourse.train.precision import LossScaler

TRAIN = "llmcourse.train"
EPS = 1e-5


def scaler_step(code: LearnersCode) -> Callable[..., bool]:
    def unscale(self: LossScaler, parameters: Iterable[nn.Parameter]) -> bool:
        with_gradient = [p for p in parameters if p.grad is not None]
        if (self.growth, self.backoff) != (2.0, 0.5):
            code.refuse(
                f"this scaler grows by {self.growth} and shrinks by {self.backoff}",
                "The function doubles and halves.",
                "LossScaler(growth=2.0, backoff=0.5).",
            )
        given = [cast("Tensor", p.grad) for p in with_gradient]
        results = code(given, self.scale, self.good, self.interval)
        gradients, scale, good = code.parts(results, ("grads", "scale", "good"))
        self.scale = float(code.number(scale, "scale", float))
        self.good = int(code.number(good, "good", int))
        if gradients is None:
            self.skipped += 1
            return False
        if not isinstance(gradients, list | tuple) or len(gradients) != len(given):
            code.refuse(
                f"grads is {kind(gradients)}, and should be a list of {len(given)}",
                "The optimizer steps by them.",
                "one gradient for each that came.",
            )
        for p, g in zip(with_gradient, gradients, strict=True):
            p.grad = tensor(code, g, p, tuple(p.shape), "a gradient")
        return True

    return unscale


def checkpointed_mlp(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.models.block import Block
    from llmcourse.models.norm import RMSNorm

    own = Block.forward

    def forward(self: Block, x: Tensor, step: Step, state: State | None) -> Tensor:
        norm, mlp = self.mlp_norm, self.mlp
        if self.post_norm or not isinstance(norm, RMSNorm) or not hasattr(mlp, "gate_up"):
            return own(self, x, step, state)  # another form of block
        if norm.eps != EPS or mlp.gate_up.bias is not None:  # type: ignore[union-attr]
            code.refuse(
                f"this model's norms have eps = {norm.eps}, or its layers biases",
                f"The function knows eps = {EPS} and no biases.",
                "a model of the course's default form.",
            )
        x = x + self.mixer(self.mixer_norm(x), step, state)
        part = cast("MLP", mlp)
        flat, weight = x.flatten(0, -2), part.gate_up.weight * norm.weight
        y = code(flat, weight[None], part.down.weight[None])
        return tensor(code, y, flat, tuple(flat.shape), "the result").view(x.shape)

    return forward


def best_pieces(code: LearnersCode) -> Callable[[int, Sequence[int]], list[int]]:
    def pieces(border: int, inside: Sequence[int]) -> list[int]:
        starts: Any = code(border, list(inside))
        fine = isinstance(starts, list | tuple) and all(type(i) is int for i in starts)
        if not fine or list(starts[:1]) != [0] or sorted(set(starts)) != list(starts):
            code.refuse(
                f"the result is {str(starts)[:60]}, and should be ascending whole numbers from 0",
                "They are the first blocks of the pieces.",
                "a list such as [0, 4, 7].",
            )
        if starts[-1] >= len(inside):
            code.refuse(
                f"block {starts[-1]} begins a piece, of {len(inside)} blocks",
                "Blocks count from 0.",
                f"numbers below {len(inside)}.",
            )
        return list(starts)

    return pieces


for _point in (
    Point(
        "scaler_step",
        ("grads", "scale", "good", "interval"),
        "(grads or None, scale, good)",
        "The true float32 gradients, or None where one is not finite, and the next scale and count.",
        (f"{TRAIN}.precision:LossScaler.unscale",),
        scaler_step,
    ),
    Point(
        "checkpointed_mlp",
        ("x", "gate_up", "down"),
        "tensor",
        "x [N, E] through L feed-forward layers with residuals, of which only the inputs are kept.",
        (f"{MODELS}.block:Block.forward",),
        checkpointed_mlp,
    ),
    Point(
        "best_pieces",
        ("border", "inside"),
        "list of ints",
        "The first block of each checkpointed piece, so that least is kept.",
        (f"{TRAIN}.checkpoint:best_pieces",),
        best_pieces,
    ),
):
    register(_point)
