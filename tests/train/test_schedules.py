"""Schedules against torch's and transformers', and what each promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR

from llmcourse.train.optim import SGD
from llmcourse.train.schedules import (
    ScheduleRangeError,
    constant,
    cosine,
    inverse_root,
    linear,
    set_rate,
    trapezoid,
)

STEPS = 37


def rates(scheduler_of):
    """The learning rates that a scheduler of torch's gives an optimizer whose rate is 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, found = scheduler_of(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_without_a_warm_up_they_are_torch_s():
    want = rates(lambda o: CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1))
    assert [cosine(t, STEPS, floor=0.1) for t in range(STEPS)] == pytest.approx(want, abs=1e-12)
    want = rates(lambda o: LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=STEPS))
    assert [linear(t, STEPS, floor=0.2) for t in range(STEPS)] == pytest.approx(want, abs=1e-12)


def test_behind_the_warm_up_they_are_transformers():
    transformers = pytest.importorskip("transformers")
    for ours, theirs in (
        (lambda t: cosine(t, STEPS, warmup=7), transformers.get_cosine_schedule_with_warmup),
        (lambda t: linear(t, STEPS, warmup=7), transformers.get_linear_schedule_with_warmup),
    ):
        want = rates(lambda o, theirs=theirs: theirs(o, 7, STEPS))
        assert [ours(t) for t in range(7, STEPS)] == pytest.approx(want[7:], abs=1e-12)
        assert [ours(t) for t in range(6)] == pytest.approx(want[1:7], abs=1e-12)  # ours is a step ahead


@pytest.mark.parametrize("schedule", [
    lambda t: cosine(t, STEPS, warmup=5, floor=0.1),
    lambda t: linear(t, STEPS, warmup=5, floor=0.1),
    lambda t: trapezoid(t, STEPS, warmup=5, cooldown=9, floor=0.1),
    lambda t: constant(t, warmup=5),
    lambda t: inverse_root(t, warmup=5),
])  # fmt: skip
def test_each_climbs_to_the_full_rate_and_never_climbs_again(schedule):
    found = [schedule(t) for t in range(STEPS + 5)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[4:] == sorted(found[4:], reverse=True)
    assert min(found) >= 0.1 - 1e-12


def test_the_floor_is_reached_at_the_end_and_kept():
    for schedule in (cosine, linear):
        assert [schedule(t, 10, warmup=3, floor=0.25) for t in (10, 11, 99)] == pytest.approx([0.25] * 3)
    assert trapezoid(12, 10, cooldown=4, floor=0.25) == pytest.approx(0.25)


def test_a_trapezoid_does_not_know_its_end_until_it_cools_down():
    short = [trapezoid(t, 30, warmup=4, cooldown=5) for t in range(25)]
    assert short == [trapezoid(t, 300, warmup=4, cooldown=5) for t in range(25)]


def test_a_step_of_the_warm_up_is_never_for_nothing():
    assert cosine(0, 100, warmup=10) == linear(0, 100, warmup=10) == constant(0, warmup=10) == 0.1


def test_set_rate_scales_each_group_s_own_rate_like_lambda_lr():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    ours = SGD([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=2.0)
    theirs = torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=2.0)
    peer = LambdaLR(theirs, lambda t: cosine(t, 9, warmup=2))
    for t in range(9):
        set_rate(ours, cosine(t, 9, warmup=2))
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups])
        theirs.step()
        peer.step()


@pytest.mark.parametrize(("call", "says"), [
    (lambda: cosine(-1, 10), "step -1 of 10"),
    (lambda: linear(0, 0), "step 0 of 0"),
    (lambda: linear(0, 10, warmup=-1), "warm-up of -1"),
    (lambda: cosine(0, 10, floor=1.5), r"floor of 1\.5"),
    (lambda: inverse_root(3, warmup=0), "warm-up of 0"),
    (lambda: trapezoid(3, 10, warmup=6, cooldown=6), "6 steps up and 6 steps down, of 10"),
])  # fmt: skip
def test_steps_that_make_no_schedule_are_refused(call, says):
    with pytest.raises(ScheduleRangeError, match=says) as caught:
        call()
    assert caught.value.why
    assert caught.value.fix
