"""Lab 03: threads, warps and blocks, in CUDA C++."""

from llmcourse.labs.lab03_gpu_architecture.block_reduce import block_reduce
from llmcourse.labs.lab03_gpu_architecture.grid_stride_saxpy import grid_stride_saxpy
from llmcourse.labs.lab03_gpu_architecture.launch_shape import launch_shape
from llmcourse.labs.lab03_gpu_architecture.vector_add import vector_add
from llmcourse.labs.lab03_gpu_architecture.warp_reduce import warp_reduce

EXERCISES = (vector_add, grid_stride_saxpy, launch_shape, warp_reduce, block_reduce)
