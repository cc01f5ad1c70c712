"""Reading GGUF: one file that holds weights (often quantised), sizes and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcourse.errors import ModelError
from llmcourse.models.config import ModelConfig

NAMES = {
    "token_embd": "embedding",
    "output_norm": "norm",
    "output": "head",
    "attn_norm": "attention_norm",
    "attn_output": "attention.out",
    "ffn_norm": "mlp_norm",
    "ffn_down": "mlp.down",
}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Sizes, weights under this package's names (float32, dequantised) and the raw metadata."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            # An unquantised tensor is a view of the mapped file, not writeable: that one is copied.
            t.name: torch.from_numpy(array if array.flags.writeable else array.copy())
            for t in reader.tensors
            for array in [dequantize(t.data, t.tensor_type).astype(np.float32, copy=False)]
        }
    except (ValueError, IndexError, KeyError, OverflowError, NotImplementedError) as error:
        raise ModelError(
            f"{path} cannot be read as GGUF ({error}).",
            "The file is truncated, altered, of another format or in a quantisation this reader lacks.",
            "downloading it again (`llmcourse assets fetch` for the course's own model).",
        ) from error
    config = ModelConfig.from_gguf(fields)
    return config, rename(config, tensors), fields


def rename(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GGUF names to ours: Q, K and V stacked, gate and up stacked, Q and K back in half-split order."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, stem = stem.split(".")
            if stem in NAMES:
                state[f"blocks.{layer}.{NAMES[stem]}.weight"] = tensor
        elif stem in NAMES:
            state[f"{NAMES[stem]}.weight"] = tensor
    for i in range(config.n_layers):
        q, k, v, gate, up = (
            tensors[f"blk.{i}.{n}.weight"] for n in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
        )
        q, k = half_split(q, config.n_heads), half_split(k, config.n_kv_heads)
        state[f"blocks.{i}.attention.qkv.weight"] = torch.cat((q, k, v))
        state[f"blocks.{i}.mlp.gate_up.weight"] = torch.cat((gate, up))
    return state


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of [H·D, E] from rotary pairs (2i, 2i+1), as GGUF keeps them, to pairs (i, i + D/2)."""
    rows, width = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
