"""The engine runs models of every kind of layer: with the cache, without it, and in a ragged batch."""

from __future__ import annotations

import pytest
import torch

from llmcourse.engine import LLM, SamplingParams
from llmcourse.models import LatentSizes, ModelConfig, random_model
from llmcourse.models.mixers import MIXERS

LATENT = LatentSizes(q_rank=14, kv_rank=10, nope_dim=5, rope_dim=6, v_dim=7)
PROMPTS = [[5], [7, 60, 3, 41, 9, 9, 2, 30, 11], [1, 2, 3]]


@pytest.mark.parametrize("kind", MIXERS)
def test_greedy_tokens_are_the_same_with_the_cache_and_in_a_batch(kind, smol):
    torch.manual_seed(4)
    config = ModelConfig(
        vocab_size=61,
        d_model=24,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        head_dim=6,
        d_ff=32,
        max_len=96,
        layers=(kind, "attention", kind),
        window=4,
        sinks=1,
        latent=LATENT if kind == "latent" else None,
    )
    model = random_model(config, dtype="float32")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    pair = model, smol[1]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    plain = LLM(pair, kv_cache=False)
    expected = [plain.generate([p], params)[0].tokens for p in PROMPTS]
    llm = LLM(pair)
    assert [llm.generate([p], params)[0].tokens for p in PROMPTS] == expected
    assert [c.tokens for c in llm.generate(PROMPTS, params)] == expected
    assert [c.tokens for c in llm.generate(PROMPTS, params)] == expected  # with what the last answer left
    assert len({tuple(t) for t in expected}) == 3
