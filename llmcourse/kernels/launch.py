"""One launch of a Triton kernel, compiled for the GPU or interpreted on the CPU, and its launch plan.

A plan holds the numbers that change a kernel's speed and never its result: which rung of the ladder,
how many rows a program takes, how many columns it holds at once, how many warps it has. The wrappers choose
one from the shape; `plan=` overrides it, for tuning (`llmcourse bench kernels`, notebook 05).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """How a kernel is launched.

    kernel     the rung: which of a file's kernels
    rows       rows that one program takes at a time
    block      columns that a program holds in registers at once, a power of two
    warps      warps of 32 threads in a program
    programs   programs in all (0: as many as the rows need)
    stages     iterations of the row loop whose loads are in flight together
    """

    kernel: str
    rows: int = 1
    block: int = 1024
    warps: int = 4
    programs: int = 0
    stages: int = 1


def launch(
    kernel: Any, programs: int | tuple[int, ...], *arguments: Any, interpret: bool = False, **meta: Any
) -> None:
    """Launch `programs` programs of a `@triton.jit` kernel; with no program there is nothing to do.

    meta   constexpr arguments, and the compiler's num_warps and num_stages (of no meaning when interpreted)
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if min(grid) == 0:
        return
    if interpret:
        from llmcourse.kernels.counters import interpreted, is_interpreting

        # In a block already open its launches are taken, also those of autograd's thread, which opened none.
        (kernel if is_interpreting() else interpreted(kernel))[grid](*arguments, **meta)
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **meta)
    else:
        kernel[grid](*arguments, **meta)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def vector_of(x: Tensor, block: int) -> int:
    """Elements of x in 16 bytes, the most that a thread loads at once, and at most `block`."""
    return min(block, 16 // x.element_size())


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 for the interpreter, so that its programs share work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def row_plan(columns: int) -> Plan:
    """A plan for kernels that hold whole rows: 1024 elements a program or more, about 16 of them a thread.

    More warps for longer rows, and at least 4, so that short programs keep enough loads in flight.
    """
    block = power_of_two(columns)
    rows = max(1, 1024 // block)
    return Plan("row", rows, block, warps=min(32, max(4, rows * block // 512)))


def walking_plan(rows: int, columns: int, itemsize: int, device: torch.device) -> Plan:
    """A plan for kernels whose programs walk through rows and keep sums over them.

    In 16-bit formats a program takes 8192 elements at a time, and the next ones are on their way to shared
    memory meanwhile; of the widest rows, whose sums take the most registers, one program a multiprocessor,
    else two.
    """
    block = power_of_two(columns)
    wide = block >= 4096
    short = itemsize == 2
    at_once = max(1, (8192 if wide or short else 4096) // block)
    most = multiprocessors(device) * (1 if block >= 8192 else 2)
    programs = max(1, min(ceil_div(rows, at_once), most))
    return Plan("row", at_once, block, 16 if wide else 8, programs, stages=3 if short else 1)


def rows_in(x: Tensor) -> int:
    """Rows of x [..., N]."""
    return x.numel() // x.shape[-1] if x.numel() else 0
