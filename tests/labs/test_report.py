"""The matrix exercise × mistake says what the bank found, faults included."""

from __future__ import annotations

from llmcourse.grading import report
from llmcourse.grading.bank import examine
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs.catalog import find_lab


def toy() -> Exercise:
    twice = Exercise(
        "twice",
        title="Twice",
        arguments=("x",),
        shapes=("x  int",),
        formula="2x",
        difficulty=1,
        importance=1,
        minutes=1,
        points=1,
        hints=("?", "!", "2 * x"),
    )

    @twice.check("twice the number")
    def value(t: Trial) -> None:
        for x in (2, t.size(3, 9)):
            t.equal(t.call(x), 2 * x)

    twice.mistake(says="it is squared", tries="2 * x.", caught_by="value")(lambda x: x * x)
    return twice


def test_the_matrix_marks_the_check_that_is_meant_and_names_every_fault():
    exercise = toy()
    exercise.alternative("by adding")(lambda x: x + x)
    text = str(report.matrix("twice", exercise.check_names(), examine(exercise, seed=1)))
    squared, added = text.splitlines()[2:]
    assert "✗*" in squared
    assert squared.endswith("named")
    assert "·" in added
    assert added.endswith("accepted")
    exercise.checks[0] = exercise.checks[0].__class__("value", "nothing", lambda t: None)
    text = str(report.matrix("twice", exercise.check_names(), examine(exercise, seed=1)))
    assert "is accepted" in text.splitlines()[2]


def test_the_command_prints_every_exercise_and_fails_only_on_faults(capsys):
    lab = find_lab("01")
    assert report.command(["01"]) == 0
    said = capsys.readouterr().out
    for exercise in lab.exercises:
        assert f"\n{exercise.name} " in "\n" + said
    assert "mistakes rejected" in said
    weak = lab.exercises[2]
    checks = list(weak.checks)
    try:
        weak.checks[:] = checks[1:]
        assert report.command(["01"]) == 1
    finally:
        weak.checks[:] = checks
    assert "✗ sum_to: mistake" in capsys.readouterr().out
