"""The optimizer explorable: what it draws is what the package's optimizers, and the formulas, do."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from llmcourse.errors import UnknownNameError
from llmcourse.train.optim import SGD, Adam
from llmcourse.widgets.optimizer_path import (
    RATES,
    descend,
    ending,
    maker,
    optimizer_path,
    start,
    valley,
)


def test_a_path_of_sgd_is_the_geometric_series_of_each_coordinate():
    path = descend(partial(valley, steepness=25.0), (-4.0, 1.5), partial(SGD, lr=0.05), 30)
    t = np.arange(31)
    np.testing.assert_allclose(path[:, 0], -4 * 0.95**t, rtol=1e-12)
    np.testing.assert_allclose(path[:, 1], 1.5 * (-0.25) ** t, atol=1e-12)


def test_turning_the_valley_turns_sgd_s_path_and_changes_adam_s():
    angle = np.pi / 4
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    straight, turned = (partial(valley, steepness=25.0, turned=a) for a in (0.0, angle))
    for make, same in ((partial(SGD, lr=0.02, momentum=0.8), True), (partial(Adam, lr=0.1), False)):
        here = descend(straight, start(0.0), make)
        there = descend(turned, start(angle), make)
        assert np.allclose(here @ turn, there, atol=1e-9) is same


def test_a_diverging_path_ends_early_and_is_called_so():
    loss = partial(valley, steepness=25.0)
    path = descend(loss, (-4.0, 1.5), partial(SGD, lr=0.5))
    assert len(path) < 20
    assert ending(loss(path)).startswith("diverges")
    settled = descend(loss, (-4.0, 1.5), maker("momentum", 0.1, 0.44))
    assert ending(loss(settled)).startswith("a thousandth after")


def test_an_optimizer_that_is_not_there_is_refused():
    with pytest.raises(UnknownNameError, match="'Lion'"):
        maker("Lion", 0.1, 0.9)


def test_moving_a_control_draws_another_picture_and_back_the_same():
    explorable = optimizer_path(optimizer="momentum")
    for name, value in (("rate", RATES[3]), ("turned", 45), ("optimizer", "Adam"), ("momentum", 0.5)):
        control = explorable.controls[name]
        before, old = bytes(explorable.image.value), control.value
        control.value = value
        assert bytes(explorable.image.value) != before
        control.value = old
        assert bytes(explorable.image.value) == before


def test_the_valley_is_the_same_for_torch_and_numpy():
    w = torch.randn(5, 2, dtype=torch.float64)
    np.testing.assert_allclose(valley(w, 9.0, 0.3).numpy(), valley(w.numpy(), 9.0, 0.3), rtol=1e-12)
