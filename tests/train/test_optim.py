"""The optimizers against torch's, and LAMB against its paper's formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from llmcourse.train.optim import (
    LAMB,
    SGD,
    Adam,
    AdamW,
    OptimizerError,
    decay_groups,
    state_bytes,
    trust_ratio,
)

PAIRS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd, decay": (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True}),
    "adam": (Adam, torch.optim.Adam, {"lr": 0.05}),
    "adam, l2": (Adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.2}),
    "adam, large eps": (Adam, torch.optim.Adam, {"lr": 0.05, "eps": 0.3}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.05}),
    "adamw, decay": (AdamW, torch.optim.AdamW, {"lr": 0.05, "betas": (0.0, 0.5), "weight_decay": 0.4}),
}


def weights(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 3), (1,), (7,), (2, 3, 5), ())
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(ps, steps, seed=1):
    """Gradients of every size, some of them 0; one parameter has none in every third step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for i, p in enumerate(ps):
            scale = 10.0 ** (i - 2)
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
            p.grad = None if step % 3 == 2 and i == 1 else (g * (g.abs() > 0.2 * scale)).to(p.dtype)
        yield step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PAIRS)
def test_twenty_steps_equal_those_of_torch(name, dtype):
    ours, theirs, settings = PAIRS[name]
    a, b = weights(dtype), weights(dtype)
    mine, peer = ours(a, **settings), theirs(b, **settings)
    for _ in zip(gradients(a, 20), gradients(b, 20), strict=True):
        mine.step()
        peer.step()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["momentum", "adam, l2", "adamw"])
def test_a_checkpoint_goes_on_in_torch_and_one_of_torch_s_goes_on_here(name):
    ours, theirs, settings = PAIRS[name]
    for first, second in ((ours, theirs), (theirs, ours)):
        a, b = weights(torch.float64), weights(torch.float64)
        whole, before = first(a, **settings), first(b, **settings)
        after = second(b, **settings)
        feeds = gradients(a, 9), gradients(b, 9)
        for step, _ in zip(*feeds, strict=True):
            if step == 4:
                after.load_state_dict(before.state_dict())
            whole.step()
            (before if step < 4 else after).step()
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def lamb_by_the_paper(w, gs, lr, beta1, beta2, eps, decay, bounds=None):
    """Algorithm 2 of You et al. 2020, in NumPy; the ratio is 1 where a norm is 0."""
    m = v = np.zeros_like(w)
    for t, g in enumerate(gs, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        u = r + decay * w
        size, length = np.linalg.norm(w), np.linalg.norm(u)
        phi = size if bounds is None else min(max(size, bounds[0]), bounds[1])
        w = w - lr * (phi / length if size > 0 and length > 0 else 1.0) * u
    return w


@pytest.mark.parametrize("bounds", [None, (0.5, 2.0)])
def test_lamb_follows_its_paper_s_algorithm(bounds):
    ps = weights(torch.float64)
    begin = [p.detach().numpy().copy() for p in ps]
    seen: list[list[np.ndarray]] = [[] for _ in ps]
    optimizer = LAMB(ps, lr=0.03, betas=(0.8, 0.95), weight_decay=0.1, bounds=bounds)
    for _ in gradients(ps, 12):
        for i, p in enumerate(ps):
            if p.grad is not None:
                seen[i].append(p.grad.numpy().copy())
        optimizer.step()
    for p, w, gs in zip(ps, begin, seen, strict=True):
        want = lamb_by_the_paper(w, gs, 0.03, 0.8, 0.95, 1e-6, 0.1, bounds)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-10)


def test_a_lamb_step_is_lr_times_as_long_as_the_weight_whatever_the_gradient_s_size():
    for size in (1e-3, 1.0, 1e3):
        w = nn.Parameter(torch.randn(6, 5, dtype=torch.float64) * size)
        before = w.detach().clone()
        w.grad = torch.randn_like(w) * 1e4
        LAMB([w], lr=0.02).step()
        assert ((w.detach() - before).norm() / before.norm()).item() == pytest.approx(0.02, rel=1e-9)


def test_where_a_norm_is_zero_the_trust_ratio_is_one():
    zero, one = torch.zeros(3), torch.ones(3)
    assert trust_ratio(zero, one) == trust_ratio(one, zero) == trust_ratio(zero, zero) == 1
    assert trust_ratio(zero, one, (0.5, 2.0)) == 1
    bias = nn.Parameter(torch.zeros(4))
    bias.grad = torch.ones(4)
    LAMB([bias], lr=0.1).step()
    torch.testing.assert_close(bias.detach(), torch.full((4,), -0.1), rtol=1e-5, atol=0)


def test_lamb_without_adaptation_is_adamw():
    a, b = weights(torch.float64), weights(torch.float64)
    mine, peer = LAMB(a, lr=0.01, eps=1e-8, adapt=False), torch.optim.AdamW(b, lr=0.01)
    for _ in zip(gradients(a, 8), gradients(b, 8), strict=True):
        mine.step()
        peer.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_l2_decays_less_where_gradients_are_large_and_decoupled_decay_does_not():
    left = {}
    for kind in (Adam, AdamW):
        w = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = kind([w], lr=0.01, weight_decay=1.0)
        for step in range(100):
            w.grad = torch.tensor([0.1, 100.0], dtype=torch.float64) * (-1) ** step
            optimizer.step()
        left[kind] = w.detach().tolist()
    assert left[Adam][1] > 3 * max(left[Adam][0], 0)
    assert left[AdamW][0] == pytest.approx(left[AdamW][1], rel=0.05)
    assert left[AdamW][0] == pytest.approx(0.99**100, rel=0.1)


def test_the_first_step_of_adam_is_a_learning_rate_long_whatever_the_gradient():
    for scale in (1e-4, 1.0, 1e4):
        w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        w.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64) * scale
        Adam([w], lr=0.1).step()
        torch.testing.assert_close(w.detach(), -0.1 * w.grad.sign(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "settings", "numbers"), [
    (SGD, {}, 0), (SGD, {"momentum": 0.9}, 1), (Adam, {}, 2), (AdamW, {}, 2), (LAMB, {}, 2),
])  # fmt: skip
def test_the_state_takes_the_bytes_that_the_docstring_says(kind, settings, numbers):
    model = nn.Linear(300, 200, bias=False)
    optimizer = kind(model.parameters(), **settings)
    assert state_bytes(optimizer) == 0
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    assert 0 <= state_bytes(optimizer) - 60_000 * 4 * numbers <= 8  # a step counter and a trust ratio


def test_a_group_has_settings_of_its_own_and_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    matrices, others = decay_groups(model, 0.1)
    assert [p.shape for p in matrices["params"]] == [(4, 4)]
    assert matrices["weight_decay"] == 0.1
    assert len(others["params"]) == 2
    assert others["weight_decay"] == 0
    frozen = model[0].bias.clone()
    optimizer = AdamW([matrices, others], lr=0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(frozen, model[0].bias)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0]


def test_a_closure_s_loss_comes_back_and_gradients_are_on_inside_of_it():
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 2.0
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.8))


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: SGD(p, lr=-0.1), r"lr = -0\.1"),
    (lambda p: AdamW(p, lr=math.nan), "lr = nan"),
    (lambda p: Adam(p, betas=(0.9, 1.0)), r"beta 2 is 1\.0"),
    (lambda p: Adam(p, eps=-1e-8), "eps = -1e-08"),
    (lambda p: SGD(p, lr=0.1, nesterov=True), "nesterov=True with momentum 0"),
    (lambda p: LAMB(p, bounds=(2.0, 1.0)), r"bounds = \(2\.0, 1\.0\)"),
    (lambda p: AdamW([{"params": p, "weight_decay": -1.0}]), r"weight_decay = -1\.0"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_in_three_parts(make, says):
    with pytest.raises(OptimizerError, match=says) as caught:
        make([nn.Parameter(torch.ones(2))])
    assert caught.value.why
    assert caught.value.fix


def test_a_sparse_gradient_is_refused_and_a_refused_group_is_not_kept():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = Adam(table.parameters())
    with pytest.raises(OptimizerError, match="sparse"):
        optimizer.step()
    with pytest.raises(OptimizerError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
