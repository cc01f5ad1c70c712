"""A trained model that sees through a window: the same weights, less sight, a cache that stops growing.

    narrow = with_window(model, 64, sinks=4)

Nothing is trained and nothing copied. What it costs is the model's to say: one that was trained with full
attention may need the sinks (Xiao et al. 2023, arXiv:2309.17453), one that was trained with the window not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llmcourse.models.transformer import Transformer


def with_window(model: Transformer, window: int, sinks: int = 0) -> Transformer:
    """The model with sliding-window attention in place of full attention, sharing its weights.

    Raises   ShapeError for a window below 1.
    """
    kinds = tuple("window" if kind == "attention" else kind for kind in model.config.kinds)
    config = replace(model.config, layers=kinds, window=window, sinks=sinks)
    with torch.device("meta"):
        made = Transformer(config)
    made.load_state_dict(model.state_dict(), assign=True)
    if config.tie_embeddings:
        made.head.weight = made.embedding.weight
    made.rope = model.rope
    return made.eval().requires_grad_(False)
