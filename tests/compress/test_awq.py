"""AWQ, against brute force over the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from compress_cases import small_model, some_tokens

from llmcourse.compress.awq import SHRINKS, awq, clip, search_scale
from llmcourse.compress.calibrate import Inputs, calibrate, layers_of
from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.compress.quantized_linear import quantize_model


def case(rows=12, columns=40, seen=200, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(seen, columns, generator=draw)
    x[:, [2, 30]] *= 25
    return torch.randn(rows, columns, generator=draw), x


@pytest.mark.parametrize("scheme", [Scheme(4, 16, False), Scheme(3, 20), Scheme(3)], ids=str)
def test_the_exponent_is_the_best_of_all_that_are_tried_with_the_inputs_themselves(scheme):
    weight, x = case()
    found = search_scale(weight, Inputs.of(x, dtype=torch.float64), scheme, steps=20)
    errors = {}
    for i in range(20):
        s = x.abs().mean(0) ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        y = (x / s).double() @ quantize(weight * s, scheme).dequantize(torch.float64).T
        errors[i / 20] = float((y - x.double() @ weight.double().T).square().sum())
    assert found.error == pytest.approx(errors[found.alpha], rel=1e-3)
    assert found.error == pytest.approx(min(errors.values()), rel=1e-3)
    assert found.error_rtn == pytest.approx(errors[0.0], rel=1e-3)
    assert found.error < 0.6 * found.error_rtn


def test_equal_inputs_need_no_scales():
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(0, 2, (400, 32), generator=draw) * 2.0 - 1  # every magnitude is 1
    found = search_scale(torch.randn(8, 32, generator=draw), Inputs.of(x), Scheme(4, 8))
    torch.testing.assert_close(found.scale, torch.ones(32))


@pytest.mark.parametrize("scheme", [Scheme(3, 16, False), Scheme(4, 16), Scheme(3)], ids=str)
def test_each_group_takes_the_clip_with_the_smallest_error_of_its_own_part_of_the_output(scheme):
    weight, x = case()
    clipped = clip(weight, x.T @ x, scheme)
    size = scheme.group or 40
    for n in range(0, len(weight), 5):
        for a in range(0, 40, size):
            part, inputs = weight[n : n + 1, a : a + size], x[:, a : a + size].double()

            def error(w, part=part, inputs=inputs):
                change = quantize(w, Scheme(scheme.bits, None, scheme.symmetric)).dequantize() - part
                return float((inputs @ change.double().T).square().sum())

            # a short last group has a zero in its padding, which min and max take in anyway
            low, high = part.min().clamp(max=0), part.max().clamp(min=0)
            best = min(error(part.clamp(s * low, s * high)) for s in SHRINKS)
            assert error(clipped[n : n + 1, a : a + size]) == pytest.approx(best, rel=1e-3)


def test_the_folded_model_computes_the_same_and_the_one_that_came_is_untouched():
    model, tokens = small_model(), some_tokens()
    before = {name: p.clone() for name, p in model.named_parameters()}
    folded, codes = awq(model, calibrate(model, tokens), Scheme(4, 16, False))
    torch.testing.assert_close(folded(tokens), model(tokens), rtol=1e-3, atol=1e-3)
    assert codes.keys() == layers_of(model).keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("how", [{"clipped": False}, {}, {"then_gptq": True}], ids=str)
def test_predictions_stay_closer_than_with_rounding_to_nearest(how):
    model, tokens, others = small_model(), some_tokens(8), some_tokens(8, seed=9)
    scheme = Scheme(3, 16, False)
    want = model(others).log_softmax(-1)

    def distance(quantized):
        return float((want.exp() * (want - quantized(others).log_softmax(-1))).sum(-1).mean())

    folded, codes = awq(model, calibrate(model, tokens), scheme, **how)
    fitted = quantize_model(folded, lambda name, layer: codes.get(name))
    assert distance(fitted) < 0.92 * distance(quantize_model(model, scheme))


def test_gptq_behind_it_keeps_the_grids_and_lowers_every_layers_error():
    model, tokens = small_model(), some_tokens(8)
    inputs, scheme = calibrate(model, tokens), Scheme(3, 16, False)
    folded, nearest = awq(model, inputs, scheme)
    _, fitted = awq(model, inputs, scheme, then_gptq=True)
    after = calibrate(folded, tokens)
    for name, layer in layers_of(folded).items():
        assert torch.equal(fitted[name].scale, nearest[name].scale)
        errors = [after[name].error(q[name].dequantize() - layer.weight) for q in (fitted, nearest)]
        assert errors[0] < errors[1]
