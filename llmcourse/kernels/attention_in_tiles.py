"""Attention in tiles, in plain torch: FlashAttention's two loops to read, before they become kernels.

    naive            the formula: all S × T scores at once
    tiled            forward: a tile of queries stays, blocks of keys and values stream by
    tiled_backward   the weights computed again from lse, block by block
    merge            two parts of a row, each a triple (m, l, acc), become one

One head, no mask: q [S, D], k and v [T, D]. `flash_forward.py` and `flash_backward.py` are the same loops in
Triton, with masks, heads and formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v, [..., S, D]. Makes and keeps S × T numbers a head."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def tiled(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """(out [S, D], lse [S]), with no more than block_m × block_n scores at a time."""
    out, lse = torch.empty_like(q), q.new_empty(len(q))
    for i in range(0, len(q), block_m):
        tile = slice(i, i + block_m)
        m, total, acc = torch.full_like(lse[tile], -torch.inf), torch.zeros_like(lse[tile]), q[tile] * 0
        for j in range(0, len(k), block_n):
            s = q[tile] @ k[j : j + block_n].T * q.shape[1] ** -0.5
            m_new = torch.maximum(m, s.amax(1))
            p, shrink = torch.exp(s - m_new[:, None]), torch.exp(m - m_new)
            total = total * shrink + p.sum(1)
            acc = acc * shrink[:, None] + p @ v[j : j + block_n]
            m = m_new
        out[tile], lse[tile] = acc / total[:, None], m + total.log()
    return out, lse


def tiled_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, block_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from what forward kept: out, and a number a query."""
    scale, delta = q.shape[1] ** -0.5, (dout * out).sum(1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for j in range(0, len(k), block_n):
        part = slice(j, j + block_n)
        p = torch.exp(q @ k[part].T * scale - lse[:, None])  # finished weights: nothing to divide by
        ds = p * (dout @ v[part].T - delta) * scale
        dv[part], dk[part] = p.T @ dout, ds.T @ q
        dq += ds @ k[part]
    return dq, dk, dv


def triple(s: Tensor, v: Tensor) -> Triple:
    """(m [S], l [S], acc [S, D]) of scores s [S, T] over values v [T, D]: the maximum, and sums under it."""
    m = s.amax(1)
    p = torch.exp(s - m[:, None])
    return m, p.sum(1), p @ v


def merge(a: Triple, b: Triple) -> Triple:
    """The triple of two parts of the keys together. Associative; (m, 0, 0) with a very small m is neutral."""
    m = torch.maximum(a[0], b[0])
    x, y = torch.exp(a[0] - m), torch.exp(b[0] - m)
    return m, a[1] * x + b[1] * y, a[2] * x[:, None] + b[2] * y[:, None]


def with_gradients(
    f: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """[f(*inputs), the gradient of each input], computed in `dtype`, with dout sent backward."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = f(*leaves)
    out.backward(dout.to(dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
