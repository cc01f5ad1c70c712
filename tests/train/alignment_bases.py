"""What the tests of alignment begin with, made once a process: models that imitate, pairs, and a judge."""

from functools import cache

from llmcourse.train.alignment import (
    Sorting,
    draw_pairs,
    held_out_reward,
    imitate,
    train_reward_model,
)

TASK = Sorting(4)
SEEDS = (0, 1, 2)


@cache
def base_of(seed):
    return imitate(TASK, seed=seed)


@cache
def pairs_of(seed):
    return draw_pairs(base_of(seed), TASK, seed=seed + 1)


@cache
def judge_of(seed):
    return train_reward_model(base_of(seed), pairs_of(seed), seed=seed)


def rewards(model, base):
    """Held-out reward before and after, on as many prompts as make chance small: a standard error of 0.02."""
    return tuple(held_out_reward(m, TASK, prompts=512) for m in (base, model))
