"""Compile what FlashAttention would launch, for GPUs that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmcourse.kernels import flash_backward, flash_forward
from llmcourse.kernels.compile_report import Target, compile_report
from llmcourse.kernels.flash_plan import Plan, Tiles

NAMES = {"forward": "forward_kernel", "dkdv": "dkdv_kernel", "dq": "dq_kernel", "rows": "rows_kernel"}


@dataclass(frozen=True)
class Case:
    """One kernel with one call's options: 4 batch entries, 16 heads and 4096 tokens, or as many packed."""

    kernel: str
    tiles: Tiles
    head_dim: int
    dtype: torch.dtype
    capability: int
    causal: bool = True
    window: int = 0
    group: int = 1
    packed: bool = False

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        extra = (
            "-window" * bool(self.window) + f"-group{self.group}" * (self.group > 1) + "-packed" * self.packed
        )
        name = f"{self.kernel}-D{self.head_dim}-{str(self.tiles).replace(' ', '_')}-{kind}{extra}"
        return f"sm_{self.capability}-{str(self.dtype)[6:]}-{name}"


def launches(case: Case, monkeypatch: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(kernel, arguments, constants) that the wrappers launch, on tensors without memory."""
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, programs: Any, *arguments: Any, interpret: bool = False, **meta: Any) -> None:
        launched.append((kernel, arguments, meta))

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for file in (flash_forward, flash_backward):
        monkeypatch.setattr(file, "launch", record)
    monkeypatch.setattr(flash_backward, "unusable", lambda x: "")
    kv_heads, d = 16 // case.group, case.head_dim
    options: dict[str, Any] = {"causal": case.causal, "scale": 0.1, "window": case.window}
    if case.packed:
        q, k, lse = meta(16384, 16, d), meta(16384, kv_heads, d), meta(16, 16384, dtype=torch.float32)
        starts = meta(5, dtype=torch.int32)
        options |= {"cu_q": starts, "cu_k": starts, "max_q": 4096}
    else:
        q, k, lse = (
            meta(4, 16, 4096, d),
            meta(4, kv_heads, 4096, d),
            meta(4, 16, 4096, dtype=torch.float32),
        )
    if case.kernel == "forward":
        flash_forward.forward(q, k, k, tiles=case.tiles, **options)
    else:
        options |= {"max_k": 4096} if case.packed else {}
        plan = Plan(case.tiles, case.tiles, case.tiles)
        flash_backward.backward(q, q, k, k, q, lse, None, plan=plan, **options)
    return next(one for one in launched if one[0].__name__ == NAMES[case.kernel])


def compiled(case: Case, monkeypatch: Any) -> Target:
    kernel, arguments, constants = launches(case, monkeypatch)
    report = compile_report(kernel, *arguments, capabilities=(case.capability,), **constants)
    return report[case.capability]
