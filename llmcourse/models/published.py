"""Models that were published, by the facts of their `config.json`: what one weighs, and what it keeps.

No weights are here, and none are needed: bytes follow from sizes. Parameters are counted by the formula of
`ModelConfig`, which tests hold equal to the modules; where a model is a mixture of experts, the experts are
added here, and the total stands beside the one that its authors report.

    published("Llama-3-8B").cache_bytes(tokens=1)      # 131,072: what each token of each sequence costs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmcourse.errors import UnknownNameError
from llmcourse.models.config import ModelConfig

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Experts:
    """The routed experts of a mixture: a token goes through `chosen` of the `count` in each such layer.

    layers    layers that have them
    params    of one expert
    """

    layers: int
    count: int
    chosen: int
    params: int

    @property
    def total(self) -> int:
        return self.layers * self.count * self.params

    def touched(self, tokens: int) -> float:
        """Parameters of the experts that `tokens` tokens need together, if each picks at random.

        An expert is left out by one token with probability 1 − chosen/count, by all with that to the power of
        `tokens`. Real routers are not random, but are trained to use their experts about equally.
        """
        return self.total * (1 - (1 - self.chosen / self.count) ** tokens)


@dataclass(frozen=True)
class Published:
    """A model as its authors published it.

    name       as the authors write it, without the organisation
    facts      of its config.json, under the names used there
    source     where they stand
    reported   parameters as the authors give them, rounded as they round
    """

    name: str
    facts: Facts
    source: str
    reported: str

    @cached_property
    def config(self) -> ModelConfig:
        """The sizes. Of a mixture of experts: as if every layer had the feed-forward part of the first."""
        facts = dict(self.facts)
        if "n_routed_experts" in facts:
            facts |= {"model_type": "deepseek_v3", "first_k_dense_replace": facts["num_hidden_layers"]}
        return replace(ModelConfig.from_hf(facts), name=self.name)

    @cached_property
    def experts(self) -> Experts | None:
        f = self.facts
        if "n_routed_experts" not in f:
            return None
        return Experts(
            layers=f["num_hidden_layers"] - f["first_k_dense_replace"],
            count=f["n_routed_experts"],
            chosen=f["num_experts_per_tok"],
            params=3 * f["hidden_size"] * f["moe_intermediate_size"],
        )

    @property
    def n_params(self) -> int:
        """All parameters, those of all experts included."""
        return self.always + (self.experts.total if self.experts else 0)

    @property
    def always(self) -> int:
        """Parameters that every token goes through: all but the routed experts."""
        if (e := self.experts) is None:
            return self.config.n_params
        f, width = self.facts, self.config.d_model
        router = e.count * width + e.count * (f["topk_method"] == "noaux_tc")  # with a bias for each expert
        instead = f["n_shared_experts"] * e.params + router - 3 * width * self.config.d_ff
        return self.config.n_params + e.layers * instead

    def touched(self, tokens: int) -> float:
        """Parameters that a pass over `tokens` tokens reads.

        All of a dense model, but for an input embedding that is no output head too: of that a token looks up
        a row. Of a mixture, the experts that some token chose (see `Experts.touched`).
        """
        rows = 0 if self.config.tie_embeddings else self.config.vocab_size * self.config.d_model
        return self.always - rows + (self.experts.touched(tokens) if self.experts else 0)

    def cache_bytes(self, tokens: int, itemsize: float = 2) -> float:
        """Bytes that are kept of a sequence of `tokens` tokens, at `itemsize` bytes a number."""
        return self.config.cache_bytes(tokens, 1) * itemsize


def published(name: str) -> Published:
    """The model of that name (see MODELS).

    Raises   UnknownNameError, listing those there are.
    """
    if name in MODELS:
        return MODELS[name]
    raise UnknownNameError(
        f"there is no published configuration called {name!r} here.",
        "Each entry holds figures that were looked up, with their source.",
        f"one of {', '.join(MODELS)}; or ModelConfig.from_hf(json.load(…)) for a config.json of your own.",
    )


def _llama(vocab: int, width: int, layers: int, heads: int, kv: int, ff: int, **more: Any) -> Facts:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ff,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    } | more


def _stretched(factor: float) -> Facts:
    """Llama 3.1's long context."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {"max_position_embeddings": 131_072, "rope_theta": 500_000.0, "rope_scaling": scaling}


def _deepseek(**facts: Any) -> Facts:
    """What V2 and V3 share: 128 heads of 128 + 64 features, and one latent of 512 for all of them."""
    return {
        "hidden_act": "silu",
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 163_840,
    } | facts


_LLAMA3 = {"max_position_embeddings": 8192, "rope_theta": 500_000.0}
_QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
}

MODELS: dict[str, Published] = {
    m.name: m
    for m in (
        Published(
            "SmolLM2-135M",
            _llama(
                49_152,
                576,
                30,
                9,
                3,
                1536,
                tie_word_embeddings=True,
                rope_theta=100_000.0,
                max_position_embeddings=8192,
            ),
            "config.json of HuggingFaceTB/SmolLM2-135M; Allal et al. 2025, arXiv:2502.02737",
            "135M",
        ),
        Published(
            "Llama-2-7B",
            _llama(32_000, 4096, 32, 32, 32, 11_008),
            "config.json of meta-llama/Llama-2-7b-hf; Touvron et al. 2023, arXiv:2307.09288",
            "7B",
        ),
        Published(
            "Llama-2-13B",
            _llama(32_000, 5120, 40, 40, 40, 13_824),
            "config.json of meta-llama/Llama-2-13b-hf; Touvron et al. 2023, arXiv:2307.09288",
            "13B",
        ),
        Published(
            "Llama-2-70B",
            _llama(32_000, 8192, 80, 64, 8, 28_672),
            "config.json of meta-llama/Llama-2-70b-hf; Touvron et al. 2023, arXiv:2307.09288",
            "70B",
        ),
        Published(
            "Llama-3-8B",
            _llama(128_256, 4096, 32, 32, 8, 14_336, **_LLAMA3),
            "config.json of meta-llama/Meta-Llama-3-8B; Grattafiori et al. 2024, arXiv:2407.21783, table 3",
            "8B",
        ),
        Published(
            "Llama-3-70B",
            _llama(128_256, 8192, 80, 64, 8, 28_672, **_LLAMA3),
            "config.json of meta-llama/Meta-Llama-3-70B; Grattafiori et al. 2024, arXiv:2407.21783, table 3",
            "70B",
        ),
        Published(
            "Llama-3.1-405B",
            _llama(128_256, 16_384, 126, 128, 8, 53_248, **_stretched(8.0)),
            "config.json of meta-llama/Llama-3.1-405B; Grattafiori et al. 2024, arXiv:2407.21783, table 3",
            "405B",
        ),
        Published(
            "Llama-3.2-1B",
            _llama(128_256, 2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True, **_stretched(32.0)),
            "config.json and model card of meta-llama/Llama-3.2-1B (2024)",
            "1.23B",
        ),
        Published(
            "Qwen2.5-7B",
            _llama(
                152_064,
                3584,
                28,
                28,
                4,
                18_944,
                model_type="qwen2",
                rope_theta=1_000_000.0,
                rms_norm_eps=1e-6,
                max_position_embeddings=131_072,
            ),
            "config.json and model card of Qwen/Qwen2.5-7B; Qwen team 2024, arXiv:2412.15115",
            "7.61B",
        ),
        Published(
            "Qwen3-8B",
            _llama(151_936, 4096, 36, 32, 8, 12_288, **_QWEN3),
            "config.json and model card of Qwen/Qwen3-8B; Yang et al. 2025, arXiv:2505.09388",
            "8.2B",
        ),
        Published(
            "Qwen3-32B",
            _llama(151_936, 5120, 64, 64, 8, 25_600, **_QWEN3),
            "config.json and model card of Qwen/Qwen3-32B; Yang et al. 2025, arXiv:2505.09388",
            "32.8B",
        ),
        Published(
            "Mistral-7B-v0.1",
            _llama(
                32_000,
                4096,
                32,
                32,
                8,
                14_336,
                model_type="mistral",
                sliding_window=4096,
                max_position_embeddings=32_768,
            ),
            "config.json of mistralai/Mistral-7B-v0.1; Jiang et al. 2023, arXiv:2310.06825, table 1",
            "7B",
        ),
        Published(
            "DeepSeek-V2",
            _deepseek(
                vocab_size=102_400,
                hidden_size=5120,
                num_hidden_layers=60,
                intermediate_size=12_288,
                moe_intermediate_size=1536,
                n_routed_experts=160,
                n_shared_experts=2,
                num_experts_per_tok=6,
                first_k_dense_replace=1,
                topk_method="group_limited_greedy",
            ),
            "config.json of deepseek-ai/DeepSeek-V2; DeepSeek-AI 2024, arXiv:2405.04434, section 3.1.2",
            "236B",
        ),
        Published(
            "DeepSeek-V3",
            _deepseek(
                vocab_size=129_280,
                hidden_size=7168,
                num_hidden_layers=61,
                intermediate_size=18_432,
                moe_intermediate_size=2048,
                n_routed_experts=256,
                n_shared_experts=1,
                num_experts_per_tok=8,
                first_k_dense_replace=3,
                topk_method="noaux_tc",
            ),
            "config.json of deepseek-ai/DeepSeek-V3; DeepSeek-AI 2024, arXiv:2412.19437, section 4.2",
            "671B",
        ),
    )
}
