"""Rollouts: answers drawn from a policy, with the probability at which each token was drawn.

    tokens   q q q = a a a . – –     a prompt, its answer, padding          [N, T]
    mask         · · · 1 1 1 1 · ·   which predictions are the policy's own [N, T−1]

Prediction t is that of token t + 1. The mask marks the answer's tokens, its end included: a prompt was not
chosen by the policy, and padding by nobody. Padding stands behind, so a causal model never sees it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models import KVCache, Transformer
from llmcourse.train.alignment.kl import k1
from llmcourse.train.alignment.rewards import Task, checked
from llmcourse.train.fit import one_thread

PAD = 0


@dataclass(frozen=True)
class Rollout:
    """N answers, those to the same prompt beside each other.

    tokens    [N, T] prompts with their answers, PAD behind
    mask      [N, T−1] bool: True where the token that follows belongs to the answer
    logp      [N, T−1] log-probability of each token when it was drawn, 0 outside the mask
    prompts, answers   the same as lists of ids; an answer has its end token, if it came to one
    """

    tokens: Tensor
    mask: Tensor
    logp: Tensor
    prompts: list[list[int]]
    answers: list[list[int]]

    def __len__(self) -> int:
        return len(self.answers)


@torch.no_grad()
@one_thread()
def rollout(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    task: Task,
    *,
    samples: int = 1,
    seed: int = 0,
    greedy: bool = False,
) -> Rollout:
    """`samples` answers to each prompt, drawn from the model's own distribution (temperature 1).

    Prompts of one length run as one batch through a KV cache. The seed draws for all answers together.

    greedy   the likeliest token each time (all samples of a prompt are then the same)
    """
    asked = [list(p) for p in prompts for _ in range(samples)]
    if not asked:
        raise ShapeError(
            f"{len(prompts)} prompts with {samples} samples each.",
            "A rollout has at least one answer.",
            "at least one prompt and samples = 1 or more.",
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in asked]
    drawn: list[Tensor] = [torch.empty(0)] * len(asked)
    for length in sorted({len(p) for p in asked}):
        rows = [i for i, p in enumerate(asked) if len(p) == length]
        batch = torch.tensor([asked[i] for i in rows], device=model.device)
        for i, (answer, logp) in zip(rows, _continue(model, batch, task, generator, greedy), strict=True):
            answers[i], drawn[i] = answer, logp
    tokens, mask = padded([p + a for p, a in zip(asked, answers, strict=True)], [len(p) for p in asked])
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    logp = torch.zeros(mask.shape, device=model.device)
    logp[mask] = torch.cat(drawn)
    return Rollout(tokens, mask, logp, asked, answers)


def _continue(
    model: Transformer, tokens: Tensor, task: Task, generator: torch.Generator, greedy: bool
) -> list[tuple[list[int], Tensor]]:
    """The answer to each prompt of tokens [B, S], and its tokens' log-probabilities."""
    batch, length = tokens.shape
    cache = KVCache(model.config, batch, length + task.max_new, dtype=model.dtype, device=model.device)
    end = torch.tensor(task.end, device=model.device)
    done = torch.zeros(batch, dtype=torch.bool, device=model.device)
    lengths = torch.zeros(batch, dtype=torch.long, device=model.device)
    chosen, logps = [], []
    logits = model(tokens, cache, last_only=True)[:, -1]
    for step in range(task.max_new):
        log_p = logits.float().log_softmax(-1)
        pick = log_p.argmax(-1, keepdim=True) if greedy else log_p.exp().multinomial(1, generator=generator)
        chosen.append(pick)
        logps.append(log_p.gather(-1, pick))
        lengths += ~done
        done |= torch.isin(pick[:, 0], end)
        if step + 1 == task.max_new or bool(done.all()):
            break
        logits = model(pick, cache)[:, -1]
    ids, logp = torch.cat(chosen, dim=1).tolist(), torch.cat(logps, dim=1)
    return [(row[:n], logp[i, :n]) for i, (row, n) in enumerate(zip(ids, lengths.tolist(), strict=True))]


def padded(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """tokens [N, T], PAD behind, and the mask [N, T−1] of the predictions of what follows each prompt."""
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), PAD, dtype=torch.long)
    mask = torch.zeros(len(sequences), width - 1, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, start - 1 : len(ids) - 1] = True
    return tokens, mask


def token_logprobs(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π of each token of the answers given what stands before it, [N, T−1]; 0 outside the mask."""
    logits = model(tokens[:, :-1]).float()  # what stands behind the last token was not drawn
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return -losses.view(mask.shape) * mask


def last_of(mask: Tensor) -> Tensor:
    """The place of the last True in each row of a mask [N, T], as [N]."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def held_out_reward(
    model: Transformer, task: Task, *, prompts: int = 256, seed: int = 0, greedy: bool = False
) -> float:
    """Mean reward of one answer to each of `prompts` prompts that training never gets."""
    asked = task.prompts(prompts, random.Random(f"held out {seed}"), held_out=True)
    return float(checked(task)(rollout(model, asked, task, seed=seed, greedy=greedy)).mean())


@torch.no_grad()
@one_thread()
def kl_from(
    model: Transformer, reference: nn.Module, task: Task, *, prompts: int = 256, seed: int = 0
) -> float:
    """KL(model ‖ reference) in nats a sequence, estimated on one answer to each of some held-out prompts."""
    asked = task.prompts(prompts, random.Random(f"held out {seed}"), held_out=True)
    drawn = rollout(model, asked, task, seed=seed)
    return float(k1(drawn.logp, token_logprobs(reference, drawn.tokens, drawn.mask)).sum(1).mean())
