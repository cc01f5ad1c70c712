"""The points of pruning: Wanda's 2:4 mask, the update of what stays, packing, and the packed product.

`prune(model, "wanda+move", Pattern(n=2, m=4), tokens)` runs the first two, `compress.sparse_linear` the
others. A learner's kernel gets one row of x at a time; on a CPU its launches need `counters.interpreting`
around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmcourse.plug.kernels import tensor
from llmcourse.plug.point import LearnersCode, Point, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.compress.masks import Pattern
    from llmcourse.kernels.sparse24_format import Sparse24

PRUNE, SPARSE = "llmcourse.compress.prune", "llmcourse.kernels.sparse24"


def mask_24(code: LearnersCode) -> Callable[[Tensor, Tensor, Pattern], Tensor]:
    import torch

    def mask(weight: Tensor, norm: Tensor, pattern: Pattern) -> Tensor:
        if (pattern.n, pattern.m) != (2, 4) or weight.shape[1] % 4:
            code.refuse(
                f"a mask of {pattern} was asked for, for {weight.shape[1]} columns",
                "The function chooses two of every four.",
                "Pattern(n=2, m=4), and layers whose inputs are a multiple of 4.",
            )
        # Inputs with these norms: feature k comes once, in the k-th row.
        found = code(weight, torch.diag(norm.to(weight.dtype)))
        found = tensor(
            code, found, torch.ones_like(weight, dtype=torch.bool), tuple(weight.shape), "the mask"
        )
        _two_of_four(code, found)
        return found

    return mask


def _two_of_four(code: LearnersCode, mask: Tensor) -> None:
    counts = mask.view(mask.shape[0], -1, 4).sum(-1)
    if bool((counts != 2).any()):
        row, group = (int(i) for i in (counts != 2).nonzero()[0])
        code.refuse(
            f"{int(counts[row, group])} of columns {4 * group} to {4 * group + 3} of row {row} stay",
            "The packed format has room for two of every four.",
            "a mask that is True twice in each group of four.",
        )


def sparsegpt_update(code: LearnersCode) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def update(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
        wide = weight.double()
        found = tensor(code, code(wide, hessian.double(), mask), wide, tuple(weight.shape), "the weight")
        if bool((found[~mask] != 0).any()):
            code.refuse(
                "a weight that goes is not zero",
                "What is not exactly zero does not fit a packed matrix.",
                "writing 0 where the mask is False.",
            )
        return found.to(weight.dtype)

    return update


def pack_24(code: LearnersCode) -> Callable[..., Sparse24]:
    import torch

    from llmcourse.kernels.sparse24_format import WORD, Sparse24

    def pack(weight: Tensor, mask: Tensor | None = None) -> Sparse24:
        rows, columns = weight.shape
        stay = _filled((weight != 0) if mask is None else mask)
        padded = torch.nn.functional.pad(weight, (0, -columns % WORD))
        values, places = code.parts(code(padded, stay), ("values", "places"))
        values = tensor(code, values, weight, (rows, padded.shape[1] // 2), "values")
        like = torch.empty(0, dtype=torch.uint8, device=weight.device)
        places = tensor(code, places, like, (rows, padded.shape[1] // 8), "places")
        words = places.contiguous().view(torch.int16)  # two bytes, the first one lower: a word of four groups
        return Sparse24(values.contiguous(), words, (rows, columns))

    return pack


def _filled(stay: Tensor) -> Tensor:
    """Exactly two of every four: groups with fewer get the first places that are free."""
    import torch

    from llmcourse.kernels.sparse24_format import GROUP, KEPT, WORD

    rows, columns = stay.shape
    groups = torch.nn.functional.pad(stay, (0, -columns % WORD)).view(rows, -1, GROUP)
    order = groups.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :KEPT]
    return torch.zeros_like(groups).scatter_(-1, order, True).view(rows, -1)


def sparse_gemv(code: LearnersCode) -> Callable[..., Tensor]:
    import torch

    def linear(x: Tensor, weight: Sparse24, **_: Any) -> Tensor:
        places = weight.indices.view(torch.uint8)
        spare = places.shape[1] * 8 - x.shape[-1]
        lines = torch.nn.functional.pad(x.reshape(-1, x.shape[-1]), (0, spare))
        results = [
            tensor(code, code(weight.values, places, line.contiguous()), x, weight.shape[:1], "the result")
            for line in lines
        ]
        return torch.stack(results).view(*x.shape[:-1], -1)

    return linear


for _point in (
    Point(
        "mask_24",
        ("weight", "x"),
        "bool tensor",
        "Which two of every four weights stay, by |w| times the norm of the input.",
        (f"{PRUNE}:wanda_mask",),
        mask_24,
    ),
    Point(
        "sparsegpt_update",
        ("weight", "gram", "mask"),
        "tensor",
        "The weight with zeros where the mask is False, the others moved to make up for it.",
        (f"{PRUNE}:update", "llmcourse.compress.sparsegpt:update"),
        sparsegpt_update,
    ),
    Point(
        "pack_24",
        ("weight", "mask"),
        "(values, places)",
        "The weights that stay and, in two bits each, where they were.",
        (f"{SPARSE}:pack24",),
        pack_24,
    ),
    Point(
        "sparse_gemv",
        ("values", "places", "x"),
        "tensor",
        "A packed 2:4 matrix [N, K] times x [K].",
        (f"{SPARSE}:sparse24_linear",),
        sparse_gemv,
    ),
):
    register(_point)
