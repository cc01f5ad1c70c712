"""A small model of the real one's shape, with grouped queries, and inputs with outliers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build

CONFIG = ModelConfig(
    vocab_size=61,
    d_model=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    d_ff=72,
    max_len=64,
    name="small",
)


def small_model(seed: int = 0, **changes: object) -> Transformer:
    """Random weights as large as a trained model's, norms that are not all 1, two features far larger."""
    model = build(Transformer, replace(CONFIG, **changes), seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.embedding.weight *= 20
        for name, p in model.named_parameters():
            if name.endswith("norm.weight") and "blocks" in name:
                p += 0.3 * torch.randn(p.shape, generator=draw)
                p[[3, min(17, len(p) - 1)]] *= 12
            if name.endswith("bias"):
                p += 0.1 * torch.randn(p.shape, generator=draw)
    return model.eval().requires_grad_(False)


def some_tokens(batch: int = 4, length: int = 33, seed: int = 0) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))
