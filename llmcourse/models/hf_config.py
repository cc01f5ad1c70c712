"""`config.json` of Hugging Face checkpoints, in this package's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcourse.errors import ModelError
from llmcourse.models.config import ModelConfig
from llmcourse.models.sizes import LatentSizes, RopeScaling

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "deepseek_v3")


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Sizes of a Llama, Mistral, Qwen2, Qwen3 or (dense) DeepSeek-V3 checkpoint.

    Raises ModelError for another family, or for a feature (experts, an unknown RoPE scaling, an activation
    other than SiLU) that these blocks would silently compute wrongly.
    """
    family = str(hf.get("model_type", "unknown"))
    if family not in FAMILIES:
        raise ModelError(
            f"model_type {family!r} is not one of {', '.join(FAMILIES)}.",
            "Other families order their layers differently, so the result would be wrong text.",
            "a checkpoint of one of these families, e.g. SmolLM2, Llama 3.2 or Qwen3.",
        )
    if (act := hf.get("hidden_act", "silu")) != "silu":
        raise _unsupported("hidden_act", act, "the feed-forward block here is SwiGLU, with SiLU")
    if hf.get("mlp_bias") or (family != "qwen2" and hf.get("attention_bias")):
        raise _unsupported("attention_bias/mlp_bias", True, "these blocks keep no such bias")
    try:
        heads, width, depth = hf["num_attention_heads"], hf["hidden_size"], hf["num_hidden_layers"]
        rope = _rope(hf)
        layers, window = _layers(family, hf, depth)
        latent = _latent(hf) if family == "deepseek_v3" else None
        eos = hf.get("eos_token_id")
        return ModelConfig(
            vocab_size=hf["vocab_size"],
            d_model=width,
            n_layers=depth,
            n_heads=heads,
            n_kv_heads=heads if latent else hf.get("num_key_value_heads") or heads,
            head_dim=latent.qk_dim if latent else hf.get("head_dim") or width // heads,
            d_ff=hf["intermediate_size"],
            max_len=hf.get("max_position_embeddings", 2048),
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
            rope_scaling=_rope_scaling(rope, hf),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            name=str(hf.get("_name_or_path") or family),
            layers=layers,
            window=window,
            latent=latent,
        )
    except KeyError as missing:
        raise ModelError(
            f"config.json has no {missing}.",
            "The sizes of the layers cannot be guessed.",
            "a complete checkpoint folder as `save_pretrained` writes it.",
        ) from missing


def _layers(family: str, hf: Mapping[str, Any], depth: int) -> tuple[tuple[str, ...], int]:
    """The kind of each layer (none: attention everywhere) and the window of those that slide."""
    if family == "deepseek_v3":
        dense = hf.get("first_k_dense_replace", 0)
        if dense < depth:
            reason = "layers behind the first ones are mixtures of experts"
            raise _unsupported("first_k_dense_replace", dense, reason)
        return ("latent",) * depth, 0
    window = hf.get("sliding_window")
    if not window or (family != "mistral" and not hf.get("use_sliding_window")):
        return (), 0
    if family == "mistral":
        return ("window",) * depth, window
    kinds = hf.get("layer_types") or [
        "full_attention" if i < hf["max_window_layers"] else "sliding_attention" for i in range(depth)
    ]
    return tuple("window" if kind == "sliding_attention" else "attention" for kind in kinds), window


def _latent(hf: Mapping[str, Any]) -> LatentSizes:
    if not hf.get("rope_interleave", True):
        raise _unsupported("rope_interleave", False, "rows are put in order for interleaved pairs")
    return LatentSizes(
        q_rank=hf.get("q_lora_rank") or 0,
        kv_rank=hf["kv_lora_rank"],
        nope_dim=hf["qk_nope_head_dim"],
        rope_dim=hf["qk_rope_head_dim"],
        v_dim=hf["v_head_dim"],
    )


def _rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (transformers 4), or nothing."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _rope_scaling(rope: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeScaling:
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
    if kind == "yarn":
        if not rope.get("truncate", True):
            raise _unsupported("rope_parameters.truncate", False, "the band's edges are whole numbers here")
        return RopeScaling(
            "yarn",
            factor=rope["factor"],
            original_max_len=rope.get("original_max_position_embeddings") or hf["max_position_embeddings"],
            beta_slow=rope.get("beta_slow") or 1.0,
            beta_fast=rope.get("beta_fast") or 32.0,
            attention_factor=rope.get("attention_factor"),
            mscale=rope.get("mscale") or 0.0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
        )
    # "dynamic" and "longrope" change their angles once a text grows long: keys already cached were turned by
    # the old ones.
    raise _unsupported("rope_type", kind, "the positions would be encoded wrongly")


def _unsupported(field: str, value: object, reason: str) -> ModelError:
    return ModelError(
        f"config.json asks for {field} = {value!r}, which these blocks do not compute.",
        f"Loading it all the same would give wrong text: {reason}.",
        "a checkpoint without it.",
    )
