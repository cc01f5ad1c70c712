"""What a proxy does to the true reward; a learner's losses in place of the package's; the benchmark."""

import json
from dataclasses import replace

import pytest
import torch
from alignment_bases import SEEDS, TASK, base_of, judge_of, pairs_of, rewards

from llmcourse.bench.alignment import align, small_plan
from llmcourse.plug import PlugError, plug
from llmcourse.train.alignment import draw_pairs, hack, train_dpo, train_ppo


@pytest.mark.parametrize("seed", SEEDS)
def test_a_proxy_without_a_leash_goes_up_and_takes_the_true_reward_down(seed):
    base, free, held = hack(base_of(seed), TASK, kl_weights=(0.0, 1.0), rounds=50, seed=seed)
    assert free.proxy > 0.75 > base.proxy + 0.5
    assert free.true < 0.05 < base.true
    assert max(true for _, true in free.course) > free.true + 0.1  # it went up first, then down
    assert held.true > free.true + 0.1
    assert held.kl < free.kl / 2
    assert base.proxy < held.proxy < free.proxy


def test_a_judge_that_is_right_of_almost_all_pairs_is_hacked_without_a_leash():
    judge = judge_of(0).model
    run = train_ppo(base_of(0), TASK, reward=judge, beta=0.0, seed=0)
    before, after = rewards(run.model, base_of(0))
    assert judge.accuracy(draw_pairs(base_of(0), TASK, prompts=512, seed=99, held_out=True)) > 0.9
    assert run.reward[-1] > run.reward[0] + 1
    assert after < 0.08 < before


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
