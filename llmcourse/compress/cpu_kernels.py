"""Products of codes on a CPU, by the kernels that PyTorch carries for them.

PyTorch multiplies bfloat16 rows with weights of 4 bits: its kernel unpacks 16 or 32 codes into a register,
looks up their values and adds up in float32, so that a weight costs half a byte of memory traffic and never
exists in 16 bits. Its weights are (digit − 8)·scale + shift, with a scale and a shift for each 32, 64, 128 or
256 digits of a row.

Eight bits are two such digits: code = 16·high + low. So an INT8 product is a 4-bit product of twice the
columns, in which the row comes twice:

    [x, x] · [16·scale·(high digits),  scale·(low digits)]

Its sum is still one float32 sum, rounded once, and it reads the same 8 bits a weight as PyTorch's kernel for
INT8 (`_weight_int8pack_mm`). Where a register holds all 16 values of a digit (AVX-512), the look-up is so
cheap that two digits are faster than that kernel, which spends long on short rows; elsewhere a look-up takes
two registers and more instructions, and the INT8 kernel is used.

A digit kernel's layout is its own, so the codes are kept a second time, rearranged. The operations are
PyTorch's but not public; they are used in this file only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmcourse.compress.quantize import Quantized

Product = Callable[[Tensor], Tensor]  # x [M, K] bfloat16 → [M, N]
GROUPS = (256, 128, 64, 32)  # digits that can share a scale


def most_rows(bits: int) -> int:
    """Rows for which a product pays: it unpacks the weight anew for each few; beyond, once is cheaper."""
    return 36 if bits <= 4 else 12


def product(quantized: Quantized) -> Product | None:
    """A product with these codes for up to `most_rows` rows, or None where no kernel fits."""
    if quantized.codes.device.type != "cpu" or quantized.scheme.codes != "int":
        return None
    size, few_bits = group_size(quantized), quantized.scheme.bits <= 4
    bytes_fit = reads_bytes(quantized)
    if size and (few_bits or quantized.zero is None) and (few_bits or wide_registers() or not bytes_fit):
        return digit_product(quantized, size)
    return byte_product(quantized) if bytes_fit else None


def wide_registers() -> bool:
    """Whether a register holds the values of all 16 digits, so that one instruction looks up 16 of them."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def reads_bytes(quantized: Quantized) -> bool:
    """Whether the INT8 kernel can be used: symmetric codes, one scale a row, rows of whole vectors."""
    # NOTE: it checks no length, and reads beyond rows that are not whole vectors (torch 2.13: a crash).
    whole = quantized.shape[1] % 32 == 0 and hasattr(torch, "_weight_int8pack_mm")
    return whole and quantized.zero is None and quantized.scale.shape[1] == 1


def group_size(quantized: Quantized) -> int:
    """The most digits that can share a scale here; 0 where the kernel cannot be used."""
    rows, columns = quantized.shape
    if not hasattr(torch, "_weight_int4pack_mm_for_cpu") or rows % 16:
        return 0
    group = quantized.scheme.group or columns
    sizes = [s for s in GROUPS if columns % s == 0 and (group < 0 or group % s == 0)]
    return sizes[0] if sizes else 0


def digit_product(quantized: Quantized, size: int) -> Product:
    """x · Wᵀ by the 4-bit kernel, for codes of up to 4 bits, or symmetric ones of up to 8."""
    codes, scale = quantized.codes.int(), scales(quantized, size)
    if quantized.scheme.bits <= 4:
        zero = torch.zeros_like(scale) if quantized.zero is None else scales(quantized, size, quantized.zero)
        digits = codes + 8 if quantized.zero is None else codes
        shift = torch.zeros_like(scale) if quantized.zero is None else scale * (8 - zero)
        twice = False
    else:
        digits = torch.cat(((codes >> 4) + 8, codes & 15), dim=1)
        shift = torch.cat((torch.zeros_like(scale), 8 * scale))
        scale = torch.cat((16 * scale, scale))
        twice = True
    packed = torch._convert_weight_to_int4pack_for_cpu(digits.contiguous(), 1)
    table = torch.stack((scale, shift), dim=-1).bfloat16().contiguous()

    def times(x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(torch.cat((x, x), 1) if twice else x, packed, size, table)

    return times


def byte_product(quantized: Quantized) -> Product:
    """x · Wᵀ by the INT8 kernel, for symmetric codes with one scale a row."""
    codes = quantized.codes.contiguous()
    scale = quantized.scale.bfloat16().expand(codes.shape[0], 1).reshape(-1).contiguous()
    return lambda x: torch._weight_int8pack_mm(x, codes, scale)


def scales(quantized: Quantized, size: int, values: Tensor | None = None) -> Tensor:
    """Scales (or other `values` of groups) of every `size` columns, float32 [K/size, N]."""
    rows, columns = quantized.shape
    values = (quantized.scale if values is None else values).float().expand(rows, -1)
    group = quantized.scheme.group
    own = columns if group is None or group < 0 else group
    at = torch.arange(0, columns, size) // own
    return values[:, at].T.contiguous()
