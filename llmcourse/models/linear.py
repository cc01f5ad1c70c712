"""Matrix products with weights, by the kernels that read them fastest on a CPU.

At decode a linear layer is a matrix times one vector: its time is the time to read the weight. On x86
processors that are not Intel's, the BLAS that PyTorch calls in float32 reads it at half the speed of
oneDNN, which PyTorch carries as well; and in bfloat16 oneDNN doubles its own speed when the weight
was rearranged for it once (*packed*) instead of at every call. Packing keeps a second copy of a weight.

The two oneDNN operations are PyTorch's own but not public; they are used in this file only. Where
they are missing, or a gradient is wanted, or the tensors are on a GPU, this is `F.linear`; and under
torch.compile, which chooses a product by itself.
"""

from __future__ import annotations

from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def onednn(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor have oneDNN's products for `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]: [..., N]."""
    if _usable(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` through `linear`; with `packed` on, bfloat16 weights are packed when first used."""

    packed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.packed and self.weight.dtype == torch.bfloat16 and _usable(x, self.weight) and _counts(self):
            return linear(x, _packed(self), self.bias)
        return linear(x, self.weight, self.bias)


# Beside the modules and not in them: a packed weight is opaque and can be neither copied nor saved.
_PACKED: WeakKeyDictionary[Linear, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


def _counts(module: Linear) -> bool:
    """Whether changes of the weight are counted. Of one made in inference mode they are not: no packing."""
    return not module.weight.is_inference()


def _packed(module: Linear) -> Tensor:
    key = module.weight.data_ptr(), module.weight._version  # of the weight that was packed
    found = _PACKED.get(module)
    if found is None or found[0] != key:
        found = key, torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 1)
        _PACKED[module] = found
    return found[1]


def _usable(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return weight.device.type == "cpu" and not wants_grad and x.dtype == weight.dtype and onednn(x.dtype)
