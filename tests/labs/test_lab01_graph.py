"""Lab 01's exercises on graphs and on difference quotients: what their banks of mistakes do not show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.perform import Call, perform
from llmcourse.grading.plain import pack, unpack
from llmcourse.grading.trial import LocalSubject, Oracle, Trial
from llmcourse.grading.verdict import Verdict, judge, run_check
from llmcourse.labs.lab01_backprop import graphs

NAMES = ("topological_order", "backward_pass", "numeric_gradient")
order_file, backward_file, numeric_file = (import_module(f"{graphs.__package__}.{name}") for name in NAMES)

topological_order = order_file.topological_order
backward_pass = backward_file.backward_pass
numeric_gradient = numeric_file.numeric_gradient
EXERCISES = [topological_order, backward_pass, numeric_gradient]


def verdict(exercise: Exercise, fn: Callable[..., Any], seed: int = 3) -> Verdict:
    return judge(exercise, LocalSubject(fn, exercise.name), seed)


def a_trial(seed: int = 5) -> Trial:
    return Trial(LocalSubject(len), (), seed, "a test")


class FromAfar:
    """A function whose arguments, and all that passes through its callables, are copied as bytes."""

    name = "from afar"

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def call(self, args: tuple[Any, ...], watch: Sequence[str] = (), grads: bool = False) -> Call:
        def proxy(oracle: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *given: unpack(pack(oracle(*unpack(pack(given)))))

        return perform(self.fn, [proxy(a) if callable(a) else unpack(pack(a)) for a in args])


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_the_judgement_is_the_same_when_every_value_travels(exercise):
    for entry in [*exercise.alternatives, *exercise.mistakes]:
        for check in exercise.checks:
            if check.name != "deep":  # the chains: calls of the same kind, a thousand times
                here, afar = (run_check(exercise, check, s(entry.fn), 4) for s in (LocalSubject, FromAfar))
                assert here.ok == afar.ok, (entry.name, check.name)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_right_solutions_call_back_at_most_12000_times(exercise, monkeypatch):
    calls = 0
    counted = Oracle.__call__

    def count(oracle: Oracle, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return counted(oracle, *args)

    monkeypatch.setattr(Oracle, "__call__", count)
    for alternative in exercise.alternatives:
        calls = 0
        assert verdict(exercise, alternative.fn).ok
        assert 100 < calls <= 12_000, alternative.name


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_messages_for_the_first_tries(exercise):
    def stub(*args):
        raise NotImplementedError

    assert str(verdict(exercise, stub)) == f"○ {exercise.name} is not implemented yet."
    assert "is a `return` missing?" in str(verdict(exercise, lambda *args: None))
    for nonsense in ("text", 3.5, [["a"]], {"zz": None}, [None], float("nan"), np.array(["a"])):
        assert verdict(exercise, lambda *args, value=nonsense: value).state == "failed"


# ── topological_order ────────────────────────────────────────────────────────────────────────────


def test_random_graphs_are_reached_from_their_root_and_stand_in_a_right_order():
    for seed in range(30):
        g = graphs.dag(a_trial(seed), 12)
        assert sorted(order_file.kahn(g.root, g.ask)) == sorted(g.nodes)
        assert all(g.nodes.index(n) < g.nodes.index(p) for n in g.nodes for p in g.parents[n])


def test_recursion_under_a_raised_limit_is_accepted():
    """It is a poor habit, which a judge in another process cannot see: it answers as a stack does."""

    def raised(root, parents):
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(10_000)
        try:
            return next(m.fn for m in topological_order.mistakes if m.name == "recursive")(root, parents)
        finally:
            sys.setrecursionlimit(limit)

    assert verdict(topological_order, raised).ok


def test_any_right_order_is_accepted_not_only_one():
    g = graphs.graph("abc", [[1, 2], [], []])
    orders = {tuple(a.fn(g.root, g.ask)) for a in topological_order.alternatives}
    assert orders == {("a", "b", "c"), ("a", "c", "b")}


def test_an_order_that_is_right_backwards_is_told_to_turn_round():
    def backwards(root, parents):
        return order_file.kahn(root, parents)[::-1]

    told = verdict(topological_order, backwards).first_failure
    assert told.check.name == "consumers_first"
    assert told.tries == "the same list, reversed."


def test_catching_the_budget_error_does_not_help():
    def stubborn(root, parents):
        def patient(node):
            try:
                return parents(node)
            except RuntimeError:
                return []

        for _ in range(5):
            order = order_file.kahn(root, patient)
        return order

    assert [r.check.name for r in verdict(topological_order, stubborn).results if not r.ok] == [
        "frugal",
        "deep",
    ]


# ── backward_pass ────────────────────────────────────────────────────────────────────────────────


def test_sums_over_routes_are_torchs_gradients():
    for seed in range(8):
        t = a_trial(seed)
        g = graphs.dag(t, 8)
        local = backward_file._locals(t, g)
        values: dict[Any, torch.Tensor] = {}
        for node in reversed(g.nodes):
            terms = [d * values[p] for p, d in zip(g.parents[node], local[node], strict=True)]
            values[node] = sum(terms) if terms else torch.ones((), dtype=torch.float64, requires_grad=True)
            values[node].retain_grad()
        values[g.root].backward()
        assert backward_file.path_sums(g, local, 1.0) == {n: v.grad.item() for n, v in values.items()}


def test_writing_into_the_gradient_that_came_in_is_noticed():
    def scaled(order, grad, parents, vjp):
        grads = backward_file.right(order, grad, parents, vjp)
        if isinstance(grad, np.ndarray) and grad.ndim and grad.size:
            grads[order[0]] = grad.copy()
            grad *= 0
        return grads

    failed = [r for r in verdict(backward_pass, scaled).results if not r.ok]
    assert [r.check.name for r in failed] == ["untouched"]
    assert "argument grad was written to" in failed[0].text


# ── numeric_gradient ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("h", [1e-7, 1e-6, 6e-6, 1e-5, 1e-4])
def test_central_steps_that_leave_seven_digits_are_accepted(h):
    for seed in range(10):
        found = verdict(numeric_gradient, lambda f, x, h=h: numeric_file.central(f, x, h), seed)
        assert found.ok, str(found)


@pytest.mark.parametrize(
    ("h", "tries"),
    [(1e-2, "smaller"), (1e-3, "smaller"), (1e-10, "larger"), (1e-11, "larger"), (1e-12, "larger")],
)
def test_other_central_steps_are_rejected_with_the_direction_to_go(h, tries):
    for seed in range(10):
        found = verdict(numeric_gradient, lambda f, x, h=h: numeric_file.central(f, x, h), seed).first_failure
        assert found.check.name == "accuracy"
        assert f"a {tries} step" in found.tries


@pytest.mark.parametrize("h", [10.0**-e for e in range(3, 12)])
def test_no_step_makes_a_one_sided_difference_pass(h):
    for seed in range(5):
        for side in (h, -h):
            found = verdict(numeric_gradient, lambda f, x, h=side: numeric_file.forward(f, x, h), seed)
            assert not found.ok
            accuracy = next(r for r in found.results if r.check.name == "accuracy")
            assert "on one side of x only" in accuracy.text
            assert found.mistake is None or found.mistake.name in ("forward", "backward")


def test_the_stiff_function_has_the_gradient_that_it_states():
    t = a_trial()
    x = t.normal(3, 2)
    f, gradient = numeric_file.stiff(t, x, cubic=1)
    h = np.array([[0.5, -0.25], [0.125, 0.5], [1.0, -0.5]])  # any direction, any length
    odd_part = (f(x + h) - f(x - h)) / 2
    assert odd_part == pytest.approx((gradient * h).sum() + (h**3).sum(), rel=1e-9)
