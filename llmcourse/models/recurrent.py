"""Running sums: what the mixers keep whose memory does not grow with the sequence."""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which a running sum is kept: float32 at least.

    A sum over thousands of tokens in bfloat16 (8 bits of mantissa) stops growing: 256 + 1 is 256.
    """
    return torch.promote_types(dtype, torch.float32)


def accumulator_size(itemsize: int) -> int:
    """Bytes of a number of a running sum, beside activations of `itemsize` bytes."""
    return max(itemsize, 4)
