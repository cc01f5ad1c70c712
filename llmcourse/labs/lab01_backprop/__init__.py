"""Lab 01: the pieces of a reverse-mode engine, in NumPy."""

from llmcourse.labs.lab01_backprop.backward_pass import backward_pass
from llmcourse.labs.lab01_backprop.cross_entropy import cross_entropy
from llmcourse.labs.lab01_backprop.matmul_backward import matmul_backward
from llmcourse.labs.lab01_backprop.numeric_gradient import numeric_gradient
from llmcourse.labs.lab01_backprop.sum_to import sum_to
from llmcourse.labs.lab01_backprop.topological_order import topological_order

EXERCISES = (topological_order, backward_pass, sum_to, matmul_backward, cross_entropy, numeric_gradient)
