"""What a kernel does wrong is found, with its line, its block and its thread."""

import numpy as np
import pytest
from running import run, zeros

from llmcourse.vgpu.faults import KernelFault


def fault(source, grid, block, *arguments, **options) -> KernelFault:
    with pytest.raises(KernelFault) as caught:
        run(source, grid, block, *arguments, **options)
    return caught.value


def test_a_load_past_the_end_of_an_array():
    source = "__global__ void k(const float* x, float* y) {\n  int i = blockIdx.x * 32 + threadIdx.x;\n  y[i] = x[i + 1];\n}"
    found = fault(source, 2, 32, zeros(64), zeros(64), names=["x", "y"])
    assert (found.kind, found.line.line, found.block, found.thread) == (
        "out of bounds",
        3,
        (1, 0, 0),
        (31, 0, 0),
    )
    assert "element 64 of x, which has 64" in found.what


def test_a_store_before_the_start_of_an_array():
    source = "__global__ void k(float* x) { x[(int)threadIdx.x - 1] = 1; }"
    found = fault(source, 1, 32, zeros(32))
    assert found.kind == "out of bounds"
    assert "element -1" in found.what
    assert found.thread == (0, 0, 0)


def test_each_array_is_guarded_against_its_neighbour():
    source = "__global__ void k(float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 4096]; }"
    assert fault(source, 1, 32, zeros(64), zeros(64)).kind == "out of bounds"


def test_one_shared_array_cannot_reach_into_the_next():
    source = """
    __global__ void k(float* x) {
      __shared__ float a[32]; __shared__ float b[32];
      int i = threadIdx.x; b[i] = 0; a[i + 1] = x[i];
      __syncthreads(); x[i] = a[i] + b[i]; }"""
    found = fault(source, 1, 32, zeros(32))
    assert found.kind == "out of bounds"
    assert "shared array a" in found.what
    assert found.line.line == 4


def test_a_local_array_is_guarded():
    source = """
    __global__ void k(int* x, int n) {
      int a[4]; for (int j = 0; j < n; ++j) a[(x[j] + j) % 9] = j;
      x[threadIdx.x] = a[x[threadIdx.x]]; }"""
    assert fault(source, 1, 32, zeros(32, dtype="i4"), np.int32(9)).kind == "out of bounds"


def test_misaligned_vectors():
    source = "__global__ void k(const float* x, float* y) {\n float4 v = *(const float4*)(x + threadIdx.x);\n y[threadIdx.x] = v.x + v.y + v.z + v.w; }"
    found = fault(source, 1, 4, zeros(64), zeros(64))
    assert (found.kind, found.line.line, found.thread) == ("misaligned", 2, (1, 0, 0))


@pytest.mark.parametrize("condition", ["threadIdx.x < 16", "threadIdx.x >= 32"])
def test_a_barrier_that_some_threads_do_not_reach(condition):
    source = f"""
    __global__ void k(float* x) {{
      __shared__ float s[64]; int t = threadIdx.x; s[t] = x[t];
      if ({condition}) __syncthreads();
      x[t] = s[t]; }}"""
    found = fault(source, 1, 64, zeros(64))
    assert found.kind == "divergent barrier"
    assert found.line.line == 4


def test_a_return_before_a_barrier():
    source = """
    __global__ void k(float* x, int n) {
      __shared__ float s[64]; int t = threadIdx.x;
      if (t >= n) return;
      s[t] = x[t];
      __syncthreads();
      x[t] = s[t]; }"""
    found = fault(source, 1, 64, zeros(64), 50)
    assert found.kind == "divergent barrier"
    assert found.line.line == 6
    run(source, 1, 64, zeros(64), 64)


def test_threads_at_two_different_barriers():
    source = """
    __global__ void k(float* x) {
      __shared__ float s[64]; int t = threadIdx.x;
      if (t < 32) { s[t] = x[t];
        __syncthreads(); x[t] = 1; }
      else { s[t] = 2 * x[t];
        __syncthreads(); x[t] = s[t - 32]; } }"""
    found = fault(source, 1, 64, zeros(64))
    assert found.kind == "divergent barrier"
    assert "5, 7" in found.what


def test_a_block_that_returns_as_a_whole_is_fine():
    source = """
    __global__ void k(float* x, int n) {
      __shared__ float s[64]; int t = threadIdx.x;
      if (blockIdx.x >= n) return;
      s[t] = x[t]; __syncthreads(); x[t] = s[63 - t]; }"""
    run(source, 4, 64, zeros(64), 2)


def test_a_barrier_that_waits_for_too_many():
    source = '__global__ void k(float* x) { asm volatile("bar.sync 1, 96;"); x[threadIdx.x] = 1; }'
    found = fault(source, 1, 64, zeros(64))
    assert found.kind == "deadlock"
    assert "96 threads" in found.what


def test_a_warp_barrier_that_names_absent_lanes():
    source = """
    __global__ void k(float* x) {
      if (threadIdx.x < 16) { x[threadIdx.x] = 1; __syncwarp(); x[threadIdx.x] += x[threadIdx.x ^ 1]; } }"""
    assert fault(source, 1, 32, zeros(32)).kind == "divergent barrier"


def test_a_loop_without_end():
    source = "__global__ void k(volatile int* x) {\n  while (*x == 0);\n}"
    found = fault(source, 1, 32, zeros(1, dtype="i4"), step_limit=5000)
    assert found.kind == "endless"
    assert found.line.line == 2


def test_a_failed_assertion_names_its_condition():
    source = "__global__ void k(int* x) {\n  assert(threadIdx.x < 20 || x[0]);\n}"
    found = fault(source, 1, 32, zeros(1, dtype="i4"))
    assert (found.kind, found.line.line, found.thread) == ("assertion", 2, (20, 0, 0))
    assert "threadIdx.x < 20 || x[0]" in found.what


def test_a_missing_barrier_is_a_race():
    source = """
    __global__ void k(float* x) {
      __shared__ float s[64]; int t = threadIdx.x;
      s[t] = x[t];
      x[t] = s[63 - t]; }"""
    found = fault(source, 1, 64, zeros(64))
    assert found.kind == "race"
    assert {"4", "5"} <= set(found.what) | set(str(found.line.line))


def test_shared_memory_that_nobody_wrote():
    source = """
    __global__ void k(float* x) {
      __shared__ float s[64]; int t = threadIdx.x;
      if (t < 60) s[t] = x[t];
      __syncthreads();
      x[t] = s[t]; }"""
    found = fault(source, 1, 64, zeros(64))
    assert (found.kind, found.line.line) == ("uninitialised", 6)
    assert found.thread == (60, 0, 0)


def test_what_was_written_before_the_fault_is_there():
    source = "__global__ void k(float* x) { x[threadIdx.x] = 5; __threadfence(); x[threadIdx.x + 1] = 6; }"
    x = zeros(32)
    fault(source, 1, 32, x)
    assert (x == 5).all()
