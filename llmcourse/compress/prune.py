"""Pruning a model: magnitude, Wanda and SparseGPT, over all linear layers of its blocks.

    method       needs                     score of a weight           the weights that stay
    magnitude    nothing                   |w|                         stay as they are
    wanda        norms of the inputs       |w|·‖x‖                     stay as they are
    sparsegpt    Gram matrices             w² / [H⁻¹]_jj               move to make up for those that went

    prune(model, "wanda", Pattern(0.5), tokens)
    sparsity_of(model)["all"]                    0.5

The last two read a few thousand tokens, block by block: each block is pruned for the inputs that it really gets
behind the pruned ones before it. Nothing is trained. Embedding and output head, one table in small models, stay.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmcourse.compress.calibrate import Inputs, block_by_block, layers_of
from llmcourse.compress.masks import Pattern, keep, magnitude_scores, wanda_scores
from llmcourse.compress.sparsegpt import sparsegpt
from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.models.transformer import Transformer

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Pruned:
    """What pruning did: the share of zeros over all linear layers of the blocks, and the seconds it took."""

    method: str
    pattern: Pattern
    sparsity: float
    seconds: float


def pruned_weight(weight: Tensor, inputs: Inputs | None, method: str, pattern: Pattern) -> Tensor:
    """One layer's weight [N, K] with zeros in it: a new tensor.

    Wanda compares within a row whatever `pattern.per` says: it is defined so, and better so.

    Raises   UnknownNameError for a method that does not exist, ShapeError where it needs inputs.
    """
    if method not in METHODS:
        raise UnknownNameError(
            f"there is no pruning method {method!r}.",
            "A method says how much a weight matters, and what becomes of those that stay.",
            f"one of {', '.join(METHODS)}.",
        )
    if method == "magnitude":
        return weight * keep(magnitude_scores(weight), pattern)
    if inputs is None:
        raise ShapeError(
            f"{method} came without a layer's inputs.",
            "It weighs a weight by what it multiplies.",
            "tokens for the model to read, or Inputs.of(x); or method='magnitude'.",
        )
    if method == "wanda":
        return weight * keep(wanda_scores(weight, inputs.norm), replace(pattern, per="row"))
    return sparsegpt(weight, inputs.gram, pattern)


@torch.no_grad()
def prune(
    model: Transformer,
    method: str = "sparsegpt",
    pattern: Pattern | None = None,
    tokens: Tensor | None = None,
    *,
    rows: int = 1,
) -> Pruned:
    """Set weights of all linear layers of a model's blocks to zero, in place.

    tokens   [B, S] of text for wanda and sparsegpt to read; a few thousand are enough
    rows     sequences that are read at once

    Raises   UnknownNameError, ShapeError.
    """
    pattern = pattern or Pattern()
    started = time.perf_counter()
    if tokens is None:
        for layer in layers_of(model).values():
            layer.weight.copy_(pruned_weight(layer.weight, None, method, pattern))
    else:

        def compress(name: str, layer: nn.Linear, inputs: Inputs) -> Tensor:
            return pruned_weight(layer.weight, inputs, method, pattern)

        block_by_block(model, tokens, compress, rows=rows)
    return Pruned(method, pattern, sparsity_of(model)["all"], time.perf_counter() - started)


def sparsity_of(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each linear layer of the blocks by name, and in "all" of them."""
    layers = layers_of(model)
    zeros = {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}
    total = sum(layer.weight.numel() for layer in layers.values())
    shares = {name: zeros[name] / layer.weight.numel() for name, layer in layers.items()}
    return shares | {"all": sum(zeros.values()) / max(1, total)}
