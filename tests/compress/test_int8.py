"""W8A8, SmoothQuant and LLM.int8: integers in the middle, and what becomes of outliers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compress_cases import small_model, some_tokens
from torch import nn

from llmcourse.compress.calibrate import Inputs, calibrate, layers_of
from llmcourse.compress.llm_int8 import llm_int8, outliers
from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.compress.quantized_linear import quantize_model
from llmcourse.compress.smoothquant import Int8Linear, int8_linear, round_activations, smoothing, smoothquant
from llmcourse.errors import ShapeError


def layer_and_rows(outlier=40.0, rows=50, features=32):
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(features, 24, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, features, generator=draw))
        layer.bias.copy_(torch.randn(24, generator=draw))
    x = torch.randn(rows, features, generator=draw)
    x[:, [5, 20]] *= outlier
    return layer.requires_grad_(False), x


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("fixed", [False, True])
def test_the_product_is_that_of_integers_summed_exactly(fixed):
    layer, x = layer_and_rows(2.0)
    inputs = Inputs.of(x)
    made = int8_linear(layer, inputs if fixed else None)
    quantized = quantize(layer.weight, Scheme(8))
    top = inputs.absmax.max() if fixed else x.abs().amax(1, keepdim=True)
    codes = (x / (top / 127)).round().clamp(-127, 127)
    whole = codes.long() @ quantized.codes.long().T
    want = whole.double() * (top / 127).double() * quantized.scale.double().T + layer.bias.double()
    torch.testing.assert_close(made(x).double(), want, rtol=1e-6, atol=1e-5)
    assert relative(made(x), layer(x)) < 0.02


def test_a_value_beyond_the_fixed_range_is_clipped_and_a_zero_token_stays_zero():
    codes, scale = round_activations(torch.tensor([[0.0, 3.0], [-9.0, 1.0]]), 3.0)
    torch.testing.assert_close(codes * scale, torch.tensor([[0.0, 3.0], [-3.0, 1.0]]), rtol=0, atol=0.02)
    codes, _ = round_activations(torch.zeros(2, 4))
    assert torch.equal(codes, torch.zeros(2, 4))


def test_group_scales_and_other_formats_are_refused():
    weight = torch.randn(8, 32)
    for scheme in (Scheme(8, 16), Scheme(4), Scheme(8, None, False)):
        with pytest.raises(ShapeError, match="sum of integers"):
            Int8Linear(quantize(weight, scheme))
    assert Int8Linear(quantize(weight, Scheme(8, -1)))(torch.ones(1, 32)).shape == (1, 8)


def test_smoothing_gives_inputs_and_weights_the_same_largest_values():
    layer, x = layer_and_rows()
    s = smoothing(x.abs().amax(0), layer.weight, 0.5)
    torch.testing.assert_close((x / s).abs().amax(0), (layer.weight * s).abs().amax(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        (x / smoothing(x.abs().amax(0), layer.weight, 1.0)).abs().amax(0), torch.ones(32)
    )
    with pytest.raises(ShapeError, match=r"alpha = 1\.5"):
        smoothing(x.abs().amax(0), layer.weight, 1.5)


def test_smoothquant_changes_nothing_by_itself_and_makes_int8_far_better():
    model, tokens = small_model(), some_tokens()
    inputs = calibrate(model, tokens)
    smooth = smoothquant(model, inputs)
    want = model(tokens)
    torch.testing.assert_close(smooth(tokens), want, rtol=1e-3, atol=1e-3)
    fixed = quantize_model(model, lambda name, layer: int8_linear(layer, inputs[name]))
    seen = calibrate(smooth, tokens)
    better = quantize_model(smooth, lambda name, layer: int8_linear(layer, seen[name]))
    assert relative(better(tokens), want) < 0.6 * relative(fixed(tokens), want)


def test_outliers_are_kept_and_all_else_is_int8():
    layer, x = layer_and_rows()
    inputs = Inputs.of(x)
    assert outliers(inputs).tolist() == [5, 20]
    mixed = llm_int8(layer, inputs)
    rest = [k for k in range(32) if k not in (5, 20)]
    codes, scale = round_activations(x[:, rest])
    regular = F.linear(codes * scale, quantize(layer.weight[:, rest], Scheme(8)).dequantize())
    want = F.linear(x[:, [5, 20]], layer.weight[:, [5, 20]], layer.bias) + regular
    torch.testing.assert_close(mixed(x), want, rtol=1e-5, atol=1e-4)
    assert relative(mixed(x), layer(x)) < 0.1 * relative(int8_linear(layer)(x), layer(x))


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_all_or_none_may_be_outliers(threshold):
    layer, x = layer_and_rows(1.0)
    assert relative(llm_int8(layer, Inputs.of(x), threshold)(x), layer(x)) < (
        1e-6 if threshold == 0 else 0.02
    )


def test_a_whole_model_runs_taken_apart():
    model, tokens = small_model(), some_tokens()
    inputs = calibrate(model, tokens)
    mixed = quantize_model(model, lambda name, layer: llm_int8(layer, inputs[name]))
    assert relative(mixed(tokens), model(tokens)) < 0.02
    assert not layers_of(mixed)
