"""Triton kernels: one file each, with its reference, its ladder from naive to good, and what it must move.

`counters` runs kernels on a CPU and counts bytes, sectors and FLOPs, by line and by argument;
`compile_report` reads registers, spills and instructions of a kernel for GPUs that are not here.
"""

from llmcourse.kernels.counters import count, counting, interpreted, interpreting

__all__ = ["count", "counting", "interpreted", "interpreting"]
