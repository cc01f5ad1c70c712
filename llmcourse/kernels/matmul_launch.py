"""Launch one rung of the matmul ladder with one configuration, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcourse.kernels.matmul_persistent import descriptor_kernel, persistent_kernel
from llmcourse.kernels.matmul_plan import Config, device_of
from llmcourse.kernels.matmul_splitk import counters_for, split_k_kernel
from llmcourse.kernels.matmul_tiled import grouped_kernel, naive_kernel

PRECISE_EVERY = 128  # fp8 without fast accumulation: products added before each step to float32
INTERPRETED_PROGRAMS = 3


@dataclass(frozen=True)
class Operands:
    """out [M, N] = activation(a [M, K] · b [K, N] · scales + bias [N]); scales in float32, of 1 or M (N)."""

    a: Tensor
    b: Tensor
    out: Tensor
    bias: Tensor | None = None
    scale_a: Tensor | None = None
    scale_b: Tensor | None = None
    activation: str = ""
    fast_accum: bool = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.b.shape[1], self.a.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.a.stride(), *self.b.stride(), *self.out.stride()

    @property
    def scale_strides(self) -> tuple[int, int]:
        """0 for one scale of the whole matrix, 1 for one of each row or column."""
        return tuple(int(s is not None and s.numel() > 1) for s in (self.scale_a, self.scale_b))  # type: ignore[return-value]

    @property
    def epilogue(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.bias, self.scale_a, self.scale_b

    def switches(self, config: Config) -> dict[str, Any]:
        """What the kernels are compiled for, beside tile sizes."""
        precise = self.a.dtype.itemsize == 1 and not self.fast_accum
        every = min(PRECISE_EVERY, config.block_k) if precise else None
        return {"ACTIVATION": self.activation, "IMPRECISE": every}


def launch(rung: str, x: Operands, config: Config) -> None:
    """Write x.out by a rung's kernel: compiled where the tensors are on a GPU, else interpreted."""
    LAUNCHERS[rung](x, config)


def _run(
    kernel: Any, grid: tuple[int, ...], x: Operands, config: Config, *arguments: Any, **meta: Any
) -> None:
    meta |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    if not x.out.is_cuda:
        from llmcourse.kernels.counters import interpreted

        interpreted(kernel)[grid](*arguments, **meta)
        return
    with torch.cuda.device(x.out.device):
        kernel[grid](*arguments, **meta, num_warps=config.warps, num_stages=config.stages)


def _tiles(x: Operands, config: Config) -> int:
    m, n, _ = x.sizes
    return -(-m // config.block_m) * -(-n // config.block_n)


def _naive(x: Operands, config: Config) -> None:
    _run(naive_kernel, (_tiles(x, config),), x, config, x.a, x.b, x.out, *x.sizes, *x.strides)


def _grouped(x: Operands, config: Config) -> None:
    arguments = (x.a, x.b, x.out, *x.epilogue, *x.sizes, *x.strides, *x.scale_strides)
    meta = {"GROUP_M": config.group_m, **x.switches(config)}
    _run(grouped_kernel, (_tiles(x, config),), x, config, *arguments, **meta)


def _described(matrix: Tensor, rows: int, columns: int) -> tuple[Any, bool]:
    """A descriptor with blocks of rows × columns, and whether it is of the transpose (columns contiguous)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if matrix.stride(1) == 1:
        return TensorDescriptor.from_tensor(matrix, [rows, columns]), False
    return TensorDescriptor.from_tensor(matrix.T, [columns, rows]), True


def _descriptors(x: Operands, config: Config) -> tuple[tuple[Any, ...], dict[str, bool]]:
    a, a_transposed = _described(x.a, config.block_m, config.block_k)
    b, b_transposed = _described(x.b, config.block_k, config.block_n)
    out, _ = _described(x.out, config.block_m, config.block_n // config.subtiles)
    return (a, b, out), {"A_TRANSPOSED": a_transposed, "B_TRANSPOSED": b_transposed}


def _descriptor(x: Operands, config: Config) -> None:
    descriptors, transposed = _descriptors(x, config)
    arguments = (*descriptors, *x.epilogue, *x.sizes, *x.scale_strides)
    meta = {"GROUP_M": config.group_m, "SUBTILES": config.subtiles, **transposed, **x.switches(config)}
    _run(descriptor_kernel, (_tiles(x, config),), x, config, *arguments, **meta)


def _persistent(x: Operands, config: Config) -> None:
    descriptors, transposed = _descriptors(x, config)
    arguments = (*descriptors, *x.epilogue, *x.sizes, *x.scale_strides)
    programs = device_of(x.out)[1] if x.out.is_cuda else INTERPRETED_PROGRAMS
    meta = {"GROUP_M": config.group_m, "PROGRAMS": programs, **transposed, **x.switches(config)}
    meta |= {"SUBTILES": config.subtiles, "FLATTEN": config.flatten}
    _run(persistent_kernel, (min(programs, _tiles(x, config)),), x, config, *arguments, **meta)


def _split_k(x: Operands, config: Config) -> None:
    (m, n, _), tiles, splits = x.sizes, _tiles(x, config), config.splits
    sums = torch.empty((splits, m, n) if splits > 1 else (1,), dtype=torch.float32, device=x.out.device)
    arguments = (x.a, x.b, x.out, sums, counters_for(tiles, x.out.device), *x.epilogue)
    arguments += (*x.sizes, *x.strides, *x.scale_strides)  # type: ignore[assignment]
    _run(split_k_kernel, (tiles, splits), x, config, *arguments, SPLITS=splits, **x.switches(config))


LAUNCHERS = {
    "naive": _naive,
    "grouped": _grouped,
    "descriptor": _descriptor,
    "persistent": _persistent,
    "split_k": _split_k,
}
