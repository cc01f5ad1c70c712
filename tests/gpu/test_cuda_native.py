"""The same kernels on the GPU and on the machine: equal values, through cuda.core on torch's stream."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from llmcourse.errors import DeviceError
from llmcourse.vgpu import cuda, native
from llmcourse.vgpu.cuda import KernelFault, LaunchError

SAXPY = """\
extern "C" __global__ void saxpy(const float* x, float* y, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}
"""
MATMUL = """\
#define TILE 16
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


@pytest.fixture(scope="module")
def saxpy() -> cuda.Kernel:
    return cuda.compile(SAXPY).kernel


def test_the_device_is_the_gpu() -> None:
    assert cuda.device() == "cuda"
    assert cuda.array([1.0, 2.0]).is_cuda
    assert native.arch_of(0).startswith("sm_")


@pytest.mark.parametrize("n", [1, 31, 1000, 1_000_003])
def test_saxpy_equals_torch_and_the_machine(saxpy: cuda.Kernel, n: int) -> None:
    torch.manual_seed(n)
    x, y = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
    expected = 2.5 * x.double() + y.double()
    on_machine = y.cpu()
    result = saxpy[(n + 255) // 256, 256](x, y, 2.5, n)
    saxpy[(n + 255) // 256, 256](x.cpu(), on_machine, 2.5, n)
    assert (result.where, result.counters) == ("gpu", None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(y.cpu(), on_machine)  # both fuse the multiply and the add
    assert result.seconds is not None
    assert 0 < result.seconds < 1
    assert result.milliseconds == 1e3 * result.seconds


def test_a_tiled_matmul_equals_the_machine_bit_by_bit() -> None:
    n = 64
    a, b = torch.randn(n, n, device="cuda"), torch.randn(n, n, device="cuda")
    c = torch.empty(n, n, device="cuda")
    kernel = cuda.compile(MATMUL).kernel
    result = kernel[(4, 4), (16, 16)](a, b, c, n, counters=True)
    on_machine = torch.empty(n, n)
    alone = kernel[(4, 4), (16, 16)](a.cpu(), b.cpu(), on_machine, n)
    assert torch.equal(c.cpu(), on_machine)
    assert result.counters is not None
    assert alone.counters is not None
    assert result.counters.total == alone.counters.total
    assert repr(result.annotated()) == repr(alone.annotated())
    assert "µs" in repr(result)


def test_counters_count_the_launch_and_not_what_it_left(saxpy: cuda.Kernel) -> None:
    """The copies are taken before the kernel overwrites its input."""
    source = "__global__ void halve(int* x) {\n  while (x[threadIdx.x] > 1) x[threadIdx.x] /= 2;\n}"
    kernel = cuda.compile(source).kernel
    x = torch.full((32,), 1024, dtype=torch.int32, device="cuda")
    result = kernel[1, 32](x, counters=True)
    assert x.eq(1).all()
    assert result.counters is not None
    assert result.counters.lines[2]["branches"] == 11  # it would be 1 for the ones that are left


def test_views_keep_their_offset_and_strides_in_both_places(saxpy: cuda.Kernel) -> None:
    whole = torch.zeros(600, device="cuda")
    result = saxpy[2, 256](torch.ones(512, device="cuda"), whole[1:513], 1.0, 512, counters=True)
    assert whole[0] == 0
    assert whole[1:513].eq(1).all()
    assert whole[513:].eq(0).all()
    assert result.counters is not None
    assert result.counters.global_store_sectors == 16 * 5


def test_the_machine_can_run_on_a_gpus_tensors(saxpy: cuda.Kernel) -> None:
    x, y = torch.ones(100, device="cuda"), torch.zeros(200, device="cuda")
    result = saxpy[1, 128](x, y[::2], 3.0, 100, where="machine")
    assert (result.where, result.seconds) == ("machine", None)
    assert y[:100].eq(3).all()
    assert y[100:].eq(0).all()


def test_launches_follow_torchs_current_stream(saxpy: cuda.Kernel) -> None:
    n = 1 << 22
    side = torch.cuda.Stream()
    x, y = torch.ones(n, device="cuda"), torch.zeros(n, device="cuda")
    saxpy[n // 256, 256](x, y, 0.0, n)  # loads the module, which may wait for the device
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the kernel must wait for this, as it is on the same stream
        y.fill_(1)
        saxpy[n // 256, 256](x, y, 2.0, n)
        y.mul_(10)
        done = torch.cuda.Event()
        done.record()
    assert not done.query()
    side.synchronize()
    assert y.eq(30).all()


def test_launches_can_be_captured_in_a_graph(saxpy: cuda.Kernel) -> None:
    x, y = torch.ones(256, device="cuda"), torch.zeros(256, device="cuda")
    saxpy[1, 256](x, y, 1.0, 256)
    y.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = saxpy[1, 256](x, y, 1.0, 256)
    assert result.seconds is None
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert y.eq(3).all()


def test_more_than_48_kib_of_dynamic_shared_memory() -> None:
    source = (
        "extern __shared__ float s[];\n__global__ void k(float* x, int n) {\n"
        "  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = i;\n  __syncthreads();\n"
        "  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = s[n - 1 - i];\n}"
    )
    n = 15_000
    x = torch.zeros(n, device="cuda")
    kernel = cuda.compile(source).kernel
    kernel[1, 256, 4 * n](x, n)
    assert torch.equal(x.cpu(), torch.arange(n - 1, -1, -1.0))
    with pytest.raises(LaunchError, match="at most"):
        kernel[1, 256, 1 << 20](x, n)


def test_structures_numbers_and_null_pointers_by_value() -> None:
    source = (
        "struct P { float a; int n; double d; };\n"
        "__global__ void k(float* o, P p, float4 v, bool b, long long q, unsigned char c, void* none) {\n"
        "  o[0] = p.a; o[1] = p.n; o[2] = p.d; o[3] = v.x + v.w; o[4] = b; o[5] = q; o[6] = c;\n"
        "  o[7] = none == nullptr; }"
    )
    kernel = cuda.compile(source).kernel
    p = np.zeros(1, np.dtype([("a", "f4"), ("n", "i4"), ("d", "f8")]))[0]
    p["a"], p["n"], p["d"] = 1.5, 7, 2.5
    out = torch.zeros(8, device="cuda")
    kernel[1, 1](out, p, (1, 2, 3, 4.5), True, -3, 200, None)
    assert out.tolist() == [1.5, 7, 2.5, 5.5, 1, -3, 200, 1]


@pytest.mark.parametrize(("kind", "dtype"), [("half", torch.float16), ("__nv_bfloat16", torch.bfloat16)])
def test_templates_of_half_precision_equal_the_machine(kind: str, dtype: torch.dtype) -> None:
    source = (
        "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\ntemplate <typename T>\n"
        "__global__ void axpb(const T* x, T* y, T a) { int i = threadIdx.x; y[i] = __hfma(x[i], a, y[i]); }"
    )
    kernel = cuda.compile(source, names=[f"axpb<{kind}>"]).kernel
    x, y = torch.randn(128, device="cuda").to(dtype), torch.randn(128, device="cuda").to(dtype)
    host = y.cpu()
    kernel[1, 128](x, y, 1.25)
    kernel[1, 128](x.cpu(), host, 1.25)
    assert y.cpu().equal(host)


@pytest.mark.parametrize(("kind", "dtype"), [("half", torch.float16), ("__nv_bfloat16", torch.bfloat16)])
def test_a_product_and_a_sum_of_halves_are_rounded_once_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    """NVRTC leaves two instructions, which the machine runs; the assembler makes them one, as PTX allows."""
    source = (
        "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\ntemplate <typename T>\n"
        "__global__ void axpb(const T* x, T* y, T a) { int i = threadIdx.x; y[i] = x[i] * a + y[i]; }"
    )
    kernel = cuda.compile(source, names=[f"axpb<{kind}>"]).kernel
    x, y = torch.randn(128, device="cuda").to(dtype), torch.randn(128, device="cuda").to(dtype)
    exact, host = x.double() * 1.25 + y.double(), y.cpu()
    twice = (x.cpu() * 1.25) + host
    kernel[1, 128](x, y, 1.25)
    kernel[1, 128](x.cpu(), host, 1.25)
    assert ((y.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2).all()
    assert host.equal(twice)


def test_headers_and_cooperative_groups_work_natively() -> None:
    source = (
        "#include <cooperative_groups.h>\n#include <cooperative_groups/reduce.h>\n"
        "namespace cg = cooperative_groups;\n__global__ void total(const float* x, float* out) {\n"
        "  auto warp = cg::tiled_partition<32>(cg::this_thread_block());\n"
        "  float s = cg::reduce(warp, x[threadIdx.x], cg::plus<float>());\n"
        "  if (warp.thread_rank() == 0) out[warp.meta_group_rank()] = s;\n}"
    )
    x, out = torch.arange(64.0, device="cuda"), torch.zeros(2, device="cuda")
    cuda.compile(source).kernel[1, 64](x, out)
    assert torch.equal(out, x.reshape(2, 32).sum(1))


def test_tensor_cores_equal_torch() -> None:
    source = (
        "#include <mma.h>\nusing namespace nvcuda;\n"
        "__global__ void mma(const half* a, const half* b, float* c) {\n"
        "  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> fa;\n"
        "  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::row_major> fb;\n"
        "  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;\n  wmma::fill_fragment(fc, 0.0f);\n"
        "  wmma::load_matrix_sync(fa, a, 16);\n  wmma::load_matrix_sync(fb, b, 16);\n"
        "  wmma::mma_sync(fc, fa, fb, fc);\n  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);\n}"
    )
    a, b = (torch.randn(16, 16, device="cuda", dtype=torch.float16) for _ in range(2))
    c = torch.zeros(16, 16, device="cuda")
    cuda.compile(source).kernel[1, 32](a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-3, atol=1e-3)


def test_printf_is_caught_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = cuda.compile('__global__ void hi(int n) { printf("%d of %d\\n", threadIdx.x, n); }').kernel
    result = kernel[1, 3](7)
    assert result.where == "gpu"
    assert sorted(result.printed.splitlines()) == ["0 of 7", "1 of 7", "2 of 7"]
    assert capsys.readouterr().out == result.printed


def test_kernels_from_ptx_are_loaded_by_the_driver(saxpy: cuda.Kernel) -> None:
    y = torch.zeros(8, device="cuda")
    cuda.from_ptx(saxpy.ptx, "saxpy")[1, 32](torch.ones(8, device="cuda"), y, 3.0, 8)
    assert y.eq(3).all()


def test_resources_are_those_that_the_driver_reports() -> None:
    kernel = cuda.compile(MATMUL).kernel
    loaded = native._loaded(kernel, 0)
    driver = native._driver()
    arch = native.arch_of(0)
    attribute = driver.CUfunction_attribute
    function, device = driver.CUkernel(native._handle(loaded)), driver.CUdevice(0)
    wanted = {
        "registers": attribute.CU_FUNC_ATTRIBUTE_NUM_REGS,
        "shared": attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    }
    for name, which in wanted.items():
        error, value = driver.cuKernelGetAttribute(which, function, device)
        assert int(error) == 0
        assert value == getattr(kernel.resources(arch), name)


def test_constant_memory_is_filled_before_and_after_loading() -> None:
    source = (
        "__constant__ float weights[3];\n__device__ int calls;\n"
        "__global__ void total(float* x) { x[0] = weights[0] + weights[1] + weights[2]; x[1] = ++calls; }"
    )
    module, x = cuda.compile(source), torch.zeros(2, device="cuda")
    module.set("weights", np.array([1, 2, 4], "f4"))
    module.total[1, 1](x)
    assert x.tolist() == [7, 1]
    module.set("weights", torch.ones(3, device="cuda"))
    module.total[1, 1](x)
    assert x.tolist() == [3, 2]
    other = cuda.compile(source)
    other.total[1, 1](x)
    assert x.tolist() == [0, 1]


def test_arrays_in_two_places_are_refused(saxpy: cuda.Kernel) -> None:
    x, y = torch.ones(8), torch.zeros(8, device="cuda")
    with pytest.raises(DeviceError, match="x on cpu, y on cuda:0"):
        saxpy[1, 32](x, y, 1.0, 8)
    with pytest.raises(DeviceError, match="its arrays are on the CPU"):
        saxpy[1, 32](x, x, 1.0, 8, where="gpu")


def test_an_illegal_access_is_explained() -> None:
    """In a process of its own: the GPU context does not survive it."""
    code = """
import torch
from llmcourse.vgpu import cuda
kernel = cuda.compile("__global__ void k(float* x) { x[1ll << 40] = 1; }").kernel
try:
    kernel[1, 32](torch.zeros(4, device="cuda")).seconds
except cuda.KernelFault as fault:
    assert "names neither line nor thread" in fault.why, fault
    assert "CPU tensors" in fault.fix
    print(fault.kind)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "out of bounds", done.stderr
    assert KernelFault is cuda.KernelFault


def test_launching_costs_less_than_a_millisecond(saxpy: cuda.Kernel) -> None:
    """A guard against recompiling or reloading for each launch, far above the real cost."""
    import time

    x, y = torch.ones(256, device="cuda"), torch.zeros(256, device="cuda")
    for _ in range(10):
        saxpy[1, 256](x, y, 1.0, 256)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        saxpy[1, 256](x, y, 1.0, 256)
    torch.cuda.synchronize()
    assert (time.perf_counter() - start) / 100 < 1e-3
