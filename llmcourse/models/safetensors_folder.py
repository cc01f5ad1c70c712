"""Reading a Hugging Face checkpoint folder: config.json and *.safetensors. Never pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from llmcourse.errors import ModelError
from llmcourse.models.config import ModelConfig
from llmcourse.models.rope import half_split
from llmcourse.models.sizes import LatentSizes

NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
}
BLOCK_NAMES = {
    "input_layernorm.": "mixer_norm.",
    "self_attn.o_proj.": "mixer.out.",
    "self_attn.q_norm.": "mixer.q_norm.",
    "self_attn.k_norm.": "mixer.k_norm.",
    "self_attn.q_a_proj.": "mixer.q_down.",
    "self_attn.q_a_layernorm.": "mixer.q_norm.",
    "self_attn.kv_a_layernorm.": "mixer.kv_norm.",
    "self_attn.kv_b_proj.": "mixer.kv_up.",
    "post_attention_layernorm.": "mlp_norm.",
    "mlp.down_proj.": "mlp.down.",
}


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and weights (as stored) of a checkpoint folder of one of the families that are known here."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json.",
            "A checkpoint folder holds config.json, tokenizer.json and *.safetensors.",
            "the folder that `save_pretrained` wrote, or a .gguf file.",
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no .safetensors file.",
            "Weights in pickle files (.bin, .pt) are not read: opening one can run any code.",
            "converting them with transformers' save_pretrained, which writes safetensors.",
        )
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = ModelConfig.from_hf(fields if isinstance(fields, dict) else {})
        tensors = {name: t for file in files for name, t in load_file(file).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be read ({error}).",
            "A file of the checkpoint is truncated or is not what its name says.",
            "downloading the folder again.",
        ) from error
    try:
        return config, rename(config, tensors)
    except KeyError as missing:
        raise ModelError(
            f"{folder} lacks the tensor {missing}.",
            "Every layer that config.json promises must be in the .safetensors files.",
            "downloading the folder again; a shard may be missing.",
        ) from missing


def rename(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names to ours, with Q, K, V and gate, up stacked."""
    state = {
        new + name.removeprefix(old): tensor
        for name, tensor in tensors.items()
        for old, new in NAMES.items()
        if name.startswith(old)
    }
    kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
    for i in range(config.n_layers):
        source, target = f"model.layers.{i}.", f"blocks.{i}."
        for name, tensor in tensors.items():
            for old, new in BLOCK_NAMES.items():
                if name.startswith(source + old):
                    state[target + new + name.removeprefix(source + old)] = tensor
        if config.latent:
            state |= latent_weights(config.latent, tensors, source, target)
        else:
            for kind in kinds:
                parts = [tensors[f"{source}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                state[f"{target}mixer.qkv.{kind}"] = torch.cat(parts)
        parts = [tensors[f"{source}mlp.{p}_proj.weight"] for p in ("gate", "up")]
        state[f"{target}mlp.gate_up.weight"] = torch.cat(parts)
    return state


def latent_weights(
    sizes: LatentSizes, tensors: dict[str, Tensor], source: str, target: str
) -> dict[str, Tensor]:
    """DeepSeek's projections whose rows hold rotary pairs (2i, 2i + 1), as halves (i, i + D/2)."""
    q = tensors[f"{source}self_attn.{'q_b_proj' if sizes.q_rank else 'q_proj'}.weight"]
    kv = tensors[f"{source}self_attn.kv_a_proj_with_mqa.weight"]
    heads = q.view(-1, sizes.qk_dim, q.shape[-1])
    q = torch.stack([_halves_last(head, sizes.rope_dim) for head in heads]).view(q.shape)
    return {
        f"{target}mixer.q_up.weight": q,
        f"{target}mixer.kv_down.weight": _halves_last(kv, sizes.rope_dim),
    }


def _halves_last(weight: Tensor, rope_dim: int) -> Tensor:
    return torch.cat((weight[:-rope_dim], half_split(weight[-rope_dim:], 1)))
