"""What every kernel's wrapper asks of its arguments, and how it says no.

A kernel gets bare addresses. It cannot see that a tensor is on another device, has another shape or other
strides: it reads whatever lies there. So the wrapper looks first, and names what came, why it cannot work
and what to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llmcourse.errors import CourseError, DeviceError, ShapeError, UnknownNameError
from llmcourse.kernels.counters import is_interpreting

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Backend = Literal["auto", "triton", "interpret", "reference"]
BACKENDS = ("auto", "triton", "interpret", "reference")


class DtypeError(CourseError, TypeError):
    """A number format that a kernel does not take."""


class StrideError(CourseError, ValueError):
    """Elements that do not lie in memory as a kernel reads them."""


def check_float(name: str, x: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """x is a tensor of one of the number formats that the kernels compute in."""
    if not isinstance(x, Tensor):
        raise DtypeError(
            f"{name} is a {type(x).__name__}, not a torch tensor.",
            "A kernel reads memory that torch holds.",
            f"torch.as_tensor({name}).",
        )
    if x.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise DtypeError(
            f"{name} is {str(x.dtype).removeprefix('torch.')}.",
            f"The kernel loads {names}, and computes in float32.",
            f"{name}.float().",
        )


def check_together(**tensors: Tensor) -> None:
    """All on one device."""
    (first, x), *others = tensors.items()
    for name, y in others:
        if y.device != x.device:
            raise DeviceError(
                f"{name} is on {y.device} and {first} on {x.device}.",
                "One launch runs on one device and reads that device's memory.",
                f"{name}.to({str(x.device)!r}).",
            )


def check_shape(name: str, x: Tensor, shape: Sequence[int], why: str) -> None:
    """x has exactly this shape; `why` completes "What the kernel does with it:"."""
    if tuple(x.shape) != tuple(shape):
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}.", why, f"shape {tuple(shape)}."
        )


def check_vector(name: str, x: Tensor, columns: int) -> None:
    """A float vector with one contiguous element for each column."""
    check_float(name, x)
    check_shape(name, x, (columns,), "It holds one number for each column of the rows.")
    if columns > 1 and x.stride(0) != 1:
        raise StrideError(
            f"{name} has stride {x.stride(0)}.",
            "The kernel reads its elements side by side.",
            f"{name}.contiguous().",
        )


def row_stride(x: Tensor) -> int | None:
    """Elements from one row to the next when x [..., N] is seen as rows of N; None if no one number does.

    Rows need not touch: a slice of columns, or every second row, has a stride of its own.
    """
    shape, strides = x.shape, x.stride()
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    step: int | None = None
    reach = 1  # rows counted so far, from the innermost dimension outwards
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != step * reach:
            return None
        reach *= size
    return shape[-1] if step is None else step


def check_rows(name: str, x: Tensor) -> None:
    """x [..., N] is made of rows: N ≥ 1, contiguous within a row, one distance from row to row."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}.",
            "The kernel works along rows, and a row needs at least one column.",
            "a last dimension of 1 or more.",
        )
    if x.numel() and row_stride(x) is None:
        why = (
            "Neighbouring threads read neighbouring columns; elements of a row that lie apart would cost a "
            "memory sector each."
            if x.shape[-1] > 1 and x.stride(-1) != 1
            else "The kernel finds row i at i times one stride, and these leading dimensions do not merge."
        )
        raise StrideError(
            f"{name} of shape {tuple(x.shape)} has strides {x.stride()}.", why, f"{name}.contiguous()."
        )


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x, its row stride), x copied first only if its rows do not lie as `check_rows` asks.

    For gradients: the reader does not choose how they lie (`sum().backward()` sends one number with all
    strides 0).
    """
    stride = row_stride(x)
    if stride is None:
        x = x.contiguous()
        stride = x.shape[-1]
    return x, stride


def choose(backend: str, *tensors: Tensor) -> str:
    """The backend that runs: "triton" (compiled), "interpret" (Triton's interpreter) or "reference" (torch).

    "auto" compiles for CUDA tensors and takes the reference for CPU tensors, except in a block of
    `counters.counting()` or `interpreting()`: that asks for the kernels themselves, wherever the tensors are.
    """
    if backend not in BACKENDS:
        raise UnknownNameError(
            f"there is no backend {backend!r}.",
            "A kernel runs compiled on a GPU, interpreted on a CPU, or as its reference in torch.",
            f"one of {', '.join(BACKENDS)}.",
        )
    x = tensors[0]
    if backend in ("auto", "triton") and not torch.compiler.is_compiling() and is_interpreting():
        return "interpret"
    if backend == "auto":
        return "triton" if x.is_cuda else "reference"
    if backend == "triton" and not x.is_cuda:
        raise DeviceError(
            f"backend='triton' for a tensor on {x.device}.",
            "A compiled kernel runs on a GPU and reads the GPU's memory.",
            "x.cuda(), or backend='interpret', which runs the same kernel on a CPU.",
        )
    return backend
