"""Every method raises the reward of prompts that it has not seen, on three seeds."""

import copy

import pytest
import torch
from alignment_bases import SEEDS, TASK, base_of, judge_of, pairs_of, rewards

from llmcourse.train.alignment import (
    draw_pairs,
    held_out_reward,
    kl_from,
    train_dpo,
    train_grpo,
    train_ppo,
)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_that_imitates_is_right_about_as_often_as_its_demonstrators(seed):
    assert 0.12 < held_out_reward(base_of(seed), TASK, prompts=512) < 0.40


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_model_orders_pairs_that_it_has_not_seen(seed):
    judge = judge_of(seed)
    fresh = draw_pairs(base_of(seed), TASK, prompts=512, seed=99, held_out=True)
    assert judge.loss[0] == pytest.approx(0.6931, abs=1e-3)
    assert judge.model.accuracy(fresh) > 0.85


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_raises_the_held_out_reward(seed):
    run = train_dpo(base_of(seed), pairs_of(seed), seed=seed)
    before, after = rewards(run.model, base_of(seed))
    assert after > before + 0.12, (before, after)
    assert run.reward[0] == pytest.approx(0, abs=1e-4)  # the margin
    assert run.reward[-1] > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_raises_the_held_out_reward(seed):
    run = train_grpo(base_of(seed), TASK, seed=seed)
    before, after = rewards(run.model, base_of(seed))
    assert after > before + 0.25, (before, after)
    assert run.kl[0] == pytest.approx(0, abs=1e-4)
    assert 0.2 < kl_from(run.model, base_of(seed), TASK) < 4


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_on_the_check_raises_the_held_out_reward(seed):
    run = train_ppo(base_of(seed), TASK, rounds=20, seed=seed)
    before, after = rewards(run.model, base_of(seed))
    assert after > before + 0.3, (before, after)


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_on_a_learned_reward_raises_the_checked_one(seed):
    run = train_ppo(base_of(seed), TASK, reward=judge_of(seed).model, rounds=20, seed=seed)
    before, after = rewards(run.model, base_of(seed))
    assert after > before + 0.2, (before, after)
    assert run.reward[-1] > run.reward[0] + 0.5  # in standard deviations of the judge


def test_several_updates_on_one_batch_still_raise_it():
    run = train_grpo(base_of(0), TASK, rounds=25, updates=2, seed=0)
    before, after = rewards(run.model, base_of(0))
    assert (len(run.loss), len(run.reward)) == (50, 25)
    assert after > before + 0.1


def test_training_leaves_the_base_as_it_is_and_is_the_same_for_the_same_seed():
    base = base_of(0)
    before = copy.deepcopy(base.state_dict())
    runs = [train_grpo(base, TASK, rounds=4, seed=5) for _ in range(2)]
    train_dpo(base, pairs_of(0), steps=3)
    train_ppo(base, TASK, rounds=2)
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    assert runs[0].loss == runs[1].loss
    assert runs[0].reward == runs[1].reward
    assert not any(p.requires_grad for p in runs[0].model.parameters())
