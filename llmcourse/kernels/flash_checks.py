"""What FlashAttention asks of its arguments, and how it says no."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import DtypeError, StrideError, check_float, check_together
from llmcourse.kernels.launch import ceil_div

FORWARD_HEAD_DIM = 256
BACKWARD_HEAD_DIM = 128


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
        near = (
            max(d for d in range(1, min(heads, kv_heads) + 1) if heads % d == 0) if heads and kv_heads else 1
        )
        raise ShapeError(
            f"{heads} query heads cannot share {kv_heads} key/value heads.",
            "Grouped-query attention gives each key/value head the same number of query heads.",
            f"{near} key/value heads.",
        )
    if head_dim % 8 or not 8 <= head_dim <= FORWARD_HEAD_DIM:
        raise ShapeError(
            f"the head dim is {head_dim}.",
            f"Rows are read in pieces of 16 bytes and kept whole: multiples of 8 up to {FORWARD_HEAD_DIM}.",
            f"padding with zeros to {ceil_div(max(head_dim, 1), 8) * 8} and scale={head_dim}**-0.5."
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
            f"Backward keeps two sums of a block's size on the chip, with room up to {BACKWARD_HEAD_DIM}.",
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
            "It holds the first row of each of N sequences and the end of the last, N + 1 numbers.",
            "torch.cat((zero, lengths.cumsum(0))).int().",
        )
    check_together(q=x, **{name: cu_seqlens})
    if torch.compiler.is_compiling():
        return len(x) if longest is None else longest
    if longest is not None and cu_seqlens.is_cuda:
        return longest
    numbers = cu_seqlens.tolist()
    sizes = [after - before for before, after in itertools.pairwise(numbers)]
    falls = next((i for i, size in enumerate(sizes) if size < 0), None)
    what = ""
    if falls is not None:
        what = f"falls from {numbers[falls]} to {numbers[falls + 1]}"
    elif numbers[0] != 0:
        what = f"starts with {numbers[0]}"
    elif numbers[-1] != len(x):
        what = f"ends with {numbers[-1]}, and there are {len(x)} rows"
    if what:
        raise ShapeError(
            f"{name} {what}.",
            "Sequence n is in rows cu_seqlens[n] to cu_seqlens[n + 1] − 1, and together they are all rows.",
            f"numbers that rise from 0 to {len(x)}.",
        )
    if longest is not None and longest < max(sizes, default=0):
        raise ShapeError(
            f"the longest sequence of {name} has {max(sizes)} rows, and {longest} are said to be the most.",
            "Programs are started for the blocks of the longest sequence; rows beyond would be left out.",
            f"{max(sizes)} or more.",
        )
    return max(sizes, default=0) if longest is None else longest
