"""Distillation: a small model learns from what a large one would say.

A label names one token. The teacher gives a probability to every token, and so tells which mistakes are
nearly right. Three things can be learned from it, and they differ in whose text is read and what is asked
there:

| | text | asked at each token |
|---|---|---|
| soft targets (Hinton 2015) | any, e.g. what labels would come from | the teacher's distribution |
| sequence-level (Kim & Rush 2016) | the teacher's | the token that it wrote |
| on-policy (GKD, Agarwal 2023) | the student's own | the teacher's distribution |

The distance between two distributions has a direction. Forward KL(p ‖ q), teacher first, is large where the
teacher goes and the student does not: the student spreads over everything. Reverse KL(q ‖ p) is large where
the student goes and the teacher does not: it keeps to what is safe. The generalised Jensen–Shannon divergence
lies between them. Total variation is what a draft of speculative decoding pays (see `acceptance`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import CourseError, ShapeError
from llmcourse.models import KVCache, Transformer
from llmcourse.train.fit import token_loss
from llmcourse.train.tasks import IGNORE, Batch

Divergence = Callable[[Tensor, Tensor], Tensor]


class DistillationError(CourseError, ValueError):
    """A temperature, a weight or a mixture outside the range in which it means something."""


# ------------------------------------------------------------------ distances, [..., V] → [...]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p·(log p − log q) in nats, from logits [..., V]; p the teacher's, q the student's."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ q·(log q − log p), from logits [..., V]."""
    return forward_kl(teacher, student)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """½·Σ |p − q| = 1 − Σ min(p, q): the chance that speculative sampling rejects a guess of the student."""
    return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2


def jensen_shannon(student: Tensor, teacher: Tensor, mix: float = 0.5) -> Tensor:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = β·p + (1 − β)·q, β = `mix` between 0 and 1, both excluded.

    Divided by β it becomes forward KL(p ‖ q) as β → 0, divided by 1 − β reverse KL as β → 1 (Agarwal et al.
    2023, arXiv:2306.13649).
    """
    if not 0 < mix < 1:
        raise DistillationError(
            f"a mixture of {mix} parts of the teacher.",
            "At 0 and at 1 the mixture is one of the two, and the divergence is 0 everywhere.",
            "mix between 0 and 1; forward_kl and reverse_kl are the limits.",
        )
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    shares = torch.tensor((mix, 1 - mix), dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logaddexp(log_p + shares[0], log_q + shares[1])
    p_part = (log_p.exp() * (log_p - log_m)).sum(-1)
    q_part = (log_q.exp() * (log_q - log_m)).sum(-1)
    return mix * p_part + (1 - mix) * q_part


# ------------------------------------------------------------------ the loss


def soft_loss(student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T²·KL(p_T ‖ q_T), mean over the places whose target is not IGNORE; p_T = softmax(teacher / T).

    student, teacher   logits [N, V];  targets [N]: asked for their IGNOREs only
    temperature        T > 0. Dividing logits by T flattens both distributions, so that unlikely tokens are
                       heard. The gradient falls as 1/T² with it; the factor T² takes that back, so that a
                       learning rate, or a weight beside another loss, keeps its meaning.

    No gradient goes to the teacher.
    """
    if temperature <= 0:
        raise DistillationError(
            f"the temperature is {temperature}.",
            "Logits are divided by it, and at 0 the target is a label.",
            "a temperature above 0, e.g. 2.",
        )
    same_vocabulary(student, teacher)
    asked = targets != IGNORE
    distance = forward_kl(student.float() / temperature, teacher.detach().float() / temperature)
    return temperature**2 * (distance * asked).sum() / asked.sum().clamp(min=1)


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0, weight: float = 1.0
) -> Tensor:
    """w·T²·KL(p_T ‖ q_T) + (1 − w)·cross-entropy (Hinton, Vinyals & Dean 2015, arXiv:1503.02531).

    student, teacher   logits [N, V];  targets [N], IGNORE where nothing is asked
    weight             w, of the soft part: 1 needs no labels, 0 no teacher
    """
    if not 0 <= weight <= 1:
        raise DistillationError(
            f"a weight of {weight} for the soft targets.", "Labels get the rest of 1.", "weight from 0 to 1."
        )
    soft = soft_loss(student, teacher, targets, temperature=temperature) if weight else student.new_zeros(())
    hard = token_loss(student.float(), targets) if weight < 1 else student.new_zeros(())
    return weight * soft + (1 - weight) * hard


def same_vocabulary(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"the student's logits have shape {list(student.shape)}, the teacher's {list(teacher.shape)}.",
            "Distributions are compared token by token, so both models need one tokenizer.",
            "a student with the teacher's vocabulary, on the same tokens.",
        )


# ------------------------------------------------------------------ losses for `fit`


def from_teacher(
    teacher: nn.Module, *, temperature: float = 1.0, weight: float = 1.0
) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss for `fit`: `distillation_loss` of a batch, the teacher asked in the same step."""

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            said = teacher(*batch.inputs).flatten(0, 1)
        mine = student(*batch.inputs).flatten(0, 1)
        return distillation_loss(mine, said, batch.targets.flatten(), temperature, weight)

    return loss


def by_divergence(teacher: nn.Module, distance: Divergence) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss for `fit`: the mean of `distance(student, teacher)` over the asked places of a batch."""

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            said = teacher(*batch.inputs)
        mine = student(*batch.inputs)
        same_vocabulary(mine, said)
        asked = batch.targets != IGNORE
        return (distance(mine.float(), said.float()) * asked).sum() / asked.sum().clamp(min=1)

    return loss


# ------------------------------------------------------------------ whose text


@torch.no_grad()
def written_by(
    model: nn.Module, prompts: Tensor, *, length: int, generator: torch.Generator, temperature: float = 1.0
) -> Batch:
    """`length` tokens after each prompt [B, S], drawn from the model; asked at what was drawn alone.

    temperature   0: the likeliest token each time
    The batch's inputs are [B, S + length − 1]; its targets are the next tokens, IGNORE within the prompt.
    """
    tokens = prompts
    cache = None
    if isinstance(model, Transformer):
        room = prompts.shape[1] + length
        cache = KVCache(model.config, len(prompts), room, dtype=model.dtype, device=model.device)
    for i in range(length):
        new = tokens if i == 0 or cache is None else tokens[:, -1:]
        logits = (model(new) if cache is None else model(new, cache, last_only=True))[:, -1].float()
        if temperature:
            drawn = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
        else:
            drawn = logits.argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, drawn), dim=1)
    targets = tokens[:, 1:].clone()
    targets[:, : prompts.shape[1] - 1] = IGNORE
    return Batch((tokens[:, :-1],), targets)


def rewritten(
    batches: Iterable[Batch], writer: nn.Module, *, prompt: int, seed: int, temperature: float = 1.0
) -> Iterator[Batch]:
    """Each batch with all but its first `prompt` tokens written anew by `writer`.

    With the teacher as writer and cross-entropy this is sequence-level distillation; with the student as
    writer and a divergence it is on-policy: the student is corrected where its own words lead it.
    """
    generator = torch.Generator(next(writer.parameters()).device).manual_seed(seed)
    for batch in batches:
        (tokens,) = batch.inputs
        length = tokens.shape[1] + 1 - prompt
        yield written_by(
            writer, tokens[:, :prompt], length=length, generator=generator, temperature=temperature
        )
