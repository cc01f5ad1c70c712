"""Training with rounding in the loop: the gradient, and what it recovers."""

from __future__ import annotations

from itertools import repeat

import pytest
import torch
from compress_cases import small_model, some_tokens
from torch import nn

from llmcourse.compress.calibrate import layers_of
from llmcourse.compress.qat import StraightThrough, divergence, insert_rounding, pieces, qat, remove_rounding
from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.compress.quantized_linear import quantize_model
from llmcourse.errors import ShapeError
from llmcourse.train.fit import one_thread


def test_forward_rounds_and_backward_is_the_identity():
    weight = torch.randn(6, 16, requires_grad=True)
    rounded = StraightThrough.apply(weight, Scheme(3, 8))
    assert torch.equal(rounded, quantize(weight.detach(), Scheme(3, 8)).dequantize())
    upstream = torch.randn(6, 16)
    rounded.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_a_layer_gets_the_gradient_of_its_rounded_weight():
    layer, x = nn.Linear(16, 4, bias=False), torch.randn(9, 16)
    plain = quantize(layer.weight.detach(), Scheme(4, 8)).dequantize().requires_grad_(True)
    (x @ plain.T).square().sum().backward()
    (x @ StraightThrough.apply(layer.weight, Scheme(4, 8)).T).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.grad)


def test_rounding_goes_in_and_comes_out_without_a_trace():
    model, tokens = small_model(), some_tokens()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    want = model(tokens)
    rounded = quantize_model(model, Scheme(4, 16))(tokens)
    insert_rounding(model, Scheme(4, 16))
    torch.testing.assert_close(model(tokens), rounded, rtol=1e-4, atol=1e-4)
    remove_rounding(model)
    assert torch.equal(model(tokens), want)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_the_divergence_is_that_of_two_distributions():
    teacher, student, tokens = small_model(0), small_model(5), some_tokens()
    p, q = teacher(tokens).softmax(-1), student(tokens).softmax(-1)
    want = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(teacher, student, tokens), want, rtol=1e-4, atol=1e-5)
    assert float(divergence(teacher, teacher, tokens)) == pytest.approx(0, abs=1e-6)


@one_thread()
def test_training_recovers_most_of_what_rounding_lost_on_tokens_it_has_not_seen():
    model, scheme = small_model(), Scheme(2, 16, False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(1)
    batches = (torch.randint(61, (16, 24), generator=draw) for _ in repeat(0))
    trained, curve = qat(model, batches, scheme, steps=80, lr=3e-3)
    held_out = some_tokens(16, 24, seed=77)
    lost = float(divergence(model, quantize_model(model, scheme), held_out))
    left = float(divergence(model, quantize_model(trained, scheme), held_out))
    assert left < 0.5 * lost
    assert curve[-1] < 0.6 * curve[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(trained.embedding.weight, model.embedding.weight)
    assert not any(p.requires_grad for p in trained.parameters())
    assert all(
        type(a) is type(b)
        for a, b in zip(layers_of(trained).values(), layers_of(model).values(), strict=True)
    )


def test_batches_that_run_out_are_refused():
    with pytest.raises(ShapeError, match="ran out after 2 of 5"):
        qat(small_model(), [some_tokens(1, 4)] * 2, Scheme(4), steps=5)


def test_pieces_come_from_the_text_and_repeat_with_the_seed():
    text = torch.arange(1000)
    first, second = (next(pieces(text, batch=3, length=7, seed=4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first - first[:, :1], torch.arange(7).expand(3, 7))
    assert not torch.equal(first, next(pieces(text, batch=3, length=7, seed=5)))
