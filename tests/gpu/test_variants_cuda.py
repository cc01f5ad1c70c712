"""Every kind of layer on a GPU: CUDA graphs replay what the uncached pass computes, and it is the CPU's."""

from __future__ import annotations

import pytest
import torch

from llmcourse.engine.cuda_graph import GraphDecoder
from llmcourse.models import KVCache, LatentSizes, ModelConfig, random_model
from llmcourse.models.mixers import MIXERS

LATENT = LatentSizes(q_rank=48, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=16)


def model_of(kind: str, device: str = "cuda"):
    torch.manual_seed(4)
    config = ModelConfig(
        vocab_size=997,
        d_model=96,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        head_dim=16,
        d_ff=128,
        max_len=1024,
        layers=(kind, "attention", kind),
        window=33,
        sinks=2,
        latent=LATENT if kind == "latent" else None,
    )
    return random_model(config, device="cpu", dtype="float32").to(device)


@pytest.mark.parametrize("kind", MIXERS)
def test_graph_logits_equal_the_uncached_logits_at_every_position(kind):
    model = model_of(kind)
    ids = torch.randint(0, 997, (2, 140), device="cuda")
    cache = KVCache(model.config, 2, 256, device="cuda")
    decoder = GraphDecoder(model, cache)
    with torch.inference_mode():
        whole = model(ids)
        model(ids[:, :120], cache)
        for t in range(120, 140):  # crosses the bucket of 128: a second graph is captured on the way
            torch.testing.assert_close(decoder(ids[:, t : t + 1])[:, 0], whole[:, t], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", MIXERS)
def test_the_gpu_computes_what_the_cpu_computes(kind):
    ids = torch.randint(0, 997, (2, 77))
    with torch.inference_mode():
        there, here = model_of(kind)(ids.cuda()).cpu(), model_of(kind, "cpu")(ids)
    torch.testing.assert_close(there, here, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", MIXERS)
def test_bfloat16_stays_near_float32(kind):
    ids = torch.randint(0, 997, (2, 77), device="cuda")
    model = model_of(kind)
    with torch.inference_mode():
        exact = model(ids)
        close = model.bfloat16()(ids).float()
    assert (close - exact).norm() < 0.05 * exact.norm()
