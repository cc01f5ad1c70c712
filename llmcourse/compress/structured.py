"""Structured pruning: whole neurons and whole heads go, and what is left is a smaller dense model.

A zero here and there has to be stored as a place; a row that is gone is simply not there. Every device is
faster for it, without kernels of any kind. What it costs in quality is far more: a neuron's weights matter
unequally, and all of them go.

A SwiGLU block's neuron j is row j of gate and of up and column j of down. Its part of the output is
down_j·a_j, a_j being its activation, so that taking it out changes the output by ‖down_j‖²·Σ a_j² over a
text. An attention block's unit is one key/value head with the query heads that share it: their columns of
the output projection. In both cases the unit that goes is judged by what it sends through its block's last
matrix W [E, K], whose inputs' Gram matrix G says all:

    error of taking out the columns C     tr(W_C G_CC W_Cᵀ)
    what the others may do about it       W'_S = W G_:S (G_SS)⁻¹,   the least squares fit of W a
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmcourse.compress.calibrate import calibrate, layers_of
from llmcourse.errors import ShapeError
from llmcourse.models.attention import Attention
from llmcourse.models.loading import assemble
from llmcourse.models.mlp import MLP
from llmcourse.models.transformer import Transformer


def unit_scores(weight: Tensor, gram: Tensor, size: int) -> Tensor:
    """Σ‖W_C x_C‖² for each unit C of `size` neighbouring columns of weight [N, K]: [K / size]."""
    units = weight.shape[1] // size
    w = weight.double().T.reshape(units, size, -1)  # [U, size, N]
    g = (
        gram.double().view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )  # [U, size, size]
    return (w @ w.transpose(1, 2) * g).sum((1, 2))


def refit(weight: Tensor, gram: Tensor, stay: Tensor, damp: float = 1.0) -> Tensor:
    """The weight [N, S] on the columns `stay` [S] that comes closest to weight [N, K], by the gram.

    damp   of the diagonal, as a share of its mean: the larger, the closer to weight[:, stay]. Of few tokens
           a small one fits noise.
    """
    g = gram.double()
    g = g + damp * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype, device=g.device)
    fitted = torch.linalg.solve(g[stay][:, stay], g[stay] @ weight.double().T).T
    return fitted.to(weight.dtype)


@torch.no_grad()
def shrink(
    model: Transformer,
    tokens: Tensor,
    *,
    d_ff: int | None = None,
    n_kv_heads: int | None = None,
    fit: bool = True,
) -> Transformer:
    """A smaller model: of each block the `d_ff` neurons and `n_kv_heads` key/value heads that matter most.

    tokens   [B, S] of text by which they are judged
    fit      let the matrix behind them make up for what is gone

    The query heads of a key/value head stay with it. Calibrated once, on the whole model.

    Raises   ShapeError for sizes above the model's, and for blocks other than attention and SwiGLU.
    """
    config = model.config
    d_ff = config.d_ff if d_ff is None else d_ff
    n_kv = config.n_kv_heads if n_kv_heads is None else n_kv_heads
    if not 0 < d_ff <= config.d_ff or not 0 < n_kv <= config.n_kv_heads:
        raise ShapeError(
            f"{d_ff} neurons and {n_kv} key/value heads were asked for.",
            f"The model has {config.d_ff} and {config.n_kv_heads}; at least one of each is left.",
            f"d_ff={config.d_ff // 2}, n_kv_heads={max(1, config.n_kv_heads - 1)}.",
        )
    if (
        any(type(block.mixer) is not Attention or type(block.mlp) is not MLP for block in model.blocks)
        or config.bias
    ):
        raise ShapeError(
            "the model has blocks of another kind.",
            "Neurons are taken from SwiGLU, heads from attention, both without biases.",
            "a Llama-shaped model, such as the course's own.",
        )
    seen = calibrate(model, tokens)
    group = config.n_heads // config.n_kv_heads
    state = {name: p.clone() for name, p in model.state_dict().items()}
    for i in range(config.n_layers):
        name = f"blocks.{i}.mlp"
        gate_up, down = state[f"{name}.gate_up.weight"], state[f"{name}.down.weight"]
        gram = seen[f"{name}.down"].gram
        stay = best(unit_scores(down, gram, 1), d_ff)
        state[f"{name}.gate_up.weight"] = torch.cat([half[stay] for half in gate_up.chunk(2)])
        state[f"{name}.down.weight"] = (
            refit(down, gram, stay) if fit and d_ff < config.d_ff else down[:, stay]
        )
        name = f"blocks.{i}.mixer"
        out, gram = state[f"{name}.out.weight"], seen[f"{name}.out"].gram
        heads = best(unit_scores(out, gram, group * config.head_dim), n_kv)
        q, k, v = state[f"{name}.qkv.weight"].split(
            [config.n_heads * config.head_dim] + 2 * [config.n_kv_heads * config.head_dim]
        )
        columns = rows_of(heads, group * config.head_dim)
        small = rows_of(heads, config.head_dim)
        state[f"{name}.qkv.weight"] = torch.cat([q[columns], k[small], v[small]])
        state[f"{name}.out.weight"] = (
            refit(out, gram, columns) if fit and n_kv < config.n_kv_heads else out[:, columns]
        )
        if f"{name}.qkv.bias" in state:
            bias = state[f"{name}.qkv.bias"].split([len(q), len(k), len(v)])
            state[f"{name}.qkv.bias"] = torch.cat([bias[0][columns], bias[1][small], bias[2][small]])
    smaller = replace(config, d_ff=d_ff, n_kv_heads=n_kv, n_heads=n_kv * group, name=f"{config.name}, pruned")
    return assemble(smaller, state).to(model.device, model.dtype).eval().requires_grad_(False)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def rows_of(units: Tensor, size: int) -> Tensor:
    """Indices of the rows of units of `size` rows each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def linear_parameters(model: nn.Module) -> int:
    """Weights of all linear layers of the blocks."""
    return sum(layer.weight.numel() for layer in layers_of(model).values())
