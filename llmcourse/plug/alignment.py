"""The points of `llmcourse.train.alignment`: the losses of DPO and PPO.

    with plug(dpo_loss=my_dpo_loss) as used:
        run = train_dpo(base, pairs)
    used.calls["dpo_loss"]                      # once a step

A loss comes back as one number that a gradient can leave: training goes on by `loss.backward()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmcourse.plug.kernels import tensor
from llmcourse.plug.point import LearnersCode, Point, register

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = "llmcourse.train.alignment"


def _loss(code: LearnersCode) -> Callable[..., Tensor]:
    def loss(policy: Tensor, *rest: Tensor | float) -> Tensor:
        value = tensor(code, code(policy, *rest), policy, (), "the loss")
        if policy.requires_grad and not value.requires_grad:
            code.refuse(
                "the loss has lost the policy's graph",
                "Training sends a gradient from the loss back to the policy's weights.",
                "tensors all the way: no .item(), no detach() of the policy.",
            )
        return value

    return loss


for _point in (
    Point(
        "dpo_loss",
        ("policy", "reference", "mask", "beta"),
        "tensor",
        "DPO's loss of log-probabilities [2, B, T], the chosen answers first: one number.",
        (f"{ALIGNMENT}:dpo_loss", f"{ALIGNMENT}.dpo:dpo_loss"),
        _loss,
    ),
    Point(
        "ppo_objective",
        ("policy", "old", "advantages", "mask", "clip"),
        "tensor",
        "Minus PPO's mean clipped gain over the tokens of the mask, all [N, T]: one number.",
        (f"{ALIGNMENT}:ppo_objective", f"{ALIGNMENT}.ppo:ppo_objective"),
        _loss,
    ),
):
    register(_point)
