"""Reading a Hugging Face checkpoint folder: config.json and *.safetensors. Never pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from llmcourse.errors import ModelError
from llmcourse.models.config import ModelConfig

NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
}
BLOCK_NAMES = {
    "input_layernorm.": "attention_norm.",
    "self_attn.o_proj.": "attention.out.",
    "self_attn.q_norm.": "attention.q_norm.",
    "self_attn.k_norm.": "attention.k_norm.",
    "post_attention_layernorm.": "mlp_norm.",
    "mlp.down_proj.": "mlp.down.",
}


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and weights (as stored) of a Llama, Mistral, Qwen2 or Qwen3 checkpoint folder."""
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
        config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
        tensors = {name: t for file in files for name, t in load_file(file).items()}
    except (json.JSONDecodeError, SafetensorError) as error:
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
        for kind in kinds:
            parts = [tensors[f"{source}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            state[f"{target}attention.qkv.{kind}"] = torch.cat(parts)
        parts = [tensors[f"{source}mlp.{p}_proj.weight"] for p in ("gate", "up")]
        state[f"{target}mlp.gate_up.weight"] = torch.cat(parts)
    return state
