"""The compression methods give on a GPU what they give on a CPU."""

from __future__ import annotations

import pytest
import torch

from llmcourse.compress.awq import clip, search_scale
from llmcourse.compress.calibrate import Inputs, block_by_block, calibrate, layers_of
from llmcourse.compress.gptq import gptq
from llmcourse.compress.llm_int8 import llm_int8
from llmcourse.compress.qat import divergence, pieces, qat
from llmcourse.compress.quantize import Scheme
from llmcourse.compress.quantized_linear import quantize_model
from llmcourse.compress.smoothquant import int8_linear, smoothquant
from llmcourse.models import load

SCHEME = Scheme(4, 64, False)


@pytest.fixture(scope="module")
def real():
    model, tokenizer = load(device="cuda", dtype="float32")
    tokens = torch.tensor(tokenizer.encode("The king is dead. Long live the king! " * 60)[:512])
    return model, tokens.view(4, 128).cuda()


def test_codes_are_those_of_the_cpu():
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=draw)
    x = torch.randn(400, 96, generator=draw) @ (mix + 10 * torch.eye(96))
    weight, inputs = torch.randn(40, 96, generator=draw), Inputs.of(x)
    on_gpu = Inputs.of(x.cuda())
    for order in (False, True):
        here = gptq(weight, inputs.gram, SCHEME, order=order).codes
        there = gptq(weight.cuda(), inputs.gram.cuda(), SCHEME, order=order).codes.cpu()
        assert (here == there).float().mean() > 0.97
    found = search_scale(weight.cuda(), on_gpu, SCHEME)
    assert found.alpha == search_scale(weight, inputs, SCHEME).alpha
    clipped = clip(weight.cuda(), on_gpu.gram, SCHEME).cpu()
    assert (clipped == clip(weight, inputs.gram, SCHEME)).float().mean() > 0.97


def test_every_method_runs_on_the_real_model(real):
    model, tokens = real
    inputs = calibrate(model, tokens, rows=4)
    smooth = smoothquant(model, inputs)
    want = divergence(model, model, tokens)
    assert float(want) < 1e-4
    for other in (
        smooth,
        quantize_model(smooth, lambda name, layer: int8_linear(layer)),
        quantize_model(model, lambda name, layer: llm_int8(layer, inputs[name])),
    ):
        assert float(divergence(model, other, tokens)) < 0.2
    blocks = {name for name in layers_of(model) if name.startswith("blocks.0.")}
    before = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    block_by_block(
        model,
        tokens,
        lambda name, layer, x: gptq(layer.weight, x.gram, SCHEME).dequantize() if name in blocks else None,
    )
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.weight, before[name]) != (name in blocks)
            layer.weight.copy_(before[name])


def test_training_with_rounding_lowers_the_divergence(real):
    model, tokens = real
    scheme = Scheme(3, 64, False)
    batches = (b.cuda() for b in pieces(tokens.flatten().cpu(), batch=4, length=64, seed=0))
    trained, curve = qat(model, batches, scheme, steps=20, lr=1e-4, autocast=True)
    assert curve[-1] < 0.5 * curve[0]
    lost = float(divergence(model, quantize_model(model, scheme), tokens))
    assert float(divergence(model, quantize_model(trained, scheme), tokens)) < 0.5 * lost
