"""Benchmark `matmul`: the ladder of matrix products beside cuBLAS, in bf16, fp16 and fp8.

Layouts are written as BLAS does: NN is a·b with both in row-major order, NT is a·W.T, the layout of a linear
layer. Every result is compared with a product in float64 (64 random rows of it) before it is timed. Data are
random: on zeros a GPU draws less power and runs at a higher clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.bench.timing import SHORT, Sample, measure
from llmcourse.errors import DeviceError
from llmcourse.kernels.matmul import flops, matmul, minimum_bytes
from llmcourse.kernels.matmul_fp8 import quantize, scaled_matmul
from llmcourse.kernels.matmul_plan import pick

SQUARES = (8192, 4096, 2048, 1024)
DECODE = (1, 16, 64)  # rows: sequences in a decoding batch
K_DECODE, N_DECODE = 4096, 14336  # the up projection of an 8-billion-parameter Llama
LADDER = ("naive", "grouped", "descriptor", "persistent")
CHECKED_ROWS = 64
FASTEST_FLOPS, FASTEST_BYTES = 1e15, 3e12  # a second: no call is shorter than these allow
Function = Callable[[], Tensor]


def worst_error(out: Tensor, a: Tensor, b: Tensor, scales: Tensor | float = 1.0) -> float:
    """Largest difference from float64 on random rows, in units of the result's root mean square there."""
    rows = torch.randperm(a.shape[0], device=a.device)[:CHECKED_ROWS]
    some = (
        a.view(torch.uint8)[rows].view(a.dtype) if a.dtype.itemsize == 1 else a[rows]
    )  # fp8 has no indexing
    exact = (some.double() @ b.double()) * scales
    return float((out[rows].double() - exact).abs().max() / exact.square().mean().sqrt())


def check(name: str, error: float, peers_error: float) -> None:
    """A result worse than the peer's by more than a rounding of the output is wrong, and is not timed."""
    if not error <= 1.5 * peers_error + 2**-8:
        raise DeviceError(
            f"{name} is off by {error:.3g} of the root mean square, its peer by {peers_error:.3g}.",
            "A product that is wrong must not be timed.",
            "`pytest tests/gpu/test_matmul_cuda.py`, which finds the smallest shape that fails.",
        )


def operands(m: int, n: int, k: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """Random a [m, k] and b [k, n]; NT gives b as the transpose of a row-major [n, k]."""
    a = torch.randn(m, k, device="cuda", dtype=dtype)
    if layout == "NT":
        return a, torch.randn(n, k, device="cuda", dtype=dtype).T
    return a, torch.randn(k, n, device="cuda", dtype=dtype)


def rows_of(
    head: dict[str, Any], functions: dict[str, Function], errors: dict[str, float], peer: str
) -> list[dict[str, Any]]:
    """Measure functions against each other; a row for each, with the peer's time over its own."""
    m, n, k = head["m"], head["n"], head["k"]
    bytes_ = minimum_bytes(m, n, k, 2) if head["dtype"] != "fp8" else (m * k + k * n) + 2 * m * n
    # Events around a launch that takes the host longer than the kernel takes would measure the host.
    short = max(flops(m, n, k) / FASTEST_FLOPS, bytes_ / FASTEST_BYTES) < SHORT
    samples = measure(functions, device="cuda", graph=True if short else None)

    def row(name: str, sample: Sample) -> dict[str, Any]:
        return {
            "name": f"{head['dtype']} {m}×{n}×{k} {head['layout']}: {name}",
            **head,
            "kernel": name,
            "us": sample.median * 1e6,
            "us_p10": sample.low * 1e6,
            "us_p90": sample.high * 1e6,
            "tflops": sample.rate(flops(m, n, k)) / 1e12,
            "gbytes_per_s": sample.rate(bytes_) / 1e9,
            "ratio_to_peer": samples[peer].median / sample.median,
            "error_rms": errors[name],
            "cuda_graph": sample.graph,
        }

    return [row(name, sample) for name, sample in samples.items()]


def compare(
    m: int, n: int, k: int, dtype: torch.dtype, layout: str, rungs: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Rungs beside torch.matmul; the rung named "" is the one that `matmul` picks."""
    a, b = operands(m, n, k, dtype, layout)
    functions: dict[str, Function] = {"torch.matmul": lambda: torch.matmul(a, b)}
    for rung in rungs:
        name = rung or f"matmul ({pick(a, b).rung})"
        functions[name] = lambda rung=rung: matmul(a, b, rung=rung)  # type: ignore[misc]
    errors = {name: worst_error(f(), a, b) for name, f in functions.items()}
    for name, error in errors.items():
        check(name, error, errors["torch.matmul"])
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    head = {"m": m, "n": n, "k": k, "dtype": short, "layout": layout}
    return rows_of(head, functions, errors, "torch.matmul")


def compare_fp8(m: int, n: int, k: int, *, fast_accum: bool) -> list[dict[str, Any]]:
    """fp8 with a scale for each tensor, and with one for each row and column, beside torch._scaled_mm."""
    a, sa = quantize(torch.randn(m, k, device="cuda"))
    bt, sb = quantize(torch.randn(n, k, device="cuda"))
    b = bt.T
    rows_a, columns_b = sa.expand(m, 1).contiguous(), sb.expand(1, n).contiguous()
    bf16 = torch.bfloat16

    def peer() -> Tensor:
        return torch._scaled_mm(a, b, scale_a=sa, scale_b=sb, out_dtype=bf16, use_fast_accum=fast_accum)

    def peer_rows() -> Tensor:
        return torch._scaled_mm(
            a, b, scale_a=rows_a, scale_b=columns_b, out_dtype=bf16, use_fast_accum=fast_accum
        )

    functions: dict[str, Function] = {
        "torch._scaled_mm": peer,
        "torch._scaled_mm, row scales": peer_rows,
        "scaled_matmul": lambda: scaled_matmul(a, b, sa, sb, fast_accum=fast_accum),
        "scaled_matmul, row scales": lambda: scaled_matmul(a, b, rows_a, columns_b, fast_accum=fast_accum),
    }
    errors: dict[str, float] = {}
    for name, f in list(functions.items()):
        try:
            errors[name] = worst_error(f(), a, b, (sa * sb).double())
        except RuntimeError:  # cuBLAS has no such kernel for some shapes (16 rows and the like)
            if name == "torch._scaled_mm":
                return []
            del functions[name]
    for name, error in errors.items():
        check(name, error, errors["torch._scaled_mm"] + (0.0 if not fast_accum else 0.01))
    head = {"m": m, "n": n, "k": k, "dtype": "fp8", "layout": "NT", "fast_accum": fast_accum}
    return rows_of(head, functions, errors, "torch._scaled_mm")


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the ladder and of the peers; on a CPU torch's own product only."""
    if device != "cuda":
        return _on_cpu()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for n in SQUARES:
        rows += compare(n, n, n, torch.bfloat16, "NT", LADDER if n == SQUARES[0] else ("grouped", ""))
        torch.cuda.empty_cache()
    rows += compare(8192, 8192, 8192, torch.bfloat16, "NN", ("",))
    rows += compare(8192, 8192, 8192, torch.float16, "NT", ("",))
    for m in DECODE:
        rows += compare(m, N_DECODE, K_DECODE, torch.bfloat16, "NT", ("grouped", ""))
        rows += compare(m, K_DECODE, N_DECODE, torch.bfloat16, "NT", ("",))
    for n in SQUARES:
        for fast in (True, False):
            rows += compare_fp8(n, n, n, fast_accum=fast)
            torch.cuda.empty_cache()
    for m in DECODE[1:]:
        rows += compare_fp8(m, N_DECODE, K_DECODE, fast_accum=True)
    return rows, [
        "random data, L2 swept before every call, peers take turns; under 50 µs all run from CUDA graphs",
        "ratio_to_peer is the peer's time over this kernel's: above 1 is faster than the peer",
        "error_rms: largest difference from float64 on 64 rows over the result's root mean square",
        "gbytes_per_s counts inputs read once and the result written once",
        "fp8: e4m3, bf16 results, one scale a tensor unless 'row scales'",
        "NT: b is the transpose of a row-major matrix; NN: b is row-major",
    ]


def _on_cpu() -> tuple[list[dict[str, Any]], list[str]]:
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    sample = measure({"mm": lambda: matmul(a, b)})["mm"]
    row = {"name": f"fp32 {n}³: torch.matmul", "us": sample.median * 1e6}
    return [row | {"tflops": sample.rate(flops(n, n, n)) / 1e12}], ["a CPU runs the reference"]
