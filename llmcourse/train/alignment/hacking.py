"""Reward hacking: what is rewarded is learned, and what was meant is not.

A check of sorting that is cheap to write looks at the two ends of an answer only:

    climb = (last digit − first digit) / 9

Among the answers of the model that imitates, it is a fair judge: sorted ones climb most. As a *target* it is
another matter. "0009" climbs more than any honest answer to "3141=", and does not even need the prompt. Under
optimisation the proxy goes up and the true reward goes up with it for a while, then down (Goodhart's law;
measured for learned reward models by Gao et al. 2022, arXiv:2210.10760).

A learned judge is a proxy too. One that orders 97 of 100 unseen pairs right has seen answers of the base
model only: digits of the prompt, in some order. What it has learned is that rising digits are good; whether
they are the prompt's it never had to ask. `train_ppo(base, task, reward=judge, beta=0.0)` finds that out.

The leash helps: far from the reference, where the proxy was never a fair judge, the KL penalty is large.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcourse.models import Transformer
from llmcourse.train.alignment.grpo import train_grpo
from llmcourse.train.alignment.rewards import Reward, Sorting, checked
from llmcourse.train.alignment.sampling import Rollout, kl_from, rollout


def climb(rollout: Rollout) -> Tensor:
    """(last digit − first digit) / 9 of each answer, [N]; 0 for answers with fewer than two digits."""
    rewards = []
    for answer in rollout.answers:
        digits = [i for i in answer if i < 10]
        rewards.append((digits[-1] - digits[0]) / 9 if len(digits) > 1 else 0.0)
    return torch.tensor(rewards, device=rollout.tokens.device)


@dataclass(frozen=True)
class Hacked:
    """A policy trained on a proxy.

    kl_weight     the leash, β;  0: none, ∞: the model before training
    proxy, true   mean rewards of its answers to held-out prompts
    kl            nats an answer from the model it began with
    sample        one prompt with its answer
    course        (proxy, true) of each batch of training samples, as it went
    """

    kl_weight: float
    proxy: float
    true: float
    kl: float
    sample: str
    course: list[tuple[float, float]] = field(repr=False)


def hack(
    base: Transformer,
    task: Sorting,
    *,
    kl_weights: Sequence[float] = (0.0, 0.3, 1.0),
    proxy: Reward = climb,
    rounds: int = 60,
    seed: int = 0,
) -> list[Hacked]:
    """GRPO on the proxy, once for each weight of the KL penalty; the first row is `base` itself."""
    true = checked(task)
    rows = [_measured(base, base, task, proxy, float("inf"), [])]
    for beta in kl_weights:
        course: list[tuple[float, float]] = []

        def watched(drawn: Rollout, course: list[tuple[float, float]] = course) -> Tensor:
            judged = proxy(drawn)
            course.append((float(judged.mean()), float(true(drawn).mean())))
            return judged

        run = train_grpo(base, task, reward=watched, rounds=rounds, beta=beta, seed=seed)
        rows.append(_measured(run.model, base, task, proxy, beta, course))
    return rows


def _measured(
    model: Transformer,
    base: Transformer,
    task: Sorting,
    proxy: Reward,
    beta: float,
    course: list[tuple[float, float]],
) -> Hacked:
    asked = task.prompts(256, random.Random("hacked"), held_out=True)
    drawn = rollout(model, asked, task, seed=0)
    sample = task.show(drawn.prompts[0] + drawn.answers[0])
    given, meant = (float(reward(drawn).mean()) for reward in (proxy, checked(task)))
    return Hacked(beta, given, meant, kl_from(model, base, task), sample, course)
