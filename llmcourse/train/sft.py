"""Supervised fine-tuning: next-token prediction on conversations, asked about the answers only.

    <|im_start|>user          . . . . . . . .   read
    Where goes the king?<|im_end|>              read
    <|im_start|>assistant     . . . . . . . .   read
    To bed, my lord.<|im_end|>                  ← learned, the token that ends the answer included

A pre-trained model continues text; it has no reason to answer, and none to stop. Fine-tuning on
conversations in a fixed format gives it both. The loss counts the tokens of the assistant's turns alone: the
user's words are the condition, and a model that learned them would learn to ask. The mean is over all
learned tokens of a batch: a mean of each conversation's mean would make a token of a short answer worth more
than one of a long answer.

(Ouyang et al. 2022, arXiv:2203.02155, first step.)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import ShapeError

Message = Mapping[str, str]


class Encoder(Protocol):
    """A tokenizer: `text.bpe.BPE` or `text.tokenizer.Tokenizer`."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class ChatFormat:
    """How turns are written: start, role, newline, content, end, newline. The default is SmolLM2's ChatML.

    learner   the role whose words are learned
    """

    start: str = "<|im_start|>"
    end: str = "<|im_end|>"
    learner: str = "assistant"

    @property
    def special(self) -> tuple[str, str]:
        """The control tokens, the one that ends an answer last."""
        return self.start, self.end

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The conversation as stretches of text, each with whether it is learned."""
        out = []
        for message in messages:
            if message["role"] != self.learner:
                out.append((f"{self.start}{message['role']}\n{message['content']}{self.end}\n", False))
                continue
            out.append((f"{self.start}{self.learner}\n", False))
            out.append((f"{message['content']}{self.end}", True))
            out.append(("\n", False))
        return out

    def text(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The conversation as one text; `answer` adds the opening of an answer."""
        whole = "".join(text for text, _ in self.pieces(messages))
        return whole + f"{self.start}{self.learner}\n" * answer


CHATML = ChatFormat()


@dataclass(frozen=True)
class ChatBatch:
    """tokens [B, S], and which of them are learned: bool [B, S], False for padding."""

    tokens: Tensor
    learned: Tensor

    def to(self, device: torch.device | str) -> ChatBatch:
        return ChatBatch(self.tokens.to(device), self.learned.to(device))


def encode_chat(
    tokenizer: Encoder, messages: Sequence[Message], form: ChatFormat = CHATML
) -> tuple[list[int], list[bool]]:
    """The conversation's ids, and which of them are learned.

    Each stretch is encoded by itself, so that no token lies across a border: at inference the prompt ends
    where the answer begins, and a token that reached over would never be seen there.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for text, wanted in form.pieces(messages):
        new = tokenizer.encode(text)
        ids += new
        learned += [wanted] * len(new)
    return ids, learned


def chat_batch(examples: Sequence[tuple[list[int], list[bool]]], *, length: int) -> ChatBatch:
    """Conversations side by side, cut to `length` tokens, padded to the longest with id 0 that nobody learns.

    Padding stands behind, where a causal model's earlier positions do not see it.
    """
    width = min(length, max(len(ids) for ids, _ in examples))
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, (ids, learned) in enumerate(examples):
        n = min(width, len(ids))
        tokens[row, :n], mask[row, :n] = torch.tensor(ids[:n]), torch.tensor(learned[:n])
    return ChatBatch(tokens, mask)


def chat_batches(
    examples: Sequence[tuple[list[int], list[bool]]], *, batch: int, length: int, seed: int
) -> Iterator[ChatBatch]:
    """An endless supply of random batches. Conversations whose answers lie beyond `length` are left out.

    Raises ShapeError when none is left.
    """
    fitting = [e for e in examples if any(e[1][:length])]
    if not fitting:
        raise ShapeError(
            f"no answer in {len(examples)} conversations begins within {length} tokens.",
            "There is nothing to learn from a question alone.",
            "a larger length, or shorter conversations.",
        )
    rng = random.Random(seed)
    while True:
        yield chat_batch([rng.choice(fitting) for _ in range(batch)], length=length)


def masked_sft_loss(logits: Tensor, tokens: Tensor, learned: Tensor) -> Tensor:
    """Mean loss in nats over the learned tokens, each predicted by the position before it.

    logits [B, S, V], tokens [B, S], learned bool [B, S]. 0 when nothing is learned.
    """
    asked = learned[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), tokens[:, 1:], reduction="none")
    return (losses * asked).sum() / asked.sum().clamp(min=1)


def sft_loss(model: nn.Module, batch: ChatBatch) -> Tensor:
    """`masked_sft_loss` of a model, for `fit(model, chat_batches(…), loss=sft_loss, …)`."""
    return masked_sft_loss(model(batch.tokens), batch.tokens, batch.learned)


def every_token(batch: ChatBatch) -> ChatBatch:
    """The same conversations with everything learned, questions too: what masking is compared with.

    Padding is told by its id 0, a control token that is never the last of a row's text here.
    """
    behind = batch.tokens.ne(0).flip(1).cumsum(1).flip(1) > 0
    return ChatBatch(batch.tokens, behind)


def dialogues(play: str, *, most: int = 120) -> list[list[dict[str, str]]]:
    """Two speeches in a row of a play, as a question of the user and an answer of the assistant.

    Speeches of more than `most` characters, and those that end a scene, are left out.
    """
    out, before = [], ""
    for block in play.split("\n\n"):
        found = re.fullmatch(r"\*\*[^*\n]+\*\*\n([^#*_].*)", block.strip(), re.DOTALL)
        speech = found.group(1).strip() if found else ""
        if before and speech and max(len(before), len(speech)) <= most:
            out.append([{"role": "user", "content": before}, {"role": "assistant", "content": speech}])
        before = speech
    return out
