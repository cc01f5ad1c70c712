"""Compile and launch, as a learner does: values against torch, counts against theory, errors that help."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from llmcourse.errors import CourseError, DeviceError, MissingPackageError
from llmcourse.vgpu import cuda, native
from llmcourse.vgpu.cuda import ArgumentError, CompileError, KernelFault, LaunchError
from llmcourse.vgpu.launch import Place, place_of, shared_limit, size3

SAXPY = """\
extern "C" __global__ void saxpy(const float* x, float* y, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}
"""
MATMUL = """\
__global__ void matmul(const float* A, const float* B, float* C, int n) {
  __shared__ float sA[TILE][TILE], sB[TILE][TILE];
  int tx = threadIdx.x, ty = threadIdx.y;
  int x = blockIdx.x * TILE + tx, y = blockIdx.y * TILE + ty;
  float sum = 0.0f;
  for (int t = 0; t < n; t += TILE) {
    sA[ty][tx] = A[y * n + t + tx];
    sB[ty][tx] = B[(t + ty) * n + x];
    __syncthreads();
    for (int k = 0; k < TILE; ++k) sum += sA[ty][k] * sB[k][tx];
    __syncthreads();
  }
  C[y * n + x] = sum;
}
"""


def error_of(function) -> CourseError:
    with pytest.raises(CourseError) as caught:
        function()
    assert caught.value.why
    assert caught.value.fix
    return caught.value


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the machine, also on a computer with a GPU."""
    monkeypatch.setattr(native, "available", lambda: False)


@pytest.fixture(scope="module")
def saxpy() -> cuda.Kernel:
    return cuda.compile(SAXPY).kernel


# ── values ──


@pytest.mark.parametrize("n", [1, 31, 32, 1000, 4097])
def test_saxpy_equals_torch_for_tensors_and_arrays(saxpy: cuda.Kernel, n: int) -> None:
    torch.manual_seed(n)
    x, y = torch.randn(n), torch.randn(n)
    expected = 2.5 * x.double() + y.double()
    as_array = y.numpy().copy()
    saxpy[(n + 255) // 256, 256](x, y, 2.5, n)
    saxpy[(n + 63) // 64, 64](x.numpy(), as_array, np.float32(2.5), np.int64(n))
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(as_array, y.numpy())


@pytest.mark.parametrize(("n", "tile"), [(48, 16), (40, 8)])
def test_a_tiled_matmul_equals_torch(n: int, tile: int) -> None:
    torch.manual_seed(n)
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.full((n, n), float("nan"))
    kernel = cuda.compile(MATMUL, defines={"TILE": tile}).kernel
    result = kernel[(n // tile, n // tile), (tile, tile)](a, b, c, n)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert result.counters is not None
    assert result.counters.flops_fp32 == 2 * n**3
    assert result.counters.global_load_bytes == 4 * 2 * n**3 // tile
    assert result.arrays["C"] is c


def test_a_reduction_with_shuffles_and_dynamic_shared_memory() -> None:
    source = """\
    extern __shared__ float partial[];
    __global__ void total(const float* x, float* out, int n) {
      float v = 0;
      for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
      for (int d = 16; d; d /= 2) v += __shfl_down_sync(0xffffffff, v, d);
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x / 32; ++w) v += partial[w];
        atomicAdd(out, v);
      }
    }"""
    x, out = torch.rand(5000), torch.zeros(1)
    cuda.compile(source).kernel[3, 128, 16](x, out, 5000)
    torch.testing.assert_close(out.double(), x.double().sum()[None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_templates_run_for_each_type(dtype: torch.dtype) -> None:
    source = (
        "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\ntemplate <typename T, int N>\n"
        "__global__ void scale(const T* x, T* y, T a) { int i = threadIdx.x; if (i < N) y[i] = x[i] * a; }"
    )
    spelled = {torch.bfloat16: "__nv_bfloat16", torch.float16: "half", torch.float32: "float"}
    names = [f"scale<{name}, 40>" for name in spelled.values()]
    module = cuda.compile(source, names=names)
    assert list(module) == names
    kernel = module[f"scale<{spelled[dtype]},40>"]
    x, y = torch.randn(40).to(dtype), torch.zeros(40, dtype=dtype)
    kernel[1, 64](x, y, 1.5)
    torch.testing.assert_close(y, x * 1.5, rtol=0, atol=0)


def test_structures_and_vectors_by_value() -> None:
    source = (
        "struct P { float a; int n; double d; };\n"
        "__global__ void k(float* o, P p, float4 v, bool b, long long q) {\n"
        "  o[0] = p.a; o[1] = p.n; o[2] = p.d; o[3] = v.x + v.w; o[4] = b; o[5] = q; }"
    )
    out = np.zeros(6, "f4")
    cuda.compile(source).kernel[1, 1](out, struct.pack("fid", 1.5, 7, 2.5), (1, 2, 3, 4.5), True, -3)
    np.testing.assert_array_equal(out, [1.5, 7, 2.5, 5.5, 1, -3])


def test_what_a_kernel_writes_between_a_views_elements_comes_back_from_a_copy(saxpy: cuda.Kernel) -> None:
    """A tensor of a GPU on the machine: the kernel knows no strides, and writes side by side."""
    there, here = torch.zeros(200), torch.zeros(200)
    saxpy[1, 128](torch.ones(100), here[::2], 3.0, 100)
    copies, bound = ([cuda.Argument("y", t, t[::2])] for t in (here, there))
    cuda._copy_back(copies, bound)
    assert there[:100].eq(3).all()
    assert there[100:].eq(0).all()


def test_a_view_is_its_own_memory_and_keeps_its_alignment(saxpy: cuda.Kernel) -> None:
    whole = torch.zeros(513)
    shifted = whole[1:]
    result = saxpy[2, 256](torch.ones(512), shifted, 1.0, 512)
    assert whole[0] == 0
    assert torch.equal(shifted, torch.ones(512))
    assert result.counters is not None
    # 512 floats from 4 bytes past a sector's start: each warp of 32 touches 5 sectors where 4 would do.
    assert result.counters.global_store_sectors == 16 * 5
    assert result.counters.global_load_sectors == 16 * (4 + 5)


def test_one_array_passed_twice_is_one_memory(saxpy: cuda.Kernel) -> None:
    x = torch.ones(64)
    saxpy[1, 64](x, x, 2.0, 64)
    assert torch.equal(x, torch.full((64,), 3.0))


def test_a_transposed_tensor_is_read_in_the_order_of_its_memory(saxpy: cuda.Kernel) -> None:
    x = torch.arange(6.0).reshape(2, 3).t()
    y = torch.zeros(6)
    saxpy[1, 32](x, y, 1.0, 6)
    assert torch.equal(y, torch.arange(6.0))


def test_printf_is_shown_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = cuda.compile('__global__ void hi(int n) { printf("%d of %d\\n", threadIdx.x, n); }').kernel
    result = kernel[1, 3](7)
    assert result.printed == "0 of 7\n1 of 7\n2 of 7\n"
    assert capsys.readouterr().out == result.printed


def test_autograd_notices_that_a_saved_tensor_was_overwritten(saxpy: cuda.Kernel) -> None:
    w = torch.ones(4, requires_grad=True)
    y = torch.ones(4)
    loss = (w * y).sum()
    saxpy[1, 32](torch.ones(4), y, 1.0, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_knows_that_const_arrays_stay(saxpy: cuda.Kernel) -> None:
    w = torch.ones(4, requires_grad=True)
    x = torch.ones(4)
    loss = (w * x).sum()
    saxpy[1, 32](x, torch.zeros(4), 1.0, 4)
    loss.backward()
    assert torch.equal(w.grad, x)


# ── modules and kernels ──


def test_kernels_are_found_by_attribute_and_by_item() -> None:
    module = cuda.compile(SAXPY + "namespace a { __global__ void second(float* x) { x[0] = 1; } }")
    assert list(module) == ["saxpy", "second"]
    assert module.saxpy is module["saxpy"]
    assert module.second.name == "second"
    assert {"saxpy", "second", "ptx"} <= set(dir(module))
    assert "saxpy" in error_of(lambda: module.saxby).fix
    assert "2 kernels" in error_of(lambda: module.kernel).what
    assert not hasattr(module, "third")


def test_a_module_without_kernels_says_what_is_missing() -> None:
    template = "template <typename T> __global__ void f(T* x) { x[0] = 1; }"
    assert 'names=["f<float>"]' in error_of(lambda: cuda.compile(template).kernel).fix
    assert "__global__" in error_of(lambda: cuda.compile("__device__ void f() {}").f).fix


def test_an_instance_that_is_one_of_several_must_be_named() -> None:
    module = cuda.compile("template <int N> __global__ void f(int* x) { x[0] = N; }", names=["f<1>", "f<2>"])
    assert module["f<2>"].plain == "f"
    assert "f<1>" in error_of(lambda: module["f"]).what


def test_constant_memory_is_filled_by_name() -> None:
    source = (
        "__constant__ float weights[3];\n__constant__ int count;\n__device__ float bias = 0.5f;\n"
        "__global__ void blur(float* x) {\n  float s = bias;\n"
        "  for (int i = 0; i < count; ++i) s += weights[i];\n  x[0] = s;\n}"
    )
    module, x = cuda.compile(source), torch.zeros(1)
    module.set("weights", torch.tensor([1.0, 2.0, 4.0]))
    module.set("count", 2)
    module.blur[1, 1](x)
    assert x == 3.5
    module.set("count", np.int32(3))
    module.set("bias", 1)
    module.blur[1, 1](x)
    assert x == 8
    pickle.loads(pickle.dumps(module)).blur[1, 1](x.zero_())
    assert x == 8
    cuda.compile(source).blur[1, 1](x)
    assert x == 0.5  # another module has its own variables
    assert "weights" in error_of(lambda: module.set("weight", 1)).why
    assert "12 bytes, and 24" in error_of(lambda: module.set("weights", np.zeros(3))).what


def test_a_kernel_survives_being_sent_to_another_process(saxpy: cuda.Kernel) -> None:
    copied = pickle.loads(pickle.dumps(saxpy.module)).kernel
    assert (copied.source, copied.ptx, copied.name, copied.options) == (
        saxpy.source,
        saxpy.ptx,
        saxpy.name,
        saxpy.options,
    )
    rebuilt = cuda.from_ptx(saxpy.ptx, saxpy.name, source=saxpy.source)
    y = torch.zeros(8)
    rebuilt[1, 32](torch.ones(8), y, 3.0, 8)
    assert torch.equal(y, torch.full((8,), 3.0))
    assert isinstance(saxpy.ptx, str)
    assert isinstance(saxpy.source, str)


def test_ptx_alone_runs_too(saxpy: cuda.Kernel) -> None:
    y = np.zeros(8, "f4")
    cuda.from_ptx(saxpy.ptx, "saxpy")[1, 32](np.ones(8, "f4"), y, 3.0, 8)
    assert (y == 3).all()


def test_resources_are_known_without_a_gpu(saxpy: cuda.Kernel) -> None:
    for arch in ("sm_75", "sm_90"):
        found = saxpy.resources(arch)
        assert 4 <= found.registers <= 24
        assert (found.spill_stores, found.shared) == (0, 0)
    kernel = cuda.compile(MATMUL, defines={"TILE": 16}).kernel
    assert kernel.resources().shared == kernel.static_shared == 2 * 16 * 16 * 4


def test_warnings_are_kept() -> None:
    module = cuda.compile("__global__ void k(float* x) {\n  int unused;\n  x[0] = 1;\n}")
    assert [str(w).split(":")[0] for w in module.warnings] == ["line 2"]


def test_compile_errors_reach_the_caller() -> None:
    error = error_of(lambda: cuda.compile("__global__ void k(float* x) {\n  x[0] = 1\n}"))
    assert isinstance(error, CompileError)
    assert error.errors[0].line == 2


# ── launches that cannot be ──


@pytest.mark.parametrize(
    ("grid", "block", "shared", "says"),
    [
        (1, 1025, 0, "1,024 threads"),
        (1, (32, 64), 0, "2,048 threads"),
        (0, 32, 0, "gridDim.x is 0"),
        (1, (32, 0), 0, "blockDim.y is 0"),
        (-1, 32, 0, "gridDim.x is -1"),
        ((1, 70000), 32, 0, "65,535"),
        (1, (1, 1, 65), 0, "64"),
        (1, 32, 170_000, "166,912"),
        (1, 32, -4, "negative"),
        (2.0, 32, 0, "// instead of /"),
        ("4", 32, 0, "whole numbers"),
        ((1, 2, 3, 4), 32, 0, "one to three"),
    ],
)
def test_impossible_launches_name_the_limit(saxpy: cuda.Kernel, grid, block, shared, says: str) -> None:
    x = torch.zeros(32)
    error = error_of(lambda: cuda.launch(saxpy, grid, block, x, x, 1.0, 32, shared=shared))
    assert isinstance(error, LaunchError)
    assert says in str(error)


def test_a_kernel_without_a_grid_says_how_to_launch(saxpy: cuda.Kernel) -> None:
    assert "saxpy[blocks, threads]" in error_of(lambda: saxpy(1, 2)).fix
    assert "grid, block" in error_of(lambda: saxpy[4]).fix


def test_limits_follow_the_architecture() -> None:
    assert [shared_limit(f"sm_{a}") >> 10 for a in ("75", "80", "86", "90", "90a")] == [64, 163, 99, 227, 227]
    kernel = cuda.compile(
        "extern __shared__ float s[];\n__global__ void k(float* x) { s[0] = 1; x[0] = s[0]; }", "sm_75"
    )
    x = torch.zeros(1)
    kernel.kernel[1, 1, 60_000](x)
    assert x == 1
    assert "sm_75" in error_of(lambda: kernel.kernel[1, 1, 70_000](x)).why


def test_launch_bounds_are_kept() -> None:
    kernel = cuda.compile("__global__ void __launch_bounds__(64) k(float* x) { x[threadIdx.x] = 1; }").kernel
    x = torch.zeros(64)
    kernel[1, 64](x)
    assert "__launch_bounds__" in str(error_of(lambda: kernel[1, 65](x)))


def test_more_than_48_kib_must_be_dynamic() -> None:
    kernel = cuda.compile(
        "__global__ void k(float* x) {\n  __shared__ float s[12300];\n"
        "  s[threadIdx.x] = x[0];\n  __syncthreads();\n  x[0] = s[1];\n}"
    ).kernel
    assert "extern __shared__" in error_of(lambda: kernel[1, 32](torch.zeros(1))).fix


def test_wrong_arguments_are_refused_before_anything_runs(saxpy: cuda.Kernel) -> None:
    x, y = torch.ones(8), torch.zeros(8)
    for bad in ((x.double(), y, 1.0, 8), (x, y, 1.0), (x, y, 1.0, 8.5), (x, y.requires_grad_(), 1.0, 8)):
        assert isinstance(error_of(lambda bad=bad: saxpy[1, 32](*bad)), ArgumentError)
    assert not y.detach().any()


def test_places_are_chosen_by_the_arrays() -> None:
    from llmcourse.vgpu.arguments import Argument

    on_cpu, number = Argument("x", 0, np.zeros(1)), Argument("n", 1, np.int32(1))
    assert place_of("k", [on_cpu, number], "auto", True) == Place(None)
    assert place_of("k", [number], "auto", True) == Place(0)
    assert place_of("k", [number], "auto", False) == Place(None)
    assert place_of("k", [number], "machine", True) == Place(None)
    for available in (True, False):
        assert isinstance(error_of(lambda a=available: place_of("k", [on_cpu], "gpu", a)), DeviceError)
    assert isinstance(error_of(lambda: place_of("k", [on_cpu], "tpu", True)), LaunchError)


def test_sizes_may_be_numbers_or_tuples() -> None:
    assert size3(np.int64(3), "grid") == (3, 1, 1)
    assert size3((2, 3), "grid") == (2, 3, 1)
    assert size3([2, 3, 4], "grid") == (2, 3, 4)


# ── faults ──


def test_a_fault_shows_the_line_the_block_and_the_thread(saxpy: cuda.Kernel) -> None:
    error = error_of(lambda: saxpy[2, 64](torch.zeros(100), torch.zeros(100), 1.0, 101))
    assert isinstance(error, KernelFault)
    assert (error.kind, error.line.line, error.block, error.thread) == (
        "out of bounds",
        3,
        (1, 0, 0),
        (36, 0, 0),
    )
    assert "3 │ if (i < n) y[i] = a * x[i] + y[i];" in str(error)
    assert "element 100 of" in str(error)


def test_a_fault_comes_without_the_machines_own_traceback(saxpy: cuda.Kernel) -> None:
    import traceback

    with pytest.raises(KernelFault) as caught:
        saxpy[1, 64](torch.zeros(1), torch.zeros(64), 1.0, 64)
    files = {frame.filename.rpartition("/")[2] for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert "machine.py" not in files
    assert caught.value.__cause__ is None


def test_a_failed_assert_is_found() -> None:
    kernel = cuda.compile("__global__ void k(const int* x) {\n  assert(x[threadIdx.x] < 3);\n}").kernel
    error = error_of(lambda: kernel[1, 8](torch.arange(8, dtype=torch.int32)))
    assert isinstance(error, KernelFault)
    assert (error.kind, error.line.line, error.thread) == ("assertion", 2, (3, 0, 0))


def test_a_race_is_found_unless_nobody_looks() -> None:
    source = (
        "__global__ void k(float* x) {\n  __shared__ float s[64];\n  s[threadIdx.x] = x[threadIdx.x];\n"
        "  x[threadIdx.x] = s[63 - threadIdx.x];\n}"
    )
    kernel, x = cuda.compile(source).kernel, torch.rand(64)
    error = error_of(lambda: kernel[1, 64](x.clone()))
    assert isinstance(error, KernelFault)
    assert error.kind == "race"
    kernel[1, 64](x.clone(), check=False)


# ── results ──


def test_the_result_tells_what_was_launched_without_a_clock(saxpy: cuda.Kernel) -> None:
    results = [saxpy[(4, 1), 256](torch.ones(1000), torch.zeros(1000), 1.0, 1000) for _ in range(2)]
    assert repr(results[0]) == repr(results[1])
    assert "saxpy[4, 256] on the PTX machine" in repr(results[0])
    assert "250 sectors" in repr(results[0])
    assert (results[0].where, results[0].seconds, results[0].milliseconds) == ("machine", None, None)
    assert results[0].grid == (4, 1, 1)


def test_the_table_gives_both_names(saxpy: cuda.Kernel) -> None:
    result = saxpy[4, 256](torch.ones(1000), torch.zeros(1000), 1.0, 1000)
    rows = {row[0]: row[1:] for row in result.table().rows}
    assert rows["global load sectors"] == ["250", "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum"]
    assert rows["global load sectors per request"][0] == "3.906"
    assert "barriers" not in rows
    assert "barriers" in {row[0] for row in result.table(zeros=True).rows}


def test_the_annotated_source_shows_the_lines_that_ran(saxpy: cuda.Kernel) -> None:
    shown = saxpy[4, 256](torch.ones(1024), torch.zeros(1024), 1.0, 1024).annotated()
    line = next(text for text in repr(shown).splitlines() if "y[i] = a" in text)
    assert "4.00" in line
    assert "384" in line  # 3 × 32 warps × 4 sectors
    assert shown.hottest() == 3


def test_lines_of_device_functions_and_headers_find_their_place() -> None:
    source = """\
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
namespace cg = cooperative_groups;
__device__ float square(float v) {
  return v * v;
}
__global__ void total(const float* x, float* out) {
  auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  float v = square(x[threadIdx.x]);
  float s = cg::reduce(warp, v, cg::plus<float>());
  if (warp.thread_rank() == 0) out[warp.meta_group_rank()] = s;
}
"""
    x, out = torch.arange(64.0), torch.zeros(2)
    result = cuda.compile(source).kernel[1, 64](x, out)
    assert torch.equal(out, x.reshape(2, 32).square().sum(1))
    assert result.counters is not None
    assert set(result.counters.lines) <= {5, 7, 8, 9, 10, 11, 12}
    assert result.counters.lines[5]["flops_fp32"] == 64
    assert result.counters.lines[10]["flops_fp32"] == 5 * 64
    assert "not in this source" not in repr(result.annotated())


def test_counters_are_asked_for_on_a_gpu() -> None:
    result = cuda.Result(cuda.compile(SAXPY).kernel, (1, 1, 1), (32, 1, 1), 0, [])
    assert "counters=True" in error_of(result.annotated).fix
    assert "counters=True" in error_of(result.table).fix


# ── where ──


def test_without_a_gpu_the_device_is_the_cpu() -> None:
    assert cuda.device() == "cpu"
    x = cuda.array([1, 2, 3], dtype=torch.float32)
    assert (x.device.type, x.dtype) == ("cpu", torch.float32)
    original = torch.zeros(3)
    cuda.array(original)[0] = 1
    assert original[0] == 0


def test_a_gpu_that_was_asked_for_and_is_not_there(
    saxpy: cuda.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    x = torch.ones(8)
    assert isinstance(error_of(lambda: saxpy[1, 32](x, x, 1.0, 8, where="gpu")), DeviceError)


def test_cuda_core_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    native.core.cache_clear()
    for name in ("cuda.core", "cuda.core.experimental"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match="pip install cuda-core"):
        native.core()


def test_neither_compiling_nor_running_on_arrays_waits_for_torch() -> None:
    code = f"""
import sys
import numpy as np
from llmcourse.vgpu import cuda
saxpy = cuda.compile({SAXPY!r}).saxpy
on_gpu = cuda.device() == "cuda"
x, y = np.ones(20_000, "f4"), np.ones(20_000, "f4")
saxpy[80, 256](x, y, 2.0, 20_000, where="machine")
assert (y == 3).all()
assert on_gpu or "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
