"""The CUDA C++ matrix products of tensor_cores.cu as functions of tensors: on a GPU, or on the PTX machine.

For teaching: who multiplies, and where the numbers come from. Every rung does 2·M·N·K FLOPs; it is how many
elements of C share what was fetched that sets the bytes which the threads ask of global memory:

    rung          shared by            A and B asked for      multiplied by
    naive         one element          4·M·N·K bytes          ordinary cores, in fp32
    tiled         16 × 16 elements     4·M·N·K / 16           ordinary cores, in fp32
    wmma_global   16 × 16 elements     4·M·N·K / 16           tensor cores, 16 × 16 × 16 an instruction
    wmma_shared   64 × 64 elements     4·M·N·K / 64           tensor cores

On a T4 this is the way to its tensor cores: Triton's `tl.dot` does not use them there. The products to use
elsewhere are in matmul.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcourse.errors import DeviceError, ShapeError, UnknownNameError
from llmcourse.kernels.checks import StrideError, check_float, check_together
from llmcourse.kernels.launch import ceil_div

if TYPE_CHECKING:
    from llmcourse.vgpu.cuda import Module, Result


@dataclass(frozen=True)
class Rung:
    """How a kernel of tensor_cores.cu is launched.

    tile       rows and columns of C that a block computes
    threads    of a block
    multiple   what M, N and K must be multiples of
    """

    tile: int
    threads: tuple[int, ...]
    multiple: int

    def asked_bytes(self, m: int, n: int, k: int) -> int:
        """Bytes of A and B that all threads ask for; `naive` shares nothing, whatever its block."""
        return 4 * m * n * k // (self.tile if self.multiple > 1 else 1)


RUNGS = {
    "naive": Rung(16, (16, 16), 1),
    "tiled": Rung(16, (16, 16), 16),
    "wmma_global": Rung(16, (32,), 16),
    "wmma_shared": Rung(64, (128,), 64),
}


def source() -> str:
    """The text of tensor_cores.cu."""
    return files("llmcourse.kernels").joinpath("tensor_cores.cu").read_text(encoding="utf-8")


@lru_cache
def _compiled(defines: tuple[tuple[str, object], ...]) -> Module:
    from llmcourse.vgpu import cuda

    return cuda.compile(source(), "sm_75", defines=dict(defines), name="tensor_cores.cu")


def module(defines: Mapping[str, object] | None = None) -> Module:
    """tensor_cores.cu, compiled; {"PAD": 0} takes the padding out of wmma_shared's tiles."""
    return _compiled(tuple(sorted((defines or {}).items())))


def multiply(
    a: Tensor,
    b: Tensor,
    rung: str = "wmma_shared",
    *,
    defines: Mapping[str, object] | None = None,
    counters: bool = False,
) -> tuple[Tensor, Result]:
    """(a·b, the launch) by a rung of tensor_cores.cu.

    Shapes     a [M, K], b [K, N] of float16, row-major; the product [M, N] is float32. No gradient.
    counters   count on the machine also where a GPU ran the launch
    Raises     ShapeError, DtypeError, StrideError, DeviceError, UnknownNameError; MissingPackageError where
               NVRTC is missing.
    """
    if rung not in RUNGS:
        raise UnknownNameError(
            f"there is no rung {rung!r}.", f"tensor_cores.cu has {', '.join(RUNGS)}.", "one of these."
        )
    shape = RUNGS[rung]
    _check(a, b, rung, shape.multiple)
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=torch.float32, device=a.device)
    grid = ceil_div(n, shape.tile), ceil_div(m, shape.tile)
    kernel = module(defines)[rung]
    return c, kernel[grid, shape.threads](a.detach(), b.detach(), c, m, n, k, counters=counters)


def _check(a: Tensor, b: Tensor, rung: str, multiple: int) -> None:
    for name, x in (("a", a), ("b", b)):
        check_float(name, x, (torch.float16,))
        if x.device.type not in ("cpu", "cuda"):
            raise DeviceError(
                f"{name} is on {x.device}.",
                "CUDA C++ runs on an NVIDIA GPU.",
                f"{name}.cpu() or {name}.cuda().",
            )
    check_together(a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ShapeError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}.",
            "The kernels sum along a row of a and down a column of b, which must be of one length.",
            "a [M, K] and b [K, N].",
        )
    if 0 in (*a.shape, *b.shape):
        raise ShapeError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}.",
            "A grid has at least one block, and here is nothing to compute.",
            "a @ b, which gives zeros.",
        )
    for name, x in (("a", a), ("b", b)):
        if not x.is_contiguous() or x.data_ptr() % 32:
            raise StrideError(
                f"{name} of shape {tuple(x.shape)} has strides {x.stride()} and begins {x.data_ptr() % 32} "
                "bytes after a multiple of 32.",
                "A fragment is loaded from rows one length apart that begin on multiples of 32 bytes.",
                f"{name}.clone(memory_format=torch.contiguous_format).",
            )
    sizes = {"M": a.shape[0], "N": b.shape[1], "K": a.shape[1]}
    for name, size in sizes.items():
        if size % multiple:
            raise ShapeError(
                f"{name} is {size}.",
                f"{rung} computes whole tiles, without a mask at their edges: multiples of {multiple}.",
                f"{name} = {ceil_div(size, multiple) * multiple}, padded with zeros, or rung='naive'.",
            )
