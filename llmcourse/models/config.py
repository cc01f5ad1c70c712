"""The numbers that define a decoder-only model, under one set of names for every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmcourse.errors import ModelError, ShapeError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts: `linear` or Llama 3's smooth band."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder. Lengths in tokens, widths in features.

    vocab_size V, d_model E, n_layers L, n_heads Hq, n_kv_heads Hkv (divides Hq), head_dim D,
    d_ff F; `qkv_bias` is Qwen2's, `qk_norm` (an RMSNorm on each query and key head) Qwen3's.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_len: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    name: str = "model"

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            fits = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ShapeError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads "
                f"({self.n_heads} is not a multiple of {self.n_kv_heads}).",
                "Grouped-query attention gives each key/value head the same number of query heads.",
                f"n_kv_heads = one of {fits}.",
            )
        if self.head_dim % 2:
            raise ShapeError(
                f"head_dim = {self.head_dim} is odd.",
                "Rotary position embedding turns the features of a head in pairs.",
                f"head_dim = {self.head_dim + 1}.",
            )

    @property
    def n_params(self) -> int:
        """Parameters, counted from the shapes (a test holds it equal to the module's own count)."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = self.d_model * (q + 2 * kv) + q * self.d_model
        attention += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        block = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * block + self.d_model

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of KV cache that one token of one sequence takes: 2·L·Hkv·D·itemsize."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * itemsize

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """From the `config.json` of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

        Raises ModelError for another family, or for a feature (sliding window, an unknown RoPE
        scaling, an activation other than SiLU) that these blocks would silently compute wrongly.
        """
        family = str(hf.get("model_type", "unknown"))
        if family not in FAMILIES:
            raise ModelError(
                f"model_type {family!r} is not one of {', '.join(FAMILIES)}.",
                "Other families order their layers differently, so the result would be wrong text.",
                "a checkpoint of one of these families, e.g. SmolLM2, Llama 3.2 or Qwen3.",
            )
        if (window := hf.get("sliding_window")) and (family == "mistral" or hf.get("use_sliding_window")):
            raise _unsupported("sliding_window", window, "attention here looks at the whole prefix")
        if (act := hf.get("hidden_act", "silu")) != "silu":
            raise _unsupported("hidden_act", act, "the feed-forward block here is SwiGLU, with SiLU")
        if hf.get("mlp_bias") or (family != "qwen2" and hf.get("attention_bias")):
            raise _unsupported("attention_bias/mlp_bias", True, "these blocks keep no such bias")
        try:
            heads, width = hf["num_attention_heads"], hf["hidden_size"]
            eos = hf.get("eos_token_id")
            return cls(
                vocab_size=hf["vocab_size"],
                d_model=width,
                n_layers=hf["num_hidden_layers"],
                n_heads=heads,
                n_kv_heads=hf.get("num_key_value_heads") or heads,
                head_dim=hf.get("head_dim") or width // heads,
                d_ff=hf["intermediate_size"],
                max_len=hf.get("max_position_embeddings", 2048),
                rope_theta=_rope(hf).get("rope_theta", hf.get("rope_theta", 10_000.0)),
                rope_scaling=_rope_scaling(_rope(hf)),
                norm_eps=hf.get("rms_norm_eps", 1e-6),
                tie_embeddings=hf.get("tie_word_embeddings", False),
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
                eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
                name=str(hf.get("_name_or_path") or family),
            )
        except KeyError as missing:
            raise ModelError(
                f"config.json has no {missing}.",
                "The sizes of the layers cannot be guessed.",
                "a complete checkpoint folder as `save_pretrained` writes it.",
            ) from missing

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From GGUF metadata of architecture `llama` (SmolLM2 and Llama are stored under it)."""
        if (arch := fields.get("general.architecture")) != "llama":
            raise ModelError(
                f"GGUF architecture {arch!r} is not read here.",
                "Only the layout of architecture 'llama' is known to this loader.",
                "a Llama-architecture GGUF, or the safetensors folder of the same model.",
            )
        heads = fields["llama.attention.head_count"]
        width = fields["llama.embedding_length"]
        return cls(
            vocab_size=fields.get("llama.vocab_size") or len(fields["tokenizer.ggml.tokens"]),
            d_model=width,
            n_layers=fields["llama.block_count"],
            n_heads=heads,
            n_kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=fields.get("llama.rope.dimension_count", width // heads),
            d_ff=fields["llama.feed_forward_length"],
            max_len=fields["llama.context_length"],
            rope_theta=fields.get("llama.rope.freq_base", 10_000.0),
            norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
            eos_ids=(fields["tokenizer.ggml.eos_token_id"],),
            name=str(fields.get("general.name", "model")),
        )


def _rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (transformers 4), or nothing."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_len=rope["original_max_position_embeddings"],
        )
    raise _unsupported("rope_type", kind, "the positions would be encoded wrongly")


def _unsupported(field: str, value: object, reason: str) -> ModelError:
    return ModelError(
        f"config.json asks for {field} = {value!r}, which these blocks do not compute.",
        f"Loading it all the same would give wrong text: {reason}.",
        "a checkpoint without it.",
    )
