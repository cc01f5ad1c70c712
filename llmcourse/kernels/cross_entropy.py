"""Cross-entropy over a large vocabulary: the loss, its gradient, and the projection before it.

    loss[r] = lse[r] − x[r, t[r]]          lse[r] = log Σ_c exp(x[r, c])
    dx[r, c] = (exp(x[r, c] − lse[r]) − [c = t[r]])·dloss[r]

N rows of V logits of b bytes. At V = 128 thousand and N = 8192 in bfloat16 the logits alone are 2.1 GB, and
memory, in bytes held and in bytes moved, is what this file is about:

    rung                   moves                                    holds
    naive                  N·V·(b + 4): log-probabilities           4·N·V more for them
                           through memory, forward only
    cross_entropy          forward N·V·b, backward 2·N·V·b          a gradient of N·V·b
      inplace=True         the same                                 nothing more: over the logits
    linear_cross_entropy   each chunk of logits once or twice       one chunk of logits

**Forward** goes once over a row with running maxima and sums (those of softmax's `online` rung), keeps 4
bytes a row for backward, and skips rows whose target is `ignore_index` without reading them.

**Backward** turns a logit into its gradient: one read, one write, at one place. So the gradient can take the
logits' own memory (`inplace=True`), if nobody needs the logits again.

**linear_cross_entropy** takes x [N, D] and weight [V, D] of the projection that makes the logits. A row's
gradient needs nothing but this row of logits, so it is made right after them, while forward runs:

    for a chunk of rows:   logits = x_chunk·Wᵀ              [chunk, V]
                           loss, and g = softmax − one-hot, over the logits
                           dx_chunk = g·W,  dW += gᵀ·x_chunk

and the chunk's memory serves the next. The factor dloss that backward brings multiplies dx and dW at the end
(they are linear in it). The idea is that of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); here dW is
summed in float32 over the chunks. No work is done twice: 2·N·V·D FLOPs for each of the three products.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import (
    Backend,
    DtypeError,
    StrideError,
    check_float,
    check_rows,
    check_shape,
    check_together,
    choose,
    row_stride,
)
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import Plan, ceil_div, launch, power_of_two, vector_of
from llmcourse.kernels.softmax import combined, running_sums

Reduction = Literal["mean", "sum", "none"]

# reference


def reference(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy by torch, in float32."""
    return torch.nn.functional.cross_entropy(
        logits.float(), target, ignore_index=ignore_index, reduction=reduction
    )


def linear_reference(
    x: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Projection and cross-entropy by torch, with all logits in memory."""
    return reference(x @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


def minimum_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes forward: logits read once; a target (8), a loss and an lse (4 each) a row."""
    return rows * columns * itemsize + 16 * rows


def minimum_backward_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes backward: logits read, their gradient written; a target and an lse a row."""
    return 2 * rows * columns * itemsize + 12 * rows


def naive_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of the two launches if L2 holds a row (else the logits are read three times).

    Logits read, float32 log-probabilities written, one of them read for each row.
    """
    return rows * columns * (itemsize + 4) + 16 * rows


# naive: log-probabilities through memory


@triton.jit
def log_softmax_kernel(logits, out, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        v = tl.load(logits + row * stride + start + c, mask=start + c < columns, other=-float("inf"))
        m = tl.maximum(m, v.to(tl.float32))
    top = tl.max(m, axis=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        v = tl.load(logits + row * stride + start + c, mask=start + c < columns, other=-float("inf"))
        total += tl.exp(v.to(tl.float32) - top)
    lse = top + tl.log(tl.sum(total, axis=0))
    for start in tl.range(0, columns, BLOCK):
        v = tl.load(logits + row * stride + start + c, mask=start + c < columns).to(tl.float32)
        tl.store(out + row * columns + start + c, v - lse, mask=start + c < columns)


@triton.jit
def pick_kernel(log_probs, target, loss, columns, ignore_index):
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target + row)
    value = -tl.load(log_probs + row * columns + t, mask=(t >= 0) & (t < columns), other=float("nan"))
    tl.store(loss + row, tl.where(t == ignore_index, 0.0, value))


# good


@triton.jit
def loss_kernel(
    logits, target, loss, lse, stride, columns, ignore_index, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """One row a program: its loss and lse, from one reading of the row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target + row)
    logits += row * stride
    if t == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(lse + row, 0.0)
    else:
        m, l = running_sums(logits, columns, BLOCK, VECTOR)  # noqa: E741
        top, total = combined(m, l)
        z = top + tl.log(total)
        # A target outside the vocabulary gives NaN: the kernel cannot raise, and must not read elsewhere.
        picked = tl.load(logits + t, mask=(t >= 0) & (t < columns), other=float("nan")).to(tl.float32)
        tl.store(loss + row, z - picked)
        tl.store(lse + row, z)


@triton.jit
def gradient_kernel(
    logits, target, lse, factor, out, stride, out_stride, factor_stride, columns, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row a program: (softmax − one-hot)·factor[row]. `out` may be the logits."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(target + row)
    out += row * out_stride + c
    if t == ignore_index:
        tl.store(out, tl.zeros((BLOCK,), out.dtype.element_ty), mask=c < columns)
    else:
        f = tl.load(factor + row * factor_stride)
        f = tl.where((t >= 0) & (t < columns), f, float("nan"))
        v = tl.load(logits + row * stride + c, mask=c < columns).to(tl.float32)
        g = (tl.exp(v - tl.load(lse + row)) - tl.where(c == t, 1.0, 0.0)) * f
        tl.store(out, g.to(out.dtype.element_ty), mask=c < columns)


@triton.jit
def loss_and_gradient_kernel(
    logits, target, loss, stride, columns, ignore_index, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """One row a program: the loss, and softmax − one-hot written over the logits.

    Logits are read twice, once for the sum and once to be replaced: wide blocks, so that few rows are in work
    at a time and L2 holds as much of them as it can. Between the passes a barrier: no thread may write before
    every thread has read, the target's logit too.
    """
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target + row)
    logits += row * stride
    c = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if t == ignore_index:
        tl.store(loss + row, 0.0)
        for start in tl.range(0, columns, BLOCK):
            zero = tl.zeros((BLOCK // VECTOR, VECTOR), logits.dtype.element_ty)
            tl.store(logits + start + c, zero, mask=start + c < columns)
    else:
        known = (t >= 0) & (t < columns)
        picked = tl.load(logits + t, mask=known, other=float("nan")).to(tl.float32)
        m, l = running_sums(logits, columns, BLOCK, VECTOR)  # noqa: E741
        top, total = combined(m, l)
        tl.debug_barrier()
        z = top + tl.log(total)
        tl.store(loss + row, z - picked)
        hit = tl.where(known, 1.0, float("nan"))
        for start in tl.range(0, columns, BLOCK):
            inside = start + c < columns
            v = tl.load(logits + start + c, mask=inside, eviction_policy="evict_first").to(tl.float32)
            g = (tl.exp(v - z) - tl.where(start + c == t, 1.0, 0.0)) * hit
            g = g.to(logits.dtype.element_ty)
            tl.store(logits + start + c, g, mask=inside, eviction_policy="evict_first")


# wrappers


def loss_plan(columns: int) -> Plan:
    """Columns at a time and warps of the kernel that walks along a row once."""
    block = min(8192, power_of_two(columns))
    return Plan("online", block=block, warps=max(1, block // 512))


def step_plan(columns: int) -> Plan:
    """Columns at a time and warps of the kernel that gives loss and gradient at once."""
    block = min(16384, power_of_two(columns))
    return Plan("online", block=block, warps=max(1, block // 512))


GRADIENT_PLAN = Plan("gradient", block=8192, warps=16)
CHUNK_BYTES = 1 << 30  # of logits at a time: at V = 128k 4096 rows, whose products still fill the GPU


def losses(
    logits: Tensor, target: Tensor, ignore: int, plan: Plan, interpret: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each float32 [N], of logits [N, V]."""
    loss, lse = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    launch(
        loss_kernel, len(logits), logits, target, loss, lse, row_stride(logits), logits.shape[1], ignore,
        BLOCK=plan.block, VECTOR=vector_of(logits, plan.block), num_warps=plan.warps, interpret=interpret,
    )  # fmt: skip
    return loss, lse


def gradient(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    factor: Tensor,
    out: Tensor,
    ignore: int,
    *,
    plan: Plan = GRADIENT_PLAN,
    interpret: bool = False,
) -> None:
    """Write (softmax − one-hot)·factor [N] into `out`, which may be the logits."""
    columns = logits.shape[1]
    launch(
        gradient_kernel, len(logits) * ceil_div(columns, plan.block),
        logits, target, lse, factor, out, row_stride(logits), row_stride(out), factor.stride(0),
        columns, ignore,
        BLOCK=plan.block, num_warps=plan.warps, interpret=interpret,
    )  # fmt: skip


def losses_and_gradient(
    logits: Tensor, target: Tensor, loss: Tensor, ignore: int, plan: Plan, interpret: bool = False
) -> None:
    """Write each row's loss, and softmax − one-hot over the logits."""
    launch(
        loss_and_gradient_kernel, len(logits),
        logits, target, loss, row_stride(logits), logits.shape[1], ignore,
        BLOCK=plan.block, VECTOR=vector_of(logits, plan.block), num_warps=plan.warps, interpret=interpret,
    )  # fmt: skip


def _reduce(loss: Tensor, target: Tensor, ignore: int, reduction: str) -> tuple[Tensor, Tensor | None]:
    """(loss reduced, rows that count, which only the mean needs)."""
    if reduction == "none":
        return loss, None
    if reduction == "sum":
        return loss.sum(), None
    count = (target != ignore).sum()
    return loss.sum() / count, count


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore: int,
        reduction: str,
        inplace: bool,
        plan: Plan,
        interpret: bool,
    ) -> Tensor:
        loss, lse = losses(logits, target, ignore, plan, interpret)
        result, count = _reduce(loss, target, ignore, reduction)
        ctx.save_for_backward(logits, target, lse, count)
        ctx.ignore, ctx.inplace, ctx.interpret = ignore, inplace, interpret
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        logits, target, lse, count = ctx.saved_tensors
        factor = grads[0].float() if count is None else grads[0] / count
        factor = factor.expand(len(logits))
        if ctx.inplace:
            out = logits.detach()
        else:
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        gradient(logits, target, lse, factor, out, ctx.ignore, interpret=ctx.interpret)
        if ctx.inplace:  # autograd then refuses another backward that needs these logits
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None, None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    inplace: bool = False,
    backend: Backend = "auto",
    plan: Plan | None = None,
) -> Tensor:
    """−log softmax(logits)[target] along the last dimension; differentiable.

    Shapes   logits [N, V], rows any stride apart; target [N] int64 in 0 … V − 1 or `ignore_index`. Returns a
             float32 number, or [N] with reduction "none" (ignored rows 0). The mean is over rows that count;
             without any it is NaN, as in torch.
    inplace  backward writes the gradient over the logits, which then are gone
    Moves    N·V·itemsize bytes forward, 2·N·V·itemsize backward.
    Keeps    the logits and 4 bytes a row for backward.
    Raises   ShapeError, DtypeError, StrideError, DeviceError. On a GPU the targets are not looked at (that
             would wait for the device): one outside the vocabulary gives NaN.
    """
    check_float("logits", logits)
    _check_target("logits", logits, target, logits.shape[-1], ignore_index)
    check_rows("logits", logits)
    _check_reduction(reduction)
    chosen = choose(backend, logits)
    if chosen == "reference":
        return reference(logits, target, ignore_index=ignore_index, reduction=reduction)
    plan = plan or loss_plan(logits.shape[1])
    return _CrossEntropy.apply(logits, target, ignore_index, reduction, inplace, plan, chosen == "interpret")


def cross_entropy_naive(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy in two launches, the log-probabilities through memory in float32. No backward."""
    check_float("logits", logits)
    _check_target("logits", logits, target, logits.shape[-1], ignore_index)
    check_rows("logits", logits)
    _check_reduction(reduction)
    chosen = choose(backend, logits)
    if chosen == "reference":
        return reference(logits, target, ignore_index=ignore_index, reduction=reduction)
    rows, columns = logits.shape
    interpret = chosen == "interpret"
    log_probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(4096, power_of_two(columns))
    launch(
        log_softmax_kernel, rows, logits, log_probs, row_stride(logits), columns,
        BLOCK=block, num_warps=8, interpret=interpret,
    )  # fmt: skip
    launch(
        pick_kernel, rows, log_probs, target, loss, columns, ignore_index, num_warps=1, interpret=interpret
    )
    return _reduce(loss, target, ignore_index, reduction)[0]


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total = a·b, or total += a·b. A float32 total takes the product before it is rounded to a's format."""
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        ignore: int,
        reduction: str,
        chunk: int,
        sum_dtype: torch.dtype,
        plan: Plan | None,
        interpret: bool,
    ) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        rows, (vocabulary, _) = len(x), weight.shape
        loss = torch.empty(rows, dtype=torch.float32, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
        new = torch.empty if rows else torch.zeros
        dw = new(weight.shape, dtype=sum_dtype, device=x.device) if wants_weight else None
        memory = torch.empty(min(chunk, rows), vocabulary, dtype=x.dtype, device=x.device)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = memory[: len(x[part])]
            torch.mm(x[part], weight.T, out=logits)
            if not (wants_x or wants_weight):
                once = plan or loss_plan(vocabulary)
                loss[part] = losses(logits, target[part], ignore, once, interpret)[0]
                continue
            step = plan or step_plan(vocabulary)
            losses_and_gradient(logits, target[part], loss[part], ignore, step, interpret)
            if dx is not None:
                torch.mm(logits, weight, out=dx[part])
            if dw is not None:
                _accumulate(dw, logits.T, x[part], first=start == 0)
        result, count = _reduce(loss, target, ignore, reduction)
        ctx.save_for_backward(dx, dw, count)
        ctx.weight_dtype = weight.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dx, dw, count = ctx.saved_tensors
        factor = grads[0] if count is None else grads[0] / count
        if dx is not None:
            dx = torch.mul(dx, factor, out=torch.empty_like(dx))
        if dw is not None:
            dw = torch.mul(dw, factor, out=torch.empty(dw.shape, dtype=ctx.weight_dtype, device=dw.device))
        return dx, dw, None, None, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_rows: int | None = None,
    sum_dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
    plan: Plan | None = None,
) -> Tensor:
    """cross_entropy(x·weightᵀ, target) without ever holding all logits; differentiable in x and weight.

    Shapes       x [N, D] and weight [V, D] of one format; target [N] int64 in 0 … V − 1 or `ignore_index`.
                 Returns a float32 number.
    chunk_rows   rows of logits in memory at once (None: as many as fit half a GiB)
    sum_dtype    format in which dW is summed over the chunks: float32, or weight's own to save memory
    Holds        chunk_rows·V·itemsize bytes of logits, and dx and dW from forward to backward.
    Raises       ShapeError, DtypeError, StrideError, DeviceError; targets as in `cross_entropy`.
    """
    check_float("x", x)
    check_float("weight", weight, (x.dtype,))
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}.",
            "A logit is the product of a row of x [N, D] and a row of weight [V, D].",
            "x.flatten(0, -2), and weight with as many columns.",
        )
    check_together(x=x, weight=weight)
    _check_target("x", x, target, len(weight), ignore_index)
    _check_reduction(reduction, ("mean", "sum"))
    if chunk_rows is not None and chunk_rows < 1:
        raise ShapeError(
            f"chunk_rows is {chunk_rows}.", "At least one row of logits is made at a time.", "1 or more."
        )
    if sum_dtype not in (torch.float32, weight.dtype):
        raise DtypeError(
            f"sum_dtype is {sum_dtype}.",
            f"dW ends in {weight.dtype}; its sum over chunks needs that format or a finer one.",
            f"torch.float32 or {weight.dtype}.",
        )
    chosen = choose(backend, x)
    if chosen == "reference":
        return linear_reference(x, weight, target, ignore_index=ignore_index, reduction=reduction)
    chunk = chunk_rows or max(1, CHUNK_BYTES // max(1, len(weight) * x.element_size()))
    return _LinearCrossEntropy.apply(
        x, weight, target, ignore_index, reduction, chunk, sum_dtype, plan, chosen == "interpret"
    )


def _check_target(name: str, x: Tensor, target: Tensor, vocabulary: int, ignore_index: int) -> None:
    if x.dim() != 2 or vocabulary == 0:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}.",
            "The loss is taken row by row of a matrix, over at least one class.",
            f"{name}.flatten(0, -2), and target.flatten().",
        )
    if target.dtype != torch.int64:
        raise DtypeError(
            f"target is {str(target.dtype).removeprefix('torch.')}.",
            "It holds the number of a class for each row.",
            "target.long().",
        )
    check_shape("target", target, x.shape[:1], f"It holds one class for each row of {name}.")
    if target.numel() > 1 and target.stride(0) != 1:
        raise StrideError(
            f"target has stride {target.stride(0)}.",
            "The kernel finds the target of row i at place i.",
            "target.contiguous().",
        )
    check_together(**{name: x, "target": target})
    if not target.is_cuda:
        wrong = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
        if wrong.any():
            at = int(wrong.nonzero()[0, 0])
            raise ShapeError(
                f"target[{at}] is {int(target[at])}.",
                f"There are {vocabulary} classes, 0 to {vocabulary - 1}, and ignore_index is {ignore_index}.",
                "a class that exists, or ignore_index.",
            )


def _check_reduction(reduction: str, known: tuple[str, ...] = ("mean", "sum", "none")) -> None:
    if reduction not in known:
        raise ShapeError(
            f"reduction is {reduction!r}.",
            "It says how the losses of the rows become one number.",
            f"{', '.join(map(repr, known))}.",
        )
