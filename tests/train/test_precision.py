"""Loss scaling, master weights and policies: torch's GradScaler and float64 as the judges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmcourse.errors import ShapeError
from llmcourse.models import Transformer
from llmcourse.train.fit import build, one_thread
from llmcourse.train.lean import fit_lean
from llmcourse.train.precision import (
    PRECISIONS,
    LossScaler,
    MasterWeights,
    all_finite,
    lost,
    next_scale,
)
from llmcourse.train.small import small
from llmcourse.train.tasks import Text


@pytest.mark.parametrize("seed", range(6))
def test_the_scaler_decides_as_torchs_grad_scaler_does(seed):
    generator = torch.Generator().manual_seed(seed)
    interval = int(torch.randint(1, 6, (1,), generator=generator))
    ours = LossScaler(2.0**8, interval=interval)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=interval)
    theirs.scale(torch.zeros(()))
    a, b = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    opt_a, opt_b = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)
    for _ in range(80):
        grad = torch.randn(7, generator=generator)
        kind = torch.rand((), generator=generator)
        if kind < 0.2:
            grad[3] = float("nan") if kind < 0.1 else -math.inf
        a.grad, b.grad = grad * ours.scale, grad * theirs.get_scale()
        if ours.unscale([a]):
            opt_a.step()
        theirs.step(opt_b)
        theirs.update()
        assert ours.scale == theirs.get_scale()
        assert torch.equal(a, b)
    assert ours.skipped > 0


def test_the_scale_is_kept_across_a_save():
    scaler = LossScaler(64.0, interval=3)
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    scaler.unscale([p])
    again = LossScaler()
    again.load_state_dict(scaler.state_dict())
    assert (again.scale, again.good) == (64.0, 1)


def test_next_scale_counts_only_good_steps_in_a_row():
    assert next_scale(8.0, 2, True, interval=3) == (16.0, 0)
    assert next_scale(8.0, 1, True, interval=3) == (8.0, 2)
    assert next_scale(8.0, 2, False, interval=3) == (4.0, 0)


def test_a_scaler_that_cannot_work_is_refused():
    for wrong in ({"growth": 1.0}, {"backoff": 1.5}, {"interval": 0}, {"scale": -1.0}):
        with pytest.raises(ShapeError, match="loss scaler"):
            LossScaler(**wrong)


def test_all_finite_sees_both_infinities_and_nan_and_takes_no_gradients():
    good = torch.ones(3)
    assert all_finite([])
    assert all_finite([good, good.half()])
    for bad in (math.inf, -math.inf, math.nan):
        assert not all_finite([good, torch.tensor([1.0, bad])])


def test_lost_counts_what_the_format_cannot_hold():
    values = [torch.tensor([0.0, 1.0, 2.0**-24, 2.0**-26]), torch.tensor([-(2.0**-30)])]
    assert lost(values, torch.float16) == 2 / 4
    assert lost(values, torch.float16, 2.0**8) == 0
    assert lost(values, torch.bfloat16) == 0


def test_masters_keep_what_bfloat16_rounds_away():
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    masters = MasterWeights([p])
    optimizer = torch.optim.SGD(masters.parameters, lr=1.0)
    for _ in range(100):
        p.grad = torch.full_like(p, -1e-3)
        masters.take_gradients()
        assert p.grad is None
        optimizer.step()
        masters.write_back()
    step = float(torch.tensor(1e-3, dtype=torch.bfloat16))
    assert torch.allclose(masters.parameters[0], torch.tensor(1 + 100 * step), atol=1e-5)
    assert torch.equal(p, masters.parameters[0].bfloat16())
    assert masters.nbytes == 20


def test_bytes_per_parameter_are_those_of_a_real_training_state():
    for name, p in PRECISIONS.items():
        model = nn.Linear(40, 50, bias=False).to(p.stored)
        masters = MasterWeights(model.parameters()) if p.masters else None
        held = sum(w.nbytes for w in model.parameters()) * 2 + (masters.nbytes if masters else 0)
        held += 2 * 4 * 2000
        assert p.bytes_per_parameter * 2000 == held, name


@one_thread()
def test_repaired_policies_learn_what_float32_learns():
    text = Text("the quick brown fox jumps over the lazy dog; " * 40)
    ends = {}
    for name in ("float32", "bfloat16 autocast", "float16 autocast", "bfloat16 with masters"):
        model = build(Transformer, small(text.vocab_size, 1), seed=0)
        batches = text.batches(batch=4, length=16, seed=1)
        run = fit_lean(model, batches, steps=25, precision=name, rows=3, every=1)
        ends[name] = sum(run.curve[-5:]) / 5
        assert run.curve[-1] < run.curve[0] - 0.5
    assert all(abs(end - ends["float32"]) < 0.03 for end in ends.values()), ends


@one_thread()
def test_pieces_and_checkpoints_change_no_step_of_a_training():
    text = Text("the quick brown fox jumps over the lazy dog; " * 40)
    curves = []
    for how in ({}, {"rows": 3}, {"every": 1}, {"rows": 1, "starts": [0, 1]}):
        model = build(Transformer, small(text.vocab_size, 2), seed=0)
        curves.append(fit_lean(model, text.batches(batch=4, length=16, seed=1), steps=8, **how).curve)
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=2e-5)


def test_a_scale_that_is_too_high_comes_down_and_the_training_goes_on():
    text = Text("the quick brown fox jumps over the lazy dog; " * 40)
    model = build(Transformer, small(text.vocab_size, 1), seed=0)
    batches = text.batches(batch=4, length=16, seed=1)
    run = fit_lean(
        model, batches, steps=20, precision="float16 autocast", scaler=LossScaler(2.0**24, interval=1000)
    )
    assert 0 < run.skipped < 20
    assert run.scale == 2.0 ** (24 - run.skipped)
    assert run.curve[-1] < run.curve[0]


def test_a_training_without_steps_or_batches_is_refused():
    text = Text("abc " * 300)
    model = build(Transformer, small(text.vocab_size, 1), seed=0)
    with pytest.raises(ShapeError, match="0 steps"):
        fit_lean(model, [], steps=0)
    with pytest.raises(ShapeError, match="ran out after 1 of 2"):
        fit_lean(model, [next(text.batches(batch=1, length=8, seed=0))], steps=2)
