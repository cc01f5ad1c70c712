"""What the memory-bound kernels move, counted on a CPU: each naive rung beside the fused one.

Bytes are those of Triton's interpreter on small shapes: `asked` is what the programs ask for, `unique` the
different bytes of every launch, which must cross the memory whatever a cache serves, and `formula` what the
kernel's file says. Counts do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from llmcourse.kernels import add_rms_norm as add_norm
from llmcourse.kernels import cross_entropy as ce
from llmcourse.kernels import layer_norm as ln
from llmcourse.kernels import rms_norm as rms
from llmcourse.kernels import rope as rope_file
from llmcourse.kernels import softmax as softmax_file
from llmcourse.kernels import swiglu as swiglu_file
from llmcourse.kernels import vector_add as add_file
from llmcourse.kernels.counters import counting

ROWS, COLUMNS = 24, 768
Count = tuple[str, str, int, Callable[[], Any]]


def launches(dtype: torch.dtype = torch.bfloat16) -> Iterator[Count]:
    """(kernel, rung, bytes by its file's formula, a call that launches it) for every kernel and rung."""
    m, n, b = ROWS, COLUMNS, dtype.itemsize
    x, r, w, bias = (torch.randn(s).to(dtype) for s in ((m, n), (m, n), (n,), (n,)))
    packed = torch.randn(m, 2 * n).to(dtype)
    target = torch.arange(m) * 7 % n
    heads, length, head_dim = 6, 16, 64
    q = torch.randn(2, heads, length, head_dim).to(dtype)
    cos, sin = torch.rand(length, head_dim // 2), torch.rand(length, head_dim // 2)
    tables = 2 * cos.numel() * 4
    yield "vector_add", "good", add_file.minimum_bytes(m * n, b), lambda: add_file.vector_add(x, r)
    yield "softmax", "naive", softmax_file.naive_bytes(m, n, b), lambda: softmax_file.softmax_naive(x)
    yield "softmax", "row", softmax_file.minimum_bytes(m, n, b), lambda: softmax_file.softmax(x)
    online = softmax_file.Plan("online", block=256)
    yield (
        "softmax", "online", softmax_file.minimum_bytes(m, n, b), lambda: softmax_file.softmax(x, plan=online)
    )  # fmt: skip
    yield "rms_norm", "naive", rms.naive_bytes(m, n, b), lambda: rms.rms_norm_naive(x, w)
    yield "rms_norm", "row", rms.minimum_bytes(m, n, b), lambda: rms.rms_norm(x, w)
    yield "layer_norm", "naive", ln.naive_bytes(m, n, b), lambda: ln.layer_norm_naive(x, w, bias)
    yield "layer_norm", "row", ln.minimum_bytes(m, n, b), lambda: ln.layer_norm(x, w, bias)
    yield "add_rms_norm", "naive", add_norm.naive_bytes(m, n, b), lambda: add_norm.add_rms_norm_naive(x, r, w)
    yield "add_rms_norm", "fused", add_norm.minimum_bytes(m, n, b), lambda: add_norm.add_rms_norm(x, r, w)
    yield "swiglu", "naive", swiglu_file.naive_bytes(m, n, b), lambda: swiglu_file.swiglu_naive(packed)
    yield "swiglu", "fused", swiglu_file.minimum_bytes(m, n, b), lambda: swiglu_file.swiglu(packed)
    yield (
        "rope", "naive", rope_file.naive_bytes(q.numel(), b, tables=tables),
        lambda: rope_file.rope_naive(q, cos, sin),
    )  # fmt: skip
    yield (
        "rope", "fused", rope_file.minimum_bytes(q.numel(), b, tables=tables),
        lambda: rope_file.rope(q, cos, sin),
    )  # fmt: skip
    yield "cross_entropy", "naive", ce.naive_bytes(m, n, b), lambda: ce.cross_entropy_naive(x, target)
    yield "cross_entropy", "fused", ce.minimum_bytes(m, n, b), lambda: ce.cross_entropy(x, target)


def rows() -> list[dict[str, Any]]:
    """A row for each kernel and rung."""
    found = []
    for kernel, rung, needed, launch in launches():
        with counting() as c:
            launch()
        found.append(
            {
                "name": f"{kernel} {rung}",
                "shape": f"{ROWS}×{COLUMNS}",
                "launches": len(c),
                "asked_bytes": c.bytes,
                "unique_bytes": c.unique_bytes,
                "formula_bytes": needed,
            }
        )
    return found
