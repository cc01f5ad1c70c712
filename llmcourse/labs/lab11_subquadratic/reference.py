"""What lab 11's checks of linear attention share: inputs, and the definition, token by token in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor


def draw(t: Trial, batch: int, heads: int, length: int, dim: int, v_dim: int) -> tuple[Any, Any, Any]:
    """q and k with positive elements, and v."""
    q, k = (tensor(t, batch, heads, length, dim).exp() for _ in range(2))
    return q, k, tensor(t, batch, heads, length, v_dim)


def linear_attention(q: Any, k: Any, v: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs [B, H, S, Dv], and Σ k vᵀ and Σ k over all tokens."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    y = np.zeros(v.shape)
    for b, h, i in np.ndindex(*q.shape[:3]):
        weights = k[b, h, : i + 1] @ q[b, h, i]
        y[b, h, i] = weights @ v[b, h, : i + 1] / weights.sum()
    return y, np.einsum("bhsd,bhse->bhde", k, v), k.sum(axis=2)
