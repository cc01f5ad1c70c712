"""The same weights under another configuration, for the choices that change no weight.

A sliding window, its sinks or another stretching of the positions are decisions of the one who runs a model.
Whether the model bears them is another matter: it was trained with the ones it was trained with. One that was
trained with full attention may need the sinks (Xiao et al. 2023, arXiv:2309.17453).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmcourse.errors import ModelError
from llmcourse.models.loading import assemble
from llmcourse.models.transformer import Transformer


def reconfigured(model: Transformer, **changes: Any) -> Transformer:
    """`model` with fields of its configuration changed, sharing its weights: no memory, no copy.

        reconfigured(model, rope_scaling=RopeScaling("linear", factor=4.0))

    Raises ModelError when the change asks for weights that the model does not have, or leaves some out.
    """
    other = assemble(replace(model.config, **changes), model.state_dict())
    other.rope.to(model.device, model.dtype)
    return other.train(model.training).requires_grad_(False)


def with_window(model: Transformer, window: int, sinks: int = 0) -> Transformer:
    """`model` with sliding-window attention in place of full attention, sharing its weights.

    Raises ShapeError for a window below 1, and ModelError for a model without such attention.
    """
    if not {"attention", "window"} & set(model.config.kinds):
        raise ModelError(
            f"the layers of {model.config.name} are {', '.join(sorted(set(model.config.kinds)))}.",
            "A window narrows attention to keys that are kept one by one.",
            "a model with 'attention' layers.",
        )
    kinds = tuple("window" if kind == "attention" else kind for kind in model.config.kinds)
    return reconfigured(model, layers=kinds, window=window, sinks=sinks)
