"""Orders leave the bubble of theory; stages in processes train as one model does, and as torch's do."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build, cross_entropy, one_thread
from llmcourse.train.parallel.launch import WorkerContext, run_workers
from llmcourse.train.parallel.pipeline import Pipeline, cut
from llmcourse.train.parallel.schedule import (
    SCHEDULES,
    ScheduleError,
    Timeline,
    Work,
    gpipe,
    ideal_bubble,
    micros_for,
    one_f_one_b,
    simulate,
    text,
)
from llmcourse.train.tasks import IGNORE, Batch

SIZES = list(itertools.product((1, 2, 3, 4, 7), (1, 2, 3, 5, 8, 13)))

# ── orders ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SCHEDULES)
def test_equal_stages_leave_the_bubble_of_theory(name: str) -> None:
    for p, m in SIZES:
        for backward in (0.5, 1.0, 2.0):
            timeline = simulate(SCHEDULES[name](p, m), backward=backward)
            assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
            assert timeline.makespan == pytest.approx((m + p - 1) * (1 + backward))
            assert ideal_bubble(p, m) == pytest.approx((p - 1) / (m + p - 1))


def test_gpipe_keeps_all_micro_batches_and_1f1b_no_more_than_stages_are_left() -> None:
    for p, m in SIZES:
        for s in range(p):
            assert simulate(gpipe(p, m)).peak(s) == m
            assert simulate(one_f_one_b(p, m)).peak(s) == min(p - s, m)


def test_1f1b_reads_as_in_the_paper() -> None:
    assert text(one_f_one_b(2, 3)) == "stage 0  F0 F1 B0 F2 B1 B2\nstage 1  F0 B0 F1 B1 F2 B2"


def test_unequal_stages_go_at_the_pace_of_the_slowest() -> None:
    times = (1.0, 3.0, 1.0)
    for order in (gpipe(3, 50), one_f_one_b(3, 50)):
        timeline = simulate(order, forward=times, backward=times)
        assert 2 * 50 * 3 <= timeline.makespan <= 2 * (50 * 3 + 2)


def test_a_hand_over_that_takes_time_costs_1f1b_more_than_gpipe() -> None:
    gpipe_, alternating = (simulate(f(4, 16), send=0.5).makespan for f in (gpipe, one_f_one_b))
    assert simulate(gpipe(4, 16)).makespan < gpipe_ < alternating


def test_idle_and_busy_time_make_up_the_whole() -> None:
    timeline = simulate(one_f_one_b(4, 6), forward=(1, 2, 0.5, 1), send=0.25)
    for s in range(4):
        idle = sum(end - start for start, end in timeline.idle(s))
        assert idle + timeline.busy(s) == pytest.approx(timeline.makespan)


def test_micros_for_gives_the_fewest_that_do() -> None:
    for p, bubble in itertools.product(range(1, 9), (0.03, 0.1, 0.25, 0.5, 0.75, 0.9)):
        m = micros_for(p, bubble)
        assert ideal_bubble(p, m) <= bubble
        assert m == 1 or ideal_bubble(p, m - 1) > bubble
    with pytest.raises(ScheduleError, match="a bubble of 0 was asked for"):
        micros_for(4, 0)


def test_any_valid_order_is_simulated_as_by_brute_force() -> None:
    """Time goes on in small ticks; at each, every stage begins its next piece if it may."""
    rng, seen = random.Random(4), set()
    for _ in range(30):
        p, m = rng.randint(1, 4), rng.randint(1, 5)
        order = [merged(rng, m) for _ in range(p)]
        forward, backward = ([rng.randint(1, 4) for _ in range(p)] for _ in range(2))
        send = rng.randint(0, 2)
        expected = ticks(order, forward, backward, send)
        seen.add(expected is None)
        if expected is None:
            with pytest.raises(ScheduleError, match="wait for each other"):
                simulate(order, forward=forward, backward=backward, send=send)
        else:
            took = simulate(order, forward=forward, backward=backward, send=send).makespan
            assert took == expected
    assert seen == {True, False}


def merged(rng: random.Random, m: int) -> list[Work]:
    """Forwards and backwards, each in order, mixed at random with every F before its B."""
    line: list[Work] = []
    f = b = 0
    while b < m:
        if f < m and (f == b or rng.random() < 0.6):
            line.append(Work("F", f))
            f += 1
        else:
            line.append(Work("B", b))
            b += 1
    return line


def ticks(order: list[list[Work]], forward: list[int], backward: list[int], send: int) -> int | None:
    p = len(order)
    ends: dict[tuple[int, Work], int] = {}
    place, free = [0] * p, [0] * p
    for now in range(500):
        for s in range(p):
            if place[s] == len(order[s]) or free[s] > now:
                continue
            work = order[s][place[s]]
            source = s - 1 if work.kind == "F" else s + 1
            if 0 <= source < p and ends.get((source, work), 10**9) + send > now:
                continue
            free[s] = now + (forward if work.kind == "F" else backward)[s]
            ends[s, work] = free[s]
            place[s] += 1
    return max(free) if place == [len(line) for line in order] else None


F0, F1, B0, B1 = ("F", 0), ("F", 1), ("B", 0), ("B", 1)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ([[F0, B0, F1, B1], [F0, F1, B0]], "stage 1 never does B1"),
        ([[F0, F1, B1, B0, B0]], "stage 0 does B0 twice"),
        ([[F0, B1, F1, B0]], "stage 0 does B1 before F1"),
        ([[F0, B0, ("W", 0)]], "stage 0 is to do W0"),
        ([[F0, B0, F1, B1], [F0, F1, B0, B1]], "stage 0 at B0 waits for B0 of stage 1"),
        ([], "0 stages and 0 micro-batches"),
        ([[]], "1 stages and 0 micro-batches"),
    ],
)
def test_an_order_that_cannot_be_run_is_refused_with_the_reason(order: Any, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        simulate(order)


# ── stages in processes ─────────────────────────────────────────────────────────────────────────────

CONFIG = ModelConfig(
    vocab_size=31, d_model=24, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=36, max_len=32
)
OWN_HEAD = replace(
    CONFIG, tie_embeddings=False, position="learned", layers=("attention", "window") * 2, window=5
)


def batches(steps: int = 10, sequences: int = 7, masked: bool = True) -> list[Batch]:
    """Uneven on purpose: 7 sequences for 4 micro-batches, and sequences that ask seldom."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(steps):
        tokens = torch.randint(0, 31, (sequences, 13), generator=generator)
        share = torch.rand(sequences, 1, generator=generator)
        silent = torch.rand(sequences, 13, generator=generator) < share * masked
        made.append(Batch((tokens,), (tokens // 4).masked_fill(silent, IGNORE)))
    return made


def train_alone(config: ModelConfig) -> tuple[list[float], dict[str, Tensor]]:
    model, losses = build(Transformer, config, seed=3), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches():
        loss = cross_entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def train_stage(context: WorkerContext, config: ModelConfig, name: str, micros: int) -> dict[str, Any]:
    stage = cut(build(Transformer, config, seed=3), context.rank, context.world_size)
    pipeline = Pipeline(stage, SCHEDULES[name](context.world_size, micros))
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    losses = []
    for batch in batches():
        losses.append(pipeline.step(batch).item())
        optimizer.step()
    sent = {name: wire.bytes_sent["send"] for name, wire in pipeline.borders.wires.items()}
    return {"losses": losses, "state": stage.state_dict(), "peak": pipeline.peak, "sent": sent}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("config", "stages", "micros"), [(CONFIG, 2, 4), (OWN_HEAD, 3, 7), (CONFIG, 4, 2), (CONFIG, 1, 3)]
)
def test_ten_steps_have_the_losses_and_weights_of_one_process(
    config: ModelConfig, stages: int, micros: int, name: str
) -> None:
    with one_thread():
        expected, weights = train_alone(config)
    assert expected[-1] < expected[0] - 0.05
    results = run_workers(train_stage, stages, config, name, micros, echo=False)
    seen = set()
    border = 10 * 7 * 13 * 24 * 4  # steps, sequences, tokens, E, bytes
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx(expected, abs=1e-5)
        assert result["peak"] == (micros if name == "GPipe" else min(stages - rank, micros))
        assert result["sent"].get("to_next", 0) == (border if rank < stages - 1 else 0)
        assert result["sent"].get("to_previous", 0) == (border if rank > 0 else 0)
        for key, value in result["state"].items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=3e-4, msg=key)
            seen.add(key)
    assert seen == set(weights)
    if config.tie_embeddings and stages > 1:
        assert torch.equal(results[0]["state"]["embedding.weight"], results[-1]["state"]["head.weight"])


def beside_torch(context: WorkerContext, name: str, micros: int) -> tuple[float, float]:
    """Differences of loss and of gradients from torch.distributed.pipelining's own schedule."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    rank, p = context.rank, context.world_size
    batch = batches(1, sequences=2 * micros, masked=False)[0]
    mine, theirs = (cut(build(Transformer, OWN_HEAD, seed=3), rank, p) for _ in range(2))
    loss = Pipeline(mine, SCHEDULES[name](p, micros)).step(batch)
    peer_stage = PipelineStage(theirs, rank, p, torch.device("cpu"))
    peer = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[name](
        peer_stage, micros, loss_fn=lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten())
    )
    losses: list[Tensor] = []
    if rank == 0:
        peer.step(batch.inputs[0])
    elif rank == p - 1:
        peer.step(target=batch.targets, losses=losses)
    else:
        peer.step()
    apart = abs(float(sum(losses)) / micros - loss.item()) if rank == p - 1 else 0.0
    worst = 0.0
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        worst = max(worst, float((a.grad - b.grad).abs().max()))
    return apart, worst


@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_gradients_are_those_of_torch_pipelining(name: str) -> None:
    for apart, worst in run_workers(beside_torch, 3, name, 4, echo=False):
        assert apart < 1e-6
        assert worst < 1e-6


def recorded(context: WorkerContext, name: str, micros: int) -> list[Timeline]:
    stage = cut(build(Transformer, CONFIG, seed=3), context.rank, context.world_size)
    pipeline = Pipeline(stage, SCHEDULES[name](context.world_size, micros), pace=(0.02, 0.04))
    batch = batches(1)[0]
    timelines = []
    for _ in range(4):
        pipeline.step(batch, record=True)
        timelines.append(pipeline.timeline())
    return timelines


@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_of_equal_pace_show_the_bubble(name: str) -> None:
    results = run_workers(recorded, 3, name, 6, echo=False)
    assert all(other == results[0] for other in results)
    timeline = min(results[0], key=lambda t: t.bubble)  # the one that other programs disturbed least
    assert len(timeline.spans) == 3 * 6 * 2
    for s, line in enumerate(SCHEDULES[name](3, 6)):
        assert [(span.kind, span.micro) for span in timeline.of(s)] == line
        assert timeline.peak(s) == (6 if name == "GPipe" else 3 - s)
    # The clock of a busy machine may only lengthen it; a line without overlap would be idle for two thirds.
    assert 0.9 * ideal_bubble(3, 6) < timeline.bubble < 0.5


def refused(context: WorkerContext) -> list[str]:
    """What is said of an order for others, of one that overtakes, and of too few sequences."""
    stage, said = cut(build(Transformer, CONFIG, seed=3), context.rank, 2), []
    overtaking = [gpipe(2, 2)[0], [Work(k, 1 - i) for k, i in gpipe(2, 2)[1]]]
    for order in (gpipe(3, 2), overtaking):
        with pytest.raises(ScheduleError) as caught:
            Pipeline(stage, order)
        said.append(caught.value.what)
    with pytest.raises(ShapeError) as few:
        Pipeline(stage, gpipe(2, 8)).step(batches(1)[0])
    with pytest.raises(ShapeError) as stages:
        cut(build(Transformer, CONFIG, seed=3), 0, 5)
    return [*said, few.value.what, stages.value.what]


def test_what_cannot_be_run_is_said_on_every_rank() -> None:
    for said in run_workers(refused, 2, echo=False):
        assert said == [
            "an order for 3 stages came to 2 ranks.",
            "the stages do not agree on the order of their F.",
            "7 sequences came for 8 micro-batches.",
            "stage 0 of 5 was asked of a model of 4 blocks.",
        ]
