"""The points of a training step: the gate's backward, the loss, the schedule, and the optimizers' steps.

A learner's function that gives a gradient stands inside of a `torch.autograd.Function`: forward keeps what it
needs, backward calls it. One that makes a step gets copies, so that it may write over its arguments, and what
it returns is put where the optimizer keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmcourse.plug.kernels import MODELS, rows, tensor
from llmcourse.plug.point import LearnersCode, Point, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.models.mlp import MLP

TRAIN = "llmcourse.train"
STEP = ("w", "g", "m", "v", "t", "lr", "beta1", "beta2", "eps", "weight_decay")
Update = Callable[..., None]


def swiglu_backward(code: LearnersCode) -> Callable[[MLP, Tensor], Tensor]:
    import torch
    import torch.nn.functional as F

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return F.silu(gate) * up

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            gate, up = (x.clone() for x in ctx.saved_tensors)
            parts = code.parts(code(gate, up, grads[0].clone()), ("d_gate", "d_up"))
            like = ctx.saved_tensors[0]
            return tuple(
                tensor(code, part, like, tuple(like.shape), name)
                for name, part in zip(("d_gate", "d_up"), parts, strict=True)
            )

    def forward(self: MLP, x: Tensor) -> Tensor:
        gate, up = (rows(half) for half in self.gate_up(x).chunk(2, dim=-1))
        y: Tensor = Gate.apply(gate, up)
        return self.down(y.view(*x.shape[:-1], -1))

    return forward


def token_loss(code: LearnersCode) -> Callable[[Tensor, Tensor], Tensor]:
    import torch

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
            value, grad = code.parts(code(logits.clone(), targets.clone()), ("loss", "grad"))
            ctx.save_for_backward(tensor(code, grad, logits, tuple(logits.shape), "grad"))
            try:
                return torch.as_tensor(value, dtype=torch.float32, device=logits.device).reshape(()).clone()
            except (TypeError, ValueError, RuntimeError):
                why = f"The training goes on with it as if it were its own. {code.point.says}"
                code.refuse(f"loss is {value!r:.60}, and should be a single number", why, ".mean().")

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            (grad,) = ctx.saved_tensors
            return grad * grads[0].to(grad.dtype), None

    def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = Loss.apply(logits, targets)
        return loss

    return mean_loss


def learning_rate(code: LearnersCode) -> Callable[..., float]:
    def cosine(step: int, steps: int, *, warmup: int = 0, floor: float = 0.0) -> float:
        if warmup >= steps:  # the ramp is all there is: not what the point asks for
            return min(1.0, (step + 1) / warmup)
        return float(code.number(code(step, steps, warmup, 1.0, floor), "the rate", "float64"))

    return cosine


def _step(code: LearnersCode, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Let the learner's function step `w`, and keep its means under the names that torch gives them."""
    import torch

    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
    state["step"] += 1
    given = (x.detach().clone() for x in (w, g, state["exp_avg"], state["exp_avg_sq"]))
    settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    results = code.parts(code(*given, int(state["step"]), *settings), ("w", "m", "v"))
    after = [
        tensor(code, part, w, tuple(w.shape), name)
        for name, part in zip(("w", "m", "v"), results, strict=True)
    ]
    w.copy_(after[0])
    state["exp_avg"].copy_(after[1])
    state["exp_avg_sq"].copy_(after[2])


def adamw_step(code: LearnersCode) -> Update:
    def update(self: Any, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        _step(code, w, g, state, group)

    return update


def lamb_step(code: LearnersCode) -> Update:
    from llmcourse.train.optim import LAMB

    own = LAMB.update

    def update(self: Any, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["bounds"] or not group["adapt"]:
            own(self, w, g, state, group)  # variants that the exercise does not have
        else:
            _step(code, w, g, state, group)

    return update


_POINTS: tuple[tuple[Any, ...], ...] = (
    (
        "swiglu_backward",
        ("gate", "up", "grad"),
        "(d_gate, d_up)",
        "The gradients of y = silu(gate)·up for a gradient of y; all tensors [M, N].",
        (f"{MODELS}.mlp:MLP.forward",),
        swiglu_backward,
    ),
    (
        "token_loss",
        ("logits", "targets"),
        "(loss, grad)",
        "Mean cross-entropy of logits [N, V] over targets [N] that are not −100, and its gradient [N, V].",
        (
            f"{TRAIN}.fit:token_loss",
            "llmcourse.compress.distill:token_loss",
            "llmcourse.compress.draft_training:token_loss",
        ),
        token_loss,
    ),
    (
        "learning_rate",
        ("step", "steps", "warmup", "peak", "floor"),
        "number",
        "The rate of a step: up a ramp to peak, then down a cosine to floor.",
        (f"{TRAIN}.schedules:cosine",),
        learning_rate,
    ),
    (
        "adamw_step",
        STEP,
        "(w, m, v)",
        "One step of AdamW: the weight and its two running means after it, each of w's shape.",
        (f"{TRAIN}.optim:AdamW.update",),
        adamw_step,
    ),
    (
        "lamb_step",
        STEP,
        "(w, m, v)",
        "One step of LAMB: the weight and its two running means after it, each of w's shape.",
        (f"{TRAIN}.optim:LAMB.update",),
        lamb_step,
    ),
)

for _point in _POINTS:
    register(Point(*_point))
