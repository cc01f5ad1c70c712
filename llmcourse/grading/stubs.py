"""What stands in a lab where a solution was: a stub in the language of its cell.

    def vector_add(a, b):                  %%cuda
        # YOUR CODE HERE                   __global__ void vector_add(const float* a, …) {
        raise NotImplementedError(…)           // YOUR CODE HERE
                                               #error not implemented yet
                                           }

nbgrader knows one language for a notebook. A cell that begins with `%%cuda` is CUDA C++ all the same; its
solution region is marked as in Python, behind a comment: `// ### BEGIN SOLUTION`.
"""

from __future__ import annotations

from typing import Any

from nbgrader import preprocessors

from llmcourse.vgpu.unwritten import MAGIC

CUDA = "cuda"


class ClearSolutions(preprocessors.ClearSolutions):
    """nbgrader's, with the stub of each cell's own language (`code_stub` in its configuration)."""

    def preprocess_cell(self, cell: Any, resources: Any, cell_index: int) -> tuple[Any, Any]:
        language = resources["language"]
        resources["language"] = CUDA if cell.source.startswith(MAGIC) else language
        try:
            return super().preprocess_cell(cell, resources, cell_index)
        finally:
            resources["language"] = language


def with_stubs(steps: list[Any]) -> list[Any]:
    """A converter's list of preprocessors, with this one in the place of nbgrader's."""
    return [ClearSolutions if step is preprocessors.ClearSolutions else step for step in steps]
