"""Attention and its gradients in float64 with NumPy, whole: what the blocks must add up to.

A causal query stands at the end of the keys: query i of S sees keys 0 … i + T − S of T. With S = T that
is the usual triangle, with S = 1 a decoding step that looks at the whole cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def visible(S: int, T: int, causal: bool = True) -> Array:
    """[S, T], True where a query may look."""
    every = np.ones((S, T), bool)
    return np.tril(every, T - S) if causal else every


def attention(q: Any, k: Any, v: Any, mask: Any) -> tuple[Array, Array]:
    """(out [S, D], lse [S]) of one head; where a row of mask is all False, 0 and −inf."""
    q, k, v, mask = (np.asarray(_numbers(x)) for x in (q, k, v, mask))
    scores = np.where(mask, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top[:, 0] + np.log(total), -np.inf)
    return weights @ v / np.where(total > 0, total, 1.0)[:, None], lse


def gradients(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, mask: Array
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of one head, with the weights exp(scores − lse) that `lse` says."""
    q, k, v, out, lse, dout = (_numbers(x) for x in (q, k, v, out, lse, dout))
    scale = 1 / np.sqrt(q.shape[1])
    p = np.where(mask, np.exp(np.where(mask, q @ k.T * scale - lse[:, None], 0.0)), 0.0)
    ds = p * (dout @ v.T - (dout * out).sum(axis=1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ dout


def _numbers(x: Any) -> Any:
    return x.double().numpy() if hasattr(x, "is_floating_point") and x.is_floating_point() else np.asarray(x)
