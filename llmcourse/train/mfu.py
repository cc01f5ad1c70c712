"""How much of a processor's arithmetic a training run uses: model FLOPs utilisation (MFU).

A weight is multiplied once for each token in the forward pass and twice in the backward pass (for the
gradient of what it read, and for its own); a multiplication with its addition counts as two operations. So a
token costs 6 FLOPs for each of the N weights that take part in a matrix product (Kaplan et al. 2020,
arXiv:2001.08361). An embedding that is only looked up does not count; tied to the output head, it counts as
the head. Attention adds the products of queries with keys and of weights with values: 12·H·D·S in each layer
for S tokens of context.

    MFU = FLOPs a token × tokens a second / the processor's peak

(Chowdhery et al. 2022, arXiv:2204.02311, appendix B.) Recomputed activations do not count, and the half of
the scores that a causal mask throws away does: the convention, so that figures of different systems compare.
"""

from __future__ import annotations

import torch
from torch import nn

from llmcourse.errors import CourseError
from llmcourse.models.config import ModelConfig

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class UncountedLayerError(CourseError, NotImplementedError):
    """A layer whose arithmetic the 6·N + 12·L·H·D·S of transformers does not describe."""


def matmul_params(model: nn.Module) -> int:
    """Weights that every token is multiplied with: those of the linear layers, a tied head included."""
    weights = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)}
    return sum(weights.values())


def attention_flops(config: ModelConfig, length: int) -> int:
    """Training FLOPs a token of the scores and weighted sums in all layers, at `length` tokens of context.

    Raises UncountedLayerError for a model with other layers than attention and windows of it.
    """
    total = 0
    for kind in config.kinds:
        if kind not in ("attention", "window"):
            raise UncountedLayerError(
                f"{config.name} has layers of kind {kind!r}.",
                "This count knows the two products of softmax attention; such a layer does something else.",
                "torch.utils.flop_counter.FlopCounterMode around one training step.",
            )
        seen = min(length, config.window + config.sinks) if kind == "window" else length
        total += 12 * config.n_heads * config.head_dim * seen
    return total


def flops_per_token(model: nn.Module, config: ModelConfig, length: int) -> int:
    """Training FLOPs a token, forward and backward: 6·N + 12·L·H·D·S."""
    return 6 * matmul_params(model) + attention_flops(config, length)


def peak_flops(
    device: str | torch.device, dtype: torch.dtype = torch.float32, *, tf32: bool = False
) -> float:
    """FLOP/s at best: a GPU's published dense peak; of a CPU the rate of a large product, measured here."""
    device = torch.device(device)
    if device.type != "cuda":
        from llmcourse.bench.ceilings import matmul_rate

        return matmul_rate("cpu", dtype)
    from llmcourse.hardware import gpu

    return gpu(torch.cuda.get_device_name(device)).peak["tf32" if tf32 else FORMATS[dtype]]


def mfu(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """The share of `peak` (FLOP/s) that a run of that speed uses."""
    return tokens_per_s * flops_per_token / peak
