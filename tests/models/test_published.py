"""Published configurations: bytes and parameters equal to known figures and to transformers' own modules."""

from __future__ import annotations

import math

import pytest
import torch

from llmcourse.errors import UnknownNameError
from llmcourse.models.published import MODELS, Experts, published

KV_BYTES = {  # bf16; computed by hand as 2·L·Hkv·D·2, or L·(512 + 64)·2 for MLA
    "Llama-2-7B": 524_288,
    "Llama-2-13B": 819_200,
    "Llama-2-70B": 327_680,
    "Llama-3-8B": 131_072,
    "Llama-3-70B": 327_680,
    "Llama-3.1-405B": 516_096,
    "Llama-3.2-1B": 32_768,
    "Qwen2.5-7B": 57_344,
    "Qwen3-8B": 147_456,
    "Qwen3-32B": 262_144,
    "Mistral-7B-v0.1": 131_072,
    "DeepSeek-V2": 69_120,
    "DeepSeek-V3": 70_272,
    "SmolLM2-135M": 23_040,
}


@pytest.mark.parametrize("name", MODELS)
def test_kv_bytes_per_token_are_those_worked_out_by_hand(name: str) -> None:
    assert published(name).cache_bytes(1) == KV_BYTES[name]


def test_every_figure_has_its_source() -> None:
    for model in MODELS.values():
        assert "config.json of " in model.source or "model card" in model.source, model.name


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_those_of_transformers_module_of_that_config(name: str) -> None:
    """Built without memory (device "meta") from the same facts: nobody here wrote that module."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = published(name)
    facts = dict(model.facts)
    family = facts.pop(
        "model_type", "deepseek_v3" if facts.get("topk_method") == "noaux_tc" else "deepseek_v2"
    )
    if family == "deepseek_v2":
        facts |= {"moe_layer_freq": 1}
    config = AutoConfig.for_model(family, **facts)
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in peer.parameters())
    # The bias with which DeepSeek-V3 picks experts is a parameter in the checkpoint and a buffer there.
    count += sum(b.numel() for n, b in peer.named_buffers() if n.endswith("e_score_correction_bias"))
    assert model.n_params == count


@pytest.mark.parametrize("name", MODELS)
def test_parameters_round_to_what_the_authors_report(name: str) -> None:
    reported = published(name).reported
    number = float(reported[:-1]) * {"B": 1e9, "M": 1e6}[reported[-1]]
    assert abs(published(name).n_params / number - 1) < 0.05


def test_transformers_defaults_for_deepseek_v3_and_mistral_are_the_published_ones() -> None:
    from transformers import DeepseekV3Config, MistralConfig

    for name, peer in (("DeepSeek-V3", DeepseekV3Config()), ("Mistral-7B-v0.1", MistralConfig())):
        facts = published(name).facts
        left_out = {
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
        }  # set for the released checkpoint
        known = {k: v for k, v in peer.to_dict().items() if k in facts and k not in left_out}
        assert len(known) >= 8
        assert {k: facts[k] for k in known} == known


def test_a_window_bounds_what_mistral_keeps() -> None:
    mistral = published("Mistral-7B-v0.1")
    assert mistral.cache_bytes(4096) == 4096 * 131_072
    assert mistral.cache_bytes(100_000) == mistral.cache_bytes(4096)


def test_four_bit_caches_take_half_a_byte_a_number() -> None:
    assert published("Llama-3-8B").cache_bytes(1000, 0.5) * 4 == published("Llama-3-8B").cache_bytes(1000)


def test_a_mixture_reads_more_experts_the_more_tokens_there_are() -> None:
    v3 = published("DeepSeek-V3")
    reads = [v3.touched(n) for n in (1, 8, 64, 512, 10**6)]
    assert reads == sorted(reads)
    # One token: all that is always used and 8 of 256 experts; the authors report 37B, both embeddings
    # included.
    assert reads[0] + v3.config.vocab_size * v3.config.d_model == pytest.approx(37e9, rel=0.02)
    assert reads[-1] + v3.config.vocab_size * v3.config.d_model == v3.n_params


def test_experts_touched_are_those_of_a_simulation() -> None:
    experts = Experts(layers=1, count=16, chosen=2, params=1)
    generator = torch.Generator().manual_seed(0)
    seen = [len(torch.rand(9, 16, generator=generator).topk(2, dim=1).indices.unique()) for _ in range(3000)]
    spread = 1.5 / math.sqrt(3000)  # a standard error, generously
    assert experts.touched(9) == pytest.approx(sum(seen) / 3000, abs=4 * spread)


def test_a_dense_model_reads_all_but_an_untied_input_embedding() -> None:
    llama, smol = published("Llama-3-8B"), published("SmolLM2-135M")
    assert llama.touched(1) == llama.n_params - 128_256 * 4096
    assert smol.touched(7) == smol.n_params


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UnknownNameError, match=r"'GPT-5'[\s\S]*DeepSeek-V3"):
        published("GPT-5")
