"""Kernels that were run on an H100 under Nsight Compute, and what it read: the proof of the PTX machine.

kernels/     the CUDA C++, a few kernels a file
cases.py     each launch: grid, block, arguments, and the right answer in NumPy
measure.py   runs all of them on a GPU under `ncu` and writes the records `ncu` and `occupancy`
compare.py   runs all of them on the PTX machine and holds its counters against the record
"""
