"""What can go wrong in a running kernel, said with the line, the block and the thread.

A GPU answers most of these with wrong numbers, with nothing at all, or with an error that names no line.
"""

from __future__ import annotations

from llmcourse.errors import CourseError
from llmcourse.vgpu.isa import SourceLine

Index3 = tuple[int, int, int]


class PtxError(CourseError, ValueError):
    """PTX text that cannot be read, or an instruction that the machine does not have."""


class KernelFault(CourseError, RuntimeError):
    """A kernel that did something illegal, or never ends.

    kind     "out of bounds", "misaligned", "uninitialised", "race", "divergent barrier", "deadlock",
             "endless", "assertion", "unsupported"
    line     in the CUDA source, None where it is not known
    block    blockIdx as (x, y, z), thread threadIdx likewise: the first that did it, None if it is no one's
    """

    def __init__(
        self,
        kind: str,
        what: str,
        why: str,
        fix: str,
        *,
        line: SourceLine | None = None,
        block: Index3 | None = None,
        thread: Index3 | None = None,
    ) -> None:
        self.kind, self.line, self.block, self.thread = kind, line, block, thread
        where = f"{line}: " if line else ""
        who = f" (block {index_text(block)}, thread {index_text(thread)})" if block and thread else ""
        super().__init__(f"{where}{what}{who}", why, fix)


def index_text(index: Index3) -> str:
    """(3, 0, 0) → 3; (3, 1, 0) → (3, 1); (3, 1, 2) → (3, 1, 2)."""
    x, y, z = index
    if z:
        return f"({x}, {y}, {z})"
    return f"({x}, {y})" if y else f"{x}"
