"""The same questions put to PyTorch, which nobody here wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.autograd.memory import saved_bytes
from llmcourse.autograd.tensor import Tensor


def bytes_kept(operation: Callable[..., Any], *arrays: np.ndarray) -> int:
    """Bytes that this engine keeps for the backward pass of `operation` on tensors of these arrays."""
    tensors = [Tensor(a.copy(), requires_grad=True) for a in arrays]
    with saved_bytes() as kept:
        operation(*tensors)
    return kept.peak


def torch_bytes_kept(operation: Callable[..., Any], *arrays: np.ndarray, device: str = "cpu") -> int:
    """The same of PyTorch, for the same operation on `torch` tensors of these arrays."""
    import torch

    tensors = [torch.tensor(a, device=device, requires_grad=True) for a in arrays]
    return torch_saved_bytes(lambda: operation(*tensors))


def torch_saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that PyTorch keeps for backward while `run()` computes: every distinct storage once."""
    import torch

    storages: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(storages.values())
    del result  # the graph had to live until here: a freed storage's address is given out again
    return total
