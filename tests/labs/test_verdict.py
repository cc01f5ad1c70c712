"""Comparisons, trials and verdicts: what is right, what is told, and which mistake is named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmcourse.grading import compare
from llmcourse.grading.compare import RTOL, Mismatch, as_array, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import BudgetError, LocalSubject, RaisedError, Trial
from llmcourse.grading.verdict import CheckFailed, NotImplementedYet, Verdict, fresh_seed, judge

NAN, INF = math.nan, math.inf


def agrees(got: Any, expected: Any, **tolerance: float) -> bool:
    try:
        compare.close(got, expected, **tolerance)
    except Mismatch:
        return False
    return True


def same(got: Any, expected: Any) -> bool:
    try:
        compare.equal(got, expected)
    except Mismatch:
        return False
    return True


def refusal(got: Any, expected: Any, **tolerance: float) -> str:
    with pytest.raises(Mismatch) as mismatch:
        compare.close(got, expected, **tolerance)
    return mismatch.value.text


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def test_nan_is_no_wildcard():
    assert not agrees(NAN, 1.0)
    assert not agrees(1.0, NAN)
    assert not agrees([1.0, NAN], [1.0, 2.0])
    assert not agrees([1.0, 2.0], [1.0, NAN])
    assert not agrees([NAN, 1.0], [1.0, NAN])
    assert not agrees(torch.tensor([NAN]), np.ones(1))
    assert agrees([1.0, NAN], [1.0, NAN])


def test_infinity_equals_only_itself_and_widens_no_tolerance():
    assert agrees([INF, 1.0], [INF, 1.0])
    assert not agrees(-INF, INF)
    assert not agrees(1e308, INF)
    assert not agrees(INF, 1e308)
    assert not agrees([INF, 1.5], [INF, 1.0])


@settings(deadline=None)
@given(
    npst.arrays(np.float64, npst.array_shapes(min_dims=0, max_dims=3), elements=st.floats(-1e6, 1e6)),
    st.data(),
)
def test_a_difference_larger_than_the_tolerance_is_found_wherever_it_is(expected, data):
    place = data.draw(st.sampled_from(list(np.ndindex(expected.shape))))
    step = max(1.0, float(np.abs(expected).max())) * data.draw(st.sampled_from([1e-6, -1e-6, 1.0]))
    got = expected.copy()
    got[place] += step
    assert agrees(expected.copy(), expected)
    assert not agrees(got, expected)
    assert not agrees(got.tolist(), expected)


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
def test_a_right_answer_rounded_once_passes_and_one_ten_times_outside_the_tolerance_does_not(kind):
    expected = np.random.default_rng(1).normal(size=1000)
    rounded = torch.tensor(expected).to(getattr(torch, kind))
    off = torch.tensor(expected * (1 + 30 * RTOL[kind])).to(getattr(torch, kind))
    assert agrees(rounded, expected)
    assert not agrees(off, expected)
    if kind != "bfloat16":
        assert agrees(rounded.numpy(), expected)
        assert not agrees(off.numpy(), expected)


def test_tensors_arrays_lists_and_numbers_are_compared_alike():
    expected = np.array([[1.0, 2.0]])
    for got in ([[1, 2]], ((1.0, 2.0),), torch.tensor([[1.0, 2.0]]), [torch.tensor([1.0, 2.0])], expected):
        assert agrees(got, expected)
        assert agrees(got, torch.tensor(expected))
    assert agrees(torch.tensor(2.0, dtype=torch.float8_e4m3fn), 2.0)
    assert agrees(True, 1)


@pytest.mark.parametrize(
    ("got", "expected", "text"),
    [
        (None, np.ones(3), "the result is None, expected an array: is a `return` missing?"),
        (np.ones((3, 1)), np.ones(3), "the result has shape (3, 1), expected (3,)"),
        (np.ones(1), 1.0, "the result has shape (1,), expected ()"),
        (np.ones((0, 2)), np.ones((0, 3)), "the result has shape (0, 2), expected (0, 3)"),
        ([[1.0], [1.0, 2.0]], np.ones(2), "the result is a ragged list, expected an array"),
        ("one", 1.0, "the result is 'one', expected numbers"),
        ({"a": 1}, 1.0, "the result is {'a': 1}, expected numbers"),
        ([1.0, None], np.ones(2), "the result is [1.0, None], expected numbers"),
        ([1.0, "2"], np.ones(2), "the result is [1.0, '2'], expected numbers"),
        (2.0, 1.0, "2, expected 1"),
        ([1.0, 2.0], [1.0, 1.0], "first difference at [1]: 2, expected 1"),
        (
            [[0.0, 2.0], [3.0, 4.0]],
            [[0, 1], [1, 4]],
            "first difference at [0, 1]: 2, expected 1, and at 1 more of 4 places",
        ),
        (np.float32(0.1), 0.2, "0.1, expected 0.2"),
        (np.uint8(255), -1, "255, expected -1"),
        (1 + 1j, 1.0, "1+1j, expected 1"),
        (True, 0.0, "True, expected 0"),
    ],
)
def test_a_mismatch_says_what_came_and_what_was_expected(got, expected, text):
    assert refusal(got, expected) == text


def test_a_tolerance_can_be_given():
    assert agrees(1.05, 1.0, rtol=0.1)
    assert not agrees(1e-12, 0.0)
    assert agrees(1e-12, 0.0, atol=1e-9)
    assert not agrees(1.05, 1.0, rtol=0.0, atol=0.01)


def test_exact_means_exact_in_value_type_and_order():
    assert same([1, (2, "a"), None], [1, (2, "a"), None])
    assert same((1, 2), [1, 2])
    assert same(np.array([1, 2]), np.array([1, 2]))
    assert same(np.int64(3), 3)
    assert same({"a": np.ones(2), "b": [1]}, {"b": [1], "a": np.ones(2)})
    assert same(torch.tensor([1, 2]), torch.tensor([1, 2]))
    for got, expected in [
        (1, True),
        (1.0, 1),
        ("1", 1),
        ([1, 2], [2, 1]),
        ([1], [1, 2]),
        (None, []),
        ([], None),
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([1, 1]), 1),
        (np.array([[1]]), np.array([1])),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": np.ones(2)}, {"a": 1.0}),
        (torch.ones(2), None),
        (torch.ones(2), torch.zeros(2)),
        (NAN, NAN),
        (np.array([NAN]), np.array([NAN])),
    ]:
        assert not same(got, expected), (got, expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((3, 4), np.float32), "[3, 4] float32"),
        (np.arange(3), "[0, 1, 2]"),
        (np.ones((2, 2)), "[[1., 1.], [1., 1.]]"),
        (np.ones((0, 3)), "[0, 3] float64"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "[2, 3] bfloat16"),
        (np.float64(0.1234567891), "0.123457"),
        ((1,), "(1,)"),
        (list(range(20)), "[0, 1, 2, 3, 4, 5, 6, 7, …]"),
        ({"a": np.zeros(9), 1: [2]}, "{'a': [9] float64, 1: [2]}"),
        ([[[[[1]]]]], "[[[…]]]"),
        (len, "a function"),
        ("x" * 500, "'" + "x" * 76 + "…"),
        (None, "None"),
    ],
)
def test_a_value_is_described_in_one_short_line(value, text):
    assert describe(value) == text


def test_a_description_stays_short_whatever_is_described():
    wide: Any = 1
    for _ in range(6):
        wide = [wide] * 8
    for value in (wide, ["y" * 10_000] * 8, {i: "z" * 1000 for i in range(1000)}, b"\0" * 10**6):
        text = describe(value)
        assert len(text) < 5000
        assert "\n" not in text


def test_numbers_that_numpy_lacks_become_float64():
    assert as_array(torch.tensor([1.5], dtype=torch.bfloat16)).dtype == np.float64
    assert as_array([torch.tensor(1.5, dtype=torch.bfloat16)]).tolist() == [1.5]


# ── trials ───────────────────────────────────────────────────────────────────────────────────────


def trial(fn: Any, *names: str, seed: int = 0, check: str = "values") -> Trial:
    return Trial(LocalSubject(fn), names, seed, check)


def test_inputs_follow_from_the_seed_and_the_checks_name_alone():
    def draw(seed: int, check: str) -> list[Any]:
        t = trial(abs, seed=seed, check=check)
        return [t.normal(3).tolist(), t.size(), t.odd(), t.integers(0, 100, 5).tolist()]

    assert draw(1, "values") == draw(1, "values")
    assert len({str(draw(s, c)) for s in (1, 2) for c in ("values", "shape")}) == 4


def test_drawn_sizes_stay_in_their_ranges():
    t = trial(abs)
    assert {t.size(2, 4) for _ in range(99)} == {2, 3, 4}
    assert {t.odd(3, 8) for _ in range(99)} == {3, 5, 7}
    assert {t.odd(4, 7) for _ in range(99)} == {5, 7}
    assert set(t.integers(0, 3, 99).tolist()) == {0, 1, 2}
    assert t.normal(3, 2, dtype=np.float32).dtype == np.float32
    assert t.normal().shape == ()


def test_layouts_hold_the_same_numbers():
    t = trial(abs)
    array = t.normal(3, 4)
    found = t.layouts(array)
    assert [f.flags.c_contiguous for f in found] == [True, False, False]
    assert [f.flags.f_contiguous for f in found] == [False, True, False]
    assert all(np.array_equal(f, array) for f in found)


def test_a_call_that_raises_ends_the_check_unless_it_may_raise():
    t = trial(lambda x: 1 / x, "x")
    with pytest.raises(RaisedError, match="ZeroDivisionError: division by zero"):
        t.call(0)
    assert t.raises(0).kind == "ZeroDivisionError"
    assert t.raises(1) is None


def test_an_argument_that_was_written_past_its_end_fails_every_check():
    def fn(x):
        np.lib.stride_tricks.as_strided(x, (4,))[3] = 0
        return x.sum()

    with pytest.raises(Mismatch, match="argument x was written past its end"):
        trial(fn, "x").call(np.ones(3))


def test_written_arguments_are_named():
    t = trial(lambda x, y: y.sort(), "x", "y")
    t.call(np.zeros(2), np.array([2.0, 1.0]))
    with pytest.raises(Mismatch, match="argument y was written to"):
        t.unchanged()
    t.call(np.zeros(2), np.array([1.0, 2.0]))
    t.unchanged()


def test_an_oracle_counts_for_the_judge_and_ends_a_runaway():
    def search(f):
        n = 0
        while not f(n):
            n += 1
        return n

    t = trial(search, "f")
    steps = t.oracle(lambda n: n == 7, "the test", limit=20)
    assert t.call(steps) == 7
    assert (steps.calls, t.counts) == (8, [8])
    endless = t.oracle(lambda n: False, "the test", limit=20)
    assert t.raises(endless).kind == BudgetError.__name__
    assert "the test was asked more than 20 times" in t.calls[-1].error.message
    assert t.counts == [8, 21]


def test_an_oracle_counts_the_bytes_that_it_was_sent():
    t = trial(lambda f: f(np.zeros(10)) + f(1), "f")
    f = t.oracle(lambda x: 0)
    t.call(f)
    assert f.sent == 80


def test_judgements_say_what_they_are_about():
    t = trial(abs, "x")
    for judgement, text in [
        (lambda: t.close(1.0, 2.0, "loss"), "loss: 1, expected 2"),
        (lambda: t.equal([1], [2], "order"), "order: [1], expected [2]"),
        (lambda: t.holds(False, "it leaks"), "it leaks"),
        (lambda: t.at_most(2e6, 10, "bytes"), "bytes: 2e+06, expected at most 10"),
        (lambda: t.pair(3, 2, "a pair (x, y)"), "the result is 3, expected a pair (x, y)"),
        (lambda: t.pair([1, 2, 3], 2, "a pair (x, y)"), "the result is [1, 2, 3], expected a pair (x, y)"),
    ]:
        with pytest.raises(Mismatch) as mismatch:
            judgement()
        assert mismatch.value.text == text
    t.at_most(10, 10, "bytes")
    t.holds(True, "it leaks")
    assert t.pair([1, 2], 2, "a pair") == (1, 2)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────


def exercise_mean() -> Exercise:
    """mean(x, axis), with two checks and two mistakes."""
    made = Exercise(
        "mean",
        title="The mean",
        arguments=("x", "axis"),
        shapes=("x  array",),
        formula="Σ x / n",
        difficulty=1,
        importance=2,
        minutes=5,
        points=3,
        hints=("?", "divide", "x.sum(axis) / x.shape[axis]"),
    )

    @made.check("the mean is taken over the given axis")
    def values(t: Trial) -> None:
        x = np.arange(6.0).reshape(2, 3)
        t.close(t.call(x, 0), [1.5, 2.5, 3.5])

    @made.check("x is left as it was")
    def unchanged(t: Trial) -> None:
        t.call(t.normal(3, 5), 1)
        t.unchanged()

    @made.mistake(says="the sum is not divided", tries="dividing by x.shape[axis].", caught_by="values")
    def summed(x, axis):
        return x.sum(axis=axis)

    @made.mistake(says="the axis is ignored", tries="x.mean(axis=axis).", caught_by="values")
    def of_all(x, axis):
        return x.mean()

    return made


def verdict(fn: Any, seed: int = 42, exercise: Exercise | None = None) -> Verdict:
    made = exercise or exercise_mean()
    return judge(made, LocalSubject(fn, made.name), seed)


def right(x, axis):
    return x.mean(axis=axis)


def test_a_failing_check_reads_like_this():
    assert str(verdict(lambda x, axis: x.sum(axis=axis))).splitlines() == [
        "✗ mean · the mean is taken over the given axis",
        "  x [[0., 1., 2.], [3., 4., 5.]], axis 0: first difference at [0]: 3, expected 1.5, "
        "and at 2 more of 3 places",
        "  This is what you get when the sum is not divided.",
        "  Try: dividing by x.shape[axis].",
        "  ✓ x is left as it was",
        "  The same inputs again: check(mean, seed=42)",
    ]


def test_a_passing_function_reads_like_this():
    passed = verdict(right)
    assert str(passed) == "✓ mean · 2 of 2 properties hold · 3 points"
    assert (passed.ok, passed.points, passed.state, passed.mistake) == (True, 3, "passed", None)


def test_a_function_that_raises_is_told_with_its_line():
    def fn(x, axis):
        return x / len(axis)  # oops

    text = str(verdict(fn)).splitlines()
    assert text[1].startswith("  x [[0., 1., 2.], [3., 4., 5.]], axis 0: TypeError: ")
    assert "`return x / len(axis)  # oops`)" in text[1]


def test_the_stub_is_open_and_gets_no_points():
    def stub(x, axis):
        raise NotImplementedError("your turn")

    opened = verdict(stub)
    assert str(opened) == "○ mean is not implemented yet."
    assert (opened.ok, opened.points, opened.state) == (False, 0, "open")
    assert len(opened.results) == 1, "the other checks would only repeat it"


def test_all_properties_count_or_none():
    def fn(x, axis):
        x /= x.shape[axis]
        return x.sum(axis=axis)

    failed = verdict(fn)
    assert [r.ok for r in failed.results] == [True, False]
    assert (failed.points, failed.state) == (0, "failed")
    assert "argument x was written to" in str(failed)


def test_an_exercise_without_checks_passes_nobody():
    assert not Verdict(exercise_mean(), [], 0, 0.0).ok


def test_a_result_that_is_no_plain_data_is_named():
    assert "the result holds a set." in str(verdict(lambda x, axis: {1}))


def test_inputs_that_are_long_stand_on_a_line_of_their_own():
    exercise = exercise_mean()

    @exercise.check("long inputs")
    def long(t: Trial) -> None:
        t.call(list(range(8)), ["a" * 60] * 2)

    result = verdict(lambda x, axis: np.mean(x, axis) if x is not None else 0, exercise=exercise).results[-1]
    first, second = result.text.splitlines()[:2]
    assert first.startswith("x [0, 1, 2")
    assert second.split(":")[0] in ("TypeError", "ValueError")


def test_the_seed_gives_the_same_inputs_again_and_a_fresh_one_others():
    def calls(seed: int | None) -> list[str]:
        return [str(call.args) for r in verdict(right, seed).results for call in r.calls]

    assert calls(5) == calls(5)
    assert calls(5) != calls(6)
    assert len({fresh_seed() for _ in range(20)}) > 10


def test_the_seed_can_stay_secret():
    failed = verdict(lambda x, axis: 0)
    failed.show_seed = False
    assert "42" not in str(failed)
    assert "same inputs" not in str(failed)


def test_a_mistake_is_named_only_if_it_answers_alike():
    assert verdict(lambda x, axis: x.mean()).mistake.name == "of_all"
    assert verdict(lambda x, axis: x.sum(axis=axis) * 1.01).mistake is None
    assert verdict(lambda x, axis: None).mistake is None
    assert verdict(right).mistake is None


def test_a_mistake_that_also_writes_is_still_recognised_by_what_it_fails_first():
    def summed_in_place(x, axis):
        x *= 1.0 + (x.shape[0] == 3)  # writes, and only where the shape is that of the second check
        return x.sum(axis=axis)

    assert verdict(summed_in_place).mistake.name == "summed"


def test_a_mistake_that_would_have_failed_earlier_is_not_named():
    exercise = exercise_mean()

    @exercise.check("a mean over the last axis")
    def last(t: Trial) -> None:
        x = t.normal(3, 5)
        t.close(t.call(x, -1), x.mean(axis=-1))

    def summed_over_the_last(x, axis):
        return x.sum(axis=axis) if axis == -1 else x.mean(axis=axis)

    failed = verdict(summed_over_the_last, exercise=exercise)
    assert failed.first_failure.check.name == "last"
    assert failed.mistake is None, "`summed` answers this check alike, but would have failed the first"


def test_a_function_that_asks_more_often_is_another_mistake():
    exercise = exercise_mean()

    @exercise.check("the function is asked once for each number")
    def asked(t: Trial) -> None:
        f = t.oracle(lambda x: x)
        t.call(f, 3)
        t.at_most(f.calls, 3, "calls of the function")

    exercise.checks = [exercise.checks[-1]]
    exercise.mistakes.clear()

    @exercise.mistake(says="each is asked twice", tries="once.", caught_by="asked")
    def twice(f, n):
        return sum(f(i) + 0 * f(i) for i in range(n)) / n

    def thrice(f, n):
        return sum(f(i) + 0 * f(i) + 0 * f(i) for i in range(n)) / n

    assert verdict(twice, exercise=exercise).mistake.name == "twice"
    found = verdict(thrice, exercise=exercise)
    assert found.mistake is None
    assert "calls of the function: 9, expected at most 3" in str(found)


def test_what_a_notebook_shows_has_no_traceback_through_the_grader():
    failed = verdict(lambda x, axis: None)
    error = CheckFailed(failed)
    assert error._render_traceback_() == str(failed).splitlines()
    assert str(error) == str(failed)
    assert isinstance(error, AssertionError)
    assert issubclass(NotImplementedYet, CheckFailed)


def test_an_object_that_equals_everything_passes_no_check():
    class EqualsAll:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return np.array([1.5, 2.5, 3.5])

    class Sly(np.ndarray):
        def __eq__(self, other: object) -> Any:
            return np.ones(3, bool)

        def __sub__(self, other: object) -> Any:
            return np.zeros(3)

        __hash__ = None  # type: ignore[assignment]

    assert not verdict(lambda x, axis: EqualsAll()).ok
    assert not verdict(lambda x, axis: [EqualsAll()] * 3).ok
    assert not verdict(lambda x, axis: np.zeros(3).view(Sly)).ok
    assert not verdict(lambda x, axis: np.array([EqualsAll()] * 3, dtype=object)).ok
    assert not verdict(lambda x, axis: np.full(3, NAN)).ok


def test_a_mistake_that_agrees_only_in_part_is_named_as_a_guess():
    """`averaged` but for single numbers: three of six checks see no difference."""
    from llmcourse.labs.lab01_backprop import sum_to

    averaged = next(m.fn for m in sum_to.mistakes if m.name == "averaged")

    def mostly(grad, shape):
        return grad if grad.size == 0 else averaged(grad, shape)

    def seldom(grad, shape):
        front = grad.size and shape and 1 not in shape and grad.ndim > len(shape)
        return averaged(grad, shape) if front else np.full(shape, 7, np.int64)

    exact, partly, hardly = (judge(sum_to, LocalSubject(f, "sum_to"), 3) for f in (averaged, mostly, seldom))
    assert "This is what you get when the copies' gradients are averaged" in str(exact)
    assert "It looks as if the copies' gradients are averaged" in str(partly)
    assert hardly.mistake is None
