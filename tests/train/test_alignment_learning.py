"""Every method raises the reward of prompts that it has not seen, on three seeds; and what a proxy does."""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from llmcourse.bench.alignment import align, small_plan
from llmcourse.plug import PlugError, plug
from llmcourse.train.alignment import (
    Sorting,
    draw_pairs,
    hack,
    held_out_reward,
    imitate,
    kl_from,
    train_dpo,
    train_grpo,
    train_ppo,
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


def test_a_judge_that_is_right_of_almost_all_pairs_is_hacked_without_a_leash():
    judge = judge_of(0).model
    run = train_ppo(base_of(0), TASK, reward=judge, beta=0.0, seed=0)
    before, after = rewards(run.model, base_of(0))
    assert judge.accuracy(draw_pairs(base_of(0), TASK, prompts=512, seed=99, held_out=True)) > 0.9
    assert run.reward[-1] > run.reward[0] + 1
    assert after < 0.08 < before


def test_several_updates_on_one_batch_still_raise_it():
    run = train_grpo(base_of(0), TASK, rounds=25, updates=2, seed=0)
    before, after = rewards(run.model, base_of(0))
    assert (len(run.loss), len(run.reward)) == (50, 25)
    assert after > before + 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_proxy_without_a_leash_goes_up_and_takes_the_true_reward_down(seed):
    base, free, held = hack(base_of(seed), TASK, kl_weights=(0.0, 1.0), rounds=50, seed=seed)
    assert free.proxy > 0.75 > base.proxy + 0.5
    assert free.true < 0.05 < base.true
    assert max(true for _, true in free.course) > free.true + 0.1  # it went up first, then down
    assert held.true > free.true + 0.1
    assert held.kl < free.kl / 2
    assert base.proxy < held.proxy < free.proxy


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


# ── a learner's losses ───────────────────────────────────────────────────────────────────────────────


def my_dpo_loss(policy, reference, mask, beta):
    ratio = ((policy - reference) * mask).sum(-1)
    return torch.nn.functional.softplus(beta * (ratio[1] - ratio[0])).mean()


def my_ppo_objective(policy, old, advantages, mask, clip):
    ratio = (policy - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain[mask].mean()


def test_a_learner_s_losses_train_in_place_of_the_package_s():
    base, pairs = base_of(0), pairs_of(0)
    own = train_dpo(base, pairs, steps=5), train_ppo(base, TASK, rounds=2)
    with plug(dpo_loss=my_dpo_loss, ppo_objective=my_ppo_objective) as used:
        mine = train_dpo(base, pairs, steps=5), train_ppo(base, TASK, rounds=2)
    assert used.calls == {"dpo_loss": 5, "ppo_objective": 8}
    for a, b in zip(own, mine, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda p, r, m, b: None, "None"),
        (lambda p, r, m, b: p.sum(-1), "has shape"),
        (lambda p, r, m, b: p.sum().item(), "a float"),
        (lambda p, r, m, b: my_dpo_loss(p.detach(), r, m, b), "lost the policy's graph"),
    ],
)
def test_a_loss_that_cannot_train_is_refused(wrong, says):
    with pytest.raises(PlugError, match=says), plug(dpo_loss=wrong):
        train_dpo(base_of(0), pairs_of(0), steps=1)


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────────


def test_the_benchmark_reports_each_method_beside_its_base():
    plan = replace(
        small_plan(base_of(0)),
        asked=64,
        pairs={"prompts": 128, "samples": 3},
        dpo={"steps": 6, "batch": 16},
        grpo={"rounds": 3, "prompts": 4, "group": 4},
    )
    base, dpo, grpo = align(plan, seeds=(0,))
    assert (base["name"], dpo["name"], grpo["name"]) == ("base", "dpo", "grpo")
    assert base["kl_nats"] == pytest.approx(0, abs=1e-5)
    assert (dpo["settings"]["answers"], dpo["settings"]["updates"]) == (384, 6)
    assert (grpo["settings"]["answers"], grpo["settings"]["updates"]) == (48, 3)
    for row in (base, dpo, grpo):
        assert row["held_out"] * 64 == int(row["held_out"] * 64)
        assert all(s["answer"] and s["reward"] in (0.0, 1.0) for s in row["samples"])
    json.dumps([base, dpo, grpo])
