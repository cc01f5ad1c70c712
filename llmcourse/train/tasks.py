"""Small tasks, each an endless supply of batches from a seed, and each the home ground of an architecture.

| task | every answer needs | suits |
|---|---|---|
| `brackets` | what stands left *and right* of it | an encoder: every position sees all |
| `dates` | a whole text read first, then an answer of another length | an encoder-decoder |
| `Text.batches` | what came before, and nothing else | a decoder: one loss at every position |

For each there is a number to beat that is computed and not trained: `causal_ceiling` is the best that any
model can reach on brackets without looking right, `Text.bigram_loss` what a table of letter pairs reaches.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcourse.errors import ShapeError

IGNORE = -100  # a target at which nothing is asked; the value that PyTorch's cross-entropy leaves out

MONTHS = (
    "January February March April May June July August September October November December".lower().split()
)
PAD, START, END = 0, 1, 2
DATE_CHARACTERS = "\0^$" + "0123456789-, " + "".join(sorted(set("".join(MONTHS))))
_DATE_ID = {c: i for i, c in enumerate(DATE_CHARACTERS)}


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and what it should answer.

    inputs    positional arguments of the model: (tokens,) or (source, target, source_lengths)
    targets   [B, S], the right class for each position, IGNORE where nothing is asked
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(tuple(t.to(device) for t in self.inputs), self.targets.to(device))


# ---------------------------------------------------------------- brackets: look to both sides


def brackets(*, batch: int, length: int, seed: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Random brackets, tokens 0 for "(" and 1 for ")". At each "(": is it closed (1) or not (0)?

    Nothing is asked at a ")": whether that has a partner is decided by what stands before it.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, 2, (batch, length), generator=generator)
        targets = torch.tensor([closed(row) for row in tokens.tolist()])
        yield Batch((tokens,), targets).to(device)


def closed(row: Sequence[int]) -> list[int]:
    """For every "(" (0) of a row 1 if a later ")" (1) closes it, else 0; IGNORE at every ")"."""
    answers, waiting = [IGNORE] * len(row), []
    for i, token in enumerate(row):
        if token == 0:
            answers[i] = 0
            waiting.append(i)
        elif waiting:
            answers[waiting.pop()] = 1
    return answers


def causal_ceiling(length: int) -> float:
    """The best accuracy on `brackets` for a model that does not look right.

    What follows a "(" is a coin for each of the r tokens left, and it is closed when ")" leads for the first
    time: a random walk from 1 that reaches 0. Its chance depends on r only; the best answer is the
    likelier of the two. A "(" is equally likely at every position, hence the plain mean.
    """
    chance, depths, best = 0.0, {1: 1.0}, []
    for _ in range(length):
        best.append(max(chance, 1 - chance))
        after: dict[int, float] = {}
        for depth, p in depths.items():
            for to in (depth - 1, depth + 1):
                if to:
                    after[to] = after.get(to, 0.0) + p / 2
                else:
                    chance += p / 2
        depths = after
    return sum(best) / length


# ---------------------------------------------------------------- dates: read it all, then rewrite


def dates(*, batch: int, seed: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """ "7 march 1871" or "march 7, 1871" to "1871-03-07", character by character.

    Inputs (source [B, S], target [B, T], source_lengths [B]): the target begins with START, and the right
    answer at each of its positions is the next character, END after the last.
    """
    rng = random.Random(seed)
    while True:
        pairs = [random_date(rng) for _ in range(batch)]
        source, lengths = encode_dates([written for written, _ in pairs])
        answer = torch.tensor([[START, *(_DATE_ID[c] for c in iso), END] for _, iso in pairs])
        yield Batch((source, answer[:, :-1], lengths), answer[:, 1:]).to(device)


def in_one_sequence(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same task for a decoder alone: each source followed at once by its target, padding behind both.

    Inputs (tokens [B, S + T],); nothing is asked within the source.
    """
    for batch in batches:
        source, target, lengths = batch.inputs
        width = source.shape[1] + target.shape[1]
        tokens = torch.full((len(source), width), PAD, device=source.device)
        targets = torch.full_like(tokens, IGNORE)
        for row, n in enumerate(lengths.tolist()):
            end = n + target.shape[1]
            tokens[row, :end] = torch.cat((source[row, :n], target[row]))
            targets[row, n:end] = batch.targets[row]
        yield Batch((tokens,), targets)


def random_date(rng: random.Random) -> tuple[str, str]:
    """A date as people write it, and as ISO 8601 does."""
    year, month, day = rng.randint(1000, 2999), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    written = f"{day} {name} {year}" if rng.random() < 0.5 else f"{name} {day}, {year}"
    return written, f"{year}-{month:02}-{day:02}"


def encode_dates(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Character ids [B, S], PAD after the shorter texts, and the lengths without it [B]."""
    width = max(map(len, texts))
    try:
        ids = [[_DATE_ID[c] for c in text] + [PAD] * (width - len(text)) for text in texts]
    except KeyError as unknown:
        raise ShapeError(
            f"the character {unknown} is in no date.",
            f"The vocabulary of this task is {DATE_CHARACTERS[3:]!r}.",
            'a date such as "7 march 1871".',
        ) from None
    return torch.tensor(ids), torch.tensor([len(text) for text in texts])


def decode_date(ids: Sequence[int]) -> str:
    """Characters up to END; PAD and START show as nothing."""
    ids = list(ids)
    return "".join(DATE_CHARACTERS[i] for i in ids[: ids.index(END) if END in ids else None] if i > END)


# ---------------------------------------------------------------- text: the next character


class Text:
    """A text as characters: ids from 0, the last tenth held out.

    `Text.shakespeare()` is the course's text; any string of a thousand characters or so will do.
    """

    def __init__(self, text: str) -> None:
        self.characters = "".join(sorted(set(text)))
        self._id = {c: i for i, c in enumerate(self.characters)}
        ids = torch.tensor([self._id[c] for c in text], dtype=torch.long)
        cut = len(ids) * 9 // 10
        self.train, self.held_out = ids[:cut], ids[cut:]

    @classmethod
    def shakespeare(cls, plays: int = 4) -> Text:
        """The first plays of the course's text (of 38, in the order of their names)."""
        from llmcourse.assets import play_paths

        lines = "\n".join(path.read_text() for path in play_paths()[:plays]).splitlines()
        return cls(
            "\n".join(line.rstrip() for line in lines)
        )  # Markdown ends a line of verse with two blanks

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Ids [S]; a character that the text does not have is an error."""
        if strange := sorted(set(text) - set(self.characters)):
            raise ShapeError(
                f"{strange[0]!r} does not occur in the text.",
                "The vocabulary is the text's own characters.",
                f"only these: {self.characters!r}.",
            )
        return torch.tensor([self._id[c] for c in text], dtype=torch.long)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return "".join(self.characters[int(i)] for i in ids)

    def batches(
        self,
        *,
        batch: int,
        length: int,
        seed: int,
        held_out: bool = False,
        device: torch.device | str = "cpu",
    ) -> Iterator[Batch]:
        """Random stretches of `length` characters; the target of each is the one after it."""
        ids = self.held_out if held_out else self.train
        if len(ids) <= length:
            raise ShapeError(
                f"stretches of {length} characters from a text of {len(ids)}.",
                "Every stretch is cut from the text, with one character more for the last target.",
                f"length = {len(ids) - 1} or less.",
            )
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(length + 1)
        while True:
            starts = torch.randint(0, len(ids) - length, (batch, 1), generator=generator)
            stretch = ids[starts + window]
            yield Batch((stretch[:, :-1],), stretch[:, 1:]).to(device)

    def bigram_loss(self) -> float:
        """Nats per held-out character of a table of pairs counted on the rest; none counts as never seen."""
        counts = torch.ones(self.vocab_size, self.vocab_size)
        counts.index_put_((self.train[:-1], self.train[1:]), torch.tensor(1.0), accumulate=True)
        log_p = (counts / counts.sum(1, keepdim=True)).log()
        return float(-log_p[self.held_out[:-1], self.held_out[1:]].mean())
