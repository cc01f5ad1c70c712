"""A task that the model cannot do, and learns in seconds: a record, written the way that somebody wants it.

    Anna, 31, Rome =  Anna of Rome is 31.            style "say"
    Anna, 31, Rome =  Rome;Anna;31                   style "csv"

Nothing has to be known, only a form to be learned, which is what most fine-tuning is for. The model is right
when its greedy answer is, to the last character: `exact`. With the true answer as input, that is so exactly
if the largest logit is right at every position, so that one forward pass tells, without generating.

The last blocks alone are adapted here. Then the blocks before them never change, and what they make of an
example is computed once (`read_ahead`), not at every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import UnknownNameError
from llmcourse.models import Transformer
from llmcourse.models.step import Step
from llmcourse.train.sft import ChatBatch, Encoder, chat_batch

NAMES = (  # noqa: SIM905
    "Anna Ben Clara David Emma Felix Grace Henry Ivan Julia Karl Laura "
    "Maria Nina Oscar Paul Rosa Sam Tom Vera Walter Alice Bruno Carmen"
).split()
TOWNS = (  # noqa: SIM905
    "Paris London Rome Berlin Madrid Vienna Oslo Dublin Lisbon Prague "
    "Athens Warsaw Boston Chicago Dallas Denver Seattle Miami Austin Houston"
).split()
AGES = range(18, 91)
Record = tuple[str, int, str]
STYLES: dict[str, Callable[[str, int, str], str]] = {
    "say": lambda name, age, town: f" {name} of {town} is {age}.\n",
    "csv": lambda name, age, town: f" {town};{name};{age}\n",
    "tag": lambda name, age, town: f" <{name}> {age}, <{town}>\n",
}
"""How a record can be written."""


def prompt(record: Record) -> str:
    """What the model reads."""
    name, age, town = record
    return f"{name}, {age}, {town} ="


def records(count: int, *, held_out: bool = False) -> list[Record]:
    """Different records, always the same ones. None is both held out and not."""
    everything = list(product(NAMES, AGES, TOWNS))
    random.Random(0).shuffle(everything)
    return everything[-count:] if held_out else everything[:count]


def examples(tokenizer: Encoder, style: str, count: int, *, held_out: bool = False) -> ChatBatch:
    """Records and how they are written in a style: tokens [count, S], and which of them are learned.

    Raises UnknownNameError for another style.
    """
    if style not in STYLES:
        raise UnknownNameError(
            f"there is no style {style!r}.", f"Records are written as {', '.join(STYLES)}.", "one of these."
        )
    pairs = []
    for record in records(count, held_out=held_out):
        asked, answer = tokenizer.encode(prompt(record)), tokenizer.encode(STYLES[style](*record))
        pairs.append((asked + answer, [False] * len(asked) + [True] * len(answer)))
    return chat_batch(pairs, length=max(len(ids) for ids, _ in pairs))


@dataclass(frozen=True)
class Ahead:
    """Examples as they are before block `first`: x [B, S, E], tokens and learned [B, S]."""

    x: Tensor
    tokens: Tensor
    learned: Tensor
    first: int

    def batches(self, size: int, *, seed: int) -> Iterator[Ahead]:
        """Random rows without end, each once before any comes again."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
            for rows in order[: len(order) // size * size].split(size):
                yield Ahead(self.x[rows], self.tokens[rows], self.learned[rows], self.first)


@torch.no_grad()
def read_ahead(model: Transformer, batch: ChatBatch, first: int) -> Ahead:
    """Examples through the blocks before `first`, which are frozen."""
    batch = batch.to(model.device)
    step = model.plan(batch.tokens, None)
    x = model.embedding(batch.tokens)
    for block in _blocks(model)[:first]:
        x = block(x, step, None)
    return Ahead(x, batch.tokens, batch.learned, first)


def asked(model: Transformer, ahead: Ahead) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and targets [T] of the T learned tokens: only they go through the output head."""
    step: Step = model.plan(ahead.tokens, None)
    x = ahead.x if ahead.first else model.embedding(ahead.tokens)  # which may be trained as well
    for block in _blocks(model)[ahead.first :]:
        x = block(x, step, None)
    wanted = ahead.learned[:, 1:]
    return model.head(model.norm(x[:, :-1][wanted])), ahead.tokens[:, 1:][wanted]


def loss(model: nn.Module, ahead: Ahead) -> Tensor:
    """Mean loss in nats over the learned tokens, for `fit(model, ahead.batches(…), loss=loss)`."""
    assert isinstance(model, Transformer)
    logits, targets = asked(model, ahead)
    return F.cross_entropy(logits.float(), targets)


@torch.no_grad()
def test(model: Transformer, ahead: Ahead) -> tuple[float, float]:
    """(mean loss in nats, share of answers that are right to the last token)."""
    logits, targets = asked(model, ahead)
    wrong = torch.zeros_like(ahead.learned[:, 1:])
    wrong[ahead.learned[:, 1:]] = logits.argmax(-1) != targets
    return F.cross_entropy(logits.float(), targets).item(), float((~wrong.any(1)).float().mean())


def _blocks(model: Transformer) -> list[nn.Module]:
    return list(model.blocks)
