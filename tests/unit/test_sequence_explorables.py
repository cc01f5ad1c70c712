"""The explorables of chapter 11: what they draw is what the package computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from llmcourse.models import KVCache, ModelConfig
from llmcourse.models.long_filter import ModalFilter
from llmcourse.widgets import layer_costs
from llmcourse.widgets.modal_filter import half_life, impulse, pole_explorer
from llmcourse.widgets.sequence_state import human, stacks, state_explorer

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=0, max_len=64
)


def test_the_drawn_filter_is_that_of_a_modal_layer_with_this_pole():
    layer = ModalFilter(stacks(CONFIG, 2)["hyena, modal"]).double()
    with torch.no_grad():
        layer.log_rate.fill_(np.log(-np.log(0.9)))
        layer.angle.fill_(2 * np.pi * 0.07)
        layer.residue.zero_()
        layer.residue[:, 0, 0] = 1
        np.testing.assert_allclose(layer(40)[0], impulse(0.9, 0.07, 40), atol=1e-12)


def test_after_its_half_life_a_filter_is_half_as_large():
    assert 0.9 ** half_life(0.9) == pytest.approx(0.5)


def test_the_hybrid_keeps_attention_in_every_nth_layer():
    assert stacks(CONFIG, 2)["hybrid"].kinds == ("hyena", "attention") * 2
    assert stacks(CONFIG, 1)["hybrid"].kinds == ("attention",) * 4


def test_bytes_drawn_are_bytes_allocated():
    for config in stacks(CONFIG, 2).values():
        assert KVCache(config, 3, 50, dtype=torch.bfloat16).nbytes == 3 * config.cache_bytes(50, 2)


@pytest.mark.parametrize(("nbytes", "text"), [(12, "12 B"), (1500, "1.5 kB"), (3.19e6, "3.19 MB")])
def test_bytes_are_said_in_the_unit_that_fits(nbytes, text):
    assert human(nbytes) == text


def test_moving_a_control_draws_another_picture_and_back_the_same():
    for explorable, name, value in (
        (state_explorer(CONFIG, every=2), "batch", 16),
        (state_explorer(CONFIG, every=2), "tokens", 512),
        (pole_explorer(), "turns", 0.0),
    ):
        control = explorable.controls[name]
        before, first = bytes(explorable.image.value), control.value
        control.value = value
        assert bytes(explorable.image.value) != before
        control.value = first
        assert bytes(explorable.image.value) == before


def test_each_step_of_the_hybrids_slider_changes_the_hybrid():
    for layers in (4, 24):
        config = replace(CONFIG, n_layers=layers)
        shares = state_explorer(config, every=2).controls["every"].options
        kept = [stacks(config, every)["hybrid"].cache_bytes(4096, 2) for every in shares]
        assert kept == sorted(set(kept), reverse=True)


def test_costs_are_drawn_in_a_panel_for_each_measure():
    rows = [{"name": k, "tokens": n, "ms": n, "flops": n * n} for k in layer_costs.COLORS for n in (32, 64)]
    figure = Figure()
    layer_costs.draw(figure, {"FLOPs": ("flops", rows), "ms": ("ms", rows)})
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[1024, 4096]] * 5
    assert [list(line.get_ydata()) for line in right.lines] == [[32, 64]] * 5
    assert (left.get_ylabel(), right.get_xlabel()) == ("FLOPs", "tokens")
