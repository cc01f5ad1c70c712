"""Kernels that exchange values inside a warp, compiled and run; and what is undefined in them."""

from __future__ import annotations

import numpy as np
import pytest
from running import run, zeros

from llmcourse.vgpu.faults import KernelFault

rng = np.random.default_rng(11)


def fault(*what, **options) -> KernelFault:
    with pytest.raises(KernelFault) as raised:
        run(*what, **options)
    return raised.value


REDUCE = """
__device__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2)
    v += __shfl_down_sync(0xffffffff, v, offset);
  return v;
}
__global__ void sum(const float* x, float* out, int n) {
  __shared__ float partial[32];
  int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float v = warp_sum(i < n ? x[i] : 0.f);
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = warp_sum(lane < blockDim.x / 32 ? partial[lane] : 0.f);
    if (lane == 0) atomicAdd(out, v);
  }
}"""


@pytest.mark.parametrize(("n", "block"), [(1, 32), (1000, 128), (5000, 1024), (70_001, 256)])
def test_a_block_reduction_by_shuffles(n, block):
    x = rng.integers(-9, 9, n).astype("f4")
    out = zeros(1)
    run(REDUCE, -(-n // block), block, x, out, n)
    assert out[0] == x.sum()


def test_a_warp_scan_and_a_butterfly_in_segments_of_every_width():
    source = """
    template <int W> __device__ int scan(int v) {
      for (int d = 1; d < W; d *= 2) {
        int other = __shfl_up_sync(0xffffffff, v, d, W);
        if (threadIdx.x % W >= d) v += other;
      }
      return v;
    }
    template <int W> __device__ int total(int v) {
      for (int d = W / 2; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffff, v, d, W);
      return v;
    }
    __global__ void k(const int* x, int* s, int* t) {
      int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x, v = x[i];
      s[i] = scan<2>(v); s[n + i] = scan<8>(v); s[2 * n + i] = scan<32>(v);
      t[i] = total<2>(v); t[n + i] = total<8>(v); t[2 * n + i] = total<32>(v);
    }"""
    x = rng.integers(-100, 100, 192).astype("i4")
    s, t = zeros(3, 192, dtype="i4"), zeros(3, 192, dtype="i4")
    run(source, 3, 64, x, s, t)
    for row, width in enumerate((2, 8, 32)):
        parts = x.reshape(-1, width)
        np.testing.assert_array_equal(s[row], parts.cumsum(1).ravel())
        np.testing.assert_array_equal(t[row], parts.sum(1).repeat(width))


def test_doubles_halves_and_long_integers_travel_whole():
    source = """
    #include <cuda_fp16.h>
    __global__ void k(double* d, __half* h, long long* q) {
      int i = threadIdx.x, from = (i * 5 + 3) % 32;
      d[i] = __shfl_sync(0xffffffff, d[i], from);
      h[i] = __shfl_sync(0xffffffff, h[i], from);
      q[i] = __shfl_sync(0xffffffff, q[i], from);
    }"""
    d, h, q = rng.standard_normal(32), rng.standard_normal(32).astype("f2"), rng.integers(0, 1 << 62, 32)
    wanted = [a[(np.arange(32) * 5 + 3) % 32].copy() for a in (d, h, q)]
    run(source, 1, 32, d, h, q)
    for got, want in zip((d, h, q), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_votes_and_matches_in_diverged_branches():
    source = """
    __global__ void k(const int* x, unsigned* out) {
      int i = threadIdx.x, v = x[i];
      if (v % 3 == 0) {
        unsigned m = __activemask();
        out[i] = __ballot_sync(m, v > 10); out[64 + i] = __match_any_sync(m, v);
        out[128 + i] = __popc(m) + 100 * __all_sync(m, v < 30) + 1000 * __any_sync(m, v == 9);
      } else {
        unsigned m = __match_any_sync(__activemask(), v % 3);
        out[i] = m; out[64 + i] = __reduce_add_sync(m, v); out[128 + i] = __reduce_max_sync(m, v);
      }
    }"""
    x = rng.integers(0, 40, 64).astype("i4")
    out = zeros(3, 64, dtype="u4")
    run(source, 1, 64, x, out)
    for warp in (0, 1):
        part = x[32 * warp : 32 * warp + 32]
        for lane in range(32):
            group = part % 3 == part[lane] % 3
            bits = lambda lanes: sum(1 << int(i) for i in np.flatnonzero(lanes))  # noqa: E731
            if part[lane] % 3 == 0:
                rest = 100 * (part[group] < 30).all() + 1000 * (part[group] == 9).any()
                want = (
                    bits(group & (part > 10)),
                    bits(group & (part == part[lane])),
                    group.sum() + rest,
                )
            else:
                want = (bits(group), part[group].sum(), part[group].max())
            np.testing.assert_array_equal(out[:, 32 * warp + lane], want)


def test_a_shuffle_in_a_branch_that_half_the_warp_takes():
    source = """
    __global__ void k(float* x) {
      float v = x[threadIdx.x];
      if (threadIdx.x < 48)
        v += __shfl_down_sync(0xffffffff, v, 1);
      x[threadIdx.x] = v;
    }"""
    found = fault(source, 2, 64, zeros(64))
    assert (found.kind, found.line.line, found.thread) == ("divergent barrier", 5, (32, 0, 0))
    assert "waits for lane 16 of the warp" in found.what
    assert "__ballot_sync" in found.fix


PART = """
__global__ void k(const float* x, float* out, int n) {{
  int i = threadIdx.x; float v = x[i];
  if (i < n) {{
    for (int o = {start}; o > 0; o /= 2)
      v += __shfl_down_sync({mask}, v, o);
    {use}
  }}
}}"""


def test_undefined_values_that_a_reduction_throws_away_are_no_fault():
    out = zeros(32)
    x = np.arange(32, dtype="f4")
    run(PART.format(start=8, mask="0xffff", use="if (i == 0) out[0] = v;"), 1, 32, x, out, 16)
    assert out[0] == sum(range(16))


def test_few_lanes_of_a_large_block_exchange_values_and_marks_alike():
    x = np.arange(1024, dtype="f4")
    out = zeros(1024)
    source = PART.format(start=8, mask="0xffff", use="{}").replace("i < n", "i >= 512 && i < 512 + n")
    run(source.replace("{}", "if (i == 512) out[0] = v;"), 1, 1024, x, out, 16)
    assert out[0] == x[512:528].sum()
    found = fault(source.replace("{}", "out[i] = v;"), 1, 1024, x, out, 16)
    assert (found.kind, found.thread) == ("uninitialised", (513, 0, 0))


@pytest.mark.parametrize(
    ("start", "use", "thread", "does"),
    [
        (16, "if (i == 0) out[0] = v;", 0, "stores"),
        (8, "out[i] = v;", 1, "stores"),
        (8, "if (v > 3.f) out[i] = 1.f;", 1, "branches on"),
        (8, "out[(int)v & 31] = 1.f;", 1, "stores"),
        (8, "atomicAdd(out, v);", 1, "uses"),
        (8, "out[i] = x[(int)v & 31];", 1, "loads from an address that depends on"),
        (8, "out[i] = __any_sync(0xffff, v > 2.f);", 1, "uses"),
        (8, "out[i] = i < 9 ? 0.f : v;", 9, "stores"),
        (8, "out[i] = __shfl_sync(0xffff, v, 8);", 0, "stores"),
    ],
)
def test_an_undefined_value_that_matters_is_reported_with_its_shuffle(start, use, thread, does):
    source = PART.format(start=start, mask="0xffff", use=use)
    found = fault(source, 1, 32, np.ones(32, "f4"), zeros(32), 16)
    assert (found.kind, found.line.line) == ("uninitialised", 6)
    assert found.thread == (thread, 0, 0)
    assert "reads a lane that takes no part" in found.what
    assert f"and line 7 {does} what it got" in found.what


def test_a_choice_that_leaves_the_undefined_value_out_is_no_fault():
    out = zeros(32)
    source = PART.format(start=8, mask="0xffff", use="out[i] = i < 1 ? v : -1.f;")
    run(source, 1, 32, np.ones(32, "f4"), out, 16)
    assert out[0] == 16
    assert (out[1:16] == -1).all()


def test_lanes_beyond_the_end_of_the_block_are_undefined_too():
    source = """
    __global__ void k(float* x) {
      float v = x[threadIdx.x];
      for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffff, v, o);
      if (threadIdx.x == 32) x[0] = v;
    }"""
    found = fault(source, 1, 40, zeros(64))
    assert (found.kind, found.thread) == ("uninitialised", (32, 0, 0))
    run(source, 1, 64, zeros(64))


def test_a_register_written_again_is_defined_again():
    source = """
    __global__ void k(float* x, int n) {
      float v = 0.f;
      for (int j = 0; j < n; ++j) {
        v = __shfl_down_sync(0xff, x[threadIdx.x + j], 4);
        if (threadIdx.x < 4) x[threadIdx.x] = v;
        v = x[threadIdx.x];
      }
      x[16 + threadIdx.x] = v;
    }"""
    run(source, 1, 8, zeros(64), 3)
