"""Softmax of rows, from five launches to the fewest bytes there can be, at any width.

    y[r, c] = exp(x[r, c] − m[r]) / Σ_c exp(x[r, c] − m[r]),      m[r] = max_c x[r, c]

The maximum is taken out so that nothing overflows; it cancels. The formula needs the whole row twice, for the
maximum and for the sum, before the first element can be written: what differs between the rungs is where
the row is kept meanwhile. For M rows of N columns, in bytes (b: bytes an element):

    rung      keeps the row in          moves through memory               launches
    naive     memory, after each step   M·N·(3·b + 20), see `naive_bytes`  5
    online    L2 cache (reads twice)    2·M·N·b if the cache holds it      1
    row       registers                 2·M·N·b                            1
    split     registers of several      2·M·N·b + 16 bytes a program       1 (+ 1 to clear)
              programs

FLOPs: about 5·M·N, an exponential among them, so 1.25 FLOP a byte in bfloat16: memory sets the time.

**naive** is what separate tensor operations do: row maximum, subtract, exponential, row sum, divide, each
reading and writing whole tensors (the three in between in float32).

**row** holds a row in the registers of one program. 32 warps of 32 threads have 64 registers a thread, which
is the end at about 32 thousand columns.

**online** goes over the row twice and needs no more registers for a longer row. The first pass keeps a
running maximum m and a running sum l; when the maximum grows, the old sum is rescaled (Milakov and
Gimelshein 2018, arXiv:1805.02867):

    m' = max(m, block's maximum)        l' = l·exp(m − m') + Σ exp(x − m')

Each thread keeps an (m, l) of its own, for what it has loaded itself, and they are combined at the end of the
row: within the pass no thread waits for another.

**split** gives a long row to several programs. Each keeps its part in registers, publishes the part's (m, l),
waits for the others of its row, and combines.
Programs that wait for each other must all be running: each takes its number from a counter when it starts,
so that the parts of a row are numbers that started one after the other, and a waiting program waits only for
such as have started or will start next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import Backend, as_rows, check_float, check_rows, choose, row_stride
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import (
    Plan,
    ceil_div,
    launch,
    multiprocessors,
    power_of_two,
    row_plan,
    rows_in,
    vector_of,
)

# reference


def reference(x: Tensor) -> Tensor:
    """Softmax along the last dimension by torch, in float32 inside whatever x is."""
    return torch.softmax(x, dim=-1)


def minimum_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes that must cross the memory: every element read once and written once."""
    return 2 * rows * columns * itemsize


def naive_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of the five launches: x read twice, two float32 tensors written and read, and row statistics.

    max reads x; subtract reads x, writes z; exp reads z, writes e; sum reads e; divide reads e, writes y.
    """
    return rows * columns * (3 * itemsize + 5 * 4) + 4 * rows * 4


# naive: five kernels


@triton.jit
def row_max_kernel(x, m, x_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf"))
    tl.store(m + row, tl.max(v.to(tl.float32), axis=0))


@triton.jit
def subtract_kernel(x, m, z, x_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns)
    tl.store(z + row * columns + c, v.to(tl.float32) - tl.load(m + row), mask=c < columns)


@triton.jit
def exp_kernel(z, e, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    tl.store(
        e + row * columns + c, tl.exp(tl.load(z + row * columns + c, mask=c < columns)), mask=c < columns
    )


@triton.jit
def row_sum_kernel(e, s, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    tl.store(s + row, tl.sum(tl.load(e + row * columns + c, mask=c < columns, other=0.0), axis=0))


@triton.jit
def divide_kernel(e, s, y, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(e + row * columns + c, mask=c < columns) / tl.load(s + row)
    tl.store(y + row * columns + c, v.to(y.dtype.element_ty), mask=c < columns)


# good: one launch


@triton.jit
def row_kernel(
    x, y, x_stride, y_stride, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS whole rows a program, in registers from the first read to the only write."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=-float("inf")).to(tl.float32)
    if ROWS > 1:  # a row beyond the last is all −inf, and −inf − (−inf) is no number
        v = tl.where(r < rows, v, 0.0)
    e = tl.exp(v - tl.max(v, axis=1)[:, None])
    e *= (1.0 / tl.sum(e, axis=1))[:, None]
    tl.store(y + r * y_stride + c, e.to(y.dtype.element_ty), mask=inside)


@triton.jit
def running_sums(x, columns, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """(m, l) of a row of `columns`, each [BLOCK / VECTOR]: Σ exp is the sum of l·exp(m) over all.

    Each thread has a maximum and a sum of its own, of the VECTOR neighbours that it loads at a time. So the
    loop has no barrier in it, and no thread waits for another before the end of the row.
    """
    c = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    m = tl.full((BLOCK // VECTOR,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK // VECTOR,), tl.float32)  # noqa: E741
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        v = tl.load(x + start + c, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        v = v.to(tl.float32)
        new = tl.maximum(m, tl.max(v, axis=1))
        shift = tl.where(new == -float("inf"), 0.0, new)  # nothing but −inf so far: exp(−inf − 0) is 0
        l = l * tl.exp(m - shift) + tl.sum(tl.exp(v - shift[:, None]), axis=1)  # noqa: E741
        m = new
    return m, l


@triton.jit
def combined(m, l):  # noqa: E741
    """(maximum, Σ exp(x − maximum)) from parts (m, l); −inf and 0 if every part is −inf."""
    top = tl.max(m, axis=0)
    return top, tl.sum(l * tl.exp(m - tl.where(top == -float("inf"), 0.0, top)), axis=0)


@triton.jit
def online_kernel(x, y, x_stride, y_stride, columns, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """One row a program in two passes, BLOCK columns at a time; the second pass finds the row in L2."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * y_stride
    m, l = running_sums(x, columns, BLOCK, VECTOR)  # noqa: E741
    top, total = combined(m, l)
    scale = 1.0 / total
    c = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        v = tl.load(x + start + c, mask=inside, other=0.0, eviction_policy="evict_first")
        e = tl.exp(v.to(tl.float32) - top) * scale
        tl.store(y + start + c, e.to(y.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def of_all_parts(m, l, row, part, arrived, parts_m, parts_l, PARTS: tl.constexpr):  # noqa: E741
    """(maximum, sum) of a row from the (m, l) of its PARTS programs: publish, wait for the others, combine.

    arrived   int32 [rows], zero: parts of the row whose (m, l) are written
    parts_m, parts_l   float32 [rows, PARTS]
    """
    tl.store(parts_m + row * PARTS + part, m)
    tl.store(parts_l + row * PARTS + part, l)
    tl.atomic_add(arrived + row, 1, sem="release")  # what was stored above is visible before this is
    while tl.atomic_add(arrived + row, 0, sem="acquire") < PARTS:
        pass
    k = tl.arange(0, PARTS)
    ms = tl.load(parts_m + row * PARTS + k, volatile=True)
    return combined(ms, tl.load(parts_l + row * PARTS + k, volatile=True))


@triton.jit
def split_kernel(
    x, y, started, arrived, parts_m, parts_l, x_stride, y_stride, columns,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PARTS programs a row, BLOCK columns each, which exchange their maximum and sum through memory.

    started   int32 [1], zero: programs that have taken a number
    """
    number = tl.atomic_add(started, 1)
    row = (number // PARTS).to(tl.int64)
    part = number % PARTS
    c = part * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + c, mask=c < columns, other=-float("inf")).to(tl.float32)
    m = tl.max(v, axis=0)
    shift = tl.where(m == -float("inf"), 0.0, m)
    v = tl.exp(v - shift)
    top, total = of_all_parts(m, tl.sum(v, axis=0), row, part, arrived, parts_m, parts_l, PARTS)
    v *= tl.exp(shift - top) / total
    tl.store(y + row * y_stride + c, v.to(y.dtype.element_ty), mask=c < columns)


# backward: dx = y·(dy − Σ dy·y)


@triton.jit
def backward_kernel(
    y, dy, dx, y_stride, dy_stride, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS whole rows a program. dx is contiguous."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    p = tl.load(y + r * y_stride + c, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
    d = p * (g - tl.sum(p * g, axis=1)[:, None])
    tl.store(dx + r * columns + c, d.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def looped_backward_kernel(
    y, dy, dx, y_stride, dy_stride, columns, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """One row a program in two passes, for rows that registers cannot hold."""
    row = tl.program_id(0).to(tl.int64)
    y += row * y_stride
    dy += row * dy_stride
    dx += row * columns
    c = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    dots = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        p = tl.load(y + start + c, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        g = tl.load(dy + start + c, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dots += tl.sum(p * g, axis=1)
    dot = tl.sum(dots, axis=0)
    for start in tl.range(0, columns, BLOCK):
        inside = start + c < columns
        p = tl.load(y + start + c, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(dy + start + c, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d = (p * (g - dot)).to(dx.dtype.element_ty)
        tl.store(dx + start + c, d, mask=inside, eviction_policy="evict_first")


# wrappers

ROW_LIMIT = 16384  # widest block that stays in registers without spilling on sm_75, sm_80 and sm_90
ONLINE_LIMIT = 65536  # widest row of which 132 multiprocessors' worth fits well into L2
NAIVE_LIMIT = 65536


def softmax_plan(columns: int, *, most_parts: int = 128) -> Plan:
    """The rung and its sizes for rows of this width.

    most_parts   programs that certainly run at once, and so may wait for each other: the multiprocessors of a
                 GPU, and 1 in the interpreter, which runs programs one after the other
    """
    if columns <= ROW_LIMIT:
        return row_plan(columns)
    split = Plan("split", block=8192, warps=8)
    if columns <= ONLINE_LIMIT or parts_of(columns, split) > most_parts:
        return Plan("online", block=16384, warps=32)
    return split


def softmax_naive(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Softmax in five launches, each through memory: what fusing saves. Up to 65536 columns; no backward."""
    check_float("x", x)
    check_rows("x", x)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x)
    columns, rows = x.shape[-1], rows_in(x)
    if columns > NAIVE_LIMIT:
        raise ShapeError(
            f"softmax_naive of rows of {columns} columns.",
            f"Each of its kernels holds a row at once, at most {NAIVE_LIMIT}.",
            "softmax, which takes any width.",
        )
    m, s = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    z, e = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan = row_plan(columns)
    meta: dict[str, Any] = {
        "BLOCK": plan.block,
        "num_warps": max(4, plan.warps),
        "interpret": chosen == "interpret",
    }
    stride = row_stride(x)
    launch(row_max_kernel, rows, x, m, stride, columns, **meta)
    launch(subtract_kernel, rows, x, m, z, stride, columns, **meta)
    launch(exp_kernel, rows, z, e, columns, **meta)
    launch(row_sum_kernel, rows, e, s, columns, **meta)
    launch(divide_kernel, rows, e, s, y, columns, **meta)
    return y


def forward(x: Tensor, plan: Plan, interpret: bool = False) -> Tensor:
    """The launch without autograd."""
    columns, rows = x.shape[-1], rows_in(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    meta: dict[str, Any] = {"BLOCK": plan.block, "num_warps": plan.warps, "interpret": interpret}
    stride = row_stride(x)
    if plan.kernel == "row":
        programs = ceil_div(rows, plan.rows)
        launch(row_kernel, programs, x, y, stride, columns, rows, columns, ROWS=plan.rows, **meta)
        return y
    if plan.kernel == "online":
        vector = vector_of(x, plan.block)
        launch(online_kernel, rows, x, y, stride, columns, columns, VECTOR=vector, **meta)
        return y
    parts = parts_of(columns, plan)
    flags = torch.zeros(rows + 1, dtype=torch.int32, device=x.device)
    m, l = (torch.empty(rows, parts, dtype=torch.float32, device=x.device) for _ in range(2))  # noqa: E741
    launch(
        split_kernel, rows * parts, x, y, flags, flags[1:], m, l, stride, columns, columns,
        PARTS=parts, **meta,
    )  # fmt: skip
    return y


def parts_of(columns: int, plan: Plan) -> int:
    """Programs that share a row under a plan of the rung `split`."""
    return power_of_two(ceil_div(columns, plan.block))


def backward_plan(columns: int) -> Plan:
    """The backward rung and its sizes for rows of this width."""
    return row_plan(columns) if columns <= ROW_LIMIT else Plan("online", block=16384, warps=32)


def backward(y: Tensor, dy: Tensor, *, plan: Plan | None = None, interpret: bool = False) -> Tensor:
    """dx from the forward result y (contiguous) and the gradient dy: the launch without autograd."""
    dy, dy_stride = as_rows(dy)
    columns, rows = y.shape[-1], rows_in(y)
    plan = plan or backward_plan(columns)
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    meta: dict[str, Any] = {"BLOCK": plan.block, "num_warps": plan.warps, "interpret": interpret}
    if plan.kernel == "row":
        grid = ceil_div(rows, plan.rows)
        launch(backward_kernel, grid, y, dy, dx, columns, dy_stride, rows, columns, ROWS=plan.rows, **meta)
    else:
        meta["VECTOR"] = vector_of(y, plan.block)
        launch(looped_backward_kernel, rows, y, dy, dx, columns, dy_stride, columns, **meta)
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, interpret: bool) -> Tensor:
        y = forward(x, plan, interpret)
        ctx.save_for_backward(y)
        ctx.interpret = interpret
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return backward(ctx.saved_tensors[0], grads[0], interpret=ctx.interpret), None, None


def softmax(x: Tensor, *, backend: Backend = "auto", plan: Plan | None = None) -> Tensor:
    """Softmax along the last dimension; differentiable.

    Shapes   x [..., N] of float32, float16 or bfloat16, any N ≥ 1, rows one stride apart; returns the same
             shape and format, contiguous.
    Moves    2·M·N·itemsize bytes forward (x, y), 3·M·N·itemsize backward (y, dy, dx).
    Raises   ShapeError, DtypeError, StrideError, DeviceError.

    A row that is all −inf gives NaN, as in torch.
    """
    check_float("x", x)
    check_rows("x", x)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x)
    interpret = chosen == "interpret"
    most_parts = 1 if interpret else multiprocessors(x.device)
    plan = plan or softmax_plan(x.shape[-1], most_parts=most_parts)
    _check_plan(plan, x, most_parts)
    return _Softmax.apply(x, plan, interpret)


def _check_plan(plan: Plan, x: Tensor, most_parts: int) -> None:
    columns = x.shape[-1]
    if plan.kernel == "row" and plan.block < columns:
        raise ShapeError(
            f"a plan of {plan.block} columns for rows of {columns}.",
            "The kernel `row` holds a row at once.",
            f"block={power_of_two(columns)}, or kernel='online'.",
        )
    if plan.kernel == "split":
        parts = parts_of(columns, plan)
        if parts > most_parts:
            where = "the interpreter" if most_parts == 1 else f"a GPU of {most_parts} multiprocessors"
            raise ShapeError(
                f"{parts} programs for each row, on {where}.",
                "The programs of a row wait for each other, so they must all run at once.",
                "a larger block, or kernel='online'.",
            )
