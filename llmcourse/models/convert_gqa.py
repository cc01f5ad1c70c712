"""From multi-head to grouped-query attention without training anew (Ainslie et al. 2023, arXiv:2305.13245).

The key and value projections of the heads of a group become one. Taking their mean keeps something of all of
them; taking the first keeps one and forgets the others; a random one remembers nothing. Queries, and all
other weights, stay as they are. What the pooled heads then lack, a short training (*uptraining*) gives back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from llmcourse.errors import ModelError, UnknownNameError
from llmcourse.models.config import ModelConfig
from llmcourse.models.loading import assemble
from llmcourse.models.transformer import Transformer

Pooling = Literal["mean", "first", "random"]


def to_gqa(model: Transformer, n_kv_heads: int, *, how: Pooling = "mean", seed: int = 0) -> Transformer:
    """A copy of `model` whose query heads share `n_kv_heads` key/value heads.

    n_kv_heads   a divisor of the key/value heads that the model has; neighbours form a group
    how          mean: the average of the group's heads; first: the group's first head; random: new weights of
                 the same spread, drawn from `seed` (a control)

    Raises ModelError when the model has layers without key/value heads, or the heads do not divide.
    """
    config = model.config
    _check(config, n_kv_heads, how)
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if ".mixer.qkv." in name:
            state[name] = _pool(state[name], config, n_kv_heads, how, generator)
    converted = assemble(replace(config, n_kv_heads=n_kv_heads), state)
    converted.rope.to(model.device, model.dtype)
    return converted.train(model.training)


def _pool(
    stacked: Tensor, config: ModelConfig, n_kv_heads: int, how: Pooling, generator: torch.Generator
) -> Tensor:
    """The stacked Q, K, V weight [(Hq + 2·Hkv)·D, E] (or bias, without E) with fewer K and V heads."""
    queries, keys, values = stacked.unflatten(0, (-1, config.head_dim)).split(
        [config.n_heads, config.n_kv_heads, config.n_kv_heads]
    )

    def group(heads: Tensor) -> Tensor:
        groups = heads.unflatten(0, (n_kv_heads, -1))  # [Hkv, heads of a group, D, …]
        if how == "mean":
            return groups.mean(1)
        if how == "first":
            return groups[:, 0]
        noise = torch.randn(groups[:, 0].shape, generator=generator)
        return noise.to(heads.device, heads.dtype) * heads.std()

    return torch.cat((queries, group(keys), group(values))).flatten(0, 1)


def _check(config: ModelConfig, n_kv_heads: int, how: str) -> None:
    if how not in get_args(Pooling):
        raise UnknownNameError(
            f"heads cannot be joined by {how!r}.",
            "A group's new head is made from the old ones, or drawn anew.",
            f"how = one of {', '.join(get_args(Pooling))}.",
        )
    if others := sorted(set(config.kinds) - {"attention", "window"}):
        raise ModelError(
            f"{config.name} has layers of kind {others[0]!r}.",
            "Only attention layers with key and value heads can share them.",
            "a model whose layers are all attention or window.",
        )
    if n_kv_heads < 1 or config.n_kv_heads % n_kv_heads:
        fits = [n for n in range(1, config.n_kv_heads + 1) if config.n_kv_heads % n == 0]
        raise ModelError(
            f"{config.n_kv_heads} key/value heads cannot be joined into {n_kv_heads}.",
            "Every group joins the same number of heads.",
            f"n_kv_heads = one of {fits}.",
        )
