"""Exercise `dpo_loss`: a preference, as a loss on the probabilities of two answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

dpo_loss = Exercise(
    "dpo_loss",
    title="Direct preference optimisation",
    arguments=("policy", "reference", "mask", "beta"),
    shapes=(
        "policy     tensor [2, B, T], float32: log-probability of each token under the model that learns;",
        "           policy[0] are the B chosen answers, policy[1] the B rejected ones",
        "reference  tensor [2, B, T]: the same tokens under the model that it began as",
        "mask       bool tensor [2, B, T]: True for an answer's tokens, False for prompt and padding",
        "beta       β, a float: how short the leash to the reference is",
        "returns    the loss, a tensor of no dimension, from which a gradient reaches the policy",
    ),
    formula="mean over pairs of  −log σ(β·[log π(y₊) − log ρ(y₊)] − β·[log π(y₋) − log ρ(y₋)])",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "The loss speaks of probabilities of whole answers, and you are given those of tokens. What does the "
        "log-probability of a text have to do with those of its tokens? And which tokens were not chosen by "
        "the model at all?",
        "Subtract the reference token by token, keep the mask's tokens, and sum over T: [2, B], the "
        "log-ratio of each answer. The margin of a pair is β times (chosen less rejected). Then −log "
        "σ(margin), and the mean over pairs. For a margin of −200, σ is 0 in float32, and its logarithm −∞: "
        "PyTorch has a function for both together.",
        "ratio = ((policy - reference) * mask).sum(-1); margin = beta * (ratio[0] - ratio[1]); "
        "return -torch.nn.functional.logsigmoid(…).mean().",
    ),
)


def expected(*given: Any) -> np.ndarray:
    """Pair by pair and token by token, in float64."""
    policy, reference, mask, beta = given
    wide = [x.double().numpy() for x in (policy, reference)]
    kept = mask.numpy()
    losses = []
    for b in range(policy.shape[1]):
        ratios = [sum(wide[0][i, b, kept[i, b]] - wide[1][i, b, kept[i, b]]) for i in (0, 1)]
        losses.append(np.logaddexp(0.0, -beta * (ratios[0] - ratios[1])))
    return np.mean(losses)


def _draw(t: Trial, pairs: int, tokens: int, *, ragged: bool = False) -> Any:
    """Log-probabilities below zero; the reference is near the policy. Ragged: some tokens are not asked."""
    policy = -(tensor(t, 2, pairs, tokens, scale=0.7).exp())
    reference = policy - tensor(t, 2, pairs, tokens, scale=0.4)
    mask = torch.ones(2, pairs, tokens, dtype=torch.bool)
    if ragged:
        for row in mask.view(-1, tokens):
            first = t.size(1, 2)
            row[:first] = False
            row[first + t.size(1, tokens - first) :] = False
        mask[0, 0, -1], mask[1, 0, -1] = True, False  # not all of one length
    return [policy, reference, mask]


def _judge(t: Trial, given: Any, beta: float) -> None:
    t.close(t.call(*given, beta), expected(*given, beta))


@dpo_loss.check("a policy that is still the reference has no opinion: the loss is log 2")
def start(t: Trial) -> None:
    policy, _, mask = _draw(t, 1, 1)
    _judge(t, [policy, policy.clone(), mask], 0.5)


@dpo_loss.check("one pair of one token: −log σ of β times the difference of the log-ratios")
def one(t: Trial) -> None:
    for beta in (0.1, 0.5, 2.0):
        _judge(t, _draw(t, 1, 1), beta)


@dpo_loss.check("an answer's log-probability is the sum over its tokens, and of no others")
def tokens(t: Trial) -> None:
    _judge(t, _draw(t, 1, t.odd(3, 7)), 0.3)
    _judge(t, _draw(t, 1, t.odd(5, 9), ragged=True), 0.3)


@dpo_loss.check("the loss is the mean over pairs")
def pairs(t: Trial) -> None:
    _judge(t, _draw(t, t.odd(3, 7), t.size(5, 8), ragged=True), 0.4)


@dpo_loss.check("margins of some hundred either way give finite losses")
def extreme(t: Trial) -> None:
    for sign in (1.0, -1.0):
        policy, reference, mask = _draw(t, 2, 4)
        policy[0] -= sign * (300.0 + 100.0 * t.size(0, 5))
        _judge(t, [policy, reference, mask], 1.0)


@dpo_loss.check("the gradient raises the chosen answer's tokens and lowers the rejected one's")
def gradient(t: Trial) -> None:
    beta = 0.4
    given = _draw(t, t.odd(3, 5), 6, ragged=True)
    call = t.perform(*given, beta, grads=True)
    t.close(call.value, expected(*given, beta))
    got = None if call.grads is None else call.grads[0]
    t.holds(
        got is not None, "no gradient reaches the policy", "tensors all the way: no .item(), no detach()."
    )
    policy, reference, mask = (x.double().numpy() for x in given)
    ratio = ((policy - reference) * mask).sum(-1)
    share = beta / (1 + np.exp(beta * (ratio[0] - ratio[1]))) / len(ratio[0])
    sign = np.array([-1.0, 1.0])[:, None, None]
    t.close(got, sign * share[:, None] * mask, "the gradient in the policy")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def ratios(policy: Any, reference: Any, mask: Any) -> Any:
    """log π(y) − log ρ(y) of each answer, [2, B]."""
    return ((policy - reference) * mask).sum(-1)


def loss_of(margin: Any) -> Any:
    return -torch.nn.functional.logsigmoid(margin).mean()


@dpo_loss.mistake(
    says="the reference is left out: the loss is that of the policy's own probabilities",
    tries="policy − reference, token by token, before the sum.",
    caught_by="start",
)
def no_reference(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = (policy * mask).sum(-1)
    return loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="the reference is added, not subtracted",
    tries="log π − log ρ: the logarithm of a ratio is a difference.",
    caught_by="start",
)
def reference_added(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ((policy + reference) * mask).sum(-1)
    return loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="β stands before the loss, not within σ: it scales the gradient, and is no leash",
    tries="−log σ(β · margin).",
    caught_by="start",
)
def beta_outside(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return beta * loss_of(chosen - rejected)


@dpo_loss.mistake(
    says="the minus sign is missing: training would make preferred answers unlikely",
    tries="−logsigmoid: a loss that falls when the margin grows.",
    caught_by="start",
)
def no_minus(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return -loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="the logarithm is missing: 1 − σ stops pulling where the order is most wrong",
    tries="−log σ(margin), Bradley–Terry's likelihood.",
    caught_by="start",
)
def no_logarithm(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return (1 - torch.sigmoid(beta * (chosen - rejected))).mean()


@dpo_loss.mistake(
    says="each answer has a loss of its own, as if it were judged alone, not against the other",
    tries="one σ for a pair, of the difference of both log-ratios.",
    caught_by="start",
)
def judged_alone(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return loss_of(beta * chosen) + loss_of(-beta * rejected)


@dpo_loss.mistake(
    says="the loss of each pair is returned, not their mean",
    tries=".mean() over the B pairs.",
    caught_by="start",
)
def not_averaged(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="chosen and rejected have changed places",
    tries="ratio[0] − ratio[1]: the chosen answers come first.",
    caught_by="one",
)
def exchanged(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return loss_of(beta * (rejected - chosen))


@dpo_loss.mistake(
    says="β is left out",
    tries="β times the difference of the log-ratios.",
    caught_by="one",
)
def no_beta(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return loss_of(chosen - rejected)


@dpo_loss.mistake(
    says="the difference is divided by β",
    tries="multiply: the implied reward is β·log(π/ρ).",
    caught_by="one",
)
def divided(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return loss_of((chosen - rejected) / beta)


@dpo_loss.mistake(
    says="only the chosen answer counts: the rejected one is not looked at",
    tries="the log-ratio of the chosen less that of the rejected answer.",
    caught_by="one",
)
def chosen_only(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    return loss_of(beta * ratios(policy, reference, mask)[0])


@dpo_loss.mistake(
    says="brackets are missing: the rejected answer's reference is subtracted, not added back",
    tries="(π₊ − ρ₊) − (π₋ − ρ₋): minus times minus is plus.",
    caught_by="start",
)
def no_brackets(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    (chosen, rejected), (r_chosen, r_rejected) = ((x * mask).sum(-1) for x in (policy, reference))
    return loss_of(beta * (chosen - r_chosen - rejected - r_rejected))


@dpo_loss.mistake(
    says="the mean over an answer's tokens is taken, and long answers weigh no more than short ones",
    tries=".sum(-1): the probability of a text is the product over its tokens.",
    caught_by="tokens",
)
def mean_over_tokens(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask) / mask.sum(-1)
    return loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="the mean over all T places is taken, padding counted",
    tries=".sum(-1), not .mean(-1).",
    caught_by="tokens",
)
def mean_over_places(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ((policy - reference) * mask).mean(-1)
    return loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="prompt and padding count as the answer: the mask is not used",
    tries="(policy − reference) * mask.",
    caught_by="tokens",
)
def unmasked(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = (policy - reference).sum(-1)
    return loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="the mask of the chosen answer is used for both",
    tries="mask as it is, [2, B, T]: each answer has its own length.",
    caught_by="tokens",
)
def one_mask(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ((policy - reference) * mask[0]).sum(-1)
    return loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="every token is a preference of its own: −log σ comes before the sum over the answer",
    tries="sum over tokens first, then one σ for a pair.",
    caught_by="tokens",
)
def by_token(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = (policy - reference) * mask
    return loss_of(beta * (chosen - rejected))


@dpo_loss.mistake(
    says="the losses of the pairs are summed",
    tries=".mean(), so that the step does not grow with the batch.",
    caught_by="pairs",
)
def summed(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).sum()


@dpo_loss.mistake(
    says="the margins are averaged before −log σ: pairs far in order hide those out of order",
    tries="−log σ of every pair's margin, then the mean.",
    caught_by="pairs",
)
def margins_averaged(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return loss_of(beta * (chosen - rejected).mean())


@dpo_loss.mistake(
    says="log(σ(x)) is computed in two steps, and σ is 0 for a large negative margin",
    tries="torch.nn.functional.logsigmoid.",
    caught_by="extreme",
)
def underflow(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return -torch.log(torch.sigmoid(beta * (chosen - rejected))).mean()


@dpo_loss.mistake(
    says="a small number is added within the logarithm: the loss, and its gradient, end at about 18",
    tries="torch.nn.functional.logsigmoid, which needs no such number.",
    caught_by="extreme",
)
def padded_logarithm(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy, reference, mask)
    return -torch.log(torch.sigmoid(beta * (chosen - rejected)) + 1e-8).mean()


@dpo_loss.mistake(
    says="the policy's log-probabilities are detached: the loss is right, and nothing learns from it",
    tries="detach (or no_grad) for the reference only.",
    caught_by="gradient",
)
def detached(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    chosen, rejected = ratios(policy.detach(), reference, mask)
    return loss_of(beta * (chosen - rejected))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@dpo_loss.alternative("softplus of the margin turned round")
def by_softplus(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    answers = [torch.where(m, p - r, 0.0).sum(dim=1) for p, r, m in zip(policy, reference, mask, strict=True)]
    return torch.nn.functional.softplus(beta * (answers[1] - answers[0])).mean()


@dpo_loss.alternative("cross-entropy of the two implied rewards, the chosen one being class 0")
def by_cross_entropy(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    rewards = beta * torch.einsum("ibt,ibt->bi", policy - reference, mask.to(policy.dtype))
    return torch.nn.functional.cross_entropy(rewards, torch.zeros(len(rewards), dtype=torch.long))


@dpo_loss.alternative("policy and reference summed apart, log-sum-exp of the two answers")
def by_logsumexp(policy: Any, reference: Any, mask: Any, beta: float) -> Any:
    implied = beta * ((policy * mask).sum(-1) - (reference * mask).sum(-1))
    return (torch.logsumexp(implied, dim=0) - implied[0]).mean()
