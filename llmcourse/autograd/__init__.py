"""Reverse-mode automatic differentiation on NumPy arrays, small enough to read in one sitting.

buffers    whose memory an array stands on, and whether it was written to
memory     count the bytes kept for backward
function   an operation as an object; ops/ has them all
tensor     arrays that remember where they came from
reverse    the backward pass
check      gradients against finite differences
graph      the graph as a picture
nn, fit    a multilayer perceptron and its training loop; digits has the data
peer       the same questions put to PyTorch
"""

from llmcourse.autograd.check import gradcheck, numeric_gradient
from llmcourse.autograd.function import Function
from llmcourse.autograd.functional import concat, cross_entropy, stack
from llmcourse.autograd.memory import saved_bytes
from llmcourse.autograd.mode import no_grad
from llmcourse.autograd.tensor import Tensor, apply

__all__ = [
    "Function",
    "Tensor",
    "apply",
    "concat",
    "cross_entropy",
    "gradcheck",
    "no_grad",
    "numeric_gradient",
    "saved_bytes",
    "stack",
]
