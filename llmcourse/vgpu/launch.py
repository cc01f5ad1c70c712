"""The shape of a launch, checked before anything runs: grid, block, shared memory, and where it goes.

On a GPU a block of 2048 threads is an error of the driver ("invalid argument") that names nothing; or, where
nobody asks for errors, nothing at all happens. The limits are those of the *CUDA C++ Programming Guide*
(technical specifications by compute capability).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmcourse.errors import CourseError, DeviceError
from llmcourse.vgpu.arguments import Argument, is_tensor

Size = tuple[int, int, int]

MAX_THREADS = 1024
MAX_BLOCK: Size = (1024, 1024, 64)
MAX_GRID: Size = ((1 << 31) - 1, 65535, 65535)
STATIC_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may declare; beyond, a launch must ask for dynamic shared memory."""
_DYNAMIC_SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 88: 99, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}
_DYNAMIC_SHARED |= {120: 99, 121: 99}


class LaunchError(CourseError, ValueError):
    """A grid, block or amount of shared memory that no GPU, or not this one, can launch."""


def size3(value: Any, what: str) -> Size:
    """4 → (4, 1, 1), (4, 2) → (4, 2, 1). Raises LaunchError for anything but one to three whole numbers."""
    parts: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
    try:
        numbers = [operator.index(p) for p in parts]
    except TypeError:
        floats = any(isinstance(p, float) for p in parts)
        raise LaunchError(
            f"{what}={value!r} is not a size.",
            f"A {what} is one to three whole numbers"
            + (", and / gives a float in Python even where it divides evenly." if floats else "."),
            "// instead of /, or (n + 255) // 256 to round up." if floats else f"{what} = 4, or (4, 2).",
        ) from None
    if not 1 <= len(numbers) <= 3:
        raise LaunchError(
            f"{what}={value!r} has {len(numbers)} dimensions.",
            f"A {what} has one to three: x, y and z.",
            f"{what} = {tuple(numbers[:3]) or 4!r}.",
        )
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


def check_launch(
    kernel: str,
    grid: Size,
    block: Size,
    *,
    max_threads: int | None = None,
    arch: str = "sm_80",
    static_shared: int = 0,
    dynamic_shared: int = 0,
) -> None:
    """Refuse what the hardware refuses, with the limit that is exceeded.

    max_threads   from __launch_bounds__; bytes of shared memory are per block
    """
    threads = block[0] * block[1] * block[2]
    if threads > MAX_THREADS and min(block) > 0:
        raise LaunchError(
            f"{kernel} was launched with {threads:,} threads a block ({_text(block)}).",
            f"A block has at most {MAX_THREADS:,} threads: all of them share one SM.",
            f"256 threads a block and {-(-threads // 256)} times as many blocks; blockIdx tells them apart.",
        )
    for what, size, limit in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        for axis, n, most in zip("xyz", size, limit, strict=True):
            if n < 1:
                raise LaunchError(
                    f"{kernel} was launched with a {what} of {_text(size)}: {what}Dim.{axis} is {n}.",
                    "No thread would run.",
                    "at least 1; (n + 255) // 256 blocks of 256 threads cover n elements when n ≥ 1.",
                )
            if n > most:
                raise LaunchError(
                    f"{kernel} was launched with a {what} of {_text(size)}: {what}Dim.{axis} is {n:,}.",
                    f"A {what} has at most {most:,} in {axis}.",
                    "more blocks." if what == "block" else "the x axis for the longest side of the grid.",
                )
    if max_threads is not None and threads > max_threads:
        raise LaunchError(
            f"{kernel} was launched with {threads} threads a block ({_text(block)}).",
            f"Its __launch_bounds__ promises at most {max_threads}: the compiler gave each thread registers "
            "accordingly.",
            f"at most {max_threads} threads, or another __launch_bounds__.",
        )
    most = shared_limit(arch)
    if static_shared > STATIC_SHARED:
        raise LaunchError(
            f"{kernel} declares {static_shared:,} bytes of shared memory.",
            f"A kernel may declare at most {STATIC_SHARED:,}; the rest must be asked for at launch.",
            "extern __shared__ float s[]; and kernel[grid, block, nbytes](…).",
        )
    if dynamic_shared < 0:
        raise LaunchError(
            f"{kernel} was launched with {dynamic_shared} bytes of dynamic shared memory.",
            "A size is not negative.",
            "0, or the bytes that extern __shared__ arrays need.",
        )
    if static_shared + dynamic_shared > most:
        declared = f" and {static_shared:,} declared" if static_shared else ""
        raise LaunchError(
            f"{kernel} was launched with {dynamic_shared:,} bytes of dynamic shared memory{declared}.",
            f"A block of {arch} has at most {most:,} bytes.",
            "a smaller tile, or a half-precision one.",
        )


def shared_limit(arch: str) -> int:
    """Bytes of shared memory a block may have, static and dynamic together, once a launch asks for them."""
    number = int(re.sub(r"\D", "", arch) or 80)
    known = [a for a in _DYNAMIC_SHARED if a <= number] or [75]
    return _DYNAMIC_SHARED[max(known)] << 10


def _text(size: Size) -> str:
    x, y, z = size
    return f"{x} × {y} × {z}" if z != 1 else f"{x} × {y}" if y != 1 else f"{x}"


@dataclass(frozen=True)
class Place:
    """Where a launch runs.

    gpu      index of the GPU that runs it; None for the machine
    copied   the machine runs it on copies of a GPU's tensors, which are copied back
    """

    gpu: int | None
    copied: bool = False


def place_of(kernel: str, bound: Sequence[Argument], where: str, available: bool) -> Place:
    """Choose by the arguments: one GPU's tensors run there, the CPU's on the machine.

    available   kernels can run on a GPU here

    Raises   DeviceError for arguments in several places, or not where they were asked for.
    """
    if where not in ("auto", "machine", "gpu"):
        raise LaunchError(
            f"where={where!r} is no place.",
            'A launch goes to the PTX machine or to a GPU: "auto" follows the tensors.',
            'where="auto", "machine" or "gpu".',
        )
    devices = {a.name: _device(a) for a in bound if a.is_array}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {'cpu' if d is None else f'cuda:{d}'}" for name, d in devices.items())
        raise DeviceError(
            f"the arrays of {kernel} are in different places: {listed}.",
            "A kernel reaches the memory of the device it runs on.",
            "device=cuda.device() for every tensor, or x.to(y.device).",
        )
    found = next(iter(devices.values()), None)
    if where == "machine":
        return Place(None, copied=found is not None)
    if found is not None:
        if not available:
            raise DeviceError(
                f"{kernel} got tensors on a GPU, and kernels cannot be launched on it from here.",
                "That takes the package cuda-core and a GPU of compute capability 7.5 or more.",
                'pip install cuda-core, or where="machine".',
            )
        return Place(found)
    if where == "gpu" or (not devices and available):
        if not available:
            raise DeviceError(
                f"{kernel} was to run on a GPU, and there is none here.",
                "torch finds no NVIDIA GPU that CUDA C++ can be compiled for.",
                'where="auto": the PTX machine computes the same values.',
            )
        if devices:
            raise DeviceError(
                f"{kernel} was to run on a GPU, and its arrays are on the CPU.",
                "Arrays are not copied in silence: the copies would cost more than most kernels.",
                "x.cuda() first, or device=cuda.device() where x is made.",
            )
        return Place(0)
    return Place(None)


def _device(argument: Argument) -> int | None:
    """Index of the GPU that holds an array, None for the CPU."""
    if not is_tensor(argument.data) or argument.data.device.type == "cpu":
        return None
    return argument.data.device.index or 0
