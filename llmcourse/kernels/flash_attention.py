"""FlashAttention: exact attention without the matrix of scores, forward and backward.

    q [B, Hq, S, D]   k, v [B, Hkv, T, D]   →   o [B, Hq, S, D]

    rung        file                     memory beside q, k, v, o           bytes moved, S = T, a head
    reference   attention_reference.py   scores and weights, 2·S·T          by torch
    naive       attention_naive.py       scores, S·T                        ≥ 4·S² numbers
    pointer     flash_forward.py         a number a query                   2·S·D + 2·S·D·⌈S / BLOCK_M⌉ numbers
    descriptor  the same kernels         the same                           the same, by Hopper's copy engine
    hopper      flash_hopper.py          the same                           the same, softmax under the products

The last two columns are the idea (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691): a tile of
scores is used up where it is made, in registers. With BLOCK_M = 128 the keys and values are read S/128 times,
which costs less than one S × S matrix as soon as D < 128·2 — and they come from the L2 cache, the matrix would
not. FLOPs are those of the formula, half of them when causal (`flash_cost.py`); backward computes the weights
again instead of reading them (`flash_backward.py`).

`attention` and `attention_varlen` check, choose and launch. They are one operator for PyTorch,
`llmcourse::flash_attention`, whose kernels torch.compile does not look into: it needs to know the shapes
(register_fake) and the gradient (register_autograd), and captures models that use it whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import DeviceError, ShapeError
from llmcourse.kernels.attention_reference import reference, reference_varlen
from llmcourse.kernels.checks import DtypeError, StrideError, check_float, check_together, choose
from llmcourse.kernels.flash_backward import backward as launch_backward
from llmcourse.kernels.flash_cost import Sizes, bytes_moved, flops, minimum_bytes
from llmcourse.kernels.flash_forward import forward as launch_forward
from llmcourse.kernels.flash_plan import INTERPRETED, Plan, plan_for, unusable

__all__ = ["Plan", "Sizes", "attention", "attention_varlen", "bytes_moved", "flops", "minimum_bytes"]

BACKWARD_HEAD_DIM = 128
FORWARD_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    plan: Plan | str | None = None,
    interpret: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale·q·kᵀ)·v, differentiable in q, k and v, without a matrix of scores.

    Shapes   q [B, Hq, S, D], k and v [B, Hkv, T, D], Hq a multiple of Hkv; D a multiple of 8, to 128 (256 without
             gradient), contiguous; other strides are free, so that x.view(B, S, H, D).transpose(1, 2) is not copied.
             Returns o of q's shape, format and order of dimensions; with return_lse also the natural
             log-sum-exp of each query's scores [B, Hq, S] in float32, which may be differentiated too.
    causal   query i is at position T − S + i and sees keys up to there; a query before the first key
             sees none: o = 0, lse = −∞
    scale    1/√D if None; positive
    window   with causal: the last W keys, the query's own among them; None or 0 for no limit
    plan     tiles (`flash_plan.py`), as a Plan or its text; None for this device's own
    interpret   run the kernels in Triton's interpreter. Otherwise CPU tensors take the reference, unless
             in a block of `counters.counting()` or `interpreting()`
    Moves    `bytes_moved`, FLOPs `flops`: 4·B·Hq·D for each visible pair, backward 10.
    Keeps    q, k, v, o and the log-sum-exp for backward; the largest intermediate is 2·B·Hq·S numbers.
    Raises   ShapeError, DtypeError, StrideError, DeviceError, UnknownNameError.
    """
    window = window or 0
    check(q, k, v, causal=causal, scale=scale, window=window)
    backend = choose("interpret" if interpret else "auto", q)
    if backend == "reference":
        o, lse = reference(q, k, v, causal=causal, scale=scale, window=window)
        return (o, lse) if return_lse else o
    check_backward(q, k, v)
    number = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    o, lse = flash_attention(
        q, k, v, None, None, 0, 0, causal, number, window, str(plan or ""), backend == "interpret"
    )
    return (o, lse) if return_lse else o


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    plan: Plan | str | None = None,
    interpret: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` for N sequences of unequal lengths that lie one after another, without padding.

    Shapes   q [ΣS, Hq, D], k and v [ΣT, Hkv, D]; cu_seqlens_q [N + 1] int32: sequence n is in rows
             cu_seqlens_q[n] … cu_seqlens_q[n + 1] − 1; cu_seqlens_k the same for k and v (None: as q's).
             Sequences may be empty. Returns o [ΣS, Hq, D]; the log-sum-exp is [Hq, ΣS].
    max_seqlen_q, max_seqlen_k   the longest lengths, or more. Without them they are read from cu_seqlens,
             for which the CPU waits for the GPU, and cu_seqlens' numbers are checked. With them nothing is read.
             Under torch.compile they are ΣS and ΣT if not given: right, with programs that have nothing to do.
    Others   as for `attention`.
    """
    window = window or 0
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check(q, k, v, causal=causal, scale=scale, window=window, packed=True)
    max_q = lengths("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
    max_k = lengths("cu_seqlens_k", cu_k, k, max_seqlen_k)
    if len(cu_k) != len(cu_seqlens_q):
        raise ShapeError(
            f"cu_seqlens_q is for {len(cu_seqlens_q) - 1} sequences and cu_seqlens_k for {len(cu_k) - 1}.",
            "Sequence n of the queries looks at sequence n of the keys.",
            "an empty sequence (the same number twice) where one has none.",
        )
    backend = choose("interpret" if interpret else "auto", q)
    if backend == "reference":
        o, lse = reference_varlen(q, k, v, cu_seqlens_q, cu_k, causal=causal, scale=scale, window=window)
        return (o, lse) if return_lse else o
    check_backward(q, k, v)
    number = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    o, lse = flash_attention(
        q, k, v, cu_seqlens_q, cu_k, max_q, max_k, causal, number, window, str(plan or ""), backend == "interpret"
    )
    return (o, lse) if return_lse else o


# the operator


@torch.library.custom_op("llmcourse::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    window: int,
    plan: str,
    interpret: bool,
) -> tuple[Tensor, Tensor]:
    """(o, lse), launched. Arguments are checked by the functions above."""
    tiles = chosen_plan(plan, q, k, v, causal=causal, window=window, packed=cu_q is not None, interpret=interpret)
    if tiles.forward.rung == "hopper" and not interpret:
        from llmcourse.kernels.flash_hopper import flash_forward

        return flash_forward(q, k, v, causal, scale, window)
    return launch_forward(
        q, k, v, causal=causal, scale=scale, window=window, tiles=tiles.forward, cu_q=cu_q, cu_k=cu_k,
        max_q=max_q, interpret=interpret,
    )  # fmt: skip


@flash_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    causal: bool, scale: float, window: int, plan: str, interpret: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = q.shape[:3] if cu_q is None else (q.shape[1], q.shape[0])
    return torch.empty_like(q), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("llmcourse::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    window: int,
    plan: str,
    interpret: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), launched."""
    tiles = chosen_plan(plan, q, k, v, causal=causal, window=window, packed=cu_q is not None, interpret=interpret)
    return launch_backward(
        do, q, k, v, o, lse, dlse, causal=causal, scale=scale, window=window, plan=tiles, cu_q=cu_q, cu_k=cu_k,
        max_q=max_q, max_k=max_k, interpret=interpret,
    )  # fmt: skip


@flash_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    causal: bool, scale: float, window: int, plan: str, interpret: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # most often nobody uses the log-sum-exp, and its gradient is None
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _gradient(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = flash_attention_backward(do, q, k, v, o, lse, dlse, cu_q, cu_k, *ctx.options)
    return *grads, *(None for _ in range(2 + len(ctx.options)))


flash_attention.register_autograd(_gradient, setup_context=_keep)


def chosen_plan(
    text: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int, packed: bool, interpret: bool
) -> Plan:
    """The plan written in `text`, or this device's own for these tensors."""
    reason = unusable(q, k, v, packed=packed)
    if text:
        plan = Plan.parse(text)
        if reason and any(tiles.rung != "pointer" for tiles in plan):
            raise StrideError(
                f"the plan {text!r} cannot read these tensors: {reason}.",
                "The copy engine takes tensors [B, H, tokens, D] whose start and strides are multiples of 16 bytes.",
                "plan=None, which reads any strides, or tensors of such strides.",
            )
        return plan
    if interpret:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(q.device)
    capability = 10 * major + minor
    if q.dtype == torch.bfloat16 and capability < 80:
        raise DeviceError(
            f"bfloat16 on a GPU of compute capability {major}.{minor}.",
            "Its multiplication came with the A100 (8.0).",
            "q.half(), k.half(), v.half().",
        )
    return plan_for(
        q.shape[-1], q.dtype, capability, causal=causal, window=window, descriptors=not reason
    )


# checks


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: int,
    packed: bool = False,
) -> None:
    """Raise unless these can be attended to: shapes, formats, devices, strides, scale and window."""
    check_float("q", q)
    for name, x in (("k", k), ("v", v)):
        check_float(name, x, (q.dtype,))
    dims, shape = (3, "[tokens, heads, head_dim]") if packed else (4, "[batch, heads, tokens, head_dim]")
    if q.dim() != dims or k.dim() != dims:
        raise ShapeError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}.",
            f"Attention reads {shape}" + (", sequences one after another." if packed else "."),
            "x.flatten(0, 1)." if packed else "x.view(B, S, H, D).transpose(1, 2).",
        )
    if v.shape != k.shape:
        raise ShapeError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}.",
            "Every key comes with one value, of the same head dim.",
            f"v of shape {tuple(k.shape)}.",
        )
    check_together(q=q, k=k, v=v)
    head_dim = q.shape[-1]
    if k.shape[-1] != head_dim or (not packed and k.shape[0] != q.shape[0]):
        raise ShapeError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}.",
            "A score is the product of a query and a key of one batch entry, over the head dim.",
            "k of the same head dim" + ("." if packed else " and batch."),
        )
    heads, kv_heads = (q.shape[1], k.shape[1])
    if kv_heads == 0 or heads % kv_heads:
        near = max(d for d in range(1, min(heads, kv_heads) + 1) if heads % d == 0) if heads and kv_heads else 1
        raise ShapeError(
            f"{heads} query heads cannot share {kv_heads} key/value heads.",
            "Grouped-query attention gives each key/value head the same number of query heads.",
            f"{near} key/value heads.",
        )
    if head_dim % 8 or not 8 <= head_dim <= FORWARD_HEAD_DIM:
        raise ShapeError(
            f"the head dim is {head_dim}.",
            f"A row is read 16 bytes at a time and kept on the chip whole: multiples of 8 up to {FORWARD_HEAD_DIM}.",
            f"padding q, k and v with zeros to {min(max(8, -(-head_dim // 8) * 8), FORWARD_HEAD_DIM)}, and scale="
            f"{head_dim}**-0.5."
            if head_dim < FORWARD_HEAD_DIM
            else "more heads of a smaller dim.",
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise StrideError(
                f"{name} of shape {tuple(x.shape)} has strides {x.stride()}.",
                "The kernel reads the numbers of a head side by side; the other dimensions may lie anyhow.",
                f"{name}.contiguous().",
            )
    if scale is not None and not 0 < scale < math.inf:
        raise ShapeError(
            f"scale is {scale}.",
            "The largest score is found before the scale is applied, so that it must be positive and finite.",
            "scale=None for 1/√D, or −q with −scale.",
        )
    if window < 0 or (window and not causal):
        raise ShapeError(
            f"window is {window}" + (" without causal." if window > 0 else "."),
            "The window is the last W keys up to the query's own position.",
            "causal=True, or window=None." if window > 0 else "window=None for no limit.",
        )


def check_backward(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise if a gradient will be wanted that the kernels cannot give."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wanted and q.shape[-1] > BACKWARD_HEAD_DIM:
        raise ShapeError(
            f"the head dim is {q.shape[-1]}, and a gradient is wanted.",
            f"Backward keeps two sums of a block's size on the chip, which has room up to {BACKWARD_HEAD_DIM}.",
            "torch.no_grad(), or flash_attention.reference.",
        )


def lengths(name: str, cu_seqlens: Tensor, x: Tensor, longest: int | None) -> int:
    """The longest sequence (or a bound), after cu_seqlens has been checked as far as it can be read."""
    if cu_seqlens.dtype != torch.int32:
        raise DtypeError(
            f"{name} is {str(cu_seqlens.dtype).removeprefix('torch.')}.",
            "The kernel loads 32-bit row numbers.",
            f"{name}.int().",
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or (len(cu_seqlens) > 1 and cu_seqlens.stride(0) != 1):
        raise ShapeError(
            f"{name} has shape {tuple(cu_seqlens.shape)}.",
            "It holds, side by side, the first row of each of N sequences and the end of the last: N + 1 numbers.",
            "torch.cat((zero, lengths.cumsum(0))).int().",
        )
    check_together(q=x, **{name: cu_seqlens})
    if torch.compiler.is_compiling():
        return len(x) if longest is None else longest
    if longest is not None and cu_seqlens.is_cuda:
        return longest
    numbers = cu_seqlens.tolist()
    sizes = [after - before for before, after in zip(numbers, numbers[1:], strict=False)]
    if numbers[0] != 0 or numbers[-1] != len(x) or min(sizes, default=0) < 0:
        what = (
            f"starts with {numbers[0]}"
            if numbers[0] != 0
            else f"falls from {numbers[i := next(i for i, n in enumerate(sizes) if n < 0)]} to {numbers[i + 1]}"
            if min(sizes, default=0) < 0
            else f"ends with {numbers[-1]}, and there are {len(x)} rows"
        )
        raise ShapeError(
            f"{name} {what}.",
            "Sequence n is in rows cu_seqlens[n] to cu_seqlens[n + 1] − 1, and together they are all rows.",
            f"numbers that rise from 0 to {len(x)}.",
        )
    if longest is not None and longest < max(sizes, default=0):
        raise ShapeError(
            f"the longest sequence of {name} has {max(sizes)} rows, and {longest} are said to be the most.",
            "Programs are started for as many blocks as the longest sequence has; rows beyond would be left out.",
            f"{max(sizes)} or more.",
        )
    return max(sizes, default=0) if longest is None else longest
