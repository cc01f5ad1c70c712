"""Exercise `ppo_objective`: how far a batch of samples may move the policy."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

ppo_objective = Exercise(
    "ppo_objective",
    title="PPO's clipped objective",
    arguments=("policy", "old", "advantages", "mask", "clip"),
    shapes=(
        "policy      tensor [N, T], float32: log-probability of each token under the policy as it is now",
        "old         tensor [N, T]: under the policy that drew the tokens",
        "advantages  tensor [N, T]: how much better than expected it went from this token on",
        "mask        bool tensor [N, T]: True for the answers' tokens",
        "clip        ε, a float: 0.2 lets the ratio move the policy between 0.8 and 1.2",
        "returns     the loss (to be made small), a tensor of no dimension",
    ),
    formula="r = π/π_old:   −mean over the mask's tokens of  min(r·A, clip(r, 1 − ε, 1 + ε)·A)",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "A token with a positive advantage should become likelier. From which ratio on does the formula stop "
        "rewarding that? A token with a negative advantage has become twice as likely: should anything stop "
        "it from coming back down?",
        "r = exp(policy − old). Two candidates for each token: r·A, and the same with r clamped to "
        "[1 − ε, 1 + ε]. The smaller of the two, for either sign of A. Then the mean over all tokens of the "
        "mask together: their sum divided by how many there are; and a minus, since an optimizer goes "
        "downhill.",
        "r = (policy - old).exp(); gain = torch.minimum(r * A, r.clamp(1 - clip, 1 + clip) * A); "
        "return -(gain * mask).sum() / …",
    ),
)


def expected(*given: Any) -> np.ndarray:
    """Token by token, in float64."""
    policy, old, advantages, mask, clip = given
    gains = []
    for at in zip(*np.nonzero(mask.numpy()), strict=True):
        p, o, a = (float(x[at]) for x in (policy, old, advantages))
        ratio = np.exp(p - o)
        limit = 1 + clip if a > 0 else 1 - clip
        stopped = ratio > limit if a > 0 else ratio < limit
        gains.append((limit if stopped else ratio) * a)
    return -np.mean(gains)


def _given(t: Trial, ratio: Any, advantages: Any, mask: Any = None) -> Any:
    """Arguments whose ratios are these, [N, T]."""
    old = -tensor(t, *ratio.shape, scale=0.7).exp() - 3.0
    mask = torch.ones(ratio.shape, dtype=torch.bool) if mask is None else mask
    return [old + ratio.log(), old, advantages, mask]


def _ratios(t: Trial, low: float, high: float, *shape: int) -> Any:
    return torch.from_numpy(t.rng.uniform(low, high, shape)).float()


def _judge(t: Trial, given: Any, clip: float = 0.2) -> None:
    t.close(t.call(*given, clip), expected(*given, clip), atol=2e-6)


def _ragged(t: Trial, rows: int, width: int) -> Any:
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for i, row in enumerate(mask):
        first = t.size(0, 2)
        row[first : first + (1 if i == 0 else t.size(2, width - 3))] = True
    return mask


@ppo_objective.check("on the samples' own policy, r = 1, the loss is minus the mean advantage")
def on_policy(t: Trial) -> None:
    advantages = tensor(t, 1, 4)
    advantages[0, 0] = 2.0 + t.size(1, 5)  # far from 1 ± ε, where the ratio is
    _judge(t, _given(t, torch.ones(1, 4), advantages))


@ppo_objective.check("a ratio within the clip multiplies the advantage")
def within(t: Trial) -> None:
    _judge(t, _given(t, _ratios(t, 0.82, 0.97, 1, 3), tensor(t, 1, 3)))
    _judge(t, _given(t, _ratios(t, 1.03, 1.18, 1, 3), tensor(t, 1, 3)))


@ppo_objective.check("for a good token the gain ends at 1 + ε, and does not end below")
def good(t: Trial) -> None:
    _judge(t, _given(t, _ratios(t, 1.5, 3.0, 1, 3), tensor(t, 1, 3).abs() + 0.1))
    _judge(t, _given(t, _ratios(t, 0.2, 0.6, 1, 3), tensor(t, 1, 3).abs() + 0.1))


@ppo_objective.check("for a bad token it ends at 1 − ε; one that became likelier is not let off")
def bad(t: Trial) -> None:
    _judge(t, _given(t, _ratios(t, 0.2, 0.6, 1, 3), -tensor(t, 1, 3).abs() - 0.1))
    _judge(t, _given(t, _ratios(t, 1.5, 3.0, 1, 3), -tensor(t, 1, 3).abs() - 0.1))


@ppo_objective.check("another ε clips elsewhere")
def other(t: Trial) -> None:
    for clip in (0.1, 0.4):
        width = t.odd(7, 11)
        _judge(t, _given(t, _ratios(t, 0.3, 2.0, 1, width), tensor(t, 1, width)), clip)


@ppo_objective.check("the mean is over the mask's tokens, all alike, whichever answer they are of")
def masked(t: Trial) -> None:
    rows, width = t.odd(3, 5), t.odd(7, 9)
    mask = _ragged(t, rows, width)
    _judge(t, _given(t, _ratios(t, 0.5, 1.6, rows, width), tensor(t, rows, width) + 1.0, mask))


@ppo_objective.check("tokens of probability e⁻²⁰⁰ have a ratio like others")
def unlikely(t: Trial) -> None:
    given = _given(t, _ratios(t, 0.5, 1.6, 2, 5), tensor(t, 2, 5))
    ratio = given[0] - given[1]
    given[1] = given[1] - 200.0
    given[0] = given[1] + ratio
    t.close(t.call(*given, 0.2), expected(*given, 0.2), rtol=1e-4, atol=1e-4)


@ppo_objective.check("the gradient is r·A of each token, and 0 where the clip has ended it")
def gradient(t: Trial) -> None:
    rows, width = 3, t.odd(7, 9)
    given = _given(
        t, _ratios(t, 0.5, 1.6, rows, width), tensor(t, rows, width) + 0.3, _ragged(t, rows, width)
    )
    call = t.perform(*given, 0.2, grads=True)
    t.close(call.value, expected(*given, 0.2), atol=2e-6)
    got = None if call.grads is None else call.grads[0]
    t.holds(
        got is not None, "no gradient reaches the policy", "tensors all the way: no .item(), no detach()."
    )
    policy, old, advantages, mask = (x.double().numpy() for x in given)
    ratio = np.exp(policy - old)
    stopped = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    want = -np.where(stopped, 0.0, ratio * advantages) * mask / mask.sum()
    t.close(got, want, "the gradient in the policy", atol=1e-5)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def mean(x: Any, mask: Any) -> Any:
    return (x * mask).sum() / mask.sum()


def gains(policy: Any, old: Any, advantages: Any, clip: float) -> Any:
    """The clipped gain of each token."""
    ratio = (policy - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@ppo_objective.mistake(
    says="the minus sign is missing: an optimizer would make good tokens unlikely",
    tries="minus the mean: a loss is made small.",
    caught_by="on_policy",
)
def no_minus(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return mean(gains(policy, old, advantages, clip), mask)


@ppo_objective.mistake(
    says="the ratio is policy − old, the logarithm of what it should be",
    tries="(policy − old).exp().",
    caught_by="on_policy",
)
def log_ratio(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = policy - old
    return -mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


@ppo_objective.mistake(
    says="the log-probability takes the ratio's place: REINFORCE, which knows no old policy",
    tries="r = exp(policy − old).",
    caught_by="on_policy",
)
def reinforce(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -mean(policy * advantages, mask)


@ppo_objective.mistake(
    says="the ratio is clipped to [−ε, ε]",
    tries="clamp(1 − ε, 1 + ε): around 1, where nothing has changed.",
    caught_by="on_policy",
)
def around_zero(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = (policy - old).exp()
    return -mean(torch.minimum(ratio * advantages, ratio.clamp(-clip, clip) * advantages), mask)


@ppo_objective.mistake(
    says="the gains of the tokens are summed, and long answers make large steps",
    tries="the sum over the mask divided by mask.sum().",
    caught_by="on_policy",
)
def summed(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -(gains(policy, old, advantages, clip) * mask).sum()


@ppo_objective.mistake(
    says="the gain r·A is clipped to [1 − ε, 1 + ε], not the ratio",
    tries="r.clamp(1 − ε, 1 + ε) first, times A after.",
    caught_by="on_policy",
)
def gain_clipped(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    gain = (policy - old).exp() * advantages
    return -mean(torch.minimum(gain, gain.clamp(1 - clip, 1 + clip)), mask)


@ppo_objective.mistake(
    says="the ratio is upside down: old over new",
    tries="policy − old in the exponent.",
    caught_by="within",
)
def upside_down(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -mean(gains(old, policy, advantages, clip), mask)


@ppo_objective.mistake(
    says="r is taken as 1 + log r, its first two terms",
    tries="torch.exp.",
    caught_by="within",
)
def first_terms(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = 1 + policy - old
    return -mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


@ppo_objective.mistake(
    says="nothing is clipped: one batch may move the policy as far as it likes",
    tries="the minimum of r·A and clamp(r)·A.",
    caught_by="good",
)
def unclipped(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -mean((policy - old).exp() * advantages, mask)


@ppo_objective.mistake(
    says="the clipped gain alone is taken, without the minimum: a token that went the wrong way stays there",
    tries="torch.minimum of the gain with and without the clip.",
    caught_by="good",
)
def clipped_only(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -mean((policy - old).exp().clamp(1 - clip, 1 + clip) * advantages, mask)


@ppo_objective.mistake(
    says="the larger of the two gains is taken",
    tries="torch.minimum: the pessimistic one.",
    caught_by="good",
)
def maximum(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = (policy - old).exp()
    return -mean(torch.maximum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


@ppo_objective.mistake(
    says="the logarithm of the ratio is clipped to ±ε, which ends at e^ε, not at 1 + ε",
    tries="the ratio itself, clamp(1 − ε, 1 + ε).",
    caught_by="good",
)
def log_clipped(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    log = policy - old
    return -mean(torch.minimum(log.exp() * advantages, log.clamp(-clip, clip).exp() * advantages), mask)


@ppo_objective.mistake(
    says="the smaller ratio is taken, and then multiplied: for a bad token that is the wrong one",
    tries="the minimum of the two products with A.",
    caught_by="bad",
)
def smaller_ratio(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = (policy - old).exp()
    return -mean(torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip)) * advantages, mask)


@ppo_objective.mistake(
    says="the ratio is clipped above only: a bad token is pushed down without end",
    tries="clamp with both limits, 1 − ε and 1 + ε.",
    caught_by="bad",
)
def above_only(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = (policy - old).exp()
    return -mean(torch.minimum(ratio * advantages, ratio.clamp(max=1 + clip) * advantages), mask)


@ppo_objective.mistake(
    says="ε is 0.2 whatever the argument says",
    tries="the argument clip.",
    caught_by="other",
)
def always_a_fifth(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -mean(gains(policy, old, advantages, 0.2), mask)


@ppo_objective.mistake(
    says="the mean is over all places, prompt and padding too",
    tries="(gain * mask).sum() / mask.sum().",
    caught_by="masked",
)
def unmasked(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -gains(policy, old, advantages, clip).mean()


@ppo_objective.mistake(
    says="the masked sum is divided by all N·T places, and shrinks with the padding",
    tries="mask.sum() as the divisor.",
    caught_by="masked",
)
def all_places(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -(gains(policy, old, advantages, clip) * mask).mean()


@ppo_objective.mistake(
    says="each answer's mean is taken first (GRPO's weighting): tokens of short answers count more",
    tries="one sum over all tokens of the mask, one division.",
    caught_by="masked",
)
def answer_by_answer(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    gain = gains(policy, old, advantages, clip) * mask
    return -(gain.sum(1) / mask.sum(1)).mean()


@ppo_objective.mistake(
    says="π is divided by π_old after exp, and both are 0 for an unlikely token: 0 / 0",
    tries="the difference first: (policy − old).exp().",
    caught_by="unlikely",
)
def quotient(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = policy.exp() / old.exp()
    return -mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


@ppo_objective.mistake(
    says="the policy's log-probabilities are detached: the loss is right, and nothing learns from it",
    tries="a gradient through policy; only old and the advantages are given.",
    caught_by="gradient",
)
def detached(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    return -mean(gains(policy.detach(), old, advantages, clip), mask)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@ppo_objective.alternative("the larger of two losses, over the tokens that the mask selects")
def larger_loss(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    a = advantages[mask]
    ratio = torch.exp(policy[mask] - old[mask])
    return torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()


@ppo_objective.alternative("a limit by the advantage's sign: r·A ≤ (1 ± ε)·A")
def by_sign(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    limit = torch.where(advantages > 0, 1 + clip, 1 - clip) * advantages
    gain = torch.where(mask, torch.minimum(advantages * (policy - old).exp(), limit), 0.0)
    return gain.sum() / -mask.sum()


@ppo_objective.alternative("a weighted average, weights 1 over the number of tokens")
def weighted(policy: Any, old: Any, advantages: Any, mask: Any, clip: float) -> Any:
    ratio = (policy - old).exp()
    gain = torch.stack((ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)).amin(0)
    return -torch.einsum("nt,nt->", gain, mask.float() / mask.sum())
