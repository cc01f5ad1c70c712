"""From logits to the next token: greedy, temperature, top-k, top-p.

Each request draws from its own generator, so that its text depends on its seed and not on what else
is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcourse.errors import CourseError


class SamplingError(CourseError, ValueError):
    """Sampling parameters outside the range in which they mean something."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    max_tokens    the longest answer
    temperature   0 picks the likeliest token; 1 draws from the model's distribution
    top_k         draw from the k likeliest only (0: all)
    top_p         draw from the smallest set whose probability reaches p (Holtzman et al. 2019,
                  arXiv:1904.09751)
    seed          the same seed gives the same text for the same prompt
    stop          strings that end the answer; they are not part of it
    ignore_eos    go on to max_tokens (for timing)
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "stop": (all(self.stop), "a tuple of strings that are not empty"),
        }
        for name, (ok, rule) in bounds.items():
            if not ok:
                raise SamplingError(
                    f"{name} = {getattr(self, name)!r}.",
                    f"{name} must be {rule}.",
                    f"SamplingParams() and change one value at a time; its defaults are {SamplingParams()}.",
                )


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that is drawn from, [..., V] float32, for temperature > 0.

    Order as in Hugging Face: temperature, then top-k, then top-p on what is left.
    """
    scaled = logits.float() / params.temperature
    if 0 < params.top_k < scaled.shape[-1]:
        kth = scaled.topk(params.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    probs = scaled.softmax(dim=-1)
    if params.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays if the likelier ones do not yet reach p; the likeliest always stays.
        drop = ordered.cumsum(dim=-1) - ordered >= params.top_p
        probs = probs.masked_fill(drop.gather(-1, index.argsort(dim=-1)), 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


class Sampler:
    """Chooses the next token of each sequence of a batch."""

    def __init__(self, params: list[SamplingParams]) -> None:
        self.params = params
        self.generators = [torch.Generator().manual_seed(p.seed) for p in params]

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, V] → token ids [B] on the same device."""
        choice = logits.argmax(dim=-1)
        for row, (params, generator) in enumerate(zip(self.params, self.generators, strict=True)):
            if params.temperature > 0:
                probs = probabilities(logits[row], params).cpu()
                choice[row] = torch.multinomial(probs, 1, generator=generator)[0]
        return choice
