"""SparseGPT: remove weights one column at a time, and let those that stay make up for them.

A layer's output error is quadratic in the change of a row w of its weight: δ G δᵀ, with G = Σ x xᵀ. If w_j
must become zero and the weights behind it may move, the least error is the optimal brain surgeon's (Hassibi
& Stork 1993), with H⁻¹ the inverse of G's part that is still free:

    δ = −w_j / [H⁻¹]_jj · H⁻¹_j            error  w_j² / [H⁻¹]_jj

so w_j² / [H⁻¹]_jj is what removing a weight costs *after* the others have moved. Which weights go differs
from row to row, and each row would need inverses of its own. The trick of the paper (Frantar & Alistarh
2023, arXiv:2301.00774): let only weights to the right of a column move. Then all rows share one sequence of
inverses, and the rows of one Cholesky factor hold it: with H⁻¹ = UᵀU, U upper triangular, the inverse of the
part from column j on is U[j:, j:]ᵀ U[j:, j:], its first row U_jj · U_j,j:.

Masks are chosen for `block` columns at a time, by the weights as they are by then; updates within a block
are made at once, those behind it together, as one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.compress.inverse_factor import inverse_factor
from llmcourse.compress.masks import Pattern, keep, require_matrix
from llmcourse.errors import ShapeError

DAMP = 0.1  # the paper takes 0.01; with a few thousand tokens, 0.1 leaves the real model's perplexity lower


def damped(gram: Tensor, damp: float = DAMP) -> Tensor:
    """gram [K, K] + damp · mean(diagonal) · 1: positive definite.

    A feature that never occurs has a diagonal of zero; it is given one, as its weights do not matter.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return hessian


@torch.no_grad()
def sparsegpt(
    weight: Tensor, gram: Tensor, pattern: Pattern | None = None, *, block: int = 128, damp: float = DAMP
) -> Tensor:
    """The weight [N, K] with zeros by `pattern` (half, unless given) and the rest moved; a new tensor.

    gram    Σ x xᵀ [K, K] over the layer's inputs: `calibrate(model, tokens)[name].gram`
    block   columns for which a mask is chosen at a time, before any of them is removed; with an n:m pattern
            masks are chosen for m columns, and so many columns are updated before the rest is
    damp    is added to the diagonal, as a share of its mean: fewer tokens than features make G singular

    Of an unstructured pattern every *block* has its share of zeros, chosen among all rows of it.

    Cost     O(K³ + N·K²).
    Raises   ShapeError for shapes that do not fit together.
    """
    pattern = pattern or Pattern()
    require_matrix(weight)
    columns = weight.shape[1]
    if gram.shape != (columns, columns) or block < 1:
        raise ShapeError(
            f"gram {list(gram.shape)} and block {block} came with a weight of shape {list(weight.shape)}.",
            "The Gram matrix has a row and a column for each of the weight's inputs; a block has columns.",
            f"a gram of shape {[columns, columns]}, and block=128.",
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(wide).clone()
    u = inverse_factor(damped(gram.to(wide), damp))
    block = -(-block // pattern.m) * pattern.m if pattern.m else block
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        prune_block(w[:, start:stop], u[start:stop, start:stop], w[:, stop:], u[start:stop, stop:], pattern)
    return w.to(weight.dtype)


@torch.no_grad()
def update(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The weight [N, K] with zeros where mask [N, K] is False, whoever chose it, and the rest moved.

    hessian   [K, K] positive definite, as `damped` gives it
    """
    w, u = weight.clone(), inverse_factor(hessian)
    for j in range(w.shape[1]):
        errors = torch.where(mask[:, j], 0, w[:, j] / u[j, j])
        w[:, j:] -= errors[:, None] * u[j, j:]
        w[:, j].masked_fill_(~mask[:, j], 0)
    return w


def prune_block(w: Tensor, u: Tensor, rest: Tensor, u_rest: Tensor, pattern: Pattern) -> None:
    """Prune the columns w [N, B] in place and send what they leave to `rest` [N, R] on their right, in place.

    u [B, B] and u_rest [B, R] are these columns' rows of the factor.
    """
    errors = torch.zeros_like(w)
    stay = torch.ones_like(w, dtype=torch.bool)
    if not pattern.m:
        stay = keep(w**2 / u.diagonal() ** 2, Pattern(pattern.sparsity, pattern.per))
    for j in range(w.shape[1]):
        if pattern.m and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            stay[:, group] = keep(w[:, group] ** 2 / u.diagonal()[group] ** 2, pattern)
        errors[:, j] = torch.where(stay[:, j], 0, w[:, j] / u[j, j])
        w[:, j:] -= errors[:, j, None] * u[j, j:]
        w[:, j].masked_fill_(~stay[:, j], 0)  # exactly, not up to rounding
    rest -= errors @ u_rest
