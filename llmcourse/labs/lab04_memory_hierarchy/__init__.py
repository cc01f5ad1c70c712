"""Lab 04: what moves between the memories, counted, in CUDA C++."""

from llmcourse.labs.lab04_memory_hierarchy.histogram import histogram
from llmcourse.labs.lab04_memory_hierarchy.stencil import stencil
from llmcourse.labs.lab04_memory_hierarchy.tile_roofline import tile_roofline
from llmcourse.labs.lab04_memory_hierarchy.tiled_matmul import tiled_matmul
from llmcourse.labs.lab04_memory_hierarchy.transpose import transpose
from llmcourse.labs.lab04_memory_hierarchy.vector_copy import vector_copy

EXERCISES = (vector_copy, transpose, stencil, histogram, tiled_matmul, tile_roofline)
