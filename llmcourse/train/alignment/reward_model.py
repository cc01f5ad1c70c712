"""A reward model: pairs of answers in, a number for any answer out.

Bradley & Terry (1952) say that the better of two is preferred with probability σ(r₁ − r₂). Going downhill on

    loss = −log σ(r(chosen) − r(rejected))

finds the scores r under which the judgements were likeliest. Only differences between answers to *one* prompt
count: a number added to all answers of a prompt changes no preference, so scores of different prompts cannot
be compared.
The loss sets no unit for r either: the longer it is trained on judgements that agree, the larger the numbers.
`score` gives them in standard deviations, so that the weight of a KL penalty means the same for every judge.

The model is the policy's own transformer with another head: E features → one number, read at the answer's
last token, which has seen all of it. The head starts at zero, so training starts from "no opinion", log 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models import Transformer
from llmcourse.train.alignment.preferences import Preferences
from llmcourse.train.alignment.run import Run, trainable
from llmcourse.train.alignment.sampling import Rollout, last_of
from llmcourse.train.fit import fit, one_thread

NO_OPINION = math.log(2)


def with_scalar_head(model: Transformer) -> Transformer:
    """A copy that learns and gives one number a position, [B, S, 1], all 0 at first."""
    body = trainable(model)
    body.head = nn.Linear(model.config.d_model, 1, bias=False, device=model.device, dtype=model.dtype)  # type: ignore[assignment]
    nn.init.zeros_(body.head.weight)
    return body


class RewardModel(nn.Module):
    """Scores [N] of answers. `train_ppo` and `train_grpo` take it as their reward."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.body = with_scalar_head(model)
        self.register_buffer("mean", torch.zeros((), device=model.device))
        self.register_buffer("std", torch.ones((), device=model.device))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores [N] of tokens [N, T] whose answers the mask [N, T−1] marks."""
        last = last_of(mask)[:, None] + 1  # the mask stands at the prediction, one place before the token
        return self.body(tokens)[:, :, 0].float().gather(1, last)[:, 0]

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        """Scores [N] of a rollout's answers in standard deviations, without a graph."""
        return (self(rollout.tokens, rollout.mask) - self.mean) / self.std

    @torch.no_grad()
    def standardise(self, pairs: Preferences) -> None:
        """Let `score` have mean 0 and variance 1 over the answers of these pairs."""
        scores = torch.cat([self(pairs.tokens[i], pairs.mask[i]) for i in (0, 1)])
        self.mean.copy_(scores.mean())
        self.std.copy_(scores.std(correction=0).clamp(min=1e-6))

    @torch.no_grad()
    def accuracy(self, pairs: Preferences) -> float:
        """The share of pairs whose chosen answer has the higher score."""
        chosen, rejected = (self(pairs.tokens[i], pairs.mask[i]) for i in (0, 1))
        return float((chosen > rejected).float().mean())


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of −log σ(chosen − rejected), scores [B] each: nats a preference."""
    return -F.logsigmoid(chosen - rejected).mean()


@one_thread()
def train_reward_model(
    base: Transformer,
    pairs: Preferences,
    *,
    steps: int = 100,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> Run[RewardModel]:
    """A reward model that begins with the weights of `base`, trained on pairs."""
    judge = RewardModel(base)

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        tokens, mask = pairs.tokens[:, index], pairs.mask[:, index]
        return bradley_terry(*model(tokens.flatten(0, 1), mask.flatten(0, 1)).chunk(2))

    batch = min(batch, len(pairs))
    curve = fit(judge, pairs.order(batch=batch, seed=seed), steps=steps, lr=lr, loss=loss)
    judge.standardise(pairs)
    return Run(judge.eval().requires_grad_(False), curve)
