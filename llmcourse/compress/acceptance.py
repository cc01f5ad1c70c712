"""How good a draft is: the share of its guesses that the rule of speculative sampling accepts.

A draft q guesses the next token, the target p checks. Leviathan, Kalman & Matias (2023, arXiv:2211.17192)
accept a guessed x with probability min(1, p(x)/q(x)), and draw from what is left, (p − q)⁺, where they do
not: the text is then distributed as the target's own. At one place the guess is accepted with probability

    Σ_x q(x)·min(1, p(x)/q(x)) = Σ_x min(p(x), q(x)) = 1 − TV(p, q)

so a good draft is one at a small *total variation* distance from its target; where p and q are greedy, one
that has the same largest logit.

No draft has to run to measure it. Seen from the other side, a token x that the *target* wrote was a guess
that passed with probability min(1, q(x)/p(x)), because min(p, q) = p·min(1, q/p). So one pass of both models
over text that the target wrote gives every place its probability, in order, and `tokens_per_pass` plays any
draft length on them: places do not accept independently (easy words come in runs), and this keeps their
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcourse.errors import CourseError
from llmcourse.notebook import Table

LENGTHS = tuple(range(1, 9))
"""Draft lengths that a report looks at."""


class AcceptanceError(CourseError, ValueError):
    """Logits, tokens or probabilities from which no acceptance rate follows."""


@dataclass(frozen=True)
class Places:
    """What was found at each place of the target's own texts.

    overlap    one tensor a text: Σ min(p, q), the chance that a guess is accepted there
    accepted   one tensor a text: min(1, q(x)/p(x)) of the token that the target wrote
    """

    overlap: list[Tensor]
    accepted: list[Tensor]

    @property
    def count(self) -> int:
        return sum(len(a) for a in self.overlap)

    @property
    def rate(self) -> float:
        """α: the mean chance that one guess is accepted, over all places."""
        return float(torch.cat(self.overlap).mean())

    def tokens_per_pass(self, length: int) -> float:
        """Tokens that one pass of the target yields with drafts of `length`, over all texts."""
        passes = sum(expected_passes(a, length) for a in self.accepted)
        return self.count / passes

    def table(self, lengths: Sequence[int] = LENGTHS, cost: float | None = None) -> Table:
        """Draft length by draft length: played on the texts, and by the formula for independent places.

        cost   of one step of the draft, in steps of the target: adds the speed that follows
        """
        rows = []
        for n in lengths:
            played = self.tokens_per_pass(n)
            row: list[object] = [n, f"{played:.2f}", f"{expected_tokens(self.rate, n):.2f}"]
            rows.append([*row, f"{played / (1 + n * cost):.2f}×"] if cost is not None else row)
        names = ["draft length", "tokens a pass, played", "by the formula"]
        return Table(names + ["speed"] * (cost is not None), rows, f"α = {self.rate:.3f}")


def compare(
    target: Tensor, draft: Tensor, tokens: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Overlap and acceptance at the S places of one text, both [S].

    target, draft   logits [S, V] at the same places;  tokens [S]: what the target wrote there
    temperature     at which both would draw; 0: greedy, where a guess passes if both choose the same token

    Raises AcceptanceError for shapes that do not belong together or a negative temperature.
    """
    if target.shape != draft.shape or target.dim() != 2 or tokens.shape != target.shape[:1]:
        raise AcceptanceError(
            f"logits {list(target.shape)} and {list(draft.shape)} came with tokens {list(tokens.shape)}.",
            "Both models are compared at the same places and over the same vocabulary.",
            "logits [S, V] of both, and tokens [S].",
        )
    if temperature < 0:
        raise AcceptanceError(
            f"the temperature is {temperature}.",
            "Logits are divided by it; 0 stands for the likeliest token.",
            "0 or more.",
        )
    if temperature == 0:
        same = (target.argmax(-1) == draft.argmax(-1)).double()
        return same, same
    p = (target.double() / temperature).log_softmax(-1)
    q = (draft.double() / temperature).log_softmax(-1)
    written = tokens[:, None]
    ratio = (q.gather(-1, written) - p.gather(-1, written))[:, 0].exp()
    return torch.minimum(p, q).exp().sum(-1), ratio.clamp(max=1)


def expected_passes(accepted: Tensor, length: int) -> float:
    """Passes of the target that a text of S tokens takes, on average over the draft's luck.

    accepted   [S] chance that each token would have passed as a guess
    length     γ: guesses before each check

    A pass that begins at place i ends at the first guess that fails, in whose place it writes the target's
    token, or after γ passed guesses and one token more. So the chance that *some* pass begins at a place
    follows from the chances of the places before it; their sum is the expected number of passes.
    """
    if length < 1:
        raise AcceptanceError(
            f"drafts of {length} tokens.", "A draft guesses at least one.", "length = 1 or more."
        )
    chances = accepted.tolist()
    count = len(chances)
    begins = [0.0] * count
    if count:
        begins[0] = 1.0
    for i in range(count):
        reach = begins[i]
        for j in range(i, min(i + length, count)):
            if j + 1 < count:
                begins[j + 1] += reach * (1 - chances[j])
            reach *= chances[j]
        if i + length + 1 < count:
            begins[i + length + 1] += reach
    return sum(begins)


def expected_tokens(rate: float, length: int) -> float:
    """(1 − α^(γ+1)) / (1 − α): tokens a pass if every guess passed independently with probability α."""
    return sum(rate**k for k in range(length + 1))


def speedup(rate: float, length: int, cost: float) -> float:
    """Tokens a second against the target alone, if a step of the draft takes `cost` of a step of the target
    and checking γ guesses takes as long as writing one token (small batches: weights are read once)."""
    return expected_tokens(rate, length) / (1 + length * cost)


@torch.inference_mode()
def measure(
    target: torch.nn.Module,
    draft: torch.nn.Module,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    temperature: float = 1.0,
) -> Places:
    """Both models over `texts`, pairs of a prompt and what the target wrote after it, at `temperature`.

    Raises AcceptanceError when nothing was written, or the models have different vocabularies.
    """
    if not any(len(written) for _, written in texts):
        raise AcceptanceError(
            f"no token was written in {len(texts)} texts.",
            "A guess is compared with a token of the target.",
            "texts with at least one token each after the prompt.",
        )
    device = next(target.parameters()).device
    overlap, accepted = [], []
    for prompt, written in texts:
        if not len(written):
            continue
        ids = torch.tensor([[*prompt, *written]], device=device)
        place = slice(len(prompt) - 1, -1)
        p, q = (model(ids)[0, place].float() for model in (target, draft))
        one, other = compare(p, q, ids[0, len(prompt) :], temperature=temperature)
        overlap.append(one.cpu())
        accepted.append(other.cpu())
    return Places(overlap, accepted)
