"""The two ceilings of a machine: bytes copied per second and matrix FLOPs per second.

What moves its data through a GPU's memory runs at most about as fast as a large copy, and what is made of
matrix products at most about as fast as a large product. On a CPU the copy is a yardstick only: code that
reads and does not write can go beyond it. Both are measured, not taken from a data sheet, and stand
beside the figures of the course.
"""

from __future__ import annotations

from typing import Any

import torch

from llmcourse.bench.timing import measure


def copy_bandwidth(device: str, *, megabytes: int | None = None) -> float:
    """Bytes per second of a large copy within the device's memory, counting bytes read and written."""
    size = (megabytes or (4096 if device == "cuda" else 256)) << 20
    source = torch.empty(size, dtype=torch.int8, device=device).random_(-9, 9)
    target = torch.empty_like(source)
    return measure({"copy": lambda: target.copy_(source)}, device=device)["copy"].rate(2 * size)


def matmul_rate(device: str, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP/s of a square matrix product on random data (zeros run faster than real data on a GPU)."""
    n = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return measure({"mm": lambda: torch.mm(a, b, out=out)}, device=device)["mm"].rate(2 * n**3)


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Benchmark `ceilings`: rows of name, value and unit."""
    rows: list[dict[str, Any]] = [
        {"name": "copy", "value": copy_bandwidth(device), "unit": "bytes/s, read + written"}
    ]
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rows.append({"name": f"matmul {name}", "value": matmul_rate(device, dtype), "unit": "FLOP/s"})
    return rows, ["random data; float32 products with TF32 off"]
