"""A teacher and a student of seconds: characters of Shakespeare, and little text for the student.

The teacher has 15 times the student's weights and has read two plays. The student gets 4,000 characters of
them: few enough to learn by heart, which is where labels fail first. Both see the same batches whatever they
learn from; only what is asked differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from llmcourse.compress.acceptance import compare
from llmcourse.compress.distill import (
    Divergence,
    by_divergence,
    forward_kl,
    from_teacher,
    rewritten,
    written_by,
)
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build, cross_entropy, fit, one_thread
from llmcourse.train.small import small
from llmcourse.train.tasks import Batch, Text

CHARACTERS = 4_000
LENGTH, ROWS, PROMPT = 32, 16, 8
METHODS = ("labels", "soft targets", "sequence-level")


@dataclass(frozen=True)
class Pair:
    """A trained teacher, the text it has read, and held-out batches to compare students on."""

    teacher: Transformer
    text: Text
    held_out: tuple[Batch, ...]

    def own_text(self, seed: int) -> Text:
        """The characters that student `seed` may read: another stretch for each."""
        mine = copy.copy(self.text)
        start = seed * 10 * CHARACTERS
        mine.train = self.text.train[start : start + CHARACTERS]
        return mine


@dataclass(frozen=True)
class Student:
    """A trained student.

    loss       nats a held-out character, of what Shakespeare wrote
    overlap    Σ min(p, q) with the teacher on held-out text: the chance that a guess is accepted
    greedy     the share of places at which both choose the same character
    """

    model: Transformer
    loss: float
    overlap: float
    greedy: float


def student_config(vocab_size: int) -> ModelConfig:
    """One block of width 24."""
    return small(vocab_size, 1, d_model=24, n_heads=2, n_kv_heads=2, head_dim=12, d_ff=48)


@one_thread()
def small_teacher(plays: int = 2, steps: int = 250, *, tests: int = 4) -> Pair:
    """Train the teacher: about five seconds."""
    text = Text.shakespeare(plays)
    teacher = build(Transformer, small(text.vocab_size, 2), seed=0)
    fit(teacher, text.batches(batch=16, length=48, seed=1), steps=steps, lr=6e-3)
    teacher.eval().requires_grad_(False)
    held_out = tuple(islice(text.batches(batch=16, length=48, seed=98, held_out=True), tests))
    return Pair(teacher, text, held_out)


def batches_of(pair: Pair, seed: int) -> Iterator[Batch]:
    return pair.own_text(seed).batches(batch=ROWS, length=LENGTH, seed=10 + seed)


@one_thread()
def train_student(
    pair: Pair,
    method: str | Callable[[nn.Module, Batch], Tensor],
    *,
    seed: int = 0,
    steps: int = 120,
    temperature: float = 1.0,
    characters: int = 0,
) -> Student:
    """A student from seed `seed`, trained by one of METHODS, or by a loss for `fit` on its own text.

    temperature   of soft targets;  characters: that the teacher writes (0: as many as the student's own text)
    """
    student = build(Transformer, student_config(pair.text.vocab_size), seed=seed)
    batches, loss = batches_of(pair, seed), method
    if method == "soft targets":
        loss = from_teacher(pair.teacher, temperature=temperature)
    elif method == "sequence-level":
        batches = teachers_text(pair, seed, characters or CHARACTERS)
    if isinstance(loss, str):
        loss = cross_entropy
    fit(student, batches, steps=steps, lr=1e-2, loss=loss)
    return measured(pair, student)


@one_thread()
def go_on(
    pair: Pair,
    student: Student,
    *,
    own_words: bool,
    distance: Divergence = forward_kl,
    seed: int = 0,
    steps: int = 30,
) -> Student:
    """More training of a copy, on its own text as it was, or continued by the student at every step."""
    model = copy.deepcopy(student.model)
    batches = pair.own_text(seed).batches(batch=ROWS, length=LENGTH, seed=50 + seed)
    if own_words:
        batches = rewritten(batches, model, prompt=PROMPT, seed=seed)
    fit(model, batches, steps=steps, lr=5e-3, loss=by_divergence(pair.teacher, distance))
    return measured(pair, model)


def teachers_text(pair: Pair, seed: int, characters: int) -> Iterator[Batch]:
    """Rows of so many characters in all, written by the teacher after openings from the student's text."""
    count = characters // LENGTH
    given = next(pair.own_text(seed).batches(batch=count, length=LENGTH, seed=20 + seed))
    written = next(rewritten([given], pair.teacher, prompt=PROMPT, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(0, count, (ROWS,), generator=generator)
        yield Batch((written.inputs[0][rows],), written.targets[rows])


@torch.no_grad()
@one_thread()
def own_words_loss(pair: Pair, model: Transformer, *, seed: int = 0) -> float:
    """What the teacher thinks of the text that a model writes: nats a character, over 64 rows of 40."""
    batch = pair.held_out[0]
    prompts = batch.inputs[0].repeat(4, 1)[:64, :PROMPT]
    written = written_by(model, prompts, length=40, generator=torch.Generator().manual_seed(seed))
    return cross_entropy(pair.teacher, written).item()


@one_thread()
def written_texts(
    pair: Pair, *, rows: int = 64, length: int = 40, seed: int = 3
) -> list[tuple[list[int], list[int]]]:
    """What the teacher writes after openings of held-out text: pairs of a prompt and what follows it."""
    prompts = pair.held_out[0].inputs[0].repeat(-(-rows // ROWS), 1)[:rows, :PROMPT]
    drawn = written_by(pair.teacher, prompts, length=length, generator=torch.Generator().manual_seed(seed))
    whole = torch.cat((drawn.inputs[0], drawn.targets[:, -1:]), dim=1).tolist()
    return [(row[:PROMPT], row[PROMPT:]) for row in whole]


@torch.no_grad()
@one_thread()
def measured(pair: Pair, model: Transformer) -> Student:
    """A model's loss on the held-out batches, and how it agrees with the teacher there."""
    losses, overlaps, greedy = [], [], []
    for batch in pair.held_out:
        p, q = (m(*batch.inputs).flatten(0, 1) for m in (pair.teacher, model))
        targets = batch.targets.flatten()
        losses.append(cross_entropy(model, batch))
        overlaps.append(compare(p, q, targets)[0].mean())
        greedy.append(compare(p, q, targets, temperature=0)[0].mean())
    return Student(model, *(float(torch.stack(x).mean()) for x in (losses, overlaps, greedy)))
