"""Kernels run right on the machine, and their counts are what the access patterns say."""

import numpy as np
import pytest
from cpu_time import least
from running import run, zeros

from llmcourse.vgpu.memory import ArgumentError

SAXPY = """
__global__ void saxpy(const float* x, float* y, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}"""

TILED = """
__global__ void mm(const float* A, const float* B, float* C, int n) {
  __shared__ float a[16][16], b[16][16];
  int tx = threadIdx.x, ty = threadIdx.y, col = blockIdx.x * 16 + tx, row = blockIdx.y * 16 + ty;
  float s = 0.f;
  for (int t = 0; t < n / 16; ++t) {
    a[ty][tx] = A[row * n + t * 16 + tx];
    b[ty][tx] = B[(t * 16 + ty) * n + col];
    __syncthreads();
    for (int k = 0; k < 16; ++k) s += a[ty][k] * b[k][tx];
    __syncthreads();
  }
  C[row * n + col] = s;
}"""

rng = np.random.default_rng(3)


@pytest.mark.parametrize("n", [1, 31, 1000, 4099])
def test_saxpy_of_any_length(n):
    x, y = (a.copy() for a in rng.standard_normal((2, n)).astype("f4"))  # each on its own boundary
    expected = np.float32(2.5) * x.astype("f8") + y
    counters = run(SAXPY, -(-n // 128), 128, x, y, 2.5, n).counters
    assert np.allclose(y, expected, rtol=1e-6)
    warps = -(-n // 32)
    assert counters.global_load_requests == 2 * warps
    assert counters.global_load_sectors == 2 * -(-n // 8)
    assert counters.global_load_bytes == 8 * n
    assert counters.global_store_bytes == counters.global_store_unique_bytes - 32 * -(-n // 8) + 4 * n
    assert counters.flops_fp32 == 2 * n


def test_tiled_matmul_moves_what_the_tiles_say():
    n = 64
    a, b = rng.standard_normal((2, n, n)).astype("f4")
    c = zeros(n, n)
    counters = run(TILED, (4, 4), (16, 16), a, b, c, n).counters
    assert np.allclose(c, a.astype("f8") @ b, rtol=1e-4, atol=1e-4)
    assert counters.global_load_bytes == 2 * 4 * n**3 // 16
    assert counters.global_load_unique_bytes == 2 * 4 * n * n
    assert counters.flops_fp32 == 2 * n**3
    assert counters.shared_load_bank_conflicts == 0
    assert counters.active_threads == 32
    assert counters.barriers == 2 * (n // 16) * 16 * 8


def test_the_machine_is_fast_enough_to_learn_with():
    """One core: a 256³ tiled product within a second, a million threads of saxpy within 0.3 s."""
    a, b = rng.standard_normal((2, 256, 256)).astype("f4")
    c = zeros(256, 256)
    x, y = rng.standard_normal((2, 1 << 20)).astype("f4")

    assert least(lambda: run(TILED, (16, 16), (16, 16), a, b, c, 256), within=1) < 1
    assert least(lambda: run(SAXPY, 1 << 12, 256, x, y, 2.0, 1 << 20), within=0.3) < 0.3


def test_three_dimensional_indices():
    source = """
    __global__ void k(int* x) {
      int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      x[b * blockDim.x * blockDim.y * blockDim.z + t] = threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z
        + 1000 * blockIdx.x + 10000 * blockIdx.y + 100000 * blockIdx.z;
    }"""
    x = zeros(2, 3, 2, 2, 5, 7, dtype="i4")
    run(source, (2, 3, 2), (7, 5, 2), x)
    z, y, b, c, d, e = np.indices(x.shape)
    x = x.reshape(2, 3, 2, 2, 5, 7)
    assert np.array_equal(x, e + 10 * d + 100 * c + 1000 * b + 10000 * y + 100000 * z)


def test_a_grid_stride_loop_with_more_batches_than_one():
    source = """
    __global__ void k(const float* x, float* y, int n) {
      for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] = x[i] * 2;
    }"""
    n = 300_007
    x, y = rng.standard_normal(n).astype("f4"), zeros(n)
    run(source, 700, 128, x, y, n)
    assert np.array_equal(y, x * 2)


def test_arrays_that_share_memory_share_it_in_the_kernel():
    source = "__global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }"
    storage = np.arange(65, dtype="f4")
    run(source, 1, 32, storage, storage[:64])
    assert storage[0] == 1


def test_a_view_that_starts_inside_its_storage_is_as_misaligned_as_on_a_gpu():
    source = "__global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }"
    storage = np.arange(65, dtype="f4")
    aligned = run(source, 1, 32, storage[:32], zeros(32)).counters
    shifted = run(source, 1, 32, storage[1:33], zeros(32)).counters
    assert aligned.global_load_sectors == 4
    assert shifted.global_load_sectors == 5


def test_strided_arrays_are_written_where_their_elements_are():
    source = "__global__ void k(float* x) { x[2 * threadIdx.x] = threadIdx.x; }"
    storage = np.full(20, -1, "f4")
    run(source, 1, 10, storage[::2])
    assert storage[::2].tolist() == list(range(10))
    assert (storage[1::2] == -1).all()


def test_local_arrays_with_computed_indices():
    source = """
    __global__ void k(const int* x, int* y) {
      int a[16], i = threadIdx.x;
      for (int j = 0; j < 16; ++j) a[j] = x[j] * i;
      y[i] = a[x[i] & 15] + a[(i * 7) & 15];
    }"""
    x, y = rng.integers(0, 99, 40, dtype="i4"), zeros(40, dtype="i4")
    counters = run(source, 1, 40, x, y).counters
    i = np.arange(40)
    assert np.array_equal(y, x[x[i] & 15] * i + x[(i * 7) & 15] * i)
    assert counters.local_load_requests > 0


@pytest.mark.parametrize("kind", ["int", "unsigned", "float", "double", "unsigned long long"])
def test_atomic_additions_reach_every_word(kind):
    dtype = {"int": "i4", "unsigned": "u4", "float": "f4", "double": "f8", "unsigned long long": "u8"}[kind]
    source = f"""
    __global__ void k(const int* where, {kind}* total) {{
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      atomicAdd(total + where[i], ({kind})(i % 7)); }}"""
    where, total = rng.integers(0, 5, 512, dtype="i4"), zeros(5, dtype=dtype)
    run(source, 4, 128, where, total)
    expected = np.bincount(where, weights=np.arange(512) % 7, minlength=5)
    assert np.array_equal(total, expected.astype(dtype))


def test_old_values_of_atomics_are_those_of_some_order():
    source = """
    __global__ void k(int* count, int* ticket, int* seen, int* largest, int* swapped) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      ticket[i] = atomicAdd(count + i % 3, 1);
      seen[i] = atomicMax(largest, i * 37 % 101);
      swapped[i] = atomicExch(count + 3, i);
    }"""
    count, largest = zeros(4, dtype="i4"), zeros(1, dtype="i4")
    ticket, seen, swapped = (zeros(96, dtype="i4") for _ in range(3))
    count[3] = -1
    run(source, 3, 32, count, ticket, seen, largest, swapped)
    for r in range(3):
        assert sorted(ticket[r::3]) == list(range(32))
    assert largest[0] == max(i * 37 % 101 for i in range(96))
    assert sorted([*swapped, count[3]]) == list(range(-1, 96))


def test_compare_and_swap_in_a_loop_builds_other_atomics():
    source = """
    __global__ void k(const float* x, float* best) {
      float v = x[blockIdx.x * blockDim.x + threadIdx.x];
      int* p = (int*)best; int old = *p;
      while (__int_as_float(old) < v) { int seen = atomicCAS(p, old, __float_as_int(v)); if (seen == old) break; old = seen; }
    }"""
    x, best = rng.standard_normal(256).astype("f4"), np.full(1, -9, "f4")
    run(source, 2, 128, x, best)
    assert best[0] == x.max()


def test_a_lane_that_waits_for_another_does_not_hold_it_up():
    for writer in (40, 4):  # of another warp, of the same warp
        source = f"""
        __global__ void k(volatile int* flag, int* x) {{
          if (threadIdx.x == 0) {{ while (*flag == 0); x[0] = x[1] + 1; }}
          else if (threadIdx.x == {writer}) {{ x[1] = 7; __threadfence(); *flag = 1; }}
        }}"""
        x = zeros(2, dtype="i4")
        run(source, 1, 64, zeros(1, dtype="i4"), x)
        assert x.tolist() == [8, 7]


def test_barriers_that_count_and_vote():
    source = """
    __global__ void k(const int* x, int* y) {
      int i = threadIdx.x;
      y[i] = __syncthreads_count(x[i] > 2) * 100 + __syncthreads_and(x[i] > -1) * 10 + __syncthreads_or(x[i] > 8);
    }"""
    x, y = rng.integers(0, 9, 70, dtype="i4"), zeros(70, dtype="i4")
    run(source, 1, 70, x, y)
    assert (y == 100 * np.count_nonzero(x > 2) + 10 + int((x > 8).any())).all()


def test_named_barriers_let_half_a_block_go_on():
    source = """
    __global__ void k(int* y) {
      __shared__ int s[64]; int i = threadIdx.x;
      if (i < 64) { s[i] = i; asm volatile("bar.sync 1, 64;"); y[i] = s[63 - i]; }
      else { y[i] = -i; asm volatile("bar.sync 2, 64;"); y[i] -= 1; }
    }"""
    y = zeros(128, dtype="i4")
    run(source, 1, 128, y)
    i = np.arange(128)
    assert np.array_equal(y, np.where(i < 64, 63 - i, -i - 1))


def test_dynamic_shared_memory_has_the_size_of_the_launch():
    source = """
    extern __shared__ float s[];
    __global__ void k(float* x) { int i = threadIdx.x; s[i] = x[i]; __syncthreads(); x[i] = s[blockDim.x - 1 - i]; }"""
    x = rng.standard_normal(50).astype("f4")
    expected = x[::-1].copy()
    run(source, 1, 50, x, shared=200)
    assert np.array_equal(x, expected)


def test_generic_pointers_find_their_memory():
    source = """
    __device__ __noinline__ float sum(const float* p, int n) { float s = 0; for (int i = 0; i < n; ++i) s += p[i]; return s; }
    __global__ void k(const float* x, float* y) {
      __shared__ float s[8]; float l[8]; int i = threadIdx.x;
      if (i < 8) s[i] = x[i] * 2;
      for (int j = 0; j < 8; ++j) l[j] = x[j] * (i + 3);
      __syncthreads();
      y[i] = sum(x, 8) + 100 * sum(s, 8) + 10000 * sum(l, 8);
    }"""
    x, y = rng.integers(0, 9, 8).astype("f4"), zeros(32)
    run(source, 1, 32, x, y)
    assert np.array_equal(y, x.sum() * (1 + 200 + 10000 * (np.arange(32) + 3)))


def test_asynchronous_copies_arrive_at_the_wait():
    source = """
    __global__ void k(const float4* x, float4* y) {
      __shared__ float4 s[64]; int i = threadIdx.x;
      unsigned to = __cvta_generic_to_shared(s + i);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(x + i));
      asm volatile("cp.async.commit_group;");
      asm volatile("cp.async.wait_group 0;");
      __syncthreads();
      y[i] = s[63 - i];
    }"""
    x, y = rng.standard_normal((64, 4)).astype("f4"), zeros(64, 4)
    run(source, 1, 64, x, y)
    assert np.array_equal(y, x[::-1])


def test_printf_prints_in_thread_order():
    source = r"""
    __global__ void k(float* x) {
      if (threadIdx.x < 3) printf("%d|%5.2f|%-4s|%llx|%c|%%\n", threadIdx.x - 1, x[threadIdx.x] + .5f, "ab", 1ULL << 40, 'z');
    }"""
    printed = run(source, 1, 32, np.arange(32, dtype="f4")).printed
    assert printed.splitlines() == [f"{i - 1}|{i + 0.5:5.2f}|ab  |10000000000|z|%" for i in range(3)]


def test_counts_belong_to_the_line_that_caused_them():
    lines = run(TILED, (1, 1), (16, 16), zeros(16, 16), zeros(16, 16), zeros(16, 16), 16).counters.lines
    assert lines[7]["global_load_requests"] == 8
    assert lines[8]["global_load_requests"] == 8
    assert lines[10]["shared_load_requests"] == 2 * 16 * 8
    assert lines[13]["global_store_requests"] == 8


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match="takes 4 arguments, and 2"):
        run(SAXPY, 1, 32, zeros(1), zeros(1))
    frozen = zeros(32)
    frozen.flags.writeable = False
    with pytest.raises(ArgumentError, match="read-only"):
        run(SAXPY, 1, 32, np.ones(32, "f4"), frozen, 1.0, 32)


def test_a_launch_leaves_no_state_behind():
    x, y = np.ones(100, "f4"), zeros(100)
    first = run(SAXPY, 1, 128, x, y, 2.0, 100).counters.total
    again = run(SAXPY, 1, 128, x, zeros(100), 2.0, 100).counters.total
    assert first == again
