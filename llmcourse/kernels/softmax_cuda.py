"""The CUDA C++ softmax (softmax.cu) as a function of tensors: on a GPU, or on the PTX machine without one."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcourse.errors import DeviceError
from llmcourse.kernels.checks import check_float, check_rows, row_stride
from llmcourse.kernels.launch import ceil_div, rows_in

if TYPE_CHECKING:
    from llmcourse.vgpu.cuda import Module

HELD = 4  # vectors of a row that a thread keeps in registers
MAX_THREADS = 1024
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def source() -> str:
    """The text of softmax.cu."""
    return files("llmcourse.kernels").joinpath("softmax.cu").read_text(encoding="utf-8")


@lru_cache
def module() -> Module:
    """softmax.cu compiled for every number format, with vectors of 16 bytes and of one element."""
    from llmcourse.vgpu import cuda

    names = []
    for dtype, name in TYPES.items():
        for vector in (16 // dtype.itemsize, 1):
            names += [f"softmax_rows<{name}, {vector}, {HELD}>", f"softmax_online<{name}, {vector}>"]
    return cuda.compile(source(), names=names, name="softmax.cu")


def vector_of(x: Tensor, y: Tensor) -> int:
    """Elements that a thread can move at once: 16 bytes if every row of both tensors is aligned to 16."""
    wide = 16 // x.element_size()
    places = (
        x.shape[-1],
        row_stride(x) or 0,
        x.data_ptr() // x.element_size(),
        y.data_ptr() // y.element_size(),
    )
    return wide if all(place % wide == 0 for place in places) else 1


def softmax_cuda(x: Tensor) -> Tensor:
    """Softmax along the last dimension of x [..., N] by softmax.cu. No backward.

    Raises   ShapeError, DtypeError, StrideError, DeviceError; MissingPackageError where NVRTC is missing.
    """
    check_float("x", x)
    check_rows("x", x)
    if x.device.type not in ("cpu", "cuda"):
        raise DeviceError(f"x is on {x.device}.", "CUDA C++ runs on an NVIDIA GPU.", "x.cpu() or x.cuda().")
    columns, rows = x.shape[-1], rows_in(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    vector = vector_of(x, y)
    threads = 32 * ceil_div(ceil_div(columns, vector * HELD), 32)
    name = TYPES[x.dtype]
    if threads <= MAX_THREADS:
        kernel = module()[f"softmax_rows<{name}, {vector}, {HELD}>"]
    else:
        kernel, threads = module()[f"softmax_online<{name}, {vector}>"], MAX_THREADS
    kernel[rows, threads](x.detach(), y, row_stride(x), columns, columns)
    return y
