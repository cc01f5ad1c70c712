"""Pruning a model: magnitude, Wanda and SparseGPT, over all linear layers of its blocks.

    method       needs                     score of a weight           the weights that stay
    magnitude    nothing                   |w|                         stay as they are
    wanda        norms of the inputs       |w|·‖x‖                     stay as they are
    sparsegpt    Gram matrices             w² / [H⁻¹]_jj               move to make up for those that went
    wanda+move   Gram matrices             |w|·‖x‖                     move in the same way

    prune(model, "wanda", Pattern(0.5), tokens)
    sparsity_of(model)["all"]                    0.5

All but the first read some thousand tokens, block by block: each block is pruned for the inputs that it
really gets behind the pruned ones before it. Nothing is trained. Embedding and output head, one table in
small models, stay.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmcourse.compress.calibrate import Inputs, block_by_block, layers_of
from llmcourse.compress.masks import Pattern, keep, magnitude_scores, wanda_scores
from llmcourse.compress.sparsegpt import DAMP, damped, sparsegpt, update
from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.models.transformer import Transformer

METHODS = ("magnitude", "wanda", "wanda+move", "sparsegpt")


@dataclass(frozen=True)
class Pruned:
    """What pruning did: the share of zeros over all linear layers of the blocks, and the seconds it took."""

    method: str
    pattern: Pattern
    sparsity: float
    seconds: float


def pruned_weight(
    weight: Tensor, inputs: Inputs | None, method: str, pattern: Pattern, damp: float = DAMP
) -> Tensor:
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
    if method == "sparsegpt":
        return sparsegpt(weight, inputs.gram, pattern, damp=damp)
    mask = wanda_mask(weight, inputs.norm, pattern)
    return weight * mask if method == "wanda" else update(weight, damped(inputs.gram, damp), mask)


def wanda_mask(weight: Tensor, norm: Tensor, pattern: Pattern) -> Tensor:
    """Which weights [N, K] stay by Wanda's score, of those in a row."""
    return keep(wanda_scores(weight, norm), replace(pattern, per="row"))


@torch.no_grad()
def prune(
    model: Transformer,
    method: str = "sparsegpt",
    pattern: Pattern | None = None,
    tokens: Tensor | None = None,
    *,
    rows: int = 1,
    first: int | None = None,
    damp: float = DAMP,
) -> Pruned:
    """Set weights of all linear layers of a model's blocks to zero, in place.

    tokens   [B, S] of text for wanda and sparsegpt to read; a few thousand are enough
    rows     sequences that are read at once
    damp     of SparseGPT: more where tokens are few
    first    prune so many blocks, from the first on, and leave the rest (quick, to see what a method does)

    Raises   UnknownNameError, ShapeError.
    """
    pattern = pattern or Pattern()
    started = time.perf_counter()
    part = model if first is None else front(model, first)
    if tokens is None:
        for layer in layers_of(part).values():
            layer.weight.copy_(pruned_weight(layer.weight, None, method, pattern))
    else:

        def compress(name: str, layer: nn.Linear, inputs: Inputs) -> Tensor:
            return pruned_weight(layer.weight, inputs, method, pattern, damp)

        block_by_block(part, tokens, compress, rows=rows)
    return Pruned(method, pattern, sparsity_of(part)["all"], time.perf_counter() - started)


def front(model: Transformer, blocks: int) -> Transformer:
    """The model with its first blocks only; the same modules, not copies."""
    part = copy.copy(model)
    part._modules = dict(model._modules)
    part.blocks = model.blocks[:blocks]
    return part


def sparsity_of(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each linear layer of the blocks by name, and in "all" of them."""
    layers = layers_of(model)
    zeros = {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}
    total = sum(layer.weight.numel() for layer in layers.values())
    shares = {name: zeros[name] / layer.weight.numel() for name, layer in layers.items()}
    return shares | {"all": sum(zeros.values()) / max(1, total)}
