"""GPTQ: round one column at a time, and let the columns to come make up for it (Frantar et al. 2022).

Rounding to nearest treats every weight by itself. But a layer's output is a sum: an error in one column can
be undone in part by moving others, as far as their inputs go together. Which way, the Gram matrix of the
inputs says. With H = G + λI and a column j just rounded from w_j to q_j, the remaining columns F move by

    w_F ← w_F − (w_j − q_j) / [H_F⁻¹]_jj · [H_F⁻¹]_jF

(optimal brain surgeon, Hassibi & Stork 1992), the best answer of the others to that error; then column j is
done, leaves H, and the next is rounded. Three observations make this fast:

1. All rows can use the same order of columns, so that H_F⁻¹ is the same for all of them.
2. The rows of H_F⁻¹ that are needed, each for its own F, are the rows of one upper Cholesky factor U of H⁻¹:
   [H_F⁻¹]_jF / [H_F⁻¹]_jj = U_jF / U_jj. No inverse is ever updated, and no error adds up in doing so.
3. A block's corrections to the columns behind it can wait until the block is done and be one matrix product.

λ, a small share of H's mean diagonal (damping), keeps features that hardly ever move from being used as
levers.

(arXiv:2210.17323; LDLQ of Chee et al. 2023, arXiv:2307.13304, is the same algorithm.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmcourse.compress.inverse_factor import inverse_factor
from llmcourse.compress.quantize import TENSOR, Quantized, Scheme, encode, grid, require_matrix
from llmcourse.errors import ShapeError


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    block: int = 128,
    order: bool = True,
    grids_of: Tensor | None = None,
) -> Quantized:
    """A weight [N, K] in `scheme`, its codes chosen for inputs with Gram matrix [K, K].

    damping   λ as a share of the mean of gram's diagonal
    block     columns between two updates of everything behind them (speed alone: the result is the same)
    order     columns whose inputs are largest come first, while many others can still make up for them; the
              grids are then those of the weight as it came. Otherwise columns go from left to right, and each
              group gets its grid when its turn comes, from the weights as corrected so far
    grids_of  a weight [N, K] whose groups set the grids instead: with few bits, clipped ones (`awq.clip`)
              serve better than those that reach to the largest weight

    Raises ShapeError for matrices that do not fit each other, a damping that is not positive, or a Gram
    matrix that cannot be one.
    """
    require_matrix(weight)
    _check(weight, gram, damping, block)
    columns = weight.shape[1]
    size = columns if scheme.group in (None, TENSOR) else int(scheme.group)
    w = weight.to(gram.dtype, copy=True)
    if grids_of is not None and grids_of.shape != weight.shape:
        raise ShapeError(
            f"grids of a weight {list(grids_of.shape)} came for one of {list(weight.shape)}.",
            "Each group of a weight has its own grid.",
            "grids_of = clip(weight, gram, scheme), of the same weight.",
        )
    scale, zero = grid(w if grids_of is None else grids_of, scheme)
    sequence = gram.diagonal().argsort(descending=True, stable=True) if order else None
    late = sequence is None and grids_of is None and size < columns  # grids found on the way
    if sequence is not None:
        w = w[:, sequence]
    group_of = [k // size for k in (range(columns) if sequence is None else sequence.tolist())]
    factor = damped_factor(gram, damping, sequence)
    column = replace(scheme, group=None)  # of one column every row has one scale
    codes = torch.empty(w.shape, dtype=torch.int8 if scheme.low else torch.uint8, device=w.device)
    step = -(-block // size) * size if late else block  # a group's weights must be up to date when it begins
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            g = group_of[j]
            if late and j % size == 0:
                here = grid(w[:, j : j + size], scheme)
                scale[:, g] = here[0][:, 0]
                if zero is not None and here[1] is not None:
                    zero[:, g] = here[1][:, 0]
            s, z = scale[:, g : g + 1], None if zero is None else zero[:, g : g + 1]
            code = encode(w[:, j : j + 1], s, z, column)
            point = Quantized(code, s, z, column, (len(w), 1)).dequantize()
            error = (w[:, j : j + 1] - point) / factor[j, j]
            w[:, j:end] -= error * factor[j, j:end]
            errors[:, j - start : j - start + 1] = error
            codes[:, j : j + 1] = code
        w[:, end:] -= errors @ factor[start:end, end:]
    if sequence is not None:
        codes = codes[:, sequence.argsort()]
    return Quantized(codes, scale, zero, scheme, (weight.shape[0], columns))


def damped_factor(gram: Tensor, damping: float, sequence: Tensor | None = None) -> Tensor:
    """The upper Cholesky factor U of (G + λI)⁻¹ = Uᵀ U, its features taken in `sequence`; [K, K].

    Computed in float64: a Gram matrix of fewer rows than features is singular but for λ. A feature that was
    zero throughout gets a diagonal of 1, moves nothing and is moved by nothing.
    """
    h = gram.double().clone()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * mean
    if sequence is not None:
        h = h[sequence][:, sequence]
    return inverse_factor(h).to(gram.dtype)


def _check(weight: Tensor, gram: Tensor, damping: float, block: int) -> None:
    columns = weight.shape[1]
    if gram.shape != (columns, columns):
        raise ShapeError(
            f"a weight {list(weight.shape)} came with a Gram matrix {list(gram.shape)}.",
            "The Gram matrix has a row and a column for each input feature of the layer.",
            "calibrate(model, tokens)[name].gram of the same layer.",
        )
    if not damping > 0 or block < 1:
        raise ShapeError(
            f"damping = {damping}, block = {block}.",
            "Without damping a Gram matrix of few rows has no inverse; a block holds a column or more.",
            "damping = 0.01, block = 128.",
        )
