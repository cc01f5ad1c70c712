"""Tasks whose reward a program can check: nobody's opinion, no model that could be flattered.

A task draws prompts and judges answers. A tenth of all prompts, chosen by a hash of what they say, is held
out: training never sees them, whatever its seed. So a reward that was learned by heart does not count.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

import torch
from torch import Tensor

from llmcourse.errors import ShapeError

if TYPE_CHECKING:
    from llmcourse.text.tokenizer import Tokenizer
    from llmcourse.train.alignment.sampling import Rollout

Reward = Callable[["Rollout"], Tensor]
"""Judges N answers: a tensor [N], larger is better."""


class Task(Protocol):
    """What sampling and training need to know.

    end       tokens that end an answer;  max_new: the longest answer, its end included
    prompts   that many prompts, as ids; held_out: those that training never gets
    reward    of one answer, as ids, its end included if it has one
    """

    @property
    def end(self) -> tuple[int, ...]: ...
    @property
    def max_new(self) -> int: ...
    def prompts(self, count: int, rng: random.Random, *, held_out: bool = False) -> list[list[int]]: ...
    def reward(self, prompt: Sequence[int], answer: Sequence[int]) -> float: ...


def checked(task: Task) -> Reward:
    """The task's own reward, for all answers of a rollout."""

    def judge(rollout: Rollout) -> Tensor:
        pairs = zip(rollout.prompts, rollout.answers, strict=True)
        return torch.tensor([task.reward(*pair) for pair in pairs], device=rollout.tokens.device)

    return judge


def is_held_out(text: str) -> bool:
    """Whether a prompt is of the tenth that is kept from training."""
    return crc32(text.encode()) % 10 == 0


class Sorting:
    """Digits, then the same digits in rising order: "3141=" asks for "1134.", reward 1 for that and else 0.

    Tokens 0 … 9 are the digits, 10 is "=", 11 is "." and ends the answer.
    """

    vocab_size = 12
    EQUALS, END = 10, 11

    def __init__(self, digits: int = 4) -> None:
        if not 2 <= digits <= 12:
            raise ShapeError(
                f"{digits} digits to sort.",
                "One is sorted as it stands, and more than twelve are too long for the small model here.",
                "digits = 4.",
            )
        self.digits = digits

    @property
    def end(self) -> tuple[int, ...]:
        return (self.END,)

    @property
    def max_new(self) -> int:
        return self.digits + 1

    def prompts(self, count: int, rng: random.Random, *, held_out: bool = False) -> list[list[int]]:
        found: list[list[int]] = []
        while len(found) < count:
            digits = [rng.randrange(10) for _ in range(self.digits)]
            if is_held_out(self.show(digits)) == held_out:
                found.append([*digits, self.EQUALS])
        return found

    def right(self, prompt: Sequence[int]) -> list[int]:
        """The answer that is rewarded."""
        return [*sorted(prompt[: self.digits]), self.END]

    def reward(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        return float(list(answer) == self.right(prompt))

    def demonstration(self, prompt: Sequence[int], rng: random.Random) -> list[int]:
        """What a demonstrator writes: one of three sorts upwards, one downwards, one copies the digits."""
        digits = list(prompt[: self.digits])
        return [*rng.choice([sorted(digits), sorted(digits, reverse=True), digits]), self.END]

    def show(self, ids: Sequence[int]) -> str:
        """Ids as text."""
        return "".join("0123456789=."[i] for i in ids)


_WORDS = """
apple baker boat book bread bridge candle castle child city clock cloud coat corn desert doctor door dream
farm field fire fish flower forest friend garden gate glass gold grass hammer harbor horse house island
kitchen lake lamp leaf letter library market milk mirror moon morning mountain music night ocean painter
paper piano rain river road school ship shoe silver snow soldier song stone storm street sugar summer
table teacher tower train tree valley village wall water wheel wind window winter wolf
"""
WORDS = tuple(_WORDS.split())


class Sentences:
    """One sentence with two given words, for a chat model: reward 1 if all of these hold, else 0.

    The model ended the answer itself; it is one line, whose only full stop, question or exclamation mark
    stands at its end; it has 6 to 30 words; both given words are among them, as they stand.

    A check of what is asked, not of sense: see `hacking`. For SmolLM2 each word is one token, so that all
    prompts have one length and are answered as one batch.
    """

    ASK = "Write one sentence that contains the words {a} and {b}."

    def __init__(self, tokenizer: Tokenizer, *, max_new: int = 40) -> None:
        self.tokenizer = tokenizer
        self._max_new = max_new
        self._text = tokenizer.chat(self.ASK)  # once: a chat template is a program
        self._asked: dict[tuple[int, ...], tuple[str, str]] = {}

    @property
    def end(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids

    @property
    def max_new(self) -> int:
        return self._max_new

    def prompts(self, count: int, rng: random.Random, *, held_out: bool = False) -> list[list[int]]:
        found: list[list[int]] = []
        while len(found) < count:
            a, b = rng.sample(WORDS, 2)
            # Either order asks the same, so both are on the same side.
            if is_held_out(" ".join(sorted((a, b)))) == held_out:
                ids = self.tokenizer.encode(self._text.replace("{a}", a).replace("{b}", b))
                self._asked[tuple(ids)] = (a, b)
                found.append(ids)
        return found

    def reward(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        if tuple(prompt) not in self._asked:
            raise ShapeError(
                "an answer came to a prompt that this task did not ask.",
                "Which words are wanted is kept from when the prompt was made.",
                "prompts from the same task's `prompts`.",
            )
        ended = bool(answer) and answer[-1] in self.end
        return float(ended and self.holds(self.show(answer), *self._asked[tuple(prompt)]))

    @staticmethod
    def holds(text: str, *wanted: str) -> bool:
        """Whether `text` is one sentence of 6 to 30 words with all the `wanted` ones."""
        text = text.strip()
        words = re.findall(r"[\w'’-]+", text.lower())
        one = re.fullmatch(r"[^.!?\n]+[.!?][\"”']?", text) is not None
        return one and 6 <= len(words) <= 30 and all(word in words for word in wanted)

    def show(self, ids: Sequence[int]) -> str:
        """Ids as text, without control tokens."""
        return self.tokenizer.decode(ids, special=False)
