"""Lab 03: threads, warps and blocks, in CUDA C++."""

from llmcourse.labs.lab03_gpu_architecture.vector_add import vector_add

EXERCISES = (vector_add,)
