"""The training loop: forward, loss, backward, clip, step. The same curve for the same seeds.

What a run depends on is all passed in: weights (`build` draws them from a seed), batches (every task of
`train.tasks` draws from a seed of its own) and the number of steps. The learning rate climbs for a few
steps, because Adam's first steps are as long as its later ones while its estimates are still noise, and
then falls along a cosine to a tenth. Gradients are clipped by their norm over all parameters (Pascanu et al.
2013, arXiv:1211.5063), so that one odd batch cannot throw the weights away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import GraphError, ShapeError
from llmcourse.train import schedules
from llmcourse.train.optim import decay_groups
from llmcourse.train.tasks import IGNORE, Batch

Model = TypeVar("Model", bound=nn.Module)

SHORT_MEMORY = partial(torch.optim.AdamW, betas=(0.9, 0.98))
"""AdamW for runs of a few hundred steps: a mean of squares over the last 50 of them."""


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss in nats over the positions of a batch at which something is asked."""
    return token_loss(model(*batch.inputs).flatten(0, 1), batch.targets.flatten())


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log softmax(logits)[target], logits [N, V], over the targets [N] that are not IGNORE."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORE)


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float = 3e-3,
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    warmup: int | None = None,
    weight_decay: float = 0.01,
    clip: float = 1.0,
) -> list[float]:
    """Train `model` in place, by AdamW unless told otherwise; its loss at every step.

    batches       anything that yields `steps` batches or more; `Batch` for the loss that is used by default
    loss          of (model, batch): one number to go downhill on
    optimizer     makes one of (groups of parameters, lr=lr); AdamW with a short memory unless given
    warmup        steps of climbing learning rate; a tenth of all unless given
    weight_decay  for matrices only: norms and biases have no reason to be near zero
    clip          the largest norm that the gradient of all parameters may have

    Raises ShapeError when `steps` is below 1 or the batches run out, GraphError when no weight may change.
    """
    if steps < 1:
        raise ShapeError(f"{steps} steps.", "Training takes at least one.", "steps = 100.")
    warmup = max(1, steps // 10) if warmup is None else max(1, warmup)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise GraphError(
            f"no weight of this {type(model).__name__} wants a gradient.",
            "A model that was loaded to be run is frozen, so that no graph is recorded.",
            "model.requires_grad_(True).",
        )
    stepper = (optimizer or SHORT_MEMORY)(decay_groups(model, weight_decay), lr=lr)
    curve: list[float] = []
    was_training = model.training
    model.train()
    try:
        for step, batch in enumerate(islice(batches, steps)):
            for group in stepper.param_groups:
                group["lr"] = lr * scale_at(step, steps, warmup)
            value = loss(model, batch)
            stepper.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            stepper.step()
            curve.append(value.item())
    finally:  # also when a reader interrupts
        model.train(was_training)
    if len(curve) < steps:
        raise ShapeError(
            f"the batches ran out after {len(curve)} of {steps} steps.",
            "Each step takes a new batch from the iterable.",
            f"steps = {len(curve)}, or an iterable that does not end.",
        )
    return curve


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's CPU work on one thread inside the `with`, or, as a decorator, inside the function.

    Models of a few thousand parameters are too small to share between cores: threads would wait for each
    other for longer than they work, many times longer on a busy machine. And sums keep their order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def scale_at(step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step as a share of the highest: up a ramp, then down a cosine to a tenth."""
    return schedules.cosine(step, steps, warmup=warmup, floor=0.1)


def build(make: Callable[..., Model], *args: Any, seed: int, **options: Any) -> Model:
    """`make(*args, **options)`, its weights drawn from `seed`, its embeddings a twentieth of PyTorch's.

    PyTorch draws embeddings from N(0, 1). With a tied head the first logits would then be as large as √E, and
    training would spend its first steps on taking back a certainty that nothing has earned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(*args, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight *= 0.05
    return model


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """The share of the asked positions at which the largest logit is the right one."""
    asked = batch.targets != IGNORE
    return float((model(*batch.inputs).argmax(-1) == batch.targets)[asked].float().mean())
