"""The points of quantization: rounding in groups, GPTQ's loop, a quantized layer's kernel, QAT's rounding.

The package stores scales in bfloat16 and a learner's function returns float32: a `Quantized` holds either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmcourse.plug.kernels import tensor
from llmcourse.plug.point import LearnersCode, Point, kind, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.compress.quantize import Quantized, Scheme

COMPRESS = "llmcourse.compress"
ROWS = {"cuda": 32, "cpu": 1024}
"""Rows of weights that a program of a learner's kernel takes: the interpreter wants few programs."""


def pack_int4(code: LearnersCode) -> Callable[..., Quantized]:
    from llmcourse.compress.quantize import Quantized
    from llmcourse.compress.quantize import quantize as own

    def quantize(weight: Tensor, scheme: Scheme) -> Quantized:
        """Asymmetric INT4 by the learner's function; every other scheme by the package's own."""
        import torch

        if (scheme.bits, scheme.symmetric, scheme.codes) != (4, False, "int"):
            return own(weight, scheme)

        rows, columns = weight.shape
        group = scheme.group or columns
        if columns % group or group % 2:
            code.refuse(
                f"a weight {[rows, columns]} is to be stored as {scheme}",
                "The function packs groups of an even size that divides the row.",
                "Scheme(4, 64, symmetric=False).",
            )
        packed, scale, zero = code.parts(code(weight.detach().float(), group), ("packed", "scale", "zero"))
        groups = (rows, columns // group)
        for name, part, shape in (
            ("packed", packed, (rows, columns // 2)),
            ("scale", scale, groups),
            ("zero", zero, groups),
        ):
            _shaped(code, part, shape, name)
        if packed.dtype != torch.uint8 or not scale.is_floating_point():
            code.refuse(
                f"packed is {packed.dtype} and scale {scale.dtype}",
                "Bytes hold two codes each; scales are fractions.",
                "uint8 and float32.",
            )
        return Quantized.from_packed(packed, scale, zero.to(torch.uint8), scheme, (rows, columns))

    return quantize


def gptq_update(code: LearnersCode) -> Callable[..., Quantized]:
    from llmcourse.compress.quantize import Quantized, grid, spread

    def gptq(
        weight: Tensor,
        gram: Tensor,
        scheme: Scheme,
        *,
        damping: float = 0.01,
        block: int = 128,
        order: bool = True,
        grids_of: Tensor | None = None,
    ) -> Quantized:
        """The package's `gptq` with the learner's loop: damping, grids, order of columns as there."""
        import torch

        if (scheme.bits, scheme.symmetric, scheme.codes) != (4, True, "int"):
            code.refuse(f"the scheme is {scheme}", "The function rounds to codes −8 … 7.", "Scheme(4, 64).")
        columns = weight.shape[1]
        h = gram.double().clone()
        diagonal = h.diagonal()
        mean = diagonal.mean()
        diagonal[diagonal == 0] = 1.0
        diagonal += damping * mean
        scale, _ = grid(weight if grids_of is None else grids_of, scheme)
        steps = spread(scale.double(), scheme, columns).expand(weight.shape)
        first = h.diagonal().argsort(descending=True, stable=True) if order else torch.arange(columns)
        given = (weight.detach().double()[:, first], h[first][:, first], steps[:, first])
        found = _shaped(code, code(*given), tuple(weight.shape), "the result")
        if bool((found != found.round()).any()) or bool((found.abs() > 8).any()) or bool((found == 8).any()):
            code.refuse(
                "the result holds something else than the codes −8 … 7",
                "They are stored in four bits each.",
                "torch.round(…).clamp(-8, 7).",
            )
        codes = found.to(torch.int8)[:, first.argsort()]
        return Quantized(codes, scale, None, scheme, (weight.shape[0], columns))

    return gptq


def dequant_gemv(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.compress.quantized_linear import QuantizedLinear

    own = QuantizedLinear.product

    def product(self: QuantizedLinear, x: Tensor) -> Tensor:
        """One row by the learner's kernel, more of them by the package's own. On a CPU it is interpreted."""
        import torch

        scheme, columns = self.scheme, self.in_features
        if x.numel() != columns:
            return own(self, x)
        group = scheme.group or columns
        if (scheme.bits, scheme.codes) != (4, "int") or group < 4 or group & (group - 1) or columns % group:
            code.refuse(
                f"a layer of {columns} columns is stored as {scheme}",
                "The function reads INT4 in groups of a power of 2 that divides the row.",
                "Scheme(4, 64, symmetric=False).",
            )
        scale = self.scale.float().contiguous()
        zero = torch.full_like(scale, 8) if self.zero is None else self.zero.float().contiguous()
        y = code(x.reshape(-1).contiguous(), self.packed, scale, zero, group, ROWS[x.device.type])
        y = tensor(code, y, x, (self.out_features,), "the result")
        return y.view(*x.shape[:-1], self.out_features)

    return product


def straight_through(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.compress.qat import Rounded
    from llmcourse.compress.quantize import TENSOR, grid

    def forward(self: Rounded, weight: Tensor) -> Tensor:
        """The rounded weight: what the learner's layer makes of the unit vectors, a group at a time."""
        import torch

        scheme, (rows, columns) = self.scheme, weight.shape
        size = columns if scheme.group in (None, TENSOR) else int(scheme.group or columns)
        if (scheme.bits, scheme.symmetric, scheme.codes) != (4, True, "int") or columns % size:
            code.refuse(f"the scheme is {scheme}", "The function rounds to codes −8 … 7.", "Scheme(4).")
        scale = grid(weight.detach(), scheme)[0].to(weight.dtype).expand(rows, columns // size).reshape(-1, 1)
        unit = torch.eye(size, dtype=weight.dtype, device=weight.device)
        parts = _shaped(code, code(unit, weight.reshape(-1, size), scale), (size, len(scale)), "y")
        if parts.dtype != weight.dtype:
            code.refuse(
                f"y is {parts.dtype}", "The layer goes on with it.", f"{weight.dtype}, as x and weight are."
            )
        return parts.T.reshape(rows, columns)

    return forward


def _shaped(code: LearnersCode, value: Any, shape: tuple[int, ...], what: str) -> Tensor:
    import torch

    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        came = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else kind(value)
        fix = "a `return` at its end." if value is None else "printing the shapes on the way to it."
        code.refuse(f"{what} is {came}, and should be a tensor of shape {list(shape)}", code.point.says, fix)
    return value


for _point in (
    Point(
        "pack_int4",
        ("weight", "group"),
        "(packed, scale, zero)",
        "A weight [N, K] as bytes [N, K/2] of two codes each, with a scale and a zero for every group.",
        tuple(
            f"{COMPRESS}.{module}:quantize"
            for module in ("quantize", "quantized_linear", "awq", "draft", "llm_int8", "qat", "smoothquant")
        ),
        pack_int4,
    ),
    Point(
        "gptq_update",
        ("weight", "gram", "scale"),
        "tensor",
        "Codes [N, K], −8 … 7, rounded column by column, each making up for those before it.",
        (f"{COMPRESS}.gptq:gptq", f"{COMPRESS}.awq:gptq"),
        gptq_update,
    ),
    Point(
        "dequant_gemv",
        ("x", "packed", "scale", "zero", "group", "rows"),
        "tensor",
        "x [K] times 4-bit weights [N, K] that stay packed: scale · (code − zero), `rows` rows a program.",
        (f"{COMPRESS}.quantized_linear:QuantizedLinear.product",),
        dequant_gemv,
    ),
    Point(
        "straight_through",
        ("x", "weight", "scale"),
        "tensor",
        "x [B, K] times weights [N, K] rounded to INT4; the gradient passes as if they were not.",
        (f"{COMPRESS}.qat:Rounded.forward",),
        straight_through,
    ),
):
    register(_point)
