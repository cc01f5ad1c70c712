"""The statistics of a layer's inputs, against what forward hooks and NumPy give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress_cases import small_model, some_tokens

from llmcourse.compress.calibrate import Inputs, block_by_block, calibrate, layers_of
from llmcourse.errors import ShapeError, UnknownNameError


def seen_by(model, tokens, name):
    rows = []
    handle = layers_of(model)[name].register_forward_pre_hook(lambda layer, args: rows.append(args[0]))
    model(tokens)
    handle.remove()
    return torch.cat([r.flatten(0, -2) for r in rows]).double().numpy()


def test_the_layers_are_those_of_the_blocks_and_not_the_head():
    names = list(layers_of(small_model()))
    assert names[:4] == [
        "blocks.0.mixer.qkv",
        "blocks.0.mixer.out",
        "blocks.0.mlp.gate_up",
        "blocks.0.mlp.down",
    ]
    assert len(names) == 8


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_every_statistic_equals_numpys_over_all_rows(rows):
    model, tokens = small_model(), some_tokens()
    found = calibrate(model, tokens, rows=rows, dtype=torch.float64)
    assert list(found) == list(layers_of(model))
    for name in ("blocks.0.mixer.qkv", "blocks.1.mixer.out", "blocks.1.mlp.down"):
        x, inputs = seen_by(model, tokens, name), found[name]
        assert inputs.count == tokens.numel() == len(x)
        np.testing.assert_allclose(inputs.gram.numpy(), x.T @ x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(inputs.absmax.numpy(), np.abs(x).max(0), rtol=1e-6)
        np.testing.assert_allclose(inputs.absmean.numpy(), np.abs(x).mean(0), rtol=1e-6)
        np.testing.assert_allclose(inputs.norm.numpy(), np.linalg.norm(x, axis=0), rtol=1e-5)


def test_the_error_of_a_change_is_the_squared_change_of_the_outputs():
    x, change = torch.randn(30, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    inputs = Inputs.of(x, dtype=torch.float64)
    assert inputs.error(change) == pytest.approx(float((x @ change.T).square().sum()))


def test_projections_that_run_apart_are_watched_all_the_same_and_left_apart():
    model, tokens = small_model(), some_tokens()
    together = calibrate(model, tokens)
    apart = calibrate(model.fuse(False), tokens)
    assert apart.keys() == together.keys()
    assert all(m.fused is False for m in model.modules() if hasattr(m, "fused"))
    assert not any(layer._forward_pre_hooks for layer in layers_of(model).values())


def test_only_the_named_layers_are_watched_and_unknown_names_are_refused():
    model, tokens = small_model(), some_tokens(1, 5)
    assert list(calibrate(model, tokens, ["blocks.1.mlp.down"])) == ["blocks.1.mlp.down"]
    with pytest.raises(UnknownNameError, match=r"'blocks\.9\.mlp\.down'"):
        calibrate(model, tokens, ["blocks.9.mlp.down"])


def test_no_rows_change_nothing_and_rows_of_another_width_are_refused():
    inputs = Inputs.of(torch.randn(3, 4))
    before = inputs.gram.clone()
    assert inputs.add(torch.empty(0, 4)).count == 3
    assert torch.equal(inputs.gram, before)
    with pytest.raises(ShapeError, match="5 features"):
        inputs.add(torch.randn(2, 5))


def test_block_by_block_sees_the_inputs_behind_the_blocks_already_changed():
    model, tokens = small_model(), some_tokens()
    alone = calibrate(model, tokens)
    seen = {}

    def zero_the_first(name, layer, inputs):
        seen[name] = inputs
        return torch.zeros_like(layer.weight) if name == "blocks.0.mlp.down" else None

    before = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    block_by_block(model, tokens, zero_the_first)
    for name, layer in layers_of(model).items():
        changed = name == "blocks.0.mlp.down"
        assert torch.equal(layer.weight, torch.zeros_like(layer.weight) if changed else before[name])
    after = calibrate(model, tokens)
    for name, inputs in seen.items():  # of block 1 the statistics are those of the changed model
        torch.testing.assert_close(inputs.gram, after[name].gram, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(seen["blocks.1.mixer.qkv"].gram, alone["blocks.1.mixer.qkv"].gram, rtol=1e-2)
