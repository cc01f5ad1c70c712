"""Exercise `swiglu`: the first kernel, element by element, with a mask at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import TRAFFIC, at_minimum, result, run, tensor
from llmcourse.kernels.language import tl, triton

swiglu = Exercise(
    "swiglu",
    title="Element by element: SwiGLU",
    arguments=("gate", "up"),
    shapes=(
        "gate, up   float32, float16 or bfloat16 tensors [M, N], contiguous, of one format",
        "returns    tensor [M, N] of the same format, computed in float32",
        "cost       gate and up are read once, the result is written once",
    ),
    formula="out[i] = gate[i] / (1 + exp(−gate[i])) · up[i]",
    difficulty=1,
    importance=4,
    minutes=15,
    points=3,
    hints=(
        "1,000 elements and blocks of 256: how many programs does that take, and what do the last 24 lanes "
        "of the last one do? Which elements are program 2's?",
        "A program handles elements pid·BLOCK … pid·BLOCK + BLOCK − 1, all at once: tl.arange gives their "
        "offsets, tl.load a block of values, tl.store puts a block back. A mask says which of the offsets "
        "exist. tl.exp wants float32; the store converts to the format of the pointer, or do it by hand.",
        "i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), inside = i < n, g = tl.load(gate + i, "
        "mask=inside).to(tl.float32), the same for up, then tl.store(out + i, g * tl.sigmoid(g) * u, "
        "mask=inside). Grid: (triton.cdiv(n, BLOCK),).",
    ),
)


def expected(gate: Any, up: Any) -> np.ndarray:
    """SwiGLU in float64."""
    g, u = gate.double().numpy(), up.double().numpy()
    return g / (1 + np.exp(-g)) * u


def _agree(t: Trial, *shape: int, dtype: str = "float32", scale: float = 1.0) -> None:
    gate, up = (tensor(t, *shape, dtype=dtype, scale=scale) for _ in range(2))
    t.close(result(t, gate, up), expected(gate, up))


@swiglu.check("a whole number of blocks")
def whole(t: Trial) -> None:
    _agree(t, 4, 1024)
    _agree(t, 1, 1024, scale=5)


@swiglu.check("any number of elements, one too")
def tail(t: Trial) -> None:
    _agree(t, t.odd(3, 9), t.odd(101, 401))
    _agree(t, 1, 1)
    _agree(t, 1, 1025)


@swiglu.check("float16 and bfloat16 come and go, float32 computes")
def formats(t: Trial) -> None:
    for dtype in ("float16", "bfloat16"):
        n = 2 * t.odd(33, 99)
        gate, up = (tensor(t, 3, n, dtype=dtype, scale=2) for _ in range(2))
        got = result(t, gate, up)
        t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), dtype, "number format")
        t.close(got, expected(gate, up), rtol={"float16": 1e-3, "bfloat16": 8e-3}[dtype], atol=1e-5)


@swiglu.check("two tensors read, one written, by one launch")
def traffic(t: Trial) -> None:
    n = t.odd(101, 401)
    gate, up = (tensor(t, 3, n) for _ in range(2))
    call = run(t, gate, up, watch=TRAFFIC)
    t.close(call.value, expected(gate, up))
    size = gate.nbytes
    at_minimum(call, loads=2 * size, stores=size, reads="gate and up, each once", writes="the result, once")


def _empty(x: Any, dtype: Any = None) -> Any:
    import torch

    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


@triton.jit
def right_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(out + i, g * tl.sigmoid(g) * u, mask=i < n)


def launched(kernel: Any, gate: Any, up: Any, block: int = 1024, grid: int = 0, dtype: Any = None) -> Any:
    """The wrapper that most solutions have."""
    out = _empty(gate, dtype)
    n = gate.numel()
    kernel[(grid or -(-n // block),)](gate, up, out, n, BLOCK=block)
    return out


@triton.jit
def unmasked_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i).to(tl.float32)
    tl.store(out + i, g * tl.sigmoid(g) * tl.load(up + i).to(tl.float32))


@swiglu.mistake(
    says="the loads have no mask: the last block reads past the end",
    tries="mask=i < n in every tl.load and tl.store.",
    caught_by="tail",
)
def unmasked(gate: Any, up: Any) -> Any:
    return launched(unmasked_kernel, gate, up)


@triton.jit
def store_unmasked_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(out + i, g * tl.sigmoid(g) * u)


@swiglu.mistake(
    says="the loads are masked and the store is not: the last block writes past the end",
    tries="mask=i < n in tl.store as well.",
    caught_by="tail",
)
def store_unmasked(gate: Any, up: Any) -> Any:
    return launched(store_unmasked_kernel, gate, up)


@triton.jit
def no_program_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(out + i, g * tl.sigmoid(g) * u, mask=i < n)


@swiglu.mistake(
    says="every program works on the first block: the rest of the result stays unwritten",
    tries="tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).",
    caught_by="whole",
)
def no_program(gate: Any, up: Any) -> Any:
    return launched(no_program_kernel, gate, up)


@swiglu.mistake(
    says="the number of programs is rounded down: the last, partial block is missing",
    tries="triton.cdiv(n, BLOCK), which rounds up.",
    caught_by="tail",
)
def rounded_down(gate: Any, up: Any) -> Any:
    out, n = _empty(gate), gate.numel()
    right_kernel[(n // 1024,)](gate, up, out, n, BLOCK=1024)
    return out


@triton.jit
def silu_of_up_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(out + i, u * tl.sigmoid(u) * g, mask=i < n)


@swiglu.mistake(
    says="gate and up have changed places: SiLU goes over up",
    tries="g * tl.sigmoid(g) * u, with g from gate.",
    caught_by="whole",
)
def silu_of_up(gate: Any, up: Any) -> Any:
    return launched(silu_of_up_kernel, gate, up)


@triton.jit
def glu_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(out + i, tl.sigmoid(g) * u, mask=i < n)


@swiglu.mistake(
    says="the gate itself is missing: this is sigmoid(gate) · up",
    tries="gate · sigmoid(gate) · up.",
    caught_by="whole",
)
def glu(gate: Any, up: Any) -> Any:
    return launched(glu_kernel, gate, up)


@swiglu.mistake(
    says="the result is float32, whatever came in",
    tries="torch.empty_like(gate): the store converts to the format of the pointer.",
    caught_by="formats",
)
def widened(gate: Any, up: Any) -> Any:
    import torch

    return launched(right_kernel, gate, up, dtype=torch.float32)


@triton.jit
def silu_kernel(gate, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    tl.store(out + i, g * tl.sigmoid(g), mask=i < n)


@triton.jit
def product_kernel(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(a + i, mask=i < n).to(tl.float32) * tl.load(b + i, mask=i < n).to(tl.float32)
    tl.store(out + i, p, mask=i < n)


@swiglu.mistake(
    says="SiLU goes to memory and comes back for the product: two launches where one is enough",
    tries="one kernel that loads gate and up and stores the product.",
    caught_by="traffic",
)
def unfused(gate: Any, up: Any) -> Any:
    import torch

    half, out, n = _empty(gate, torch.float32), _empty(gate), gate.numel()
    grid = (-(-n // 1024),)
    silu_kernel[grid](gate, half, n, BLOCK=1024)
    product_kernel[grid](half, up, out, n, BLOCK=1024)
    return out


@triton.jit
def twice_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.sigmoid(tl.load(gate + i, mask=i < n).to(tl.float32))
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(out + i, g * s * u, mask=i < n)


@swiglu.mistake(
    says="gate is loaded twice",
    tries="a name for the loaded block: it stays in registers.",
    caught_by="traffic",
)
def loaded_twice(gate: Any, up: Any) -> Any:
    return launched(twice_kernel, gate, up)


@swiglu.mistake(
    says="torch computes it, in several launches, and no kernel runs",
    tries="a kernel: load, compute, store.",
    caught_by="traffic",
)
def by_torch(gate: Any, up: Any) -> Any:
    import torch

    g = gate.float()
    return (g * torch.sigmoid(g) * up.float()).to(gate.dtype)


@triton.jit
def strided_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
        u = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
        tl.store(out + i, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=i < n)


@swiglu.alternative("three programs, each over every third block")
def grid_stride(gate: Any, up: Any) -> Any:
    return launched(strided_kernel, gate, up, block=128, grid=3)


@triton.jit
def rows_kernel(gate, up, out, columns, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(0) * columns + c
    g = tl.load(gate + i, mask=c < columns).to(tl.float32)
    u = tl.load(up + i, mask=c < columns)
    tl.store(out + i, u.to(tl.float32) * (g * tl.sigmoid(g)), mask=c < columns)


@swiglu.alternative("a grid of rows by blocks of columns")
def two_axes(gate: Any, up: Any) -> Any:
    out = _empty(gate)
    rows, columns = gate.shape
    rows_kernel[(rows, -(-columns // 512))](gate, up, out, columns, BLOCK=512)
    return out
