"""What the Triton kernels of a call move and compute, counted by `llmcourse.kernels.counters`.

    kernels_here    launches run in the interpreter, on the CPU tensors that the judge hands over, and
                    torch.empty gives NaN, so that an element that was not written shows; no values
    kernel_bytes    kernel_load_bytes, kernel_store_bytes, kernel_atomic_bytes: asked for by the lanes whose
                    mask is set, over all launches
    kernel_dots     kernel_dot_flops: 2·M·N·K for each `tl.dot`, whole tiles

A check of a kernel needs `kernels_here` in every call: without a GPU nothing else runs a launch, and with
one the verdict must be the same. The counts do not depend on Triton's version or the machine; a fault of a
kernel (`KernelFault`) fails the call.

They are taken in the learner's process, like all costs: a submission that replaces the counters can say
what it likes. Its values are judged elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llmcourse.grading.cost import Count, register

BYTES = ("load_bytes", "store_bytes", "atomic_bytes")


@register("kernels_here")
@contextmanager
def kernels_here(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """Triton launches run in the interpreter, and new memory holds NaN or the largest integer.

    Raises   MissingPackageError without Triton.
    """
    from llmcourse.kernels.counters import interpreting

    with interpreting(), _unwritten_is_nan():
        yield Count()


@contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    """torch fills new memory while it is asked for determinism; operations that cannot give it only warn."""
    import torch

    memory: Any = torch.utils.deterministic
    before = memory.fill_uninitialized_memory
    on = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
        memory.fill_uninitialized_memory = before


@register("kernel_bytes")
@contextmanager
def kernel_bytes(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """Bytes that Triton kernels ask for.  Raises MissingPackageError without Triton."""
    with _counted(BYTES) as count:
        yield count


@register("kernel_dots")
@contextmanager
def kernel_dots(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """FLOPs of `tl.dot`.  Raises MissingPackageError without Triton."""
    with _counted(("dot_flops",)) as count:
        yield count


@contextmanager
def _counted(names: Sequence[str]) -> Iterator[Count]:
    from llmcourse.kernels.counters import counting

    count = Count()
    with counting() as launches:
        yield count
    count.values = {f"kernel_{name}": launches.total[name] for name in names}
