"""Linear layers that keep their weight as codes, and models made of them.

A weight-only quantized layer computes what `F.linear` computes with the weights that its codes stand for. Its
gain is in what it reads: at decode a layer's time is the time to read its weight, and a code is 4 or 8 bits
where a bfloat16 is 16. There are three ways to the same product:

    codes on a GPU         `kernels.quant_matmul`, which unpacks in registers
    a few rows on a CPU    PyTorch's kernels, in bfloat16 (`compress.cpu_kernels`)
    otherwise              the weight is written out once for the call and multiplied: the reference. It moves
                           more bytes than a layer that was never quantized, and is right where many rows
                           share that work (reading a prompt), or where exactness counts

The weight is frozen. Gradients reach x, and nothing is kept for them but the codes: the backward pass writes
the weight out anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.compress.cpu_kernels import Product, most_rows, product
from llmcourse.compress.quantize import Quantized, Scheme, quantize
from llmcourse.errors import ShapeError

How = Callable[[str, nn.Linear], "Quantized | nn.Module | None"]


class QuantizedLinear(nn.Module):
    """x [..., K] → [..., N] by a quantized weight [N, K]. The weight is frozen, gradients reach x.

    packed [N, ⌈K·bits/8⌉] uint8, scale [N, G], zero [N, G] or None, bias [N] or None

    kernels   off: every product is the reference, with the weight written out

    Raises ShapeError for a bias that is not [N], or rows that are not [..., K].
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    kernels = True

    def __init__(self, quantized: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.scheme = quantized.scheme
        self.out_features, self.in_features = quantized.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ShapeError(
                f"a bias of shape {list(bias.shape)} came to a weight {list(quantized.shape)}.",
                "Each output has one number added to it.",
                f"a bias of shape [{self.out_features}].",
            )
        self.register_buffer("packed", quantized.packed())
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("zero", quantized.zero)
        self.register_buffer("bias", None if bias is None else bias.detach())
        # The format of the model around it: it follows model.to(dtype), and holds nothing.
        self.register_buffer("like", quantized.scale.new_empty(0), persistent=False)

    like: Tensor

    @property
    def quantized(self) -> Quantized:
        """The weight as codes."""
        shape = self.out_features, self.in_features
        return Quantized.from_packed(self.packed, self.scale, self.zero, self.scheme, shape)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for [N, K], written out at each use, in the model's format."""
        return self.quantized.dequantize(self.like.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales, zeros and bias."""
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero, self.bias) if t is not None)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"x of shape {list(x.shape)} came to a weight {[self.out_features, self.in_features]}.",
                "The last dimension of x is multiplied with the rows of the weight.",
                f"x of shape [..., {self.in_features}].",
            )
        y = _Frozen.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x · Wᵀ without the bias, by the kernel that fits."""
        if self.kernels and x.is_cuda and self._on_gpu():
            return self._gpu_product(x)
        rows = x.reshape(-1, self.in_features)
        if self._on_cpu(rows) and (times := _cpu_product(self)) is not None:
            return times(rows).view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.quantized.dequantize(x.dtype))

    def _on_gpu(self) -> bool:
        integers = self.scheme.codes == "int" and self.scheme.bits in (4, 8)
        return integers or self.scheme.codes == "fp8_e4m3"

    def _on_cpu(self, rows: Tensor) -> bool:
        here = rows.device.type == "cpu" and rows.dtype == torch.bfloat16
        few = 0 < rows.shape[0] <= most_rows(self.scheme.bits)
        return self.kernels and here and few and not torch.compiler.is_compiling()

    def _gpu_product(self, x: Tensor) -> Tensor:
        from llmcourse.kernels.quant_matmul import quant_matmul

        packed = self.packed if self.scheme.codes == "int" else self.packed.view(torch.float8_e4m3fn)
        return quant_matmul(x, packed, self.scale, self.zero, self.scheme.bits, self.scheme.group)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


class _Frozen(torch.autograd.Function):
    """The product, differentiable in x alone: dx = dy · W, with W written out again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.quantized.dequantize(grads[0].dtype), None


# Beside the modules and not in them: a rearranged weight is a second copy, to be neither moved nor saved.
_PRODUCTS: WeakKeyDictionary[QuantizedLinear, tuple[object, Product | None]] = WeakKeyDictionary()


def _cpu_product(layer: QuantizedLinear) -> Product | None:
    tensors = [t for t in (layer.packed, layer.scale, layer.zero) if t is not None]
    if any(t.is_inference() for t in tensors):
        return None  # changes of such tensors are not counted: a copy could not follow them
    key = tuple((t.data_ptr(), t._version) for t in tensors)
    found = _PRODUCTS.get(layer)
    if found is None or found[0] != key:
        found = key, product(layer.quantized)
        _PRODUCTS[layer] = found
    return found[1]


def quantize_model(
    model: nn.Module, how: How | Scheme, skip: Sequence[str] = ("head", "embedding")
) -> nn.Module:
    """A copy of a model whose linear layers are quantized. What is kept is shared with it, not copied.

    how    a Scheme (round to nearest), or how(name, layer) → its Quantized, another module, or None (keep)
    skip   names of layers, or of modules with all their layers, that are kept. A head that is tied to the
           embedding and is not skipped gets codes of its own; the embedding stays as it is

    Raises ShapeError when no layer was replaced: a misspelt name would otherwise pass unnoticed.
    """
    choose = _nearest(how) if isinstance(how, Scheme) else how
    # Everything of the old layers is shared, so that copying the modules copies no weight.
    smaller = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    replaced = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or any(name == s or name.startswith(f"{s}.") for s in skip):
            continue
        new = choose(name, layer)
        if new is None:
            continue
        if isinstance(new, Quantized):
            new = QuantizedLinear(new, layer.bias)
        if isinstance(new, QuantizedLinear):
            new.like = new.like.to(layer.weight.dtype)
        smaller.set_submodule(name, new)
        replaced += 1
    if not replaced:
        raise ShapeError(
            "no layer was quantized.",
            f"Of a {type(model).__name__}'s linear layers, each was skipped or kept.",
            "a shorter `skip`, or a `how` that returns a Quantized.",
        )
    return smaller


def _nearest(scheme: Scheme) -> How:
    return lambda name, layer: quantize(layer.weight.detach(), scheme)
