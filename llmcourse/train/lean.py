"""A training loop that spends memory carefully: 16-bit weights or autocast, small pieces, recomputing.

It is `train.fit` with the four remedies of this folder as arguments, so that each can be turned off and the
curves be compared: none of them should change what is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from llmcourse.errors import ShapeError
from llmcourse.models import Transformer
from llmcourse.train.accumulate import accumulate, micro_batches
from llmcourse.train.checkpoint import Checkpointed
from llmcourse.train.fit import scale_at
from llmcourse.train.precision import PRECISIONS, LossScaler, MasterWeights, Precision
from llmcourse.train.tasks import Batch


@dataclass
class Run:
    """The loss at every step, and what the loss scaler did."""

    curve: list[float] = field(default_factory=list)
    skipped: int = 0
    scale: float = 1.0


def fit_lean(
    model: Transformer,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 3e-3,
    precision: str | Precision = "float32",
    rows: int | None = None,
    every: int = 0,
    starts: Sequence[int] | None = None,
    clip: float = 1.0,
    scaler: LossScaler | None = None,
) -> Run:
    """Train `model` in place by AdamW.

    precision   a policy of `PRECISIONS` or its name; the model's weights take its `stored` format
    rows        sequences of a micro-batch; None: the whole batch at once
    every, starts   how blocks are checkpointed, see `Checkpointed`
    scaler      the loss scaler, where the policy has one; None: the default

    Raises ShapeError when `steps` is below 1, or the batches run out.
    """
    if steps < 1:
        raise ShapeError(f"{steps} steps.", "Training takes at least one.", "steps = 100.")
    policy = PRECISIONS[precision] if isinstance(precision, str) else precision
    model.to(policy.stored).train()
    masters = MasterWeights(model.parameters()) if policy.masters else None
    trained = masters.parameters if masters else list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    scaler = (scaler or LossScaler()) if policy.scaled else None
    net: Any = _Net(Checkpointed(model, every, starts=starts), policy, model.device)
    run = Run()
    for step, batch in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * scale_at(step, steps, max(1, steps // 10))
        pieces = list(micro_batches(batch, rows or len(batch.targets)))
        run.curve.append(accumulate(net, pieces, scale=scaler.scale if scaler else 1.0))
        if masters:
            masters.take_gradients()
        if scaler is None or scaler.unscale(trained):
            nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            if masters:
                masters.write_back()
        optimizer.zero_grad()
    if len(run.curve) < steps:
        raise ShapeError(
            f"the batches ran out after {len(run.curve)} of {steps} steps.",
            "Each step takes a new batch from the iterable.",
            f"steps = {len(run.curve)}, or an iterable that does not end.",
        )
    if scaler:
        run.skipped, run.scale = scaler.skipped, scaler.scale
    return run


class _Net(nn.Module):
    """The model inside its policy's context; logits in float32, for a loss that is summed there."""

    def __init__(self, net: nn.Module, policy: Precision, device: torch.device) -> None:
        super().__init__()
        self.net, self.policy, self.device = net, policy, device

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with self.policy.context(self.device):
            return self.net(tokens).float()
