"""One launch of a Triton kernel, compiled for the GPU or interpreted on the CPU, and its launch plan.

A plan holds the numbers that change a kernel's speed and never its result: which rung of the ladder,
how many rows a program takes, how many columns it holds at once, how many warps it has. The wrappers choose
one from the shape; `plan=` overrides it, for tuning (`llmcourse bench kernels`, notebook 05).
"""

from __future__ import annotations

from functools import lru_cache
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
    part       columns of a row that a program takes, where several share one (0: one block)
    """

    kernel: str
    rows: int = 1
    block: int = 1024
    warps: int = 4
    programs: int = 0
    stages: int = 1
    part: int = 0


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


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 for the interpreter, so that its programs share work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def row_plan(columns: int, *, per_program: int = 2048, per_thread: int = 16, most_warps: int = 32) -> Plan:
    """A plan for kernels that hold whole rows: several short rows a program, more warps for longer rows.

    per_program   elements below which a program takes further rows
    per_thread    elements of a row that each of its threads holds
    """
    block = power_of_two(columns)
    rows = max(1, per_program // block)
    warps = min(most_warps, max(1, block * rows // (32 * per_thread)))
    return Plan("row", rows, block, power_of_two(warps))


def rows_in(x: Tensor) -> int:
    """Rows of x [..., N]."""
    return x.numel() // x.shape[-1] if x.numel() else 0
