"""The plain forward pass, transformers' Llama and the model agree: three programs, one set of weights."""

from __future__ import annotations

import builtins
from dataclasses import replace

import pytest
import torch

from llmcourse.errors import MissingPackageError, ModelError
from llmcourse.models import ModelConfig, RopeScaling, Transformer
from llmcourse.models.peer import llama
from llmcourse.models.plain import plain_logits
from llmcourse.train import build

from .test_encoder import random_weights

CONFIG = ModelConfig(
    vocab_size=61, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=40, max_len=64
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_the_three_agree_on_random_weights(tied, theta):
    config = replace(CONFIG, tie_embeddings=tied, rope_theta=theta)
    model = random_weights(build(Transformer, config, seed=1)).double()
    tokens = torch.randint(0, 61, (1, 19))
    with torch.inference_mode():
        ours, theirs = model(tokens)[0], llama(model)(tokens).logits[0]
    plain = plain_logits(config, model.state_dict(), tokens[0])
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=2e-6)  # cos and sin are float32 tables
    torch.testing.assert_close(theirs, plain, atol=2e-6, rtol=2e-6)


def test_the_real_model_agrees_with_the_plain_pass(smol):
    model, tokenizer = smol
    tokens = torch.tensor(tokenizer.encode("The capital of France is"))
    with torch.inference_mode():
        ours = model(tokens[None])[0].double()
    plain = plain_logits(model.config, model.state_dict(), tokens)
    assert (ours - plain).abs().max() < 1e-3
    assert tokenizer.decode([int(plain[-1].argmax())]) == " Paris"


def test_the_peer_shares_the_weights_memory():
    model = build(Transformer, CONFIG, seed=2)
    peer = llama(model)
    assert peer.model.embed_tokens.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert (
        peer.model.layers[1].mlp.gate_proj.weight.data_ptr() == model.blocks[1].mlp.gate_up.weight.data_ptr()
    )
    assert peer.num_parameters() == model.config.n_params


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "layer"},
        {"qk_norm": True},
        {"position": "learned"},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"layers": ("attention", "window", "attention"), "window": 4},
    ],
)
def test_what_they_do_not_compute_is_refused(change):
    config = replace(CONFIG, **change)
    with pytest.raises(ModelError):
        plain_logits(config, {}, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ModelError):
        llama(Transformer(config))


def test_without_transformers_the_peer_says_what_to_do(monkeypatch):
    original = builtins.__import__

    def without(name: str, *rest, **options):
        if name.startswith("transformers"):
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match="not installed") as error:
        llama(Transformer(CONFIG))
    assert len(str(error.value).splitlines()) == 3
