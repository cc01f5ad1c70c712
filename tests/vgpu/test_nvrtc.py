"""CUDA C++ → PTX: headers, options, templates, and the compiler's findings against the reader's lines."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from llmcourse.errors import CourseError, DeviceError, MissingPackageError
from llmcourse.vgpu import headers, nvrtc
from llmcourse.vgpu.compile_error import CompileError
from llmcourse.vgpu.diagnostics import read

TWICE = "__global__ void twice(float* x) {\n  x[threadIdx.x] *= 2.0f;\n}\n"


def refused(source: str, **options: object) -> CompileError:
    with pytest.raises(CompileError) as caught:
        nvrtc.compile_source(source, **options)  # type: ignore[arg-type]
    error = caught.value
    assert error.what
    assert error.why
    assert error.fix
    return error


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_ptx_is_made_for_each_architecture_of_the_course(arch: str) -> None:
    ptx = nvrtc.compile_source(TWICE, arch).ptx
    assert f".target {arch}" in ptx
    assert ".loc\t1 2 " in ptx


@pytest.mark.parametrize("arch", ["sm_90", "compute_90", "9.0", 90, (9, 0), "SM_90"])
def test_an_architecture_can_be_written_in_several_ways(arch: nvrtc.Arch) -> None:
    assert nvrtc.normal_arch(arch) == "sm_90"


def test_an_architecture_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(DeviceError, match="sm_75"):
        nvrtc.compile_source(TWICE, "T4")
    with pytest.raises(DeviceError, match="does not compile for sm_61"):
        nvrtc.compile_source(TWICE, "sm_61")


def test_the_same_source_gives_the_same_ptx_in_every_folder(tmp_path, monkeypatch) -> None:
    here = nvrtc.compile_source(TWICE).ptx
    nvrtc._compile.cache_clear()
    monkeypatch.chdir(tmp_path)
    assert nvrtc.compile_source(TWICE).ptx == here
    assert str(tmp_path) not in here
    assert '.file\t1 "cell.cu"' in here


def test_a_source_is_compiled_once_for_the_same_options() -> None:
    nvrtc._compile.cache_clear()
    first = nvrtc.compile_source(TWICE, defines={"N": 1})
    assert nvrtc.compile_source(TWICE, "8.0", options=["-DN=1"]) is first
    assert nvrtc.compile_source(TWICE, defines={"N": 2}) is not first


@pytest.mark.parametrize(
    "include",
    [
        "cuda_fp16.h",
        "cuda_bf16.h",
        "cuda_fp8.h",
        "mma.h",
        "cooperative_groups.h",
        "cooperative_groups/reduce.h",
        "cuda_pipeline.h",
        "cuda_runtime.h",
        "cstdio",
        "stdint.h",
        "cmath",
        "cfloat",
        "climits",
        "cassert",
    ],
)
def test_the_headers_that_kernels_use_are_found(include: str) -> None:
    for arch in ("sm_75", "sm_90"):
        assert nvrtc.compile_source(f"#include <{include}>\n{TWICE}", arch).ptx


def test_what_nvcc_offers_without_a_header_is_there() -> None:
    source = (
        "__global__ void k(float* x, uint32_t* u, int64_t n) {\n"
        '  x[0] = INFINITY; x[1] = NAN; u[0] = (uint32_t)n; assert(n > 0); printf("%f", x[0]);\n}\n'
    )
    ptx = nvrtc.compile_source(source).ptx
    assert "2139095040" in ptx or "0f7F800000" in ptx  # the bits of infinity


def test_templates_are_instantiated_by_name() -> None:
    source = "template <typename T, int N> __global__ void fill(T* x) { x[threadIdx.x] = T(N); }"
    lowered = nvrtc.compile_source(source, names=["fill<float, 3>", "fill<double, 4>"]).lowered
    assert set(lowered) == {"fill<float, 3>", "fill<double, 4>"}
    assert len(set(lowered.values())) == 2


def test_a_template_instance_that_does_not_exist_is_an_error() -> None:
    assert "nowhere" in str(refused(TWICE, names=["nowhere<float>"]))


def test_machine_code_comes_with_registers_and_shared_memory() -> None:
    source = (
        "__global__ void rev(float* x) {\n  __shared__ float s[96];\n  s[threadIdx.x] = x[threadIdx.x];\n"
        "  __syncthreads();\n  x[threadIdx.x] = s[95 - threadIdx.x];\n}\n"
    )
    compiled = nvrtc.compile_source(source, "sm_90", cubin=True)
    (found,) = compiled.resources.values()
    assert compiled.cubin[:4] == b"\x7fELF"
    assert (found.shared, found.barriers, found.spill_stores) == (384, 1, 0)
    assert 6 <= found.registers <= 32
    assert not nvrtc.compile_source(source, "sm_90").cubin


def test_errors_are_shown_under_the_line_they_are_about() -> None:
    source = "__global__ void k(float* x) {\n  x[0] = total;\n\tx[1] = 2 * other;\n}\n"
    error = refused(source)
    assert [(d.line, d.column) for d in error.errors] == [(2, 10), (3, 13)]
    lines = str(error).splitlines()
    for text, word in (("x[0] = total;", "total"), ("x[1] = 2 * other;", "other")):
        i = next(i for i, line in enumerate(lines) if text in line)
        assert lines[i + 1].index("^") == lines[i].index(word)
    assert error.log.startswith("cell.cu(2)")


def test_a_missing_semicolon_is_shown_where_it_is_missing() -> None:
    error = refused("__global__ void k(float* x) {\n  int i = threadIdx.x  // here\n\n  x[i] = 1;\n}\n")
    assert (error.errors[0].line, error.errors[0].column) == (2, 22)
    assert "line 2" in error.fix


def test_an_open_brace_is_shown_where_it_was_opened() -> None:
    error = refused("__global__ void k(float* x) {\n  if (x[0] > 0) {\n    x[0] = 1;\n}\n")
    assert error.errors[0].line in (1, 2)
    assert "clos" in error.fix


@pytest.mark.parametrize(
    ("body", "advised"),
    [
        ("x[threadidx.x] = 1;", "threadIdx"),
        ("__syncthread();", "__syncthreads"),
        ("half h = 1;", "cuda_fp16.h"),
        ("wmma::fragment<int> f;", "mma.h"),
        ("cudaMalloc(&x, 4);", "torch.empty"),
        ("cfg(x);", "declaring it"),
    ],
)
def test_common_mistakes_get_their_own_advice(body: str, advised: str) -> None:
    assert advised in str(refused(f"__global__ void k(float* x) {{\n  {body}\n}}\n"))


@pytest.mark.parametrize(
    ("source", "advised"),
    [
        ("#include <vector>\n" + TWICE, "removing the line"),
        ("float f(float x) { return x; }\n__global__ void k(float* x) { x[0] = f(x[0]); }", "__device__"),
        ("float w = 1;\n__global__ void k(float* x) { x[0] = w; }", "__constant__"),
        (TWICE + "int main() { twice<<<1, 32>>>(0); }", "in Python"),
        ("__global__ int k(float* x) { return 1; }", "__global__ void"),
        ("__global__ void k(const float* x) { x[0] = 1; }", "removing const"),
    ],
)
def test_code_of_the_cpu_gets_its_own_advice(source: str, advised: str) -> None:
    assert advised in refused(source).fix


def test_an_error_in_a_template_names_the_instance() -> None:
    source = (
        "template <typename T> __device__ T f(T x) { return x.first; }\n"
        "__global__ void k(float* x) {\n  x[0] = f(x[0]);\n}\n"
    )
    error = refused(source)
    assert error.errors[0].line == 1
    assert "T=float" in str(error)


def test_an_error_inside_a_header_is_moved_to_the_line_that_brought_it() -> None:
    log = (
        "/opt/include/crt/mma.hpp(91): error: a thing is wrong\n    code here\n    ^\n"
        '          detected during instantiation of "void f<T>()" at line 4 of cell.cu\n\n'
        '1 error detected in the compilation of "cell.cu".\n'
    )
    (found,) = read(log, "cell.cu", "a\nb\nc\nd\n")
    assert (found.file, found.line) == ("cell.cu", 4)
    assert "mma.hpp, line 91" in found.detail[0]


def test_a_long_list_of_candidates_does_not_drown_the_error() -> None:
    source = (
        "#include <mma.h>\nusing namespace nvcuda;\n__global__ void k(half* x) {\n"
        "  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> a;\n"
        "  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;\n  wmma::mma_sync(c, a, a, c);\n}\n"
    )
    error = refused(source)
    assert [d.line for d in error.errors] == [6]
    assert len(str(error).splitlines()) < 10
    assert len(error.log.splitlines()) > 100


def test_fifty_errors_are_counted_and_five_are_shown() -> None:
    error = refused(
        "__global__ void k(float* x) {\n" + "".join(f"  x[{i}] = u{i};\n" for i in range(50)) + "}\n"
    )
    assert len(error.errors) == 50
    assert str(error).count("is undefined") == 5
    assert "and 45 more" in str(error)


def test_warnings_are_kept_and_do_not_fail() -> None:
    compiled = nvrtc.compile_source("__global__ void k(float* x) {\n  int unused;\n  x[0] = 1;\n}\n")
    assert [(w.line, w.kind) for w in compiled.warnings] == [(2, "warning")]
    assert "unused" in str(compiled.warnings[0])


def test_an_unknown_option_is_a_course_error() -> None:
    assert "--nonsense" in str(refused(TWICE, options=["--nonsense"]))


def test_too_much_declared_shared_memory_is_found_by_the_assembler() -> None:
    source = (
        "__global__ void k(float* x) { __shared__ float s[20000]; "
        "s[threadIdx.x] = 1; __syncthreads(); x[0] = s[1]; }"
    )
    assert "48 KiB" in refused(source, cubin=True).why


@pytest.mark.parametrize(("platform", "says"), [("darwin", "Colab"), ("linux", "pip install")])
def test_without_the_compiler_the_error_says_what_to_do(platform: str, says: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    nvrtc._compile.cache_clear()
    with pytest.raises(MissingPackageError) as caught:
        nvrtc.compile_source(TWICE)
    assert isinstance(caught.value, CourseError)
    assert says in str(caught.value)


def test_missing_headers_are_named(monkeypatch, tmp_path) -> None:
    assert headers.missing() == []
    (tmp_path / "cuda_fp16.h").touch()
    monkeypatch.setattr(headers, "include_folders", lambda: (str(tmp_path),))
    assert headers.missing() == ["mma.h", "crt/mma.hpp"]


def test_a_toolkit_completes_wheels_that_lack_headers(monkeypatch, tmp_path) -> None:
    """PyTorch's CUDA wheels bring the runtime's headers and not those of nvidia-cuda-crt."""
    wheels, toolkit = tmp_path / "site" / "nvidia" / "cu13" / "include", tmp_path / "cuda" / "include"
    for folder, names in ((wheels, ["cuda_fp16.h", "mma.h"]), (toolkit, ["mma.h", "crt/mma.hpp"])):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    found = headers.include_folders.__wrapped__()
    assert found[:2] == (str(wheels), str(toolkit))
    (wheels / "crt").mkdir()
    (wheels / "crt" / "mma.hpp").touch()
    assert headers.include_folders.__wrapped__() == (str(wheels),)


def test_an_empty_log_does_not_overwrite_pythons_own_bytes() -> None:
    """NVRTC's binding writes into a bytes object; for a log of one byte that was the shared b" "."""
    nvrtc._compile.cache_clear()
    assert nvrtc.compile_source(TWICE).log.strip() == ""
    assert [bytes([i])[0] for i in range(256)] == list(range(256))


def test_the_package_is_imported_without_the_compiler() -> None:
    code = "import sys, llmcourse.vgpu; assert not {'numpy', 'torch', 'cuda'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
