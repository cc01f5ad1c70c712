"""Every lab's graders, graded; and the bank that does it, shown to fail where a grader is wrong."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmcourse.grading.bank import Entry, examine, faults
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import LABS

EXERCISES = [pytest.param(e, id=f"{lab.number}-{e.name}") for lab in LABS for e in lab.exercises]
SEEDS = (0, 20_260, 777_777)
LIMIT = 2.0  # seconds of CPU for a verdict, its diagnosis included: what a learner waits for


@pytest.fixture(scope="module", autouse=True)
def what_a_notebook_s_first_cells_import() -> None:
    """Not part of the time that a verdict takes."""
    importlib.import_module("torch")
    with contextlib.suppress(ImportError):  # Triton's wheels are for Linux
        importlib.import_module("llmcourse.kernels._interpreter")


# ── every exercise ───────────────────────────────────────────────────────────────────────────────


def slow_among(entries: list[Entry]) -> set[str]:
    return {entry.name for entry in entries if entry.seconds > LIMIT}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("exercise", EXERCISES)
def test_mistakes_are_rejected_and_named_and_alternatives_accepted(exercise, seed):
    entries = examine(exercise, seed)
    assert faults(entries) == []
    slow = slow_among(entries)
    for _ in range(5):  # a neighbour on the same cores may have slowed this one
        if slow:
            slow &= slow_among(examine(exercise, seed))
    assert not slow, f"a check answers within {LIMIT} s"


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_bank_is_large_enough_and_its_entries_differ(exercise):
    assert len(exercise.mistakes) >= 6
    assert len(exercise.alternatives) >= 2
    for names in (
        [m.says for m in exercise.mistakes],
        [e.name for e in [*exercise.mistakes, *exercise.alternatives]],
        [c.says for c in exercise.checks],
        [c.name for c in exercise.checks],
    ):
        assert len(names) == len(set(names))
    assert {m.caught_by for m in exercise.mistakes} <= set(exercise.check_names())
    assert all(m.says and m.tries for m in exercise.mistakes)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_tells_what_to_expect_and_has_three_layers_of_hints(exercise):
    assert len(exercise.hints) >= 3
    assert len(set(exercise.hints)) == len(exercise.hints)
    assert 1 <= exercise.difficulty <= 5
    assert 1 <= exercise.importance <= 5
    assert exercise.points > 0
    assert exercise.minutes > 0
    assert exercise.shapes
    assert exercise.formula
    assert "\n" not in exercise.formula


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_stub_is_not_implemented_yet_and_no_more(exercise):
    def stub(*args):
        raise NotImplementedError

    verdict = judge(exercise, LocalSubject(stub, exercise.name), 0)
    assert str(verdict) == f"○ {exercise.name} is not implemented yet."
    assert verdict.points == 0


def ragged(n: int) -> list[Any]:
    return [[1.0] * i for i in range(1, n + 1)]


class Stranger:
    """Equal to everything, of any length, with any attribute."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return Stranger()

    def __len__(self) -> int:
        return 2

    def __float__(self) -> float:
        return 1.0


def raising(*args: Any) -> Any:
    raise SystemExit("enough")


STRANGE: dict[str, Callable[..., Any]] = {
    "nothing": lambda *args: None,
    "its first argument": lambda *args: args[0],
    "all its arguments": lambda *args: args,
    "an empty list": lambda *args: [],
    "an empty dict": lambda *args: {},
    "an empty array": lambda *args: np.empty(0),
    "two Nones": lambda *args: (None, None),
    "a nan": lambda *args: float("nan"),
    "two nans": lambda *args: (np.nan, np.nan),
    "true": lambda *args: True,
    "text": lambda *args: "right",
    "two texts": lambda *args: ("right", b"right"),
    "a large integer": lambda *args: 10**400,
    "a ragged list": lambda *args: ragged(3),
    "two ragged lists": lambda *args: (ragged(2), ragged(2)),
    "complex infinities": lambda *args: np.full(3, complex(np.inf, np.nan)),
    "a dict of arrays": lambda *args: {0: np.zeros(3), "a": None, (1, 2): [np.nan]},
    "a dict of everything": lambda *args: dict.fromkeys(["x", "y", 0, 1, 2], np.zeros((2, 2))),
    "mixed arrays": lambda *args: [np.zeros(2), np.zeros((3, 4)), None, "x"],
    "deep lists": lambda *args: [[[[[[[[[[]]]]]]]]]],
    "an object array": lambda *args: np.array([Stranger(), None], dtype=object),
    "a stranger": lambda *args: Stranger(),
    "two strangers": lambda *args: (Stranger(), Stranger()),
    "a generator": lambda *args: (x for x in args),
    "a function": lambda *args: print,
    "an exit": raising,
    "fewer arguments": lambda: 0,
}


@pytest.mark.parametrize("exercise", EXERCISES)
@pytest.mark.parametrize("what", STRANGE)
def test_whatever_a_function_returns_is_judged_and_rejected(exercise, what):
    verdict = judge(exercise, LocalSubject(STRANGE[what], exercise.name), 1)
    assert verdict.state == "failed"
    assert len(str(verdict)) < 5000


# ── the bank itself ──────────────────────────────────────────────────────────────────────────────


def exercise_double() -> Exercise:
    """double(x) = 2x, with checks for values and for shape."""
    made = Exercise(
        "double",
        title="Twice",
        arguments=("x",),
        shapes=("x  array of any shape",),
        formula="2x",
        difficulty=1,
        importance=1,
        minutes=1,
        points=1,
        hints=("?", "add", "x + x"),
    )

    @made.check("values are doubled")
    def values(t: Trial) -> None:
        x = t.normal(3)
        t.close(t.call(x), 2 * x)

    @made.check("axes stay")
    def axes(t: Trial) -> None:
        x = t.normal(3, 2)
        t.close(t.call(x), 2 * x)

    return made


def mistake(exercise: Exercise, fn: Callable[..., Any], caught_by: str) -> None:
    exercise.mistakes.clear()
    exercise.mistake(says=f"{fn.__name__}", tries="again.", caught_by=caught_by)(fn)


def only_fault(exercise: Exercise) -> str:
    found = faults(examine(exercise, seed=5))
    assert len(found) == 1, found
    return found[0]


def flat(x):
    return 2 * x.reshape(-1)


def tripled(x):
    return 3 * x


def test_a_bank_without_faults_reports_none_and_says_what_each_entry_did():
    exercise = exercise_double()
    exercise.mistake(says="x is tripled", tries="2.", caught_by="values")(tripled)
    exercise.mistake(says="axes are lost", tries="no reshape.", caught_by="axes")(flat)
    exercise.alternative("by addition")(lambda x: x + x)
    entries = examine(exercise, seed=5)
    assert faults(entries) == []
    assert [(e.kind, e.failing, e.named) for e in entries] == [
        ("mistake", ("values", "axes"), "tripled"),
        ("mistake", ("axes",), "flat"),
        ("alternative", (), ""),
    ]


def test_a_check_that_accepts_everything_is_a_fault():
    exercise = exercise_double()
    exercise.checks.clear()

    @exercise.check("anything goes")
    def values(t: Trial) -> None:
        t.call(t.normal(3))

    mistake(exercise, tripled, "values")
    assert only_fault(exercise) == "double: mistake tripled is accepted"


def test_a_mistake_that_another_check_catches_first_is_a_fault():
    exercise = exercise_double()
    mistake(exercise, tripled, "axes")
    assert only_fault(exercise) == "double: mistake tripled is rejected by values first, not by axes"


def test_a_mistake_caught_by_a_check_that_does_not_exist_is_a_fault():
    exercise = exercise_double()
    mistake(exercise, tripled, "valeus")
    assert "not by valeus" in only_fault(exercise)


def test_a_mistake_that_no_run_repeats_cannot_be_diagnosed_and_is_a_fault():
    def noisy(x):
        return 2 * x + np.random.default_rng().normal(size=x.shape)

    exercise = exercise_double()
    mistake(exercise, noisy, "values")
    assert only_fault(exercise) == "double: mistake noisy is not named in the message"


def test_a_mistake_that_answers_like_another_is_a_fault():
    def thrice(x):
        return x + x + x

    exercise = exercise_double()
    exercise.mistake(says="x is tripled", tries="2.", caught_by="values")(tripled)
    exercise.mistake(says="x is added twice to itself", tries="once.", caught_by="values")(thrice)
    assert only_fault(exercise) == "double: mistake thrice is taken for tripled"


def test_an_alternative_that_is_rejected_is_a_fault():
    exercise = exercise_double()
    exercise.alternative("as a list of rows")(flat)
    assert only_fault(exercise) == "double: alternative flat is rejected by axes"


def test_a_mistake_that_fails_only_now_and_then_shows_on_some_seed():
    def mostly(x):
        return 2 * x if x.flat[0] > 0 else x

    exercise = exercise_double()
    mistake(exercise, mostly, "values")
    found = [faults(examine(exercise, seed)) for seed in range(12)]
    assert any(found)
    assert not all(found)


def test_faults_name_the_exercise_and_the_entry():
    entry = Entry(exercise_double(), "tripled", "mistake", "values", (), "", 0.0)
    assert faults([entry]) == ["double: mistake tripled is accepted"]
