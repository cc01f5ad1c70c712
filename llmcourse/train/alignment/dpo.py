"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): no reward model, no sampling.

The policy that gains the most reward r under a penalty β·KL(π ‖ ρ) is known in closed form:

    π(y|x) ∝ ρ(y|x)·exp(r(x, y)/β)        so        r(x, y) = β·log(π(y|x) / ρ(y|x)) + a term of x alone

Put this r into Bradley–Terry, and the term of x cancels between two answers to one prompt:

    loss = −log σ(β·[log π(y₊) − log ρ(y₊)] − β·[log π(y₋) − log ρ(y₋)])

The policy is its own reward model. The gradient raises y₊ and lowers y₋, most where the implied rewards have
the order wrong. log π(y) is the *sum* over the answer's tokens: the probability of the whole answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models import Transformer
from llmcourse.train.alignment.preferences import Preferences
from llmcourse.train.alignment.run import Run, frozen, trainable
from llmcourse.train.alignment.sampling import token_logprobs
from llmcourse.train.fit import fit, one_thread


def margins(policy: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Implied reward of the chosen answer less that of the rejected one, [B].

    policy, reference, mask   [2, B, T] as in `dpo_loss`
    """
    implied = beta * ((policy - reference) * mask).sum(-1)
    return implied[0] - implied[1]


def dpo_loss(policy: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Mean over B pairs of −log σ(margin).

    policy, reference   [2, B, T] log-probabilities of tokens, the chosen answers first, then the rejected
    mask                [2, B, T] True for the answers' tokens
    """
    return -F.logsigmoid(margins(policy, reference, mask, beta)).mean()


@one_thread()
def train_dpo(
    base: Transformer,
    pairs: Preferences,
    *,
    beta: float = 0.5,
    steps: int = 100,
    batch: int = 64,
    lr: float = 5e-4,
    seed: int = 0,
) -> Run[Transformer]:
    """A copy of `base`, trained on pairs; `base` is also the reference.

    The reference's log-probabilities never change, so they are computed once, before training.
    """
    policy = trainable(base)
    reference = reference_logprobs(frozen(base), pairs)
    rewards: list[float] = []

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        tokens, mask = pairs.tokens[:, index], pairs.mask[:, index]
        logp = token_logprobs(model, tokens.flatten(0, 1), mask.flatten(0, 1)).view(mask.shape)
        rewards.append(float(margins(logp.detach(), reference[:, index], mask, beta).mean()))
        return dpo_loss(logp, reference[:, index], mask, beta)

    order = pairs.order(batch=min(batch, len(pairs)), seed=seed)
    curve = fit(policy, order, steps=steps, lr=lr, loss=loss, weight_decay=0.0)
    return Run(policy.eval().requires_grad_(False), curve, rewards)


@torch.no_grad()
def reference_logprobs(reference: nn.Module, pairs: Preferences, *, batch: int = 64) -> Tensor:
    """[2, P, T−1] log-probabilities of all pairs' tokens, `batch` sequences at a time."""
    tokens, mask = pairs.tokens.flatten(0, 1), pairs.mask.flatten(0, 1)
    parts = [
        token_logprobs(reference, t, m) for t, m in zip(tokens.split(batch), mask.split(batch), strict=True)
    ]
    return torch.cat(parts).view(pairs.mask.shape)
