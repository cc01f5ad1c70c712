"""What the small trainings of notebook 07 share: sizes, first weights, and honest measurements."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build
from llmcourse.train.tasks import Batch, Text


def small(vocab_size: int, n_layers: int = 2, **changes: Any) -> ModelConfig:
    """A width of 64 in four heads: small enough to train in seconds, large enough to learn something."""
    sizes = dict(d_model=64, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128, max_len=64)
    return ModelConfig(vocab_size=vocab_size, n_layers=n_layers, **(sizes | changes))


def deep(vocab_size: int, n_layers: int, *, post_norm: bool, gain: float = 1.0, seed: int = 0) -> Transformer:
    """A decoder of 2017, LayerNorm and ReLU, for comparing where the norm stands.

    gain   of the initial matrices: the variance of a weight is gain² / (features it reads). PyTorch's own
           linear layers start at √(1/3); Xiong et al. 2020 (arXiv:2002.04745) analyse about 1.
    """
    config = small(vocab_size, n_layers, norm="layer", mlp="relu", post_norm=post_norm, tie_embeddings=False)
    model = build(Transformer, config, seed=seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= gain * math.sqrt(3)
    return model


@torch.no_grad()
def loss_from_prefixes(model: nn.Module, batch: Batch, every: int = 8) -> float:
    """Nats a character when a model gets only what stands before it, as it does when it generates.

    Asked at every eighth position: each is a pass of its own.
    """
    (tokens,), losses = batch.inputs, []
    for n in range(every, tokens.shape[1] + 1, every):
        losses.append(F.cross_entropy(model(tokens[:, :n])[:, -1], batch.targets[:, n - 1]).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def continue_text(model: nn.Module, text: Text, prompt: str, *, length: int, seed: int = 0) -> str:
    """`prompt` and `length` characters more, each drawn from the model's probabilities at temperature 0.7."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens: Tensor = text.encode(prompt)[None].to(device)
    for _ in range(length):
        p = (model(tokens[:, -48:])[0, -1].float().cpu() / 0.7).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(p, 1, generator=generator)[None].to(device)), dim=1)
    return text.decode(tokens[0])
