"""Lab 05: kernels in Triton, graded on values and on the bytes that they move."""

from llmcourse.labs.lab05_triton_kernels.add_rms_norm import add_rms_norm
from llmcourse.labs.lab05_triton_kernels.matmul import matmul
from llmcourse.labs.lab05_triton_kernels.rms_norm import rms_norm
from llmcourse.labs.lab05_triton_kernels.softmax import softmax
from llmcourse.labs.lab05_triton_kernels.swiglu import swiglu

EXERCISES = (swiglu, softmax, rms_norm, add_rms_norm, matmul)
