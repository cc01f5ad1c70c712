"""The point of FlashAttention: a learner's tiled attention in the place of the model's own.

The learner's function knows heads, queries and keys, and one kind of mask: the S queries are the last S of
the T positions, and each sees the keys up to its own. That is a whole prompt, a prompt behind a cache, and a
decoding step (S = 1). The adapter lays a batch's heads side by side, which keeps query head h on key/value
head h // (Hq / Hkv), and refuses what no such mask can say: a sliding window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmcourse.plug.kernels import ATTEND, tensor
from llmcourse.plug.point import LearnersCode, Point, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.models.step import Step


def flash_forward(code: LearnersCode) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float | None = None) -> Tensor:
        if v.shape[-1] != k.shape[-1]:
            code.refuse(
                f"keys have {k.shape[-1]} numbers a token and values {v.shape[-1]}",
                "Latent attention reads both off one vector; a tile of this kernel has one head dim.",
                "a model with multi-head or grouped-query attention.",
            )
        if scale is not None:  # the function divides by √D
            q = q * (scale * q.shape[-1] ** 0.5)
        if q.shape[2] > 1 or step.mask is None:
            return one(q, k, v, _causal(q, k, step))
        return _each(q, k, v, step.mask)

    def one(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        import torch

        flat = [x.flatten(0, 1).contiguous() for x in (q, k, v)]
        out, lse = code.parts(code(*flat, causal), ("out", "lse"))
        like = torch.empty(0, dtype=torch.float32, device=q.device)
        tensor(code, lse, like, tuple(flat[0].shape[:2]), "lse")
        return tensor(code, out, flat[0], tuple(flat[0].shape), "out").view(q.shape)

    def _causal(q: Tensor, k: Tensor, step: Step) -> bool:
        """Whether the step's mask is the triangle, or no mask at all."""
        import torch

        if step.mask is None:
            return step.causal
        triangle = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        if not (step.mask == triangle.tril(k.shape[2] - q.shape[2])).all():
            _refuse_mask()
        return True

    def _each(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """One token a sequence, of unequal lengths: each over its own keys."""
        import torch

        seen = mask.expand(len(q), 1, 1, k.shape[2])[:, 0, 0]
        results = []
        for b, row in enumerate(seen):
            length = int(row.sum())
            if not row[:length].all():
                _refuse_mask()
            own = slice(b, b + 1)
            results.append(one(q[own], k[own, :, :length], v[own, :, :length], False))
        return torch.cat(results)

    def _refuse_mask() -> None:
        code.refuse(
            "the model hides keys that lie before a query",
            "The function is told `causal` alone: each query sees all keys up to its own.",
            "a model without a sliding window, and without padding in front.",
        )

    return attend


register(
    Point(
        "flash_forward",
        ("q", "k", "v", "causal"),
        "(out, lse)",
        "Attention of q [Hq, S, D] over k, v [Hkv, T, D], S ≤ T, and its log-sum-exp [Hq, S] in float32.",
        ATTEND,
        flash_forward,
    )
)
