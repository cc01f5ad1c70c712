"""The parts that later labs build on, each in an exercise of its own: memory, messages, leaks, chance.

Every exercise here has a mistake that gives right values and costs too much, or the wrong distribution.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from llmcourse.grading.bank import examine, faults
from llmcourse.grading.distribution import chi_square
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.session import Cell, RemoteSubject, Session
from llmcourse.grading.trial import Trial
from llmcourse.grading.verdict import judge


def exercise(name: str, *arguments: str) -> Exercise:
    return Exercise(
        name,
        title=name,
        arguments=arguments,
        shapes=("see the code",),
        formula="see the code",
        difficulty=1,
        importance=1,
        minutes=1,
        points=1,
        hints=("a", "b", "c"),
    )


# ── memory: the largest intermediate, and what is kept for backward ─────────────────────────────

row_sums = exercise("row_sums", "x")  # Σ_j exp(x_i + x_j), without the matrix


def blockwise(x: Any) -> Any:
    return torch.cat([torch.exp(part[:, None] + x[None, :]).sum(1) for part in x.split(8)])


@row_sums.check("the sums are right")
def sums(t: Trial) -> None:
    x = torch.from_numpy(t.normal(t.odd(), scale=0.3))
    t.close(t.call(x), torch.exp(x[:, None] + x[None, :]).sum(1))


@row_sums.check("no intermediate is larger than a block of 8 rows")
def memory(t: Trial) -> None:
    n = 128
    call = t.perform(torch.from_numpy(t.normal(n, scale=0.3)), watch=("largest_intermediate",))
    t.at_most(call.costs["largest_intermediate"], 8 * n * 8, "the largest intermediate, in bytes")


@row_sums.mistake(says="the whole matrix is made at once", tries="a few rows at a time.", caught_by="memory")
def whole_matrix(x: Any) -> Any:
    return torch.exp(x[:, None] + x[None, :]).sum(1)


row_sums.alternative("a row at a time")(lambda x: torch.stack([torch.exp(x + a).sum() for a in x]))
row_sums.alternative("eight rows at a time")(blockwise)

sigmoid = exercise("sigmoid", "x")


@sigmoid.check("values and gradients are right")
def gradients(t: Trial) -> None:
    x = torch.from_numpy(t.normal(t.odd(), t.size()))
    call = t.perform(x, grads=True)
    t.close(call.value, 1 / (1 + torch.exp(-x)))
    assert call.grads is not None
    t.close(call.grads[0], torch.sigmoid(x) * (1 - torch.sigmoid(x)), "the gradient of x")


@sigmoid.check("one array of x's size is kept for backward")
def kept(t: Trial) -> None:
    x = torch.from_numpy(t.normal(50, 3))
    call = t.perform(x, watch=("saved_bytes",), grads=True)
    t.at_most(call.costs["saved_bytes"], x.numel() * 8, "bytes kept for backward")


@sigmoid.mistake(says="every step keeps its own result", tries="torch.sigmoid.", caught_by="kept")
def in_steps(x: Any) -> Any:
    return 1 / (1 + torch.exp(-x))


sigmoid.alternative("one operation")(lambda x: torch.sigmoid(x))
sigmoid.alternative("tanh, which keeps its output too")(lambda x: 0.5 * torch.tanh(0.5 * x) + 0.5)


# ── leaks ────────────────────────────────────────────────────────────────────────────────────────

scaled = exercise("scaled", "x")


@scaled.check("twice x")
def twice(t: Trial) -> None:
    x = t.normal(t.odd(), t.size())
    t.close(t.call(x), 2 * x)


@scaled.check("nothing is left behind by a call")
def clean(t: Trial) -> None:
    call = t.perform(t.normal(1000), watch=("leaked_bytes",))
    t.at_most(call.costs["leaked_bytes"], 0, "bytes left behind")


@scaled.mistake(says="every result is kept in a list", tries="returning it only.", caught_by="clean")
def hoards(x: Any, kept: list = []) -> Any:  # noqa: B006
    kept.append(2 * x)
    return kept[-1].copy()


scaled.alternative("addition")(lambda x: x + x)


# ── messages ─────────────────────────────────────────────────────────────────────────────────────

broadcast = exercise("broadcast", "value", "ranks", "send")  # rank 0 tells everybody, in a tree


@broadcast.check("everybody gets the value once, and rank 0 sends log₂(ranks) messages")
def frugal(t: Trial) -> None:
    ranks, value = 8, t.normal(16)
    got: list[int] = []

    def deliver(to: int, data: np.ndarray) -> None:
        got.append(to)

    send = t.oracle(deliver, says="send", limit=4 * ranks)
    t.call(value, ranks, send)
    t.equal(sorted(got), [1, 2, 4], "who is sent to by rank 0")
    t.at_most(send.calls, 3, "messages")
    t.at_most(send.sent, 3 * value.nbytes, "bytes sent")


@broadcast.mistake(says="rank 0 tells everybody itself", tries="ranks 1, 2, 4, …", caught_by="frugal")
def star(value: Any, ranks: Any, send: Any) -> None:
    for rank in range(1, ranks):
        send(rank, value)


@broadcast.mistake(says="the value is sent over and over", tries="each rank once.", caught_by="frugal")
def chatter(value: Any, ranks: Any, send: Any) -> None:
    while True:
        send(1, value)


@broadcast.alternative("powers of two")
def tree(value: Any, ranks: Any, send: Any) -> None:
    step = 1
    while step < ranks:
        send(step, value)
        step *= 2


# ── chance ───────────────────────────────────────────────────────────────────────────────────────

sample = exercise("sample", "p", "count", "seed")  # `count` draws from the probabilities p


@sample.check("the draws have the probabilities p (false alarms: one in a million)")
def drawn(t: Trial) -> None:
    p = np.array([0.5, 0.25, 0.15, 0.1, 0.0])
    draws = t.call(p, 20_000, int(t.integers(0, 2**31)))
    t.likely(chi_square(np.bincount(draws, minlength=5), p, false_alarm=1e-6))


@sample.mistake(says="all values are equally likely", tries="p.", caught_by="drawn")
def uniform(p: Any, count: Any, seed: Any) -> Any:
    return np.random.default_rng(seed).integers(0, 4, count)


@sample.mistake(says="the likeliest value is always taken", tries="a draw.", caught_by="drawn")
def greedy(p: Any, count: Any, seed: Any) -> Any:
    return np.full(count, p.argmax())


@sample.mistake(says="p is squared", tries="p itself.", caught_by="drawn")
def sharpened(p: Any, count: Any, seed: Any) -> Any:
    return np.random.default_rng(seed).choice(5, count, p=p**2 / (p**2).sum())


@sample.alternative("the cumulative sum")
def inverse(p: Any, count: Any, seed: Any) -> Any:
    return np.searchsorted(p.cumsum(), np.random.default_rng(seed).random(count), side="right")


sample.alternative("choice")(lambda p, count, seed: np.random.default_rng(seed).choice(5, count, p=p))

EXERCISES = [row_sums, sigmoid, scaled, broadcast, sample]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.name)
def test_costs_and_chance_reject_what_values_alone_would_accept(e, seed):
    entries = examine(e, seed)
    assert faults(entries) == []
    assert max(entry.seconds for entry in entries) < 2


@pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.name)
def test_the_same_checks_judge_a_function_of_another_process(e):
    """Counters run beside the function, oracles here; the mistake is named from afar."""
    mistake = e.mistakes[0]
    source = inspect.getsource(mistake.fn)
    source = "from typing import Any\nimport numpy as np, torch\n" + source[source.index("def ") :]
    cells = [Cell("a", f"{source}\n{e.name} = {mistake.fn.__name__}")]
    with Session(cells, sandbox=False) as session:
        session.run()
        verdict = judge(e, RemoteSubject(session, e.name), seed=3)
    assert verdict.first_failure is not None
    assert verdict.first_failure.check.name == mistake.caught_by
    assert verdict.mistake is mistake


def test_a_cost_in_a_message_has_its_bound_and_unit():
    from llmcourse.grading.trial import LocalSubject

    text = str(judge(row_sums, LocalSubject(whole_matrix, "row_sums"), seed=1))
    assert "the largest intermediate, in bytes: 131,072, expected at most 8,192" in text
    assert "This is what you get when the whole matrix is made at once." in text
