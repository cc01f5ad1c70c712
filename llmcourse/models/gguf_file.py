"""Reading GGUF: one file that holds weights (often quantised), sizes and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcourse.errors import ModelError
from llmcourse.models.config import ModelConfig
from llmcourse.models.rope import half_split

NAMES = {
    "token_embd": "embedding",
    "output_norm": "norm",
    "output": "head",
    "attn_norm": "mixer_norm",
    "attn_output": "mixer.out",
    "ffn_norm": "mlp_norm",
    "ffn_down": "mlp.down",
}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Sizes, weights under this package's names (float32, dequantised) and the raw metadata."""
    from gguf.quants import dequantize

    with _readable(path):
        reader, fields = _opened(path)
        tensors = {
            # An unquantised tensor is a view of the mapped file, not writeable: that one is copied.
            t.name: torch.from_numpy(array if array.flags.writeable else array.copy())
            for t in reader.tensors
            for array in [dequantize(t.data, t.tensor_type).astype(np.float32, copy=False)]
        }
    config = config_from(fields)
    return config, rename(config, tensors), fields


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """The raw metadata alone: sizes, tokenizer, chat template."""
    with _readable(path):
        return _opened(path)[1]


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return reader, {name: field.contents() for name, field in reader.fields.items()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError, KeyError, OverflowError, NotImplementedError) as error:
        raise ModelError(
            f"{path} cannot be read as GGUF ({error}).",
            "The file is truncated, altered, of another format or in a quantisation this reader lacks.",
            "downloading it again (`llmcourse assets fetch` for the course's own model).",
        ) from error


def config_from(fields: Mapping[str, Any]) -> ModelConfig:
    """Sizes from GGUF metadata of architecture `llama`."""
    if (arch := fields.get("general.architecture")) != "llama":
        raise ModelError(
            f"GGUF architecture {arch!r} is not read here.",
            "Only the layout of architecture 'llama' is known to this loader.",
            "a Llama-architecture GGUF, or the safetensors folder of the same model.",
        )
    heads = fields["llama.attention.head_count"]
    width = fields["llama.embedding_length"]
    return ModelConfig(
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
        state[f"blocks.{i}.mixer.qkv.weight"] = torch.cat((q, k, v))
        state[f"blocks.{i}.mlp.gate_up.weight"] = torch.cat((gate, up))
    return state
