"""Training a draft on what its target says, with the target's features kept for the whole text.

A target's logits for a token are a product of its last features with its head. The head is one matrix;
features are 576 numbers where the logits are 49,152. So the target reads the training text once, its
features stay in memory, and every epoch after that costs it nothing but the product (see `linear_kl`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmcourse.compress.linear_kl import ROWS, linear_kl
from llmcourse.errors import ShapeError
from llmcourse.models import Transformer
from llmcourse.train.fit import fit, token_loss


@dataclass(frozen=True)
class Piece:
    """tokens [B, S] and the target's features at each of them [B, S, E]."""

    tokens: Tensor
    features: Tensor


@dataclass(frozen=True)
class Corpus:
    """Texts of one length, tokens [n, S], and the target's features of them [n, S, E], on the device."""

    tokens: Tensor
    features: Tensor

    @property
    def size(self) -> int:
        return self.tokens.numel()


def features(model: Transformer, tokens: Tensor) -> Tensor:
    """What a model's head reads, [B, S, E], for tokens [B, S]: its logits before the last product."""
    return model.features(tokens, model.plan(tokens, None))


@torch.no_grad()
def corpus_of(target: Transformer, tokens: Tensor, *, tokens_at_once: int = 16_384) -> Corpus:
    """Texts [n, S] with the target's features, computed for about `tokens_at_once` tokens at a time."""
    tokens = tokens.to(target.device)
    rows = max(1, tokens_at_once // tokens.shape[1])
    width = target.config.d_model
    kept = torch.empty(*tokens.shape, width, dtype=target.dtype, device=target.device)
    for start in range(0, len(tokens), rows):
        kept[start : start + rows] = features(target, tokens[start : start + rows])
    return Corpus(tokens, kept)


def pieces(corpora: Sequence[Corpus], *, tokens_per_step: int, seed: int) -> Iterator[Piece]:
    """Random rows of one corpus a step, which one by its share of all tokens."""
    sizes = torch.tensor([float(c.size) for c in corpora])
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = corpora[int(sizes.multinomial(1, generator=generator))]
        rows = max(1, tokens_per_step // chosen.tokens.shape[1])
        index = torch.randint(0, len(chosen.tokens), (rows,), generator=generator).to(chosen.tokens.device)
        yield Piece(chosen.tokens[index], chosen.features[index])


class DraftLoss:
    """The loss of a step, for `fit`.

    head        the target's head [V, E]
    variation   weight of total variation beside KL, after the first `warm` steps
    labels      learn the next token of the text in place of the target's distribution
    """

    def __init__(
        self, head: Tensor, *, variation: float = 0.0, warm: int = 0, labels: bool = False, rows: int = ROWS
    ) -> None:
        self.head, self.variation, self.warm, self.labels, self.rows = head, variation, warm, labels, rows
        self.steps = 0

    def __call__(self, draft: Transformer, piece: Piece) -> Tensor:
        self.steps += 1
        gpu = piece.tokens.device.type == "cuda"
        with torch.autocast(piece.tokens.device.type, dtype=torch.bfloat16, enabled=gpu):
            x = features(draft, piece.tokens)
            if self.labels:
                logits = draft.head(x[:, :-1]).flatten(0, 1)
                return token_loss(logits, piece.tokens[:, 1:].flatten())
        return linear_kl(
            x.flatten(0, 1),
            draft.head.weight,
            piece.features.flatten(0, 1),
            self.head,
            rows=self.rows,
            variation=self.variation if self.steps > self.warm else 0.0,
            dtype=torch.bfloat16 if gpu else torch.float32,
        )


def train_draft(
    draft: Transformer,
    corpora: Sequence[Corpus],
    loss: Callable[[Any, Piece], Tensor],
    *,
    steps: int,
    tokens_per_step: int,
    lr: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Train `draft` in place; its loss at every step. Raises ShapeError for no text."""
    if not corpora or not all(c.size for c in corpora):
        raise ShapeError(
            "there is no text to learn from.",
            "A draft learns at every token of its target's texts.",
            "corpus_of(target, tokens) of at least one text.",
        )
    optimizer = partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=draft.device.type == "cuda")
    batches = pieces(corpora, tokens_per_step=tokens_per_step, seed=seed)
    return fit(
        draft, batches, steps=steps, lr=lr, loss=loss, optimizer=optimizer, warmup=min(100, steps // 10 + 1)
    )
