"""AWQ: make the columns that matter large before rounding to nearest (Lin et al. 2023).

A weight's rounding error is about a third of a step of its group, whether the weight is large or small.
Multiply column k by s_k > 1 and divide its input by s_k: the error, still a third of a step, now reaches
the output divided by s_k, as long as the group's step hardly grows. So the few columns that meet large
inputs should be scaled up, at the expense of all others. How far is one number a layer, searched for:

    s = a^α        a_k = mean |x_k| over a text,  α in [0, 1]

where α = 0 is rounding to nearest. The search takes the α with the smallest Σ‖W x − Ŵ x‖², which the Gram
matrix of the inputs gives without the inputs. Nothing is fitted to the text but α (and then, for each
group, by how much its largest weights are clipped), so there is little to overfit; and the codes are plain.

The division of the inputs is folded into what makes them (`fold`).

(arXiv:2306.00978.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.compress.calibrate import Inputs, layers_of
from llmcourse.compress.fold import Joint, joints
from llmcourse.compress.gptq import gptq
from llmcourse.compress.quantize import TENSOR, Quantized, Scheme, quantize
from llmcourse.models.transformer import Transformer

SHRINKS = tuple(1 - 0.05 * i for i in range(10))
"""How far a group's largest weights are drawn in, in the search for the best clip."""


@dataclass(frozen=True)
class Choice:
    """What the search found for one layer: exponent, scales [K], the error with it and with α = 0."""

    alpha: float
    scale: Tensor
    error: float
    error_rtn: float


@torch.no_grad()
def search_scale(
    weight: Tensor,
    inputs: Inputs,
    scheme: Scheme,
    *,
    steps: int = 20,
    tie: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Choice:
    """The best exponent for a weight [N, K], of 0, 1/steps, …, 1 − 1/steps.

    tie   makes scales equal that must be: see `Joint.tie`
    """
    size = inputs.absmean.float().clamp(min=1e-4)
    best: Choice | None = None
    rtn = 0.0
    for i in range(steps):
        alpha = i / steps
        scale = tie(size**alpha)
        scale = (
            scale / (scale.max() * scale.min()).sqrt()
        )  # around 1: bfloat16 scales have as many digits anywhere
        change = quantize(weight.float() * scale, scheme).dequantize() / scale - weight.float()
        error = inputs.error(change)
        rtn = error if i == 0 else rtn
        if best is None or error < best.error:
            best = Choice(alpha, scale, error, rtn)
    assert best is not None
    return best


@torch.no_grad()
def clip(weight: Tensor, gram: Tensor, scheme: Scheme, shrinks: tuple[float, ...] = SHRINKS) -> Tensor:
    """A weight [N, K] whose groups are clipped to where rounding to nearest loses least.

    A smaller range has smaller steps for everything within and a larger error for what lies beyond. Each
    group of each row takes, of `shrinks` times its own range, the one with the smallest Σ(Δw · x)² over the
    group's own features; Gram matrix [K, K].
    """
    if scheme.group == TENSOR:
        return weight
    groups, blocks = _grouped(weight.float(), scheme), _diagonal_blocks(gram.float(), scheme)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best, least = groups, torch.full(groups.shape[:2], torch.inf, device=weight.device)
    for shrink in shrinks:
        clipped = groups.clamp(shrink * low, shrink * high)
        flat = clipped.flatten(1)[:, : weight.shape[1]]
        change = _grouped(quantize(flat, scheme).dequantize(), scheme) - groups
        error = (torch.einsum("ngk,gkj->ngj", change, blocks) * change).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], clipped, best)
    return best.flatten(1)[:, : weight.shape[1]].to(weight.dtype)


@torch.no_grad()
def awq(
    model: Transformer,
    inputs: Mapping[str, Inputs],
    scheme: Scheme,
    *,
    steps: int = 20,
    clipped: bool = True,
    then_gptq: bool = False,
) -> tuple[Transformer, dict[str, Quantized]]:
    """A copy of the model with all scales folded in, and the quantized weight of each of its linear layers.

    inputs    `calibrate(model, tokens)`
    steps     exponents tried for each layer
    clipped   search for the best clip as well. Not for Q and K: a score is a product of two of their outputs,
              so that small errors of theirs grow (as in the authors' own code)
    then_gptq choose the codes by GPTQ, on the grids of the scaled and clipped weights

    The copy computes what the model does; `quantize_model(copy, lambda name, layer: codes.get(name))` is the
    quantized one.
    """
    folded = copy.deepcopy(model)
    scales: dict[str, Tensor] = {}
    for joint in joints(folded):
        if joint.name in inputs:
            scales[joint.name] = _fold_best(joint, inputs[joint.name], scheme, steps)
    codes = {}
    for name, layer in layers_of(folded).items():
        if name not in inputs:
            continue
        weight = layer.weight.float()
        scale = scales.get(name, torch.ones(1, device=weight.device))
        gram = inputs[name].gram / scale / scale.unsqueeze(-1)
        ends = clip(weight, gram, scheme) if clipped and not name.endswith("qkv") else weight
        codes[name] = gptq(weight, gram, scheme, grids_of=ends) if then_gptq else quantize(ends, scheme)
    return folded, codes


def _fold_best(joint: Joint, inputs: Inputs, scheme: Scheme, steps: int) -> Tensor:
    scale = search_scale(joint.layer.weight, inputs, scheme, steps=steps, tie=joint.tie).scale
    joint.fold(scale)
    return scale


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[N, K] → [N, G, group]; a short last group is filled up with zeros."""
    size = scheme.group or weight.shape[1]
    return F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def _diagonal_blocks(gram: Tensor, scheme: Scheme) -> Tensor:
    """The Gram matrix of each group's own features: [K, K] → [G, group, group]."""
    size = scheme.group or len(gram)
    missing = -len(gram) % size
    padded = F.pad(gram, (0, missing, 0, missing))
    return torch.stack([padded[i : i + size, i : i + size] for i in range(0, len(padded), size)])
