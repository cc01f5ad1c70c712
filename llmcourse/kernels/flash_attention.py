"""FlashAttention: exact attention without the matrix of scores, forward and backward.

    q [B, Hq, S, D]   k, v [B, Hkv, T, D]   →   o [B, Hq, S, D]

    rung        file                     numbers stored      numbers moved, S = T, a head
    reference   attention_reference.py   2·S², both kept     torch's
    naive       attention_naive.py       S²                  4·S² and q, k, v tile by tile
    pointer     flash_forward.py         S                   2·S·D + 2·S·D·⌈S / BLOCK_M⌉
    descriptor  the same kernels         S                   the same, by Hopper's copy engine
    hopper      flash_hopper.py          S                   the same, softmax beside the products

The idea (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691): a tile of scores is used up where
it is made, in registers. Keys and values are read again for every block of queries instead: with
BLOCK_M = 128 and D = 64 as many bytes as one S × S matrix has, and most come from the L2 cache, which the
matrix would not fit. FLOPs are those of the formula, half of them when causal (`flash_cost.py`); backward
computes the weights again instead of reading them (`flash_backward.py`).

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
from llmcourse.kernels.checks import StrideError, choose
from llmcourse.kernels.flash_backward import backward as launch_backward
from llmcourse.kernels.flash_checks import check, check_backward, lengths
from llmcourse.kernels.flash_cost import Sizes, bytes_moved, flops, minimum_bytes
from llmcourse.kernels.flash_forward import forward as launch_forward
from llmcourse.kernels.flash_plan import INTERPRETED, Plan, plan_for, unusable

__all__ = ["Plan", "Sizes", "attention", "attention_varlen", "bytes_moved", "flops", "minimum_bytes"]


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

    Shapes   q [B, Hq, S, D], k and v [B, Hkv, T, D], Hq a multiple of Hkv; D a multiple of 8, to 128 (256
             without gradient), contiguous; other strides are free, so that
             x.view(B, S, H, D).transpose(1, 2) is not copied. Returns o of q's shape, format and order of
             dimensions; with return_lse also the natural log-sum-exp of each query's scores [B, Hq, S] in
             float32, which may be differentiated too.
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
             for which the CPU waits for the GPU, and its numbers are checked. With them, nothing is read.
             Under torch.compile they are ΣS and ΣT if not given: right, with programs that do nothing.
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
        q,
        k,
        v,
        cu_seqlens_q,
        cu_k,
        max_q,
        max_k,
        causal,
        number,
        window,
        str(plan or ""),
        backend == "interpret",
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
    if 0 in (q.numel(), k.numel()):  # the sum over no key is zero
        shape = q.shape[:3] if cu_q is None else (q.shape[1], q.shape[0])
        return torch.zeros_like(q), q.new_full(shape, -math.inf, dtype=torch.float32)
    tiles = chosen_plan(
        plan, q, k, v, causal=causal, window=window, packed=cu_q is not None, interpret=interpret
    )
    if tiles.forward.rung == "hopper":
        from llmcourse.kernels import flash_hopper

        if interpret:
            return flash_hopper.forward(q, k, v, causal=causal, scale=scale, interpret=True)
        return flash_hopper.flash_forward(q, k, v, causal, scale, window, tiles.forward)
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
    if 0 in (q.numel(), k.numel()):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tiles = chosen_plan(
        plan, q, k, v, causal=causal, window=window, packed=cu_q is not None, interpret=interpret
    )
    return launch_backward(
        do, q, k, v, o, lse, dlse, causal=causal, scale=scale, window=window, plan=tiles,
        cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k, interpret=interpret,
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
        if plan.forward.rung == "hopper":
            reason = reason or why_not_hopper(q, k, v, window=window, interpret=interpret)
        if reason and any(tiles.rung != "pointer" for tiles in plan):
            raise StrideError(
                f"the plan {text!r} cannot read these tensors: {reason}.",
                "The copy engine takes [B, H, tokens, D] whose start and strides are multiples of 16 bytes.",
                "plan=None, which takes any tensors, or a plan of the rung 'pointer'.",
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
    hopper = not reason and not why_not_hopper(q, k, v, window=window)
    return plan_for(
        q.shape[-1], q.dtype, capability,
        causal=causal, window=window, descriptors=not reason, hopper=hopper, queries=q.shape[-2],
    )  # fmt: skip


def why_not_hopper(q: Tensor, k: Tensor, v: Tensor, *, window: int, interpret: bool = False) -> str:
    """Why the rung `hopper` cannot run; empty if it can."""
    from llmcourse.kernels import flash_hopper

    return "it has no window" if window else flash_hopper.unsupported(q, k, v, interpret=interpret)
