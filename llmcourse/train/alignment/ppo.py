"""Proximal policy optimisation of a language model (Schulman et al. 2017, arXiv:1707.06347).

Sample answers, judge them, make better tokens likelier. Four models take part (Ouyang et al. 2022,
arXiv:2203.02155): the *policy* that learns, the *reference* it began as, the *reward* that judges, and the
*critic* that guesses, at every token, how well the answer will end.

    reward of a token   −β·(log π − log ρ), and at the last token the judgement        kl.py
    advantage           how much better it went from here than the critic had guessed  gae
    policy loss         −mean min(r·A, clip(r, 1 − ε, 1 + ε)·A),  r = π/π_old           ppo_objective
    critic loss         mean ½·(V − return)²

**Why the clip.** Samples are dear, so each batch of them serves several updates; after the first, the policy
is no longer the one that drew them. The ratio r corrects for that while the two are close. Once r has moved
by ε in the direction in which A points, min lets the gradient vanish: this batch has said enough. It does not
vanish in the other direction, where the policy has gone the wrong way and must come back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcourse.models import Transformer
from llmcourse.train.alignment.kl import k1
from llmcourse.train.alignment.reward_model import RewardModel, with_scalar_head
from llmcourse.train.alignment.rewards import Reward, Task, checked
from llmcourse.train.alignment.run import Run, frozen, trainable
from llmcourse.train.alignment.sampling import last_of, rollout, token_logprobs
from llmcourse.train.fit import fit, one_thread


def surrogate(policy: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """min(r·A, clip(r, 1 − ε, 1 + ε)·A) of each token, r = exp(policy − old); shapes broadcast."""
    ratio = (policy - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def ppo_objective(policy: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """The policy's loss: minus the mean clipped surrogate over the tokens of the mask, all [N, T]."""
    return -masked_mean(surrogate(policy, old, advantages, clip), mask)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the elements where the mask is True; the others are not looked at (they may be NaN)."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438), all tensors [N, T].

        δ_t = r_t + γ·V_{t+1} − V_t,   A_t = δ_t + γλ·A_{t+1},   return_t = A_t + V_t

    Tokens of the mask stand beside each other in a row. Behind the last one the answer is over, and its
    value is 0. λ = 1 trusts what happened, λ = 0 the critic.
    """
    advantages = torch.zeros_like(rewards)
    later = value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        later = torch.where(mask[:, t], delta + gamma * lam * later, 0.0)
        value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = later
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the mask, 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) / (variance + 1e-8).sqrt(), 0.0)


def token_rewards(judged: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """[N, T]: minus β times each token's kl [N, T], and the judgement [N] at the last token of the mask."""
    leash = torch.where(mask, -beta * kl, 0.0)
    return leash.scatter_add(1, last_of(mask)[:, None], judged.to(kl.dtype)[:, None])


@dataclass(frozen=True)
class Experience:
    """Judged answers, all [N, T−1] but tokens [N, T]."""

    tokens: Tensor
    mask: Tensor
    old: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Experience:
        return Experience(*(x[index] for x in vars(self).values()))


class ActorCritic(nn.Module):
    """Policy and critic, so that one optimizer trains both."""

    def __init__(self, base: Transformer) -> None:
        super().__init__()
        self.policy = trainable(base)
        self.critic = with_scalar_head(base)

    def values(self, tokens: Tensor) -> Tensor:
        """What the critic expects before each next token, [N, T−1]."""
        return self.critic(tokens[:, :-1])[:, :, 0].float()


@one_thread()
def train_ppo(
    base: Transformer,
    task: Task,
    *,
    reward: Reward | RewardModel | None = None,
    rounds: int = 30,
    answers: int = 128,
    epochs: int = 2,
    minibatches: int = 2,
    beta: float = 0.2,
    clip: float = 0.2,
    lr: float = 2e-3,
    seed: int = 0,
) -> Run[Transformer]:
    """A copy of `base` after `rounds` of: sample `answers`, judge them, `epochs` × `minibatches` updates.

    reward   judges answers: the task's check unless given, e.g. a reward model
    beta     weight of the KL penalty, in reward for a nat
    """
    both, reference = ActorCritic(base), frozen(base)
    judge = reward.score if isinstance(reward, RewardModel) else reward or checked(task)
    run = Run(both.policy)
    rng = random.Random(seed)

    def experience() -> Iterator[Experience]:
        """Drawn by the policy as it is when the batch is asked for."""
        while True:
            drawn = rollout(both.policy, task.prompts(answers, rng), task, seed=rng.getrandbits(32))
            judged = judge(drawn)
            with torch.no_grad():
                kl = k1(drawn.logp, token_logprobs(reference, drawn.tokens, drawn.mask))
                values = both.values(drawn.tokens)
            run.reward.append(float(judged.mean()))
            run.kl.append(float(kl.sum(1).mean()))
            rewards = token_rewards(judged, kl, drawn.mask, beta)
            advantages, returns = gae(rewards, values, drawn.mask)
            advantages = whiten(advantages, drawn.mask)
            whole = Experience(drawn.tokens, drawn.mask, drawn.logp, advantages, returns)
            for _ in range(epochs):
                order = list(range(answers))
                rng.shuffle(order)
                for index in torch.tensor(order).chunk(minibatches):
                    yield whole.rows(index.to(drawn.tokens.device))

    def loss(model: nn.Module, batch: Experience) -> Tensor:
        new = token_logprobs(both.policy, batch.tokens, batch.mask)
        error = (both.values(batch.tokens) - batch.returns) ** 2
        policy = ppo_objective(new, batch.old, batch.advantages, batch.mask, clip)
        return policy + 0.5 * masked_mean(error, batch.mask)

    updates = rounds * epochs * minibatches
    run.loss = fit(both, experience(), steps=updates, lr=lr, loss=loss, weight_decay=0.0)
    both.policy.eval().requires_grad_(False)
    return run
