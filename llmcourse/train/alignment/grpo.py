"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): PPO without a critic.

A critic is a second model to train and to keep. GRPO draws G answers to each prompt instead, and compares
them with each other:

    advantage of answer i = (r_i − mean of its group) / std of its group      the same for all of its tokens

An easy prompt, whose answers are all right, and a hopeless one, all wrong, have advantages of 0: they cost
samples and teach nothing. The KL to the reference is no part of the reward here: k3 is added to the loss.

    loss = −mean over answers of  mean over its tokens of  [min(r·A, clip(r)·A) − β·k3]
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models import Transformer
from llmcourse.train.alignment.kl import k1, k3
from llmcourse.train.alignment.ppo import surrogate
from llmcourse.train.alignment.reward_model import RewardModel
from llmcourse.train.alignment.rewards import Reward, Task, checked
from llmcourse.train.alignment.run import Run, frozen, trainable
from llmcourse.train.alignment.sampling import Rollout, rollout, token_logprobs
from llmcourse.train.fit import fit, one_thread


def group_advantages(rewards: Tensor, group: int, *, eps: float = 1e-6) -> Tensor:
    """(r − mean)/std within each group, for rewards [N] whose answers to one prompt stand together.

    The standard deviation is that of the group itself (divided by G). Where all are alike, zeros.

    Raises ShapeError when N is no multiple of the group, or a group has fewer than two answers.
    """
    if group < 2 or len(rewards) % group:
        raise ShapeError(
            f"{len(rewards)} rewards in groups of {group}.",
            "Each answer is compared with the others to its prompt.",
            "group = 2 or more, with that many samples of every prompt.",
        )
    groups = rewards.float().view(-1, group)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, correction=0, keepdim=True) + eps)).flatten()


def grpo_loss(
    policy: Tensor,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    beta: float = 0.04,
) -> Tensor:
    """Loss of N answers: log-probabilities and mask [N, T], advantages [N].

    Each answer counts as much as any other, whatever its length: a mean over its tokens, then over answers.
    """
    gain = surrogate(policy, old, advantages[:, None], clip) - beta * k3(policy, reference)
    return -(torch.where(mask, gain, 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()


@one_thread()
def train_grpo(
    base: Transformer,
    task: Task,
    *,
    reward: Reward | RewardModel | None = None,
    rounds: int = 50,
    prompts: int = 16,
    group: int = 8,
    updates: int = 1,
    beta: float = 0.02,
    clip: float = 0.2,
    lr: float = 2e-3,
    seed: int = 0,
) -> Run[Transformer]:
    """A copy of `base` after `rounds` of: `group` answers to each of `prompts` prompts, `updates` steps.

    reward    judges answers: the task's check unless given
    beta      weight of the KL penalty in the loss; 0 lets the leash go
    updates   steps on each batch of answers; with one, the ratio is 1 and the clip never acts
    """
    policy, reference = trainable(base), frozen(base)
    judge = reward.score if isinstance(reward, RewardModel) else reward or checked(task)
    run = Run(policy)
    rng = random.Random(seed)

    def experience() -> Iterator[tuple[Rollout, Tensor, Tensor]]:
        while True:
            asked = task.prompts(prompts, rng)
            drawn = rollout(policy, asked, task, samples=group, seed=rng.getrandbits(32))
            judged = judge(drawn)
            with torch.no_grad():
                held = token_logprobs(reference, drawn.tokens, drawn.mask)
            run.reward.append(float(judged.mean()))
            run.kl.append(float(k1(drawn.logp, held).sum(1).mean()))
            advantages = group_advantages(judged, group)
            for _ in range(updates):
                yield drawn, held, advantages

    def loss(model: nn.Module, batch: tuple[Rollout, Tensor, Tensor]) -> Tensor:
        drawn, held, advantages = batch
        new = token_logprobs(model, drawn.tokens, drawn.mask)
        return grpo_loss(new, drawn.logp, held, advantages, drawn.mask, clip=clip, beta=beta)

    run.loss = fit(policy, experience(), steps=rounds * updates, lr=lr, loss=loss, weight_decay=0.0)
    policy.eval().requires_grad_(False)
    return run
