"""The graders, graded: each exercise against its bank of wrong and right solutions.

For a mistake the bank asks three things: is it rejected, by the check that is meant for it first, and
is it named in the message? For an alternative, one: is it accepted?
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import LocalSubject
from llmcourse.grading.verdict import Verdict, judge


@dataclass(frozen=True)
class Entry:
    """One solution of the bank, judged. `failing` are the checks that it did not pass, in order."""

    exercise: Exercise
    name: str
    kind: str  # "mistake" or "alternative"
    meant: str  # the check that should reject it first
    failing: tuple[str, ...]
    named: str  # the mistake that the message names
    seconds: float  # of CPU time

    @property
    def faults(self) -> list[str]:
        """What is wrong with the grader, in words."""
        if self.kind != "mistake":
            return [f"is rejected by {self.failing[0]}"] if self.failing else []
        if not self.failing:
            return ["is accepted"]
        found = []
        if self.failing[0] != self.meant:
            found.append(f"is rejected by {self.failing[0]} first, not by {self.meant}")
        if self.named != self.name:
            found.append(f"is taken for {self.named}" if self.named else "is not named in the message")
        return found


def examine(exercise: Exercise, seed: int) -> list[Entry]:
    """Judge every mistake and alternative of `exercise` on inputs from `seed`."""
    entries = [
        _entry(exercise, m.name, "mistake", m.caught_by, *_judge(exercise, m.fn, seed))
        for m in exercise.mistakes
    ]
    entries += [
        _entry(exercise, a.name, "alternative", "", *_judge(exercise, a.fn, seed))
        for a in exercise.alternatives
    ]
    return entries


def faults(entries: Iterable[Entry]) -> list[str]:
    """Every fault of a grader that the entries show, one line each."""
    return [f"{e.exercise.name}: {e.kind} {e.name} {fault}" for e in entries for fault in e.faults]


def _judge(exercise: Exercise, fn: object, seed: int) -> tuple[Verdict, float]:
    """The verdict, and the CPU time it took: what other programs do meanwhile does not count."""
    started = time.process_time()
    verdict = judge(exercise, LocalSubject(fn, exercise.name), seed)  # type: ignore[arg-type]
    return verdict, time.process_time() - started


def _entry(exercise: Exercise, name: str, kind: str, meant: str, verdict: Verdict, seconds: float) -> Entry:
    failing = tuple(r.check.name for r in verdict.results if not r.ok)
    named = verdict.mistake.name if verdict.mistake and verdict.sure else ""
    return Entry(exercise, name, kind, meant, failing, named, seconds)
