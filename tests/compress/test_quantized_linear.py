"""Quantized layers compute with the weights that their codes stand for; models of them run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmcourse.compress import cpu_kernels
from llmcourse.compress.quantize import Quantized, Scheme, quantize
from llmcourse.compress.quantized_linear import QuantizedLinear, quantize_model
from llmcourse.engine import LLM, SamplingParams
from llmcourse.errors import ShapeError
from llmcourse.models import ModelConfig, random_model

SCHEMES = [
    Scheme(8),
    Scheme(8, 64),
    Scheme(8, -1),
    Scheme(8, symmetric=False),
    Scheme(6, 32),
    Scheme(4),
    Scheme(4, 64),
    Scheme(4, 32, symmetric=False),
    Scheme(3, 32),
    Scheme(2, 32),
    Scheme(4, 64, codes="nf4"),
    Scheme(4, 32, codes="fp4"),
    Scheme(8, codes="fp8_e4m3"),
]
# Rows and columns: the digit kernel fits, a short last group of 64, no kernel for 17 rows, odd columns.
SHAPES = [(32, 128), (48, 160), (17, 96), (5, 33)]
CONFIG = ModelConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96)


def layer(scheme, rows=32, columns=128, dtype=torch.bfloat16, bias=True, seed=0):
    torch.manual_seed(seed)
    made = QuantizedLinear(quantize(torch.randn(rows, columns), scheme), torch.randn(rows) if bias else None)
    return made.to(dtype)


def exact(made, x):
    """The product in float64."""
    bias = None if made.bias is None else made.bias.double()
    return F.linear(x.double(), made.quantized.dequantize(torch.float64), bias)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_product_is_that_of_the_dequantized_weight(scheme, shape):
    rows, columns = shape
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)):
        made = layer(scheme, rows, columns, dtype)
        for size in ((1,), (3,), (2, 2), (1, 40)):
            x = torch.randn(*size, columns, dtype=dtype)
            with torch.inference_mode():
                got = made(x).double()
            wanted = exact(made, x)
            most = F.linear(
                x.double().abs(), made.quantized.dequantize(torch.float64).abs(), made.bias.double().abs()
            )
            assert ((got - wanted).abs() <= tolerance * most).all(), (dtype, size)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 64), Scheme(3, 32, symmetric=False)], ids=str)
def test_a_few_rows_take_torchs_kernel_and_never_write_the_weight_out(scheme, monkeypatch):
    made = layer(scheme)
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    with torch.inference_mode():
        before = made(x)  # rearranges the codes once
        monkeypatch.setattr(Quantized, "dequantize", lambda *_: pytest.fail("the weight was written out"))
        assert torch.equal(made(x), before)
        made.kernels = False
        with pytest.raises(pytest.fail.Exception):
            made(x)


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_the_kernel_is_chosen_by_what_it_can_read(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    def name(rows, columns, scheme):
        found = cpu_kernels.product(quantize(torch.randn(rows, columns), scheme))
        return None if found is None else found.__qualname__.split(".")[0].removesuffix("_product")

    assert name(32, 128, Scheme(4, 64)) == "digit"
    assert name(32, 128, Scheme(8)) == ("digit" if capability == "AVX512" else "byte")
    assert name(32, 128, Scheme(8, 64)) == "digit"
    assert name(17, 128, Scheme(8)) == "byte"
    assert name(17, 130, Scheme(8)) is None
    assert name(17, 128, Scheme(4, 64)) is None
    assert name(32, 128, Scheme(8, symmetric=False)) is None
    assert name(32, 128, Scheme(4, 64, codes="nf4")) is None


def test_an_eight_bit_code_as_two_digits_loses_nothing():
    weight = torch.arange(-128, 128).float().repeat(16, 1)
    codes = weight.to(torch.int8)
    made = Quantized(codes, torch.ones(16, 1), None, Scheme(8), (16, 256))
    times = cpu_kernels.digit_product(made, 64)
    with torch.inference_mode():
        got = torch.cat([times(rows) for rows in torch.eye(256, dtype=torch.bfloat16).split(8)])
    assert torch.equal(got.float(), weight.T)


def test_changed_codes_are_followed():
    made = layer(Scheme(4, 64), bias=False)
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        before = made(x)
        made.scale.mul_(2)
        torch.testing.assert_close(made(x), 2 * before)
        made.packed.fill_(0x88)  # 8 is the stored zero
        assert not made(x).any()
        assert not copy.deepcopy(made)(x).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 64), Scheme(4, 64, codes="nf4")], ids=str)
def test_gradients_reach_x_and_nothing_else_is_kept_for_them(scheme, dtype):
    made = layer(scheme, dtype=dtype)
    x = torch.randn(2, 3, 128, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = made(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    wanted = weights.double() @ made.quantized.dequantize(torch.float64)
    torch.testing.assert_close(
        x.grad.double(), wanted, atol=1e-5 if dtype == torch.float32 else 0.2, rtol=1e-2
    )
    assert kept == []
    assert not any(p.requires_grad for p in made.parameters())


def test_a_model_is_copied_without_copying_what_is_kept():
    model = random_model(CONFIG, dtype="float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = quantize_model(model, Scheme(4, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.blocks[0].mlp.down) is not QuantizedLinear
    assert smaller.embedding.weight is model.embedding.weight is smaller.head.weight
    layers = {n for n, m in smaller.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers == {
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("mixer.qkv", "mixer.out", "mlp.gate_up", "mlp.down")
    }


def test_weight_bytes_are_those_of_codes_and_of_what_is_kept():
    model = random_model(CONFIG, dtype="bfloat16")
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"
    )
    rest = sum(p.nbytes for p in model.parameters()) - 2 * linear
    assert quantize_model(model, Scheme(4, 32)).weight_bytes == rest + linear // 2 + linear // 32 * 2


def test_how_decides_for_each_layer_by_its_name():
    model = random_model(CONFIG, dtype="float32")

    def how(name, layer):
        if name == "head":
            return quantize(layer.weight, Scheme(8))
        if name.endswith("down"):
            return nn.Identity() if name.startswith("blocks.0") else None
        return quantize(layer.weight, Scheme(4, 32))

    mixed = quantize_model(model, how, skip=("blocks.1.mixer",))
    kinds = {n: type(m).__name__ for n, m in mixed.named_modules() if n in dict(model.named_modules())}
    assert (kinds["head"], kinds["blocks.0.mlp.down"]) == ("QuantizedLinear", "Identity")
    assert (kinds["blocks.1.mlp.down"], kinds["blocks.1.mixer.qkv"]) == ("Linear", "Linear")
    assert mixed.embedding.weight is model.embedding.weight
    assert mixed.head.scheme.bits == 8


def test_a_model_in_which_nothing_was_quantized_is_refused():
    model = random_model(CONFIG, dtype="float32")
    with pytest.raises(ShapeError, match="no layer was quantized"):
        quantize_model(model, lambda name, layer: None)


def test_operands_that_do_not_fit_are_refused_with_the_numbers():
    made = layer(Scheme(4, 64))
    with pytest.raises(ShapeError, match=r"\[2, 127\]"):
        made(torch.zeros(2, 127, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match=r"bias of shape \[31\]"):
        QuantizedLinear(made.quantized, torch.zeros(31))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_decodes_a_quantized_model_as_its_dequantized_twin(dtype, smol):
    torch.manual_seed(5)
    model = random_model(CONFIG, dtype="float32")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    smaller = quantize_model(model, Scheme(8, 32), skip=())
    twin = copy.deepcopy(model)
    twin.head.weight = nn.Parameter(twin.head.weight.clone(), requires_grad=False)
    for name, module in smaller.named_modules():
        if isinstance(module, QuantizedLinear):
            twin.get_submodule(name).weight.copy_(module.weight)
    pairs = [m.to(getattr(torch, dtype)) for m in (smaller, twin)]
    tokens = torch.randint(0, 96, (2, 9))
    with torch.inference_mode():
        got, wanted = (m(tokens).float() for m in pairs)
    assert (got - wanted).abs().max() <= (1e-5 if dtype == "float32" else 0.05) * wanted.abs().max()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = [[1, 2, 3], [50]]
    answers = [
        [a.tokens for a in LLM((pairs[0], smol[1]), **options).generate(prompts, params)]
        for options in ({}, {"fused": False}, {"kv_cache": False})
    ]
    if dtype == "float32":  # in bfloat16, other kernels round elsewhere and may choose another token
        wide = [a.tokens for a in LLM((pairs[1], smol[1])).generate(prompts, params)]
        assert answers == [wide] * 3
