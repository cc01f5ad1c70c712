"""How surprised a model is by a text: the exponential of the mean loss of its tokens.

A perplexity of n means that the model is as unsure as if it chose among n equally likely tokens each time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.models.cache import KVCache
from llmcourse.models.sizes import at_least
from llmcourse.models.transformer import Transformer


@torch.inference_mode()
def perplexity(model: Transformer, tokens: Tensor, *, piece: int = 0, stored: str | None = None) -> float:
    """exp of the mean of −log p(token | all before it), over tokens 1 … S−1 of [B, S].

    piece   tokens that are read at once, through a cache: the model is measured as it serves, and in
            bounded memory; 0: the whole text in one pass, without a cache
    stored  int8 or fp8: that cache in 8 bits

    Raises   ShapeError for fewer than two tokens (the first has nothing before it) or a negative piece.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ShapeError(
            f"tokens have shape {list(tokens.shape)}.",
            "A token is predicted from those before it, so a text has two tokens or more.",
            "torch.tensor([ids]) with a longer text.",
        )
    at_least(0, piece=piece)
    batch, length = tokens.shape
    cache = None
    if piece:
        cache = KVCache(model.config, batch, length, dtype=model.dtype, device=model.device, stored=stored)
    loss = 0.0
    for start in range(0, length - 1, piece or length):
        part = tokens[:, start : min(start + (piece or length), length - 1)]
        logits = model(part, cache)
        targets = tokens[:, start + 1 : start + 1 + part.shape[1]]
        loss += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
    return math.exp(loss / (batch * (length - 1)))
