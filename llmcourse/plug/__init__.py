"""Plug your code into the package, so that the package runs on it.

    from llmcourse.plug import plug, points

    with plug(sum_to=my_sum_to, topological_order=my_order) as used:
        fit(model, digits, epochs=1)      # trained through your code
    used                                  # a table: how often each of them ran

A point is a place in the package where one function can stand for another. `points()` lists them with
the signature that each expects. After the block the package's own code is back, whatever happened in it.
What your function returns is checked where it is used; what it raises says at which point it was.

`point` holds the mechanism, `autograd` the points of `llmcourse.autograd`; those of `llmcourse.models` are
in `kernels`, `transformer`, `flash`, `attention_variants` and `subquadratic`, those of
`llmcourse.train.alignment` in `alignment`, of tokenizers and fine-tuning in `language_model`, of training
in little memory in `training_memory`, of a training step in `optimizers`; those of
`llmcourse.compress` in `quantization`. `same_text` compares what a model
says with and without a plug.
"""

from llmcourse.plug import (  # they register their points
    alignment,
    attention_variants,
    autograd,
    distillation,
    flash,
    kernels,
    language_model,
    lora,
    optimizers,
    pruning,
    quantization,
    subquadratic,
    training_memory,
    transformer,
)
from llmcourse.plug.point import Plug, PlugError, Point, plug, points, register

__all__ = [
    "Plug",
    "PlugError",
    "Point",
    "alignment",
    "attention_variants",
    "autograd",
    "distillation",
    "flash",
    "kernels",
    "language_model",
    "lora",
    "optimizers",
    "plug",
    "points",
    "pruning",
    "quantization",
    "register",
    "subquadratic",
    "training_memory",
    "transformer",
]
