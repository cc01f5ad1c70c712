"""Lab 13: judges that torch agrees with, workers that cannot get stuck, functions that train models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch

from llmcourse.errors import CourseError
from llmcourse.grading.compare import Mismatch
from llmcourse.grading.perform import Call, perform
from llmcourse.grading.plain import pack, unpack
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import Verdict, judge, run_check
from llmcourse.labs import find_lab
from llmcourse.train.parallel import schedule
from llmcourse.train.parallel.at_work import (
    apart,
    layer_at_work,
    pipeline_at_work,
    ring_at_work,
    top_k_at_work,
)

LAB = find_lab("13")
EXERCISES = {e.name: e for e in LAB.exercises}
RIGHT = {name: e.alternatives[0].fn for name, e in EXERCISES.items()}
linear_file, order_file = (
    import_module(f"llmcourse.labs.{LAB.name}.{name}") for name in ("parallel_linear", "one_f_one_b")
)


def verdict(name: str, fn: Callable[..., Any], seed: int = 3) -> Verdict:
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


def mistake(name: str, called: str) -> Callable[..., Any]:
    return next(m.fn for m in EXERCISES[name].mistakes if m.name == called)


class FromAfar:
    """A function whose arguments, and all that passes through its callables, are copied as bytes."""

    name = "from afar"

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def call(self, args: tuple[Any, ...], watch: Sequence[str] = (), grads: bool = False) -> Call:
        def proxy(oracle: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *given: unpack(pack(oracle(*unpack(pack(given)))))

        return perform(self.fn, [proxy(a) if callable(a) else unpack(pack(a)) for a in args])


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("exercise", LAB.exercises, ids=lambda e: e.name)
def test_the_judgement_is_the_same_when_every_value_travels(exercise):
    for entry in [*exercise.alternatives, *exercise.mistakes[::2]]:
        for check in exercise.checks:
            here, afar = (run_check(exercise, check, s(entry.fn), 4) for s in (LocalSubject, FromAfar))
            assert here.ok == afar.ok, (entry.name, check.name)


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 44):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, found)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_a_missing_return_and_nonsense_are_told(name):
    def stub(*args):
        raise NotImplementedError

    assert str(verdict(name, stub)) == f"○ {name} is not implemented yet."
    assert "return" in str(verdict(name, lambda *args: None))
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2), "text", float("nan"), [["F", 0.5]], 3):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda rank, w, x, send, recv: recv(), r"workers 0, 1 of 2 wait for a message that nobody sends"),
        (lambda rank, w, x, send, recv: send(x.tolist()), r"worker 0 sends \[.*\], expected a tensor"),
        (lambda rank, w, x, send, recv: [send(x) for _ in range(999)], r"sends more than \d+ messages"),
        (lambda rank, w, x, send, recv: x if rank else recv(), r"worker 0 of 2 waits"),
    ],
)
def test_workers_of_a_ring_that_cannot_go_on_are_stopped_and_it_is_said_why(fn, says):
    assert re.search(says, str(verdict("ring_all_reduce", fn)))


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda cut, rank, *rest: rest[-1](rest[1]) if rank else None, r"wait[s]? in an all_reduce"),
        (lambda cut, rank, *rest: rest[-1](torch.zeros(2 + rank)), r"the shapes must be the same"),
        (lambda cut, rank, *rest: rest[-1](3.0), r"gives all_reduce 3.0, expected a tensor"),
    ],
)
def test_all_reduces_that_do_not_meet_are_told(fn, says):
    assert re.search(says, str(verdict("parallel_linear", fn)))


# ── the judges' references ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cut", ["column", "row"])
def test_the_layer_that_judges_equals_torch_s_autograd(cut):
    torch.manual_seed(1)
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    bias, grad = torch.randn(4), torch.randn(5, 4)
    y = torch.nn.functional.linear(x, weight, bias)
    y.backward(grad)
    given = [t.detach() for t in (x, weight, bias, grad)]
    parts = [linear_file.expected(cut, rank, 2, *given) for rank in range(2)]
    put = [torch.from_numpy(p[0]) for p in parts], [torch.from_numpy(p[1]) for p in parts]
    outputs, inputs = (
        (torch.cat(put[0], 1), put[1][0]) if cut == "column" else (put[0][1], torch.cat(put[1], 1))
    )
    assert torch.allclose(outputs.float(), y, atol=1e-5)
    assert torch.allclose(inputs.float(), x.grad, atol=1e-5)
    weights = torch.cat([torch.from_numpy(p[2]) for p in parts], 0 if cut == "column" else 1)
    assert torch.allclose(weights.float(), weight.grad, atol=1e-5)


def test_stages_that_wait_in_a_circle_are_told_as_the_package_tells_it():
    found = str(verdict("one_f_one_b", mistake("one_f_one_b", "warm_up_reversed")))
    assert "the stages wait for each other and none goes on: stage 0 at B0 waits for B0 of stage 1" in found
    assert "Traceback" not in found
    with pytest.raises(
        Mismatch, match=r"stage 0 at B0 waits for B0 of stage 1; stage 1 at F1 waits for F1 of"
    ):
        order_file.simulate(
            [[("F", 0), ("B", 0), ("F", 1), ("B", 1)], [("F", 0), ("F", 1), ("B", 0), ("B", 1)]]
        )


def test_a_right_order_is_the_package_s():
    for stages, micros in ((1, 1), (3, 2), (4, 9)):
        mine = [[tuple(w) for w in RIGHT["one_f_one_b"](s, stages, micros)] for s in range(stages)]
        assert mine == [[tuple(w) for w in line] for line in schedule.one_f_one_b(stages, micros)]


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_gpt_trains_through_a_right_ring_and_is_another_through_a_wrong_one(capsys):
    table = ring_at_work(RIGHT["ring_all_reduce"], world_size=3)
    assert all(float(row[2]) < 1e-5 for row in table.rows)
    wrong = ring_at_work(mistake("ring_all_reduce", "reduce_scattered"), world_size=2)
    assert all(float(row[2]) > 1e-3 for row in wrong.rows)
    assert "[rank 1]" in capsys.readouterr().out


def test_an_mlp_trains_on_two_processes_through_a_right_layer_only():
    for alternative in EXERCISES["parallel_linear"].alternatives:
        table = layer_at_work(alternative.fn)
        assert all(float(row[2]) < 1e-5 for row in table.rows), alternative.name
    wrong = layer_at_work(mistake("parallel_linear", "grad_not_summed"))
    assert all(float(row[2]) > 1e-4 for row in wrong.rows)


def test_a_gpt_trains_in_stages_in_a_right_order_and_a_wrong_one_is_refused():
    for alternative in EXERCISES["one_f_one_b"].alternatives:
        table = pipeline_at_work(alternative.fn)
        assert [row[1] for row in table.rows] == ["2", "1"], alternative.name
        assert all(float(row[2]) < 1e-5 for row in table.rows), alternative.name
    with pytest.raises(CourseError, match="does B0 before F0"):
        pipeline_at_work(mistake("one_f_one_b", "backward_first"))


def test_a_hundredth_of_the_gradients_trains_a_gpt():
    table = top_k_at_work(RIGHT["top_k_error_feedback"], steps=15)
    sent = [int(row[2].replace(",", "")) for row in table.rows]
    assert sent[0] > 4 * sent[1] > 8 * sent[2]
    assert sent[2] == sent[3]


def test_a_function_that_raises_in_a_worker_names_it():
    def broken(rank, world_size, x, send, recv):
        raise LookupError("no such chunk")

    with pytest.raises(CourseError, match="no such chunk"):
        ring_at_work(broken, world_size=2)


def test_curves_that_are_no_numbers_are_far_apart():
    assert apart([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert apart([math.nan], [1.0]) == math.inf


def test_a_trial_of_the_ring_counts_a_repeated_message_once():
    workers_file = import_module(f"llmcourse.labs.{LAB.name}.workers")
    fn = RIGHT["ring_all_reduce"]
    workers = workers_file.Workers(Trial(LocalSubject(fn), (), 1, "count"), 4)
    xs = [torch.arange(8.0) + rank for rank in range(4)]
    got = workers.run(lambda rank: (rank, 4, xs[rank]), ring=True)
    assert all(torch.equal(y, sum(xs)) for y in got)
    assert [(s.messages, s.nbytes) for s in workers.sent] == [(6, 48)] * 4
