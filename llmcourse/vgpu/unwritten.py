"""A kernel that is still to be written: what a `%%cuda` cell with `#error not implemented yet` defines.

    %%cuda
    __global__ void twice(float* x, int n) {
        // YOUR CODE HERE
        #error not implemented yet
    }

The compiler would stop at that line with an error of its own. In a lab it is the one thing that a fresh
notebook may say, so the cell defines `twice` all the same, and using it raises NotImplementedError.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from llmcourse.vgpu.signature import declared_kernels, without_comments

MAGIC = "%%cuda"
NOT_YET = "not implemented yet"
STUB = f"// YOUR CODE HERE\n#error {NOT_YET}"
"""What stands in a lab where its solution was."""

_ERROR = re.compile(rf"^[ \t]*#[ \t]*error[ \t]+{NOT_YET}[ \t]*$", re.M)


class UnwrittenKernel:
    """A kernel by name only. Launching it, or asking it for anything, raises NotImplementedError."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, shape: Any) -> NoReturn:
        raise NotImplementedError(NOT_YET)

    def __call__(self, *arguments: Any) -> NoReturn:
        raise NotImplementedError(NOT_YET)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # what copying, pickling and front ends look for
            raise AttributeError(name)
        raise NotImplementedError(NOT_YET)

    def __repr__(self) -> str:
        return f"<kernel {self.__name__}: {NOT_YET}>"


def unwritten(source: str) -> dict[str, UnwrittenKernel]:
    """The kernels of a source in which the stub stands, by name; none where it does not."""
    if _ERROR.search(without_comments(source)) is None:
        return {}
    return {name: UnwrittenKernel(name) for name in declared_kernels(source)}
