"""Stacks of any mixers: what holds for one kind of layer holds for a mixture of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.models import HyenaSizes, KVCache, ModelConfig, Transformer

SIZES = dict(vocab_size=53, d_model=12, n_heads=2, n_kv_heads=1, head_dim=6, d_ff=16, max_len=64)
STACKS = {
    "linear": ModelConfig(**SIZES, n_layers=1, layers=("linear",)),
    "ssm": ModelConfig(**SIZES, n_layers=1, layers=("ssm",)),
    "hyena": ModelConfig(**SIZES, n_layers=1, layers=("hyena",)),
    "modal": ModelConfig(**SIZES, n_layers=1, layers=("hyena",), hyena=HyenaSizes("modal")),
    "striped": ModelConfig(**SIZES, n_layers=3, layers=("hyena", "hyena", "attention")),
    "all": ModelConfig(
        **SIZES, n_layers=5, layers=("linear", "window", "ssm", "hyena", "attention"), window=7, sinks=1
    ),
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    return {name: Transformer(config).double().eval() for name, config in STACKS.items()}


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), name=st.sampled_from(["striped", "all"]))
def test_reading_in_any_pieces_gives_the_same_logits(models, cuts, name):
    ids = torch.randint(0, 53, (2, sum(cuts)))
    cache = KVCache(models[name].config, 2, 60, dtype=torch.float64)
    with torch.inference_mode():
        pieces = [models[name](part, cache) for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), models[name](ids), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", STACKS)
def test_a_token_never_sees_what_comes_after_it(models, name):
    ids = torch.randint(0, 53, (1, 30))
    changed = ids.clone()
    changed[0, 17] = (changed[0, 17] + 1) % 53
    with torch.inference_mode():
        a, b = models[name](ids), models[name](changed)
    # An FFT mixes all numbers before it separates them again: rounding of 1e-16 is all that may leak.
    torch.testing.assert_close(a[:, :17], b[:, :17], atol=1e-12, rtol=0)
    assert (a[:, 17] - b[:, 17]).abs().max() > 1e-6
    assert (a[:, 18:] - b[:, 18:]).abs().max() > 1e-6


@pytest.mark.parametrize("name", STACKS)
def test_sequences_of_unequal_length_decode_as_if_alone(models, name):
    model = models[name]
    prompts = [torch.randint(0, 53, (1, n)) for n in (1, 13, 6)]
    following = torch.randint(0, 53, (3, 5))
    cache = KVCache(model.config, 3, 32, dtype=torch.float64)
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            row = cache.row(i)
            model(prompt, row)
            cache.lengths[i] = row.lengths[0]
        together = torch.cat([model(following[:, t : t + 1], cache) for t in range(5)], dim=1)
        for i, prompt in enumerate(prompts):
            alone = model(torch.cat((prompt, following[i : i + 1]), dim=1))[:, -5:]
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", STACKS)
def test_a_cache_used_for_a_second_sequence_has_forgotten_the_first(models, name):
    model = models[name]
    cache = KVCache(model.config, 2, 40, dtype=torch.float64)
    with torch.inference_mode():
        model(torch.randint(0, 53, (2, 25)), cache)
        cache.reset()
        ids = torch.randint(0, 53, (2, 11))
        torch.testing.assert_close(model(ids, cache), model(ids), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", STACKS)
def test_every_parameter_gets_a_gradient(models, name):
    model = Transformer(STACKS[name]).double()
    model(torch.randint(0, 53, (2, 20))).square().mean().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias on k shifts … nothing here is invisible to the loss.
    assert idle == []


@pytest.mark.parametrize("name", STACKS)
def test_parameters_and_bytes_are_what_the_configuration_says(models, name):
    model, config = models[name], STACKS[name]
    assert sum(p.numel() for p in model.parameters()) == config.n_params
    for tokens in (1, 5, 50):
        cache = KVCache(config, 3, tokens, dtype=torch.bfloat16)
        assert cache.nbytes == 3 * config.cache_bytes(tokens, itemsize=2)


def test_memory_of_a_recurrent_stack_does_not_grow_and_of_a_hybrid_only_in_its_attention_layers():
    for name in ("linear", "ssm", "modal"):
        assert STACKS[name].kv_bytes_per_token(2) == 0
    striped = STACKS["striped"]
    attention = ModelConfig(**SIZES, n_layers=1).kv_bytes_per_token(2)
    history = ModelConfig(**SIZES, n_layers=1, layers=("hyena",)).kv_bytes_per_token(2)
    assert striped.kv_bytes_per_token(2) == attention + 2 * history


@pytest.mark.parametrize("name", STACKS)
def test_a_pass_with_a_cache_records_no_gradient(models, name):
    """Caches are overwritten in place: a graph over them would grow with each token and end in an error."""
    model = Transformer(STACKS[name])
    cache = KVCache(model.config, 2, 20)
    for tokens in (9, 1):
        assert not model(torch.randint(0, 53, (2, tokens)), cache).requires_grad
    assert not any(tensor.requires_grad for state in cache.layers for tensor in state.tensors.values())
    assert model(torch.randint(0, 53, (2, 9))).requires_grad


def test_kinds_may_come_as_a_list():
    sizes = dict(vocab_size=7, d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, max_len=9)
    config = ModelConfig(**sizes, layers=["attention", "ssm"])
    assert config == ModelConfig(**sizes, layers=("attention", "ssm"))
    assert hash(config)
