"""The judgement of a function: every check run, the first failure told, the mistake named.

All checks run even if one fails. Their calls together are the function's fingerprint: a named mistake
is recognised when it answers every one of them as the learner's function did.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from llmcourse.grading.compare import Mismatch, same_outcome
from llmcourse.grading.exercise import Check, Exercise, Mistake
from llmcourse.grading.perform import NO_FUNCTION, Call
from llmcourse.grading.trial import LocalSubject, RaisedError, Subject, Trial

NOT_YET = "NotImplementedError"


@dataclass
class Result:
    """One check on one function. `text` says what was wrong, `tries` what to do about it."""

    check: Check
    ok: bool
    text: str = ""
    tries: str = ""
    kind: str = ""
    calls: Sequence[Call] = ()
    counts: Sequence[int] = ()


@dataclass
class Verdict:
    """What `check` found.

    mistake   the named mistake that the function equals, if any
    sure      it answered every call alike; if not, those of at least a third of the checks
    """

    exercise: Exercise
    results: list[Result]
    seed: int
    seconds: float
    mistake: Mistake | None = None
    sure: bool = False
    lab: str = ""
    show_seed: bool = True

    @property
    def ok(self) -> bool:
        return bool(self.results) and all(r.ok for r in self.results)

    @property
    def points(self) -> int:
        return self.exercise.points if self.ok else 0

    @property
    def state(self) -> str:
        """`passed`, `failed` or `open` (not implemented yet)."""
        return "passed" if self.ok else "open" if self.not_yet else "failed"

    @property
    def not_yet(self) -> bool:
        first = self.first_failure
        return first is not None and first.kind == NOT_YET

    @property
    def missing(self) -> bool:
        """Whether there is no such function, in the notebook whose cells were run."""
        first = self.first_failure
        return first is not None and first.kind == "NameError" and NO_FUNCTION in first.text

    @property
    def first_failure(self) -> Result | None:
        return next((r for r in self.results if not r.ok), None)

    def __str__(self) -> str:
        name = self.exercise.name
        if self.not_yet:
            return f"○ {name} is not implemented yet."
        if self.missing:
            return f"✗ {name} · {NO_FUNCTION} {name}\n  Try: its cell, alone: it may have failed or be gone."
        failed = self.first_failure
        if failed is None:
            count = len(self.results)
            return f"✓ {name} · {count} of {count} properties hold · {self.points} points"
        lines = [f"✗ {name} · {failed.check.says}", *(f"  {line}" for line in failed.text.splitlines())]
        tries = failed.tries
        if self.mistake is not None:
            sure = "This is what you get when" if self.sure else "It looks as if"
            lines.append(f"  {sure} {self.mistake.says}.")
            tries = self.mistake.tries
        if tries:
            lines.append(f"  Try: {tries}")
        others = [f"{'✓' if r.ok else '✗'} {r.check.says}" for r in self.results if r is not failed]
        lines += [f"  {line}" for line in others]
        if self.show_seed:
            lines.append(f"  The same inputs again: check({name}, seed={self.seed})")
        return "\n".join(lines)

    __repr__ = __str__


class CheckFailed(AssertionError):
    """Raised by `check` in a notebook; shows the verdict, and no traceback through the grader."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(str(verdict))

    def _render_traceback_(self) -> list[str]:
        return str(self.verdict).splitlines()


class NotImplementedYet(CheckFailed):
    """The function is still the stub."""


def fresh_seed() -> int:
    return secrets.randbelow(1_000_000)


def judge(exercise: Exercise, subject: Subject, seed: int | None = None) -> Verdict:
    """Run every check of `exercise` on `subject`, with inputs drawn from `seed` (a fresh one by default)."""
    seed = fresh_seed() if seed is None else seed
    began = perf_counter()
    results = list(_results(exercise, subject, seed))
    verdict = Verdict(exercise, results, seed, 0.0)
    if not verdict.ok and not verdict.not_yet:
        verdict.mistake, verdict.sure = recognise(exercise, results, seed)
    verdict.seconds = perf_counter() - began
    return verdict


def run_check(exercise: Exercise, check: Check, subject: Subject, seed: int) -> Result:
    """One check, and why it failed if it did."""
    trial = Trial(subject, exercise.arguments, seed, check.name)
    text = tries = kind = ""
    try:
        check.run(trial)
    except Mismatch as mismatch:
        text, tries, kind = mismatch.text, mismatch.tries, "Mismatch"
    except RaisedError as error:
        failure = error.failure
        kind = failure.kind
        text, tries = raised(failure.kind, failure.message, failure.line, failure.source), ""
    except Exception as error:  # a check that cannot cope with a result must not stop a class's grading
        kind, text = "CheckError", f"the result could not be judged ({type(error).__name__}: {error})"
    if text and (inputs := trial.inputs()):
        text = f"{inputs}: {text}" if len(inputs) + len(text) < 160 else f"{inputs}\n{text}"
    return Result(check, not kind, text, tries, kind, trial.calls, trial.counts)


def raised(kind: str, message: str, line: int, source: str) -> str:
    """What a learner's function raised, with the line of theirs that led to it."""
    if kind == "NotPlainError":
        return message
    where = f" (line {line}: `{source.strip()}`)" if line and source.strip() else ""
    return f"{kind}: {message.rstrip('.')}{where}"


def _results(exercise: Exercise, subject: Subject, seed: int) -> Iterator[Result]:
    for check in exercise.checks:
        result = run_check(exercise, check, subject, seed)
        yield result
        stub = result.kind == NOT_YET
        missing = result.kind == "NameError" and NO_FUNCTION in result.text
        if (stub or missing) and check is exercise.checks[0]:
            return


def recognise(exercise: Exercise, results: Sequence[Result], seed: int) -> tuple[Mistake | None, bool]:
    """The named mistake that answers as the judged function did, and whether it does so everywhere.

    A mistake that agrees only in part must agree in the first failing check, be meant for that check,
    and agree in at least a third of all; the one that agrees in the most is taken.
    """
    first = next((r for r in results if not r.ok), None)
    if first is None:
        return None, False
    best: tuple[int, Mistake] | None = None
    for mistake in exercise.mistakes:
        agreed, failing = 0, False
        for result in sorted(results, key=lambda r: r is not first):
            own = run_check(exercise, result.check, LocalSubject(mistake.fn), seed)
            if same_calls(own, result):
                agreed += 1
                failing = failing or result is first
            elif result is first:
                break
        if agreed == len(results):
            return mistake, True
        fits = failing and mistake.caught_by == first.check.name and 3 * agreed >= len(results)
        if fits and (best is None or agreed > best[0]):
            best = agreed, mistake
    return (best[1] if best else None), False


def same_calls(a: Result, b: Result) -> bool:
    """Whether two functions gave the same answers, at the same cost, to the calls of a check."""
    return (
        a.ok == b.ok
        and len(a.calls) == len(b.calls)
        and list(a.counts) == list(b.counts)
        and all(_same_call(x, y) for x, y in zip(a.calls, b.calls, strict=True))
    )


def _same_call(a: Call, b: Call) -> bool:
    if (a.error is None) != (b.error is None):
        return False
    if a.error is not None and b.error is not None:
        return a.error.kind == b.error.kind
    return (
        a.changed == b.changed
        and a.overrun == b.overrun
        and a.costs == b.costs
        and same_outcome(a.value, b.value)
        and (a.grads is None or _same_grads(a.grads, b.grads))
    )


def _same_grads(a: Any, b: Any) -> bool:
    return same_outcome(list(a), list(b))
