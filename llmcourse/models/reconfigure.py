"""The same weights under another configuration, for the choices that change no weight.

A sliding window, its sinks or another stretching of the positions are decisions of the one who runs a model.
Whether the model bears them is another matter: it was trained with the ones it was trained with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llmcourse.errors import ModelError
from llmcourse.models.transformer import Transformer


def reconfigured(model: Transformer, **changes: Any) -> Transformer:
    """`model` with fields of its configuration changed, sharing its weights: no memory, no copy.

        reconfigured(model, layers=("window",) * model.config.n_layers, window=64, sinks=4)

    Raises ModelError when the change asks for weights that the model does not have.
    """
    config = replace(model.config, **changes)
    with torch.device("meta"):
        other = Transformer(config)
    have = {name: tensor.shape for name, tensor in model.state_dict().items()}
    want = {name: tensor.shape for name, tensor in other.state_dict().items()}
    if have != want:
        name = next(n for n in sorted(have | want) if have.get(n) != want.get(n))
        raise ModelError(
            f"the weight {name} has shape {_shape(have.get(name))} and would need {_shape(want.get(name))}.",
            "The same weights serve another configuration only if it asks for the same shapes.",
            "changing window, sinks, layers (attention to window or back) or rope_scaling only.",
        )
    other.rope = type(other.rope)(config).to(model.device, model.dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    if config.tie_embeddings:
        other.head.weight = other.embedding.weight
    return other.train(model.training).requires_grad_(False)


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))
