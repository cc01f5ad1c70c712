"""The losses of alignment against formulas written out here, in float64 and by autograd."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from llmcourse.errors import ShapeError
from llmcourse.models import Transformer
from llmcourse.train.alignment import (
    bradley_terry,
    dpo_loss,
    gae,
    group_advantages,
    grpo_loss,
    k1,
    k3,
    ppo_objective,
    token_logprobs,
)
from llmcourse.train.alignment.dpo import margins
from llmcourse.train.alignment.ppo import token_rewards, whiten
from llmcourse.train.fit import build
from llmcourse.train.small import small


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def a_mask(generator, *shape):
    """Every row has at least one token."""
    mask = torch.rand(*shape, generator=generator) < 0.6
    mask[..., 1] = True
    return mask


# ── DPO ──────────────────────────────────────────────────────────────────────────────────────────────


def test_dpo_is_the_log_likelihood_of_bradley_terry_with_implied_rewards(generator):
    policy, reference = normal(generator, 2, 5, 7), normal(generator, 2, 5, 7)
    mask = a_mask(generator, 2, 5, 7)
    beta, total = 0.3, 0.0
    for b in range(5):
        # exp(implied reward) of each answer, from probabilities, as the paper has it
        strength = []
        for i in (0, 1):
            pi = math.prod(math.exp(policy[i, b, t]) for t in range(7) if mask[i, b, t])
            rho = math.prod(math.exp(reference[i, b, t]) for t in range(7) if mask[i, b, t])
            strength.append((pi / rho) ** beta)
        total -= math.log(strength[0] / (strength[0] + strength[1])) / 5
    assert float(dpo_loss(policy, reference, mask, beta)) == pytest.approx(total, rel=1e-12)


def test_dpo_s_gradient_in_the_weights_is_the_paper_s():
    torch.manual_seed(0)
    model = build(Transformer, small(9, n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8), seed=0)
    model = model.double()
    tokens = torch.randint(0, 9, (2, 3, 6))
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[:, :, :2] = False
    mask[1, 0, -1] = False
    beta, weight = 0.4, model.blocks[0].mlp.down.weight
    reference = normal(torch.Generator().manual_seed(1), 2, 3, 5) - 2

    def answer(i, b):
        logits = model(tokens[i, b : b + 1])[0]
        return sum(logits[t].log_softmax(-1)[tokens[i, b, t + 1]] for t in range(5) if mask[i, b, t])

    want = torch.zeros_like(weight)
    for b in range(3):
        chosen, rejected = answer(0, b), answer(1, b)
        implied = [
            beta * float(a.detach() - reference[i, b][mask[i, b]].sum())
            for i, a in ((0, chosen), (1, rejected))
        ]
        pull = 1 / (1 + math.exp(implied[0] - implied[1]))
        (up,) = torch.autograd.grad(chosen, weight, retain_graph=True)
        (down,) = torch.autograd.grad(rejected, weight, retain_graph=True)
        want -= beta * pull * (up - down) / 3
    logp = token_logprobs(model, tokens.flatten(0, 1), mask.flatten(0, 1)).view(mask.shape)
    (got,) = torch.autograd.grad(dpo_loss(logp, reference, mask, beta), weight)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-8)  # log-probabilities are taken in float32


def test_the_policy_with_the_least_dpo_loss_is_the_reference_times_exp_of_reward_over_beta():
    """Over all pairs of four answers, preferred as their rewards say: the closed form of section 4."""
    reward = torch.tensor([0.0, 0.7, -0.4, 1.5], dtype=torch.float64)
    log_rho = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    beta = 0.6
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    likely = torch.sigmoid(torch.stack([reward[i] - reward[j] for i, j in pairs]))

    def loss(logits):
        log_pi = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        log_p = log_pi.log_softmax(0)
        index = torch.tensor(pairs).T
        each = [
            dpo_loss(
                log_p[index[:, [n]]][..., None], log_rho[index[:, [n]]][..., None], torch.ones(2, 1, 1), beta
            )
            for n in range(len(pairs))
        ]
        value = (likely * torch.stack(each)).sum()
        value.backward()
        return value.item(), log_pi.grad.numpy()

    best = torch.tensor(minimize(loss, np.zeros(4), jac=True, tol=1e-10).x).softmax(0)
    assert torch.allclose(best, (log_rho + reward / beta).softmax(0), atol=1e-4)


def test_dpo_begins_at_log_2_and_stays_finite_for_margins_of_thousands(generator):
    policy = normal(generator, 2, 4, 3)
    ones = torch.ones(2, 4, 3, dtype=torch.bool)
    assert float(dpo_loss(policy, policy, ones, 0.1)) == pytest.approx(math.log(2))
    far = policy.clone()
    far[0] -= 1e4
    assert float(dpo_loss(far, policy, ones, 1.0)) == pytest.approx(3e4)
    assert torch.allclose(margins(far, policy, ones, 1.0), torch.tensor(-3e4, dtype=torch.float64))


# ── reward model ─────────────────────────────────────────────────────────────────────────────────────


def test_bradley_terry_finds_the_scores_that_drew_the_preferences():
    scores = np.array([0.0, 1.0, -0.5])
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    share = [1 / (1 + math.exp(scores[j] - scores[i])) for i, j in pairs]

    def loss(x):
        return sum(
            p * float(bradley_terry(torch.tensor([x[i]]), torch.tensor([x[j]])))
            for p, (i, j) in zip(share, pairs, strict=True)
        )

    found = minimize(loss, np.zeros(3), tol=1e-9).x
    assert np.allclose(found - found[0], scores, atol=1e-3)


# ── PPO ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clipped_objective_is_the_paper_s_token_by_token(generator):
    policy, old, advantages = (normal(generator, 5, 7) for _ in range(3))
    old = policy + 0.4 * old
    mask, clip = a_mask(generator, 5, 7), 0.2
    gains = []
    for n, t in mask.nonzero().tolist():
        r, a = math.exp(policy[n, t] - old[n, t]), float(advantages[n, t])
        gains.append(min(r * a, min(max(r, 1 - clip), 1 + clip) * a))
    got = float(ppo_objective(policy, old, advantages, mask, clip))
    assert got == pytest.approx(-sum(gains) / len(gains), rel=1e-12)


def test_on_its_own_samples_ppo_s_gradient_is_that_of_the_policy_gradient(generator):
    old, advantages, mask = normal(generator, 4, 6), normal(generator, 4, 6), a_mask(generator, 4, 6)
    policy = old.clone().requires_grad_()
    ppo_objective(policy, old, advantages, mask, 0.2).backward()
    assert torch.allclose(policy.grad, -advantages * mask / mask.sum())


def test_a_token_that_has_moved_far_enough_has_no_gradient_and_one_that_went_wrong_has():
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    policy = ratio.log().requires_grad_()
    ppo_objective(policy, torch.zeros(1, 4), advantages, torch.ones(1, 4, dtype=torch.bool), 0.2).backward()
    assert (policy.grad != 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_surprises(generator, gamma, lam):
    rewards, values = normal(generator, 3, 8), normal(generator, 3, 8)
    spans = [(0, 8), (2, 5), (7, 8)]
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for row, (a, b) in enumerate(spans):
        mask[row, a:b] = True
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for n, (a, b) in enumerate(spans):
        delta = [
            rewards[n, t] + (gamma * values[n, t + 1] if t + 1 < b else 0) - values[n, t] for t in range(a, b)
        ]
        for t in range(a, b):
            want = sum((gamma * lam) ** k * delta[t - a + k] for k in range(b - t))
            assert float(advantages[n, t]) == pytest.approx(float(want), abs=1e-12)
            if lam == 1.0:  # then the return is what was really earned
                earned = sum(gamma**k * rewards[n, t + k] for k in range(b - t))
                assert float(returns[n, t]) == pytest.approx(float(earned), abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_the_judgement_arrives_at_the_last_token_and_the_leash_at_every_one(generator):
    kl, mask = normal(generator, 2, 5), torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    got = token_rewards(torch.tensor([2.0, -3.0]), kl, mask, 0.1)
    want = -0.1 * kl * mask
    want[0, 3] += 2.0
    want[1, 1] -= 3.0
    assert torch.allclose(got, want)


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens_that_count(generator):
    x, mask = 3 * normal(generator, 4, 9) + 5, a_mask(generator, 4, 9)
    x[~mask] = float("nan")
    white = whiten(x, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-9)
    assert float(white[mask].var(correction=0)) == pytest.approx(1, abs=1e-6)
    assert not white[~mask].any()


# ── GRPO and KL ──────────────────────────────────────────────────────────────────────────────────────


def test_group_advantages_are_standard_scores_within_each_group(generator):
    rewards = torch.rand(12, generator=generator)
    want = np.concatenate([(g - g.mean()) / g.std() for g in rewards.double().numpy().reshape(3, 4)])
    assert np.allclose(group_advantages(rewards, 4).numpy(), want, rtol=1e-4)
    assert not group_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), 2).any()  # all right, all wrong


@pytest.mark.parametrize(("count", "group"), [(10, 4), (5, 1)])
def test_groups_that_do_not_come_out_even_are_an_error(count, group):
    with pytest.raises(ShapeError, match="groups of"):
        group_advantages(torch.zeros(count), group)


def test_grpo_s_loss_is_the_paper_s_answer_by_answer(generator):
    policy, reference = normal(generator, 6, 5), normal(generator, 6, 5)
    old = policy + 0.3 * normal(generator, 6, 5)
    advantages, mask = normal(generator, 6), a_mask(generator, 6, 5)
    answers = []
    for n in range(6):
        gains = []
        for t in range(5):
            if mask[n, t]:
                r, a = math.exp(policy[n, t] - old[n, t]), float(advantages[n])
                d = float(reference[n, t] - policy[n, t])
                gains.append(min(r * a, min(max(r, 0.8), 1.2) * a) - 0.04 * (math.exp(d) - d - 1))
        answers.append(sum(gains) / len(gains))
    got = float(grpo_loss(policy, old, reference, advantages, mask, clip=0.2, beta=0.04))
    assert got == pytest.approx(-sum(answers) / 6, rel=1e-12)


def test_both_estimates_of_the_kl_divergence_are_right_on_average_and_k3_is_never_negative(generator):
    log_pi, log_rho = (normal(generator, 11).log_softmax(0) for _ in range(2))
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=log_pi), torch.distributions.Categorical(logits=log_rho)
    )
    for estimate in (k1, k3):
        assert torch.allclose((log_pi.exp() * estimate(log_pi, log_rho)).sum(), want)
    assert (k3(log_pi, log_rho) >= 0).all()
    assert not (k1(log_pi, log_rho) >= 0).all()


def test_k3_pulls_as_the_kl_divergence_of_the_other_direction_does(generator):
    logits = normal(generator, 6).requires_grad_()
    log_rho = normal(generator, 6).log_softmax(0)
    log_pi = logits.log_softmax(0)
    (got,) = torch.autograd.grad((log_pi.detach().exp() * k3(log_pi, log_rho)).sum(), logits)
    other = (log_rho.exp() * (log_rho - logits.log_softmax(0))).sum()
    (want,) = torch.autograd.grad(other, logits)
    assert torch.allclose(got, want)
