"""PTX text is read into typed instructions, whatever form NVRTC gives it."""

import numpy as np
import pytest
from running import run, zeros

from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.isa import Address, Immediate, Register
from llmcourse.vgpu.nvrtc import compile_source
from llmcourse.vgpu.ptx import parse


def test_registers_addresses_guards_and_lines_are_typed():
    source = '\nextern "C" __global__ void k(float* x, int n) {\n  if (threadIdx.x < n)\n    x[threadIdx.x] += 1.5f;\n}'
    kernel = parse(compile_source(source, "sm_80", name="cell.cu").ptx).kernels["k"]
    store = next(i for i in kernel.code if i.opcode == "st")
    assert isinstance(store.operands[0], Address)
    assert isinstance(store.operands[0].base, Register)
    assert store.operands[0].base.type == "b64"
    assert store.line is not None
    assert (store.line.file, store.line.line) == ("cell.cu", 4)
    add = next(i for i in kernel.code if i.opcode == "add" and i.type == "f32")
    assert add.operands[2] == Immediate(np.float32(1.5))
    branch = next(i for i in kernel.code if i.opcode == "bra")
    assert branch.guard is not None
    assert branch.guard.register.type == "pred"


def test_device_functions_that_were_not_inlined_are_called():
    source = """
    __device__ __noinline__ float twice(float x, int n) { for (int i = 0; i < n; ++i) x *= 2; return x; }
    __device__ __noinline__ float both(float x, int n) { return twice(x, n) + twice(-x, 1); }
    __global__ void k(float* x, int n) { x[threadIdx.x] = both(x[threadIdx.x], n) + twice(1.f, n); }"""
    x = np.arange(40, dtype="f4")
    run(source, 1, 40, x, np.int32(3))
    assert np.array_equal(x, np.arange(40) * 8 - np.arange(40) * 2 + 8)


def test_structures_by_value_reach_functions_and_kernels():
    source = """
    struct P { float a; int b[3]; double c; };
    __device__ __noinline__ double use(P p, int i) { return p.a + p.b[1] * i + p.c; }
    __global__ void k(double* x, P p) { x[threadIdx.x] = use(p, threadIdx.x); }"""
    record = np.zeros(1, np.dtype([("a", "f4"), ("b", "i4", 3), ("c", "f8")], align=True))
    record["a"], record["b"], record["c"] = 0.5, [7, 11, 13], 100.0
    x = zeros(33, dtype="f8")
    run(source, 1, 33, x, record.tobytes())
    assert np.array_equal(x, 100.5 + 11 * np.arange(33))


def test_recursion_is_refused_with_a_reason():
    source = """
    __device__ __noinline__ int f(int n) { return n < 2 ? n : f(n - 1) + f(n - 2) * (n & 3); }
    __global__ void k(int* x) { x[threadIdx.x] = f(threadIdx.x); }"""
    with pytest.raises(PtxError, match="calls itself"):
        run(source, 1, 32, zeros(32, dtype="i4"))


def test_names_that_inline_assembly_declares_in_each_scope_do_not_meet():
    source = """
    __global__ void k(unsigned* x) {
      unsigned a = x[threadIdx.x], b, c;
      asm("{ .reg .u32 t; add.u32 t, %1, 1; mul.lo.u32 %0, t, 2; }" : "=r"(b) : "r"(a));
      asm("{ .reg .u32 t; add.u32 t, %1, 5; mul.lo.u32 %0, t, 3; }" : "=r"(c) : "r"(a));
      x[threadIdx.x] = b ^ c;
    }"""
    x = np.arange(32, dtype="u4")
    run(source, 1, 32, x)
    a = np.arange(32)
    assert np.array_equal(x, (a + 1) * 2 ^ (a + 5) * 3)


def test_constant_and_global_variables_keep_their_values():
    source = """
    __constant__ double c[3] = {1.5, -2.25, 1e300};
    __constant__ short small[4] = {-1, 2, -3, 4};
    __device__ unsigned long long big = 0x123456789abcdefULL;
    __global__ void k(double* x, unsigned long long* y) {
      int i = threadIdx.x; x[i] = c[i % 3] + small[i & 3]; y[i] = big + i; }"""
    x, y = zeros(32, dtype="f8"), zeros(32, dtype="u8")
    run(source, 1, 32, x, y)
    i = np.arange(32)
    assert np.array_equal(x, np.array([1.5, -2.25, 1e300])[i % 3] + np.array([-1, 2, -3, 4])[i & 3])
    assert np.array_equal(y, np.uint64(0x123456789ABCDEF) + i.astype("u8"))


def test_a_switch_reaches_every_case():
    cases = "".join(f"case {c}: s = s * {c + 3} ^ {c * 7}; break;" for c in range(12))
    source = f"__global__ void k(int* x) {{ int s = x[threadIdx.x]; switch (threadIdx.x % 14) {{ {cases} default: s = -1; }} x[threadIdx.x] = s; }}"
    x = np.arange(100, 164, dtype="i4")
    run(source, 1, 64, x)
    lane = np.arange(64)
    expected = [
        v * (c + 3) ^ (c * 7) if (c := n % 14) < 12 else -1
        for v, n in zip(range(100, 164), lane, strict=True)
    ]
    assert x.tolist() == expected


def test_text_that_is_no_ptx_is_refused():
    with pytest.raises(PtxError, match="not PTX"):
        parse("int main() {}")


def test_ptx_that_was_cut_is_refused():
    text = compile_source("__global__ void k(int* x) { x[0] = 1; }", "sm_80", name="k.cu").ptx
    with pytest.raises(PtxError, match="ends inside"):
        parse(text[: text.rindex("}")])
