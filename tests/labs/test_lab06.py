"""Lab 06's exercises: what their banks of mistakes do not show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.perform import Call, perform
from llmcourse.grading.plain import pack, unpack
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import Verdict, judge, run_check
from llmcourse.labs.catalog import find_lab
from llmcourse.streams.at_work import at_work
from llmcourse.streams.loop import Loop
from llmcourse.streams.order import races

LAB = find_lab("06")
NAMES = ("pipeline_us", "best_chunks", "prefetch", "launch_order", "decode_step")
pipeline_file, chunks_file, prefetch_file, order_file, decode_file = (
    import_module(f"llmcourse.labs.{LAB.name}.{name}") for name in NAMES
)
EXERCISES = {e.name: e for e in LAB.exercises}
RIGHT = {name: e.alternatives[0].fn for name, e in EXERCISES.items()}


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


@pytest.mark.parametrize("exercise", LAB.exercises, ids=lambda e: e.name)
def test_the_judgement_is_the_same_when_every_value_travels(exercise):
    for entry in [*exercise.alternatives, *exercise.mistakes]:
        for check in exercise.checks:
            here, afar = (run_check(exercise, check, s(entry.fn), 4) for s in (LocalSubject, FromAfar))
            assert here.ok == afar.ok, (entry.name, check.name)


@pytest.mark.parametrize("exercise", LAB.exercises, ids=lambda e: e.name)
def test_messages_for_the_first_tries(exercise):
    def stub(*args):
        raise NotImplementedError

    assert str(verdict(exercise, stub)) == f"○ {exercise.name} is not implemented yet."
    for nonsense in ("text", -3.5, [["a"]], {"zz": None}, [None], float("nan"), np.array(["a"]), None):
        assert verdict(exercise, lambda *args, value=nonsense: value).state == "failed"


@pytest.mark.parametrize("name", ["pipeline_us", "best_chunks", "launch_order"])
def test_a_missing_return_is_named(name):
    assert "is a `return` missing?" in str(verdict(EXERCISES[name], lambda *args: None))


@pytest.mark.parametrize("exercise", LAB.exercises, ids=lambda e: e.name)
def test_right_functions_pass_on_many_seeds(exercise):
    for alternative in exercise.alternatives:
        for seed in range(20, 26):
            assert verdict(exercise, alternative.fn, seed).ok, (alternative.name, seed)


# ── pipeline_us, launch_order ────────────────────────────────────────────────────────────────────


def test_the_recurrence_and_the_simulator_agree_on_any_pipeline():
    rng = np.random.default_rng(1)
    for _ in range(60):
        n, streams = int(rng.integers(1, 12)), int(rng.integers(1, 6))
        stages = tuple(int(us) for us in rng.integers(1, 40, 3))
        made = pipeline_file.simulated(n, stages, streams)
        assert made == pytest.approx(RIGHT["pipeline_us"](n, stages, streams))


def test_the_arithmetic_of_two_stages_and_the_simulator_agree_on_any_order():
    rng = np.random.default_rng(2)
    for _ in range(40):
        jobs = [(int(a), int(b)) for a, b in rng.integers(1, 50, (int(rng.integers(1, 20)), 2))]
        order = [int(i) for i in rng.permutation(len(jobs))]
        assert order_file.simulated(jobs, order) == pytest.approx(order_file.two_stages(jobs, order))


def test_johnsons_rule_is_the_best_of_all_orders():
    rng = np.random.default_rng(3)
    for _ in range(30):
        jobs = [(int(a), int(b)) for a, b in rng.integers(0, 20, (6, 2))]
        best = min(order_file.two_stages(jobs, o) for o in permutations(range(6)))
        assert order_file.two_stages(jobs, order_file.johnson(jobs, None)) == best


def test_an_order_that_is_none_is_refused_wherever_it_comes_from():
    exercise = EXERCISES["launch_order"]
    assert "each of the indices 0 to" in str(verdict(exercise, lambda jobs, makespan: [0] * len(jobs)))
    assert "whole numbers" in str(
        verdict(exercise, lambda jobs, makespan: [float(i) for i in range(len(jobs))])
    )
    asked = verdict(exercise, lambda jobs, makespan: makespan(list(range(len(jobs) + 1))))
    assert "makespan was asked for" in str(asked)


# ── prefetch ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("us", [(100, 100, 100), (10, 90, 120), (130, 40, 60), (40, 150, 50)])
@pytest.mark.parametrize("buffers", [1, 2, 3, 5])
def test_the_best_makespan_is_what_the_right_loop_takes_in_the_simulator(us, buffers):
    prepare, copy, step = us
    loop = Loop(9, buffers, prepare_us=prepare, nbytes=copy * 1000, step_us=step)
    RIGHT["prefetch"](9, buffers, *loop.calls)
    made = loop.program.simulate(prefetch_file.IDEAL).makespan_us
    assert made == pytest.approx(prefetch_file.best_us(9, buffers, us))
    assert races(loop.program) == []


def test_two_buffers_are_enough_where_every_stage_takes_its_time():
    # The third buffer buys nothing when the stages are regular; the first one buys the overlap.
    times = [prefetch_file.best_us(20, buffers, (100, 150, 200)) for buffers in (1, 2, 3)]
    assert times[0] > 1.5 * times[1]
    assert times[1] == times[2]


def test_calls_that_make_no_sense_are_refused_with_a_reason():
    exercise = EXERCISES["prefetch"]

    def wrong_buffer(batches, buffers, prepare, *rest):
        prepare(0, buffers)

    def wrong_stream(batches, buffers, prepare, copy, step, record, wait, synchronize):
        record("copy")

    def wrong_event(batches, buffers, prepare, copy, step, record, wait, synchronize):
        wait("compute", 0)

    assert "there is no buffer" in str(verdict(exercise, wrong_buffer))
    assert "there is no stream 'copy'" in str(verdict(exercise, wrong_stream))
    assert "there is no event 0" in str(verdict(exercise, wrong_event))


def test_what_a_prefetching_loop_returns_counts_for_nothing():
    honest = verdict(EXERCISES["prefetch"], lambda *args: RIGHT["prefetch"](*args) or "anything")
    assert honest.ok
    lines = Loop(1, 1).lines
    assert not verdict(EXERCISES["prefetch"], lambda *args: lines).ok


# ── decode_step ──────────────────────────────────────────────────────────────────────────────────


def test_a_refused_read_is_noticed_though_the_learner_hides_it():
    def hides(op, read):
        with contextlib.suppress(Exception):
            read("position")
        RIGHT["decode_step"](op, read)

    found = verdict(EXERCISES["decode_step"], hides)
    assert found.first_failure is not None
    assert found.first_failure.check.name == "capturable"


def test_a_step_that_launches_nothing_is_no_step():
    assert "nothing was launched" in str(verdict(EXERCISES["decode_step"], lambda op, read: None))


def test_a_launch_that_cannot_run_says_why():
    def wrong(op, read):
        op("x", "gather", "embedding", "tokens")

    assert "there is no such buffer" in str(verdict(EXERCISES["decode_step"], wrong))


def test_the_judges_own_generation_equals_torch():
    import torch

    t = a_trial()
    arrays = decode_file.model(t, 3, 8)
    state = decode_file.start(t, arrays, [2, 5, 0])
    expected = decode_file.generate(arrays, state, 1)[0]
    w = {k: torch.tensor(v) for k, v in (arrays | state).items()}
    for b, n in enumerate([2, 5, 0]):
        x = w["embedding"][w["token"][b]]
        keys = torch.cat([w["keys"][b, :n], (x @ w["wk"])[None]])
        values = torch.cat([w["values"][b, :n], (x @ w["wv"])[None]])
        q = (x @ w["wq"])[None, None]
        y = torch.nn.functional.scaled_dot_product_attention(q, keys[None], values[None])[0, 0]
        assert int((y @ w["wo"]).argmax()) == expected[b]


# ── the last cell ────────────────────────────────────────────────────────────────────────────────


def test_right_functions_at_work_beat_what_they_are_compared_with():
    program, table = at_work(*(RIGHT[name] for name in NAMES))
    assert [row[0] for row in table.rows] == list(NAMES)
    assert races(program) == []
    ordered, came = (float(x.split()[0].replace(",", "")) for x in table.rows[3][2].split(", as they came "))
    assert ordered < came
    whole = {
        name: float(row[2].split()[0].replace(",", ""))
        for name, row in zip(NAMES, table.rows, strict=True)
        if "µs" in row[2]
    }
    assert whole["best_chunks"] < whole["pipeline_us"]
