"""Quantized models and 8-bit caches on a GPU: through the engine and its CUDA graphs, as on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmcourse.compress.quantize import Scheme
from llmcourse.compress.quantized_linear import QuantizedLinear, quantize_model
from llmcourse.engine import LLM, SamplingParams
from llmcourse.models import ModelConfig, load, random_model

CONFIG = ModelConfig(
    vocab_size=96, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=192, max_len=256
)
SCHEMES = [
    Scheme(8),
    Scheme(4, 64),
    Scheme(4, 32, symmetric=False),
    Scheme(3, 64),
    Scheme(4, 64, codes="nf4"),
    Scheme(8, codes="fp8_e4m3"),
]


def twins(scheme, dtype="bfloat16"):
    """A quantized model, and a dense one with the weights that its codes stand for."""
    torch.manual_seed(3)
    model = random_model(CONFIG, device="cuda", dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    smaller = quantize_model(model, scheme, skip=())
    dense = copy.deepcopy(model)
    dense.head.weight = nn.Parameter(dense.head.weight.clone(), requires_grad=False)
    for name, module in smaller.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.copy_(module.weight)
    return smaller, dense


@pytest.mark.parametrize("rows", [1, 7, 80])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_logits_are_those_of_the_dequantized_twin(scheme, rows):
    smaller, dense = twins(scheme)
    tokens = torch.randint(0, 96, (rows, 1), device="cuda")
    with torch.inference_mode():
        got, wanted, exact = smaller(tokens).double(), dense(tokens).double(), dense.double()(tokens)
    assert (got - exact).abs().max() <= 2 * (wanted - exact).abs().max() + 1e-2 * exact.abs().max()


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 64)], ids=str)
def test_a_captured_step_gives_what_an_uncaptured_one_does(scheme, smol):
    smaller, _ = twins(scheme)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    prompts = [[1, 2, 3], [50, 4]]
    answers = [
        [a.tokens for a in LLM((smaller, smol[1]), cuda_graphs=on).generate(prompts, params)]
        for on in (True, False)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_an_eight_bit_cache_works_in_a_captured_step(stored, smol):
    torch.manual_seed(3)
    model = random_model(CONFIG, device="cuda", dtype="bfloat16")
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    prompts = [[1, 2, 3], [50, 4]]
    answers = [
        [a.tokens for a in LLM((model, smol[1]), cuda_graphs=on, kv_stored=stored).generate(prompts, params)]
        for on in (True, False)
    ]
    assert answers[0] == answers[1]


def test_gradients_reach_the_input_of_a_quantized_layer():
    smaller, dense = twins(Scheme(4, 64))
    layer, twin = smaller.blocks[0].mlp.down, dense.blocks[0].mlp.down
    x = torch.randn(5, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    (layer(x) * y).sum().backward()
    wanted = y.double() @ twin.weight.double()
    torch.testing.assert_close(x.grad.double(), wanted, atol=0.05, rtol=0.02)


def test_the_real_model_answers_with_eight_bits():
    model, tokenizer = load(device="cuda", dtype="bfloat16")
    llm = LLM((quantize_model(model, Scheme(8)), tokenizer))
    answer = llm.generate(["The capital of France is"], SamplingParams(max_tokens=4, ignore_eos=True))[0]
    assert "Paris" in answer.text
