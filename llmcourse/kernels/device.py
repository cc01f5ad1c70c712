"""Where a notebook's kernels run: natively on a GPU; without one, in Triton's interpreter.

device = gpu_or_interpreter()                  once, at the notebook's start
x = torch.randn(4, 1000, device=device)
softmax_kernel[(4,)](x, …)                     the same launch on either
"""

from __future__ import annotations

from contextlib import AbstractContextManager

_opened: list[AbstractContextManager[None]] = []


def gpu_or_interpreter() -> str:
    """The device for tensors, "cuda" or "cpu". Where it is "cpu", every launch of this process is interpreted
    from here on (see `counters.interpreting`).

    Raises   MissingPackageError without Triton.
    """
    import torch

    from llmcourse.kernels.counters import interpreting

    if torch.cuda.is_available():
        return "cuda"
    if not _opened:
        block = interpreting()
        block.__enter__()
        _opened.append(block)  # held: a generator that nobody holds is closed, and the block with it
    return "cpu"
