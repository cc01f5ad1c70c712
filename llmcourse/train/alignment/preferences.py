"""Preferences: two answers to one prompt, the better one first.

People find it hard to give an answer a number and easy to say which of two is better (Christiano et al. 2017,
arXiv:1706.03741). Here the check says it: of several answers that a model drew, one with the highest reward
is chosen and one with the lowest is rejected. A prompt whose answers are all alike teaches nothing and is
left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.models import Transformer
from llmcourse.train.alignment.rewards import Reward, Task, checked
from llmcourse.train.alignment.sampling import padded, rollout


@dataclass(frozen=True)
class Preferences:
    """P pairs. Row 0 of the first axis is the chosen answer, row 1 the rejected one.

    tokens   [2, P, T] prompt and answer, padding behind
    mask     [2, P, T−1]: True where the token that follows belongs to the answer
    asked    prompts that were asked to find these pairs
    """

    tokens: Tensor
    mask: Tensor
    asked: int

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def order(self, *, batch: int, seed: int) -> Iterator[Tensor]:
        """Indices [batch] into the pairs, without end; every pair once before one comes again."""
        if batch > len(self):
            raise ShapeError(
                f"batches of {batch} from {len(self)} pairs.",
                "A batch holds different pairs.",
                f"batch = {len(self)} or less, or more prompts in draw_pairs.",
            )
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self), generator=generator).split(batch):
                if len(index) == batch:
                    yield index.to(self.tokens.device)


def draw_pairs(
    model: Transformer,
    task: Task,
    *,
    prompts: int = 2048,
    samples: int = 4,
    seed: int = 0,
    reward: Reward | None = None,
    held_out: bool = False,
) -> Preferences:
    """Pairs from `samples` answers of the model to each prompt, told apart by the reward (the task's check).

    Raises ShapeError when no prompt has answers of different reward.
    """
    questions = task.prompts(prompts, random.Random(seed), held_out=held_out)
    drawn = rollout(model, questions, task, samples=samples, seed=seed)
    rewards = (reward or checked(task))(drawn).view(prompts, samples)
    best, worst = rewards.argmax(1).tolist(), rewards.argmin(1).tolist()
    differ = (rewards.amax(1) > rewards.amin(1)).tolist()
    pairs = [(i * samples + best[i], i * samples + worst[i]) for i in range(prompts) if differ[i]]
    if not pairs:
        raise ShapeError(
            f"none of {prompts} prompts has answers of different reward.",
            "A pair needs an answer that is better than another.",
            "more prompts, more samples of each, or a model that is neither always right nor always wrong.",
        )
    rows = [row for side in (0, 1) for row in (pair[side] for pair in pairs)]
    tokens, mask = padded(
        [drawn.prompts[i] + drawn.answers[i] for i in rows], [len(drawn.prompts[i]) for i in rows]
    )
    shape = (2, len(pairs), -1)
    return Preferences(tokens.view(shape).to(model.device), mask.view(shape).to(model.device), prompts)
