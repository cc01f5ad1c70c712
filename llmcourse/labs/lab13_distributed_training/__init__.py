"""Lab 13: sums on a ring, a layer cut in two ways, a pipeline's order, and gradients hardly sent."""

from llmcourse.labs.lab13_distributed_training.one_f_one_b import one_f_one_b
from llmcourse.labs.lab13_distributed_training.parallel_linear import parallel_linear
from llmcourse.labs.lab13_distributed_training.ring_all_reduce import ring_all_reduce
from llmcourse.labs.lab13_distributed_training.top_k_error_feedback import top_k_error_feedback

EXERCISES = (ring_all_reduce, parallel_linear, one_f_one_b, top_k_error_feedback)
