"""Text that a chat model writes itself: both sides of conversations, from its format alone.

Given the opening of a user's turn and nothing else, a model that was tuned on conversations writes a
question, because that is what comes there (Magpie: Xu et al. 2024, arXiv:2406.08464). When it ends the turn,
the opening of an answer is put behind it, and it answers itself; and so on. Nothing is collected, and the
text is distributed as what the model says in use, which is where a draft will be asked.

All rows of a batch take every step together: a row whose next tokens are given (the opening of a turn) gets
them one a step, while its neighbours draw. So no row waits, none is thrown away, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcourse.errors import ModelError, ShapeError
from llmcourse.models import KVCache, Transformer
from llmcourse.text.tokenizer import Tokenizer

MARKS = ("\x01", "\x02", "\x03")


@dataclass(frozen=True)
class Turns:
    """What a chat format puts around what is said, in ids.

    opening   up to the user's first word
    answer    from the end of the user's words to the first word of the answer
    ask       from the end of an answer to the user's next word
    Both `answer` and `ask` begin with the token that ends a turn.
    """

    opening: list[int]
    answer: list[int]
    ask: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Turns:
        """Read off the tokenizer's chat template. Raises ModelError when its turns end without a token."""
        a, b, c = MARKS
        messages = [
            {"role": "user", "content": a},
            {"role": "assistant", "content": b},
            {"role": "user", "content": c},
        ]
        text = tokenizer.chat(messages, answer=False)
        opening, rest = text.split(a)
        answer, rest = rest.split(b)
        ask = rest.split(c)[0]
        turns = cls(*(tokenizer.encode(part) for part in (opening, answer, ask)))
        if not turns.opening or turns.answer[:1] != turns.ask[:1] or turns.answer[0] not in tokenizer.eos_ids:
            raise ModelError(
                "the chat template does not end a turn with the token that ends an answer.",
                "Where a turn ends is told by that token.",
                "a model whose format is ChatML, like SmolLM2.",
            )
        return turns


@dataclass(frozen=True)
class Written:
    """tokens [B, T], and which of them the model chose: bool [B, T], False for what the format gave."""

    tokens: Tensor
    chosen: Tensor


def conversations(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    seed: int,
    coolest: float = 0.3,
    decoder: Callable[[Tensor], Tensor] | None = None,
) -> Written:
    """`rows` conversations of exactly `length` tokens, written by the model alone.

    coolest   answers are drawn at temperatures spread evenly from this (first row) to 1 (last row), since the
              model will be asked at all of them; questions always at 1, for variety
    decoder   advances a cache that is made for `rows` × `length` (see `decoder_for`), to be used again

    Raises ShapeError for a length that the opening fills, or that the model was not made for.
    """
    turns = Turns.of(tokenizer)
    opening = len(turns.opening)
    if not opening < length <= model.config.max_len or rows < 1:
        raise ShapeError(
            f"{rows} conversations of {length} tokens.",
            f"The opening takes {opening}, and {model.config.name} was made for {model.config.max_len}.",
            f"rows = 1 or more, and a length from {opening + 1} to {model.config.max_len}.",
        )
    device = model.device
    widest = max(len(turns.answer), len(turns.ask))
    links = torch.zeros(2, widest + 1, dtype=torch.long, device=device)  # [0]: user → assistant, [1]: back
    for row, ids in enumerate((turns.answer, turns.ask)):
        links[row, : len(ids)] = torch.tensor(ids)
    sizes = torch.tensor((len(turns.answer), len(turns.ask)), device=device)
    end = turns.answer[0]
    warmth = torch.linspace(coolest, 1, rows, device=device)
    generator = torch.Generator(device).manual_seed(seed)

    speaker = torch.zeros(rows, dtype=torch.long, device=device)  # 0 the user, 1 the assistant
    place = torch.zeros_like(speaker)  # of the next given token in the link; 0: the model draws
    tokens = torch.empty(rows, length, dtype=torch.long, device=device)
    chosen = torch.zeros(rows, length, dtype=torch.bool, device=device)
    tokens[:, :opening] = torch.tensor(turns.opening, device=device)
    with torch.inference_mode():
        step = decoder or decoder_for(model, rows, length)
        logits = step(tokens[:, :opening])[:, -1]
        for i in range(opening, length):
            heat = torch.where(speaker == 1, warmth, 1.0)
            drawn = (logits.float() / heat[:, None]).softmax(-1).multinomial(1, generator=generator)[:, 0]
            given = place > 0
            token = torch.where(given, links[speaker, place], drawn)
            place = torch.where(given | (token == end), place + 1, place)
            turned = place == sizes[speaker]
            speaker = torch.where(turned, 1 - speaker, speaker)
            place = torch.where(turned, 0, place)
            tokens[:, i], chosen[:, i] = token, ~given
            if i + 1 < length:
                logits = step(token[:, None])[:, -1]
    return Written(tokens, chosen)


def decoder_for(model: Transformer, rows: int, length: int) -> Callable[[Tensor], Tensor]:
    """A function that advances `rows` sequences together: several tokens begin them anew, one goes on.

    On a GPU the steps are CUDA graphs; kept by the caller, they are captured once for all batches.
    """
    cache = KVCache(model.config, rows, length, dtype=model.dtype, device=model.device)
    graphs = None
    if model.device.type == "cuda":
        from llmcourse.engine.cuda_graph import GraphDecoder

        graphs = GraphDecoder(model, cache)

    def advance(tokens: Tensor) -> Tensor:
        if tokens.shape[1] > 1:
            cache.lengths = [0] * rows
            return model(tokens, cache, last_only=True)
        return model(tokens, cache) if graphs is None else graphs(tokens)

    return advance


def without(written: Written, prompts: list[list[int]]) -> tuple[Written, int]:
    """The rows in which none of `prompts` (ids) occurs, and how many were left out."""
    bad = torch.zeros(len(written.tokens), dtype=torch.bool, device=written.tokens.device)
    for ids in prompts:
        if 0 < len(ids) <= written.tokens.shape[1]:
            windows = written.tokens.unfold(1, len(ids), 1)
            bad |= (windows == torch.tensor(ids, device=bad.device)).all(-1).any(-1)
    return Written(written.tokens[~bad], written.chosen[~bad]), int(bad.sum())
