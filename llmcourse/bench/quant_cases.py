"""What the benchmarks of quantized products share: weights in every layout, and other people's kernels.

Each peer takes the weights in a layout of its own, converted once, as a model would at loading. A peer that a
build of PyTorch lacks, or that refuses a shape, is left out and its reason kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcourse.kernels.launch import ceil_div
from llmcourse.kernels.matmul_fp8 import quantize as to_fp8
from llmcourse.kernels.matmul_fp8 import scaled_matmul
from llmcourse.kernels.quant_int8 import int8_matmul, quantize_rows
from llmcourse.kernels.quant_matmul import dequantize, quant_matmul

Function = Callable[[], Tensor]
SHAPES = ((14336, 4096), (4096, 14336))  # N × K: up and down projection of an 8-billion-parameter Llama
GROUP = 128
INNER_TILES = 8  # tinygemm's: steps of 16 along K that lie together


@dataclass(frozen=True)
class Weights:
    """Random quantized weights [n, k].

    packed, scale    as `quant_matmul` takes them (symmetric)
    exact            the weights that they stand for, float32 [n, k]
    moved            bytes of codes and scales: what must be read at the least
    """

    bits: int
    group: int | None
    packed: Tensor
    scale: Tensor
    exact: Tensor

    @property
    def moved(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    @property
    def name(self) -> str:
        return f"INT{self.bits} " + ("row" if self.group is None else f"g{self.group}")


def weights(n: int, k: int, bits: int, group: int | None, device: str = "cuda") -> Weights:
    """Codes of the whole range, and scales that differ: every byte of them matters to the result."""
    packed = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device)
    groups = 1 if group is None else -(-k // group)
    scale = (torch.rand(n, groups, device=device) + 0.5).div(2 ** (bits - 1) * k**0.5).bfloat16()
    exact = dequantize(packed, scale, None, bits, group, k, torch.float32, backend="reference")
    return Weights(bits, group, packed, scale, exact)


def copies_for(n: int, k: int, bits: int) -> int:
    """Weights that fill the L2 cache more than twice: a call of each in turn finds none of its own there."""
    return 1 + ceil_div(2 * torch.cuda.get_device_properties(0).L2_cache_size, n * k * bits // 8)


def in_turn(sets: Sequence[Mapping[str, Function]], calls: int = 16) -> dict[str, list[Function]]:
    """The functions of each name, one of every set after another: at least `calls`, whole rounds."""
    rounds = ceil_div(calls, len(sets))
    return {name: [s[name] for s in sets] * rounds for name in sets[0]}


def peers(x: Tensor, w: Weights) -> tuple[dict[str, Function], dict[str, str]]:
    """(functions by name, reasons of those left out) for x [m, k] in bfloat16 times these weights."""
    found: dict[str, Function] = {}
    missing: dict[str, str] = {}
    full = w.exact.bfloat16()
    found["bf16 torch.matmul"] = lambda: torch.matmul(x, full.T)
    makers: dict[str, Callable[[Tensor, Weights], Function]] = {}
    if w.bits == 4:
        makers["tinygemm (torch._weight_int4pack_mm)"] = tinygemm
    elif w.group is None:
        makers["torch._weight_int8pack_mm"] = int8pack
        makers["torch._int_mm, rows quantized first"] = int_mm
        makers["torch._scaled_mm, rows quantized first"] = scaled_mm
    for name, make in makers.items():
        try:
            function = make(x, w)
            function()
            torch.cuda.synchronize()
            found[name] = function
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return found, missing


def ours(x: Tensor, w: Weights) -> dict[str, Function]:
    """This package's kernels for the same product."""
    found: dict[str, Function] = {
        "quant_matmul": lambda: quant_matmul(x, w.packed, w.scale, None, w.bits, w.group),
        "dequantize, then torch.matmul": lambda: (
            x @ dequantize(w.packed, w.scale, None, w.bits, w.group, x.shape[1]).T
        ),
    }
    if w.bits == 8 and w.group is None:
        codes = (w.packed ^ 128).view(torch.int8)
        fp8, fp8_scale = to_fp8(w.exact, "row")
        transposed, columns = fp8.T, fp8_scale.T.contiguous()

        def w8a8() -> Tensor:
            rows, scale = quantize_rows(x)
            return int8_matmul(rows, codes, scale, w.scale)

        def fp8_both() -> Tensor:
            rows, scale = to_fp8(x, "row")
            return scaled_matmul(rows, transposed, scale, columns, fast_accum=True)

        rows, scale = quantize_rows(x)
        found["int8_matmul, rows quantized first"] = w8a8
        found["int8_matmul alone"] = lambda: int8_matmul(rows, codes, scale, w.scale)
        if torch.cuda.get_device_capability() >= (8, 9):
            found["scaled_matmul (fp8), rows quantized first"] = fp8_both
    return found


def tinygemm(x: Tensor, w: Weights) -> Function:
    """(code − 8)·scale + zero, nibbles in the order that its converter takes: the even column high."""
    group = w.group or x.shape[1]
    swapped = (w.packed >> 4) | (w.packed << 4)
    packed = torch._convert_weight_to_int4pack(swapped, INNER_TILES)
    pairs = torch.stack((w.scale, torch.zeros_like(w.scale)), dim=-1).transpose(0, 1).contiguous()
    return lambda: torch._weight_int4pack_mm(x, packed, group, pairs)


def int8pack(x: Tensor, w: Weights) -> Function:
    codes = (w.packed ^ 128).view(torch.int8)
    scale = w.scale.view(-1)
    return lambda: torch._weight_int8pack_mm(x, codes, scale)


def int_mm(x: Tensor, w: Weights) -> Function:
    """Products in int32, then the scales by separate operations, as they come from PyTorch."""
    codes = (w.packed ^ 128).view(torch.int8)
    columns = w.scale.float().view(1, -1)

    def call() -> Tensor:
        rows, scale = quantize_rows(x)
        return (torch._int_mm(rows, codes.T) * scale * columns).bfloat16()

    return call


def scaled_mm(x: Tensor, w: Weights) -> Function:
    fp8, fp8_scale = to_fp8(w.exact, "row")
    columns = fp8_scale.T.contiguous()

    def call() -> Tensor:
        rows, scale = to_fp8(x, "row")
        return torch._scaled_mm(
            rows, fp8.T, scale_a=scale, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return call


def error_of(out: Tensor, x: Tensor, w: Weights) -> float:
    """‖out − x·Wᵀ‖ / ‖x·Wᵀ‖ on at most 64 rows, in float64."""
    exact = x[:64].double() @ w.exact.double().T
    return float((out[:64].double() - exact).norm() / exact.norm())
