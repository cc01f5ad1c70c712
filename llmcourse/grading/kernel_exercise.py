"""An exercise whose answer is a CUDA kernel. Its mistakes and alternatives are CUDA C++ as well.

    vector_add = KernelExercise("vector_add", signature="const float* a, const float* b, float* c, int n", …)

    @vector_add.mistake(says="…", tries="…", caught_by="tail")
    def unguarded() -> str:
        return "int i = blockIdx.x * blockDim.x + threadIdx.x; c[i] = a[i] + b[i];"

What such a function returns is the kernel's body; a text that holds `__global__` is a source of its own, for
solutions with device functions, templates or macros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmcourse.grading.exercise import Exercise, Function

Body = Callable[[], str]


@dataclass
class KernelExercise(Exercise):
    """One graded kernel of a lab.

    signature   its parameters in CUDA C++; `arguments` are "grid", "block" and then their names
    """

    signature: str = ""

    def mistake(self, *, says: str, tries: str, caught_by: str) -> Callable[[Body], Body]:
        """Register a wrong kernel, given by a function that returns its body."""
        add = super().mistake(says=says, tries=tries, caught_by=caught_by)
        return lambda body: self._added(add, body)

    def alternative(self, says: str) -> Callable[[Body], Body]:
        """Register a right kernel that is written differently."""
        add = super().alternative(says)
        return lambda body: self._added(add, body)

    def source(self, text: str) -> str:
        """A whole CUDA C++ source from a kernel's body."""
        if "__global__" in text:
            return text
        return f"__global__ void {self.name}({self.signature}) {{\n{text.strip(chr(10))}\n}}\n"

    def _added(self, add: Callable[[Function], Function], body: Body) -> Body:
        def compiled() -> dict[str, str]:
            from llmcourse.vgpu import cuda

            return cuda.compile(self.source(body()))[self.name].as_text()

        compiled.__name__ = body.__name__
        add(compiled)
        return body
