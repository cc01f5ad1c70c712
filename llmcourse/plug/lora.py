"""The points of fine-tuning: a layer with a correction, merging, and batches of many adapters.

A layer that holds several projections, stacked, is handed over one projection at a time, with its rows of the
weight. The learner's part must carry gradients: `finetune` trains through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmcourse.plug.kernels import tensor
from llmcourse.plug.point import LearnersCode, Point, kind, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.finetune.lora import LoRALinear
    from llmcourse.kernels.multi_lora import Bank

FINETUNE = "llmcourse.finetune"


def lora_linear(code: LearnersCode) -> Callable[..., Tensor]:
    def forward(self: LoRALinear, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.merged or not self.on:
            return y
        if self.bias is not None:
            code.refuse("this layer has a bias", "The function knows W, A and B.", "a model without biases.")
        flat, weight, alpha = x.reshape(-1, x.shape[-1]), self.base.weight, self.scale * self.r
        y = y.clone()
        for a, (name, rows) in zip(self.A, self.rows.items(), strict=True):
            part = code(flat, weight[rows], a, self.B[name], alpha)  # type: ignore[index]
            shape = (len(flat), rows.stop - rows.start)
            y[..., rows] = tensor(code, part, flat, shape, "the result").view(*x.shape[:-1], -1)
        return y

    return forward


def merged(code: LearnersCode) -> Callable[..., None]:
    def add(self: LoRALinear, sign: int) -> None:
        import torch

        weight: Any = self.base.weight
        with torch.no_grad():
            for a, (name, rows) in zip(self.A, self.rows.items(), strict=True):
                new = code(weight[rows], a.detach(), self.B[name].detach(), self.scale * self.r, sign)
                weight[rows] = tensor(code, new, weight, tuple(weight[rows].shape), "the merged weight")
        self.merged = sign > 0

    return add


def grouped(code: LearnersCode) -> Callable[..., tuple[list[int], list[int], list[int]]]:
    def group(ids: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        names = ("order", "lengths", "adapters")
        parts = code.parts(code(list(ids)), names)
        for name, part in zip(names, parts, strict=True):
            if not isinstance(part, list | tuple) or not all(type(n) is int for n in part):
                code.refuse(
                    f"{name} is {kind(part)}, and should be a list of ints",
                    "The batch is put together by it.",
                    ".tolist().",
                )
        order, lengths, adapters = (list(part) for part in parts)
        together = [g for g, n in zip(adapters, lengths, strict=False) for _ in range(n)]
        if sorted(order) != list(range(len(ids))) or [ids[i] for i in order] != together:
            code.refuse(
                f"order {order}, lengths {lengths} and adapters {adapters} are no grouping of {list(ids)}",
                "Every request must be answered once, by its own adapter.",
                "the requests 0 … N−1, sorted by adapter.",
            )
        return order, lengths, adapters

    return group


def multi_lora(code: LearnersCode) -> Callable[..., Tensor]:
    def add(y: Tensor, x: Tensor, ids: Tensor, bank: Bank, **_: Any) -> Tensor:
        offset = 0
        for p, (first, end) in enumerate(bank.parts):
            b = bank.b[:, offset : offset + end - first]
            delta = code(x, ids.long(), bank.a[:, p], b, bank.scale.to(x.dtype))
            y[:, first:end] += tensor(code, delta, x, (len(x), end - first), "the result")
            offset += end - first
        return y

    return add


for _point in (
    Point(
        "lora_linear",
        ("x", "weight", "a", "b", "alpha"),
        "tensor",
        "x [N, K] through weight [M, K] and its correction: x·Wᵀ + alpha/r · (x·aᵀ)·bᵀ.",
        (f"{FINETUNE}.lora:LoRALinear.forward",),
        lora_linear,
    ),
    Point(
        "merged",
        ("weight", "a", "b", "alpha", "sign"),
        "tensor",
        "weight + sign · alpha/r · b·a, rounded once to the weight's format.",
        (f"{FINETUNE}.lora:LoRALinear.add",),
        merged,
    ),
    Point(
        "grouped",
        ("ids",),
        "(order, lengths, adapters)",
        "The requests with those of one adapter side by side, and how many each adapter has.",
        (f"{FINETUNE}.serve:grouped",),
        grouped,
    ),
    Point(
        "multi_lora",
        ("x", "ids", "a", "b", "scale"),
        "tensor",
        "Each row's own correction scale·b·(a·x), a [G, r, K] and b [G, M, r] chosen by ids [N], −1: zero.",
        (f"{FINETUNE}.serve:multi_lora",),
        multi_lora,
    ),
):
    register(_point)
