"""A trained model in another form of attention, with the weights that it has.

    narrow = with_window(model, 64, sinks=4)      # the same weights, none of them copied
    single = with_kv_heads(model, 1, mean_pool)   # fewer key/value heads, made from the old ones

Nothing is trained here. A window leaves every weight as it was and takes sight away; fewer key/value heads
change what the weights compute, and are where further training begins (Ainslie et al. 2023,
arXiv:2305.13245, found that means of heads are a better beginning than one of them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

Pool = Callable[[Tensor, int, int], Tensor]


def with_window(model: Transformer, window: int, sinks: int = 0) -> Transformer:
    """The model with sliding-window attention in place of full attention, sharing its weights.

    Raises   ShapeError for a window below 1.
    """
    kinds = tuple("window" if kind == "attention" else kind for kind in model.config.kinds)
    config = replace(model.config, layers=kinds, window=window, sinks=sinks)
    return _with_weights(config, model.state_dict(), model)


def with_kv_heads(model: Transformer, n_kv_heads: int, pool: Pool) -> Transformer:
    """The model with `n_kv_heads` key/value heads in its attention layers.

    pool   pool(weight [Hkv·D, E] or bias [Hkv·D], old heads, new heads) → the new weight or bias

    Raises   ShapeError if the query heads cannot share them.
    """
    old = model.config
    config = replace(old, n_kv_heads=n_kv_heads)
    q, kv = old.n_heads * old.head_dim, old.n_kv_heads * old.head_dim
    state = model.state_dict()
    for name, tensor in state.items():
        if ".mixer.qkv." in name:
            queries, keys, values = tensor.split([q, kv, kv])
            pooled = [pool(part, old.n_kv_heads, n_kv_heads) for part in (keys, values)]
            state[name] = torch.cat((queries, *pooled))
    return _with_weights(config, state, model)


def _with_weights(config: ModelConfig, state: dict[str, Tensor], like: Transformer) -> Transformer:
    with torch.device("meta"):
        made = Transformer(config)
    made.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        made.head.weight = made.embedding.weight
    made.rope = like.rope
    return made.eval().requires_grad_(False)
