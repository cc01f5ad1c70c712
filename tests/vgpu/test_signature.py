"""Declarations read from C++ and PTX: right where they are read at all."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from llmcourse.vgpu import nvrtc
from llmcourse.vgpu.signature import declared_kernels, entries, parameters, plain_name

SOURCE = """
#define REAL float
using T2 = double;
typedef unsigned int u32;
struct P { float a; int n; double d; };
// __global__ void commented(int a) {}
/* __global__ void also(int a) {} */
template <typename T, int N = 4>
__global__ void __launch_bounds__(256, 2) copy(const T* __restrict__ x, T *y, int n) {
  const char* text = "__global__ void quoted(int a)";
  if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x]; if (text == nullptr) y[0] = x[1]; }
extern "C" __global__ __launch_bounds__(64, 1) void
many(float* x, P p, unsigned char c, bool b, float4 v, const REAL y[], T2* d, u32 a, long l,
     unsigned long long q, float** pp, const size_t s, unsigned w, volatile int* z) {
  x[0] = p.a + c + b + v.x + y[0] + d[0] + a + l + q + pp[0][0] + s + w + z[0]; }
"""


def test_kernels_are_listed_in_the_order_of_the_source() -> None:
    assert declared_kernels(SOURCE) == ["copy", "many"]


def test_names_types_and_const_are_read() -> None:
    found = parameters(SOURCE, "many")
    assert found is not None
    assert [p.name for p in found] == "x p c b v y d a l q pp s w z".split()  # noqa: SIM905
    pointers = [p.name for p in found if p.pointer]
    assert pointers == ["x", "y", "d", "pp", "z"]
    assert [p.name for p in found if p.const and p.pointer] == ["y"]
    types = {p.name: str(p.element) for p in found if p.element}
    assert types["x"] == types["y"] == types["v"] == "float32"
    assert (types["d"], types["c"], types["a"], types["q"], types["s"], types["w"], types["z"]) == (
        "float64",
        "uint8",
        "uint32",
        "uint64",
        "uint64",
        "uint32",
        "int32",
    )
    assert {"p", "l"}.isdisjoint(types)  # a structure; and long, whose size depends on the system


def test_template_arguments_take_the_place_of_their_names() -> None:
    known = parameters(SOURCE, "copy", ["__half", "8"])
    unknown = parameters(SOURCE, "copy")
    assert known is not None
    assert unknown is not None
    assert [str(p.element) for p in known] == ["float16", "float16", "int32"]
    assert [p.element for p in unknown[:2]] == [None, None]


def test_two_kernels_of_one_name_are_not_guessed_between() -> None:
    twice = "namespace a { __global__ void k(float* x) {} }\nnamespace b { __global__ void k(int* x) {} }"
    assert parameters(twice, "k") is None


def test_macros_given_to_the_compiler_count() -> None:
    source = "__global__ void k(TYPE* x) {}"
    assert str(parameters(source, "k", (), {"TYPE": "double"})[0].element) == "float64"  # type: ignore[index]
    assert parameters(source, "k")[0].element is None  # type: ignore[index]


def test_sizes_in_ptx_agree_with_the_declaration() -> None:
    for entry in entries(nvrtc.compile_source(SOURCE, names=["copy<float, 4>"]).ptx):
        plain, arguments = plain_name(entry.name)
        declared = parameters(SOURCE, plain, arguments or ())
        assert declared is not None
        assert len(declared) == len(entry.parameters)
        for parameter, variable in zip(declared, entry.parameters, strict=True):
            if parameter.pointer:
                assert variable.size == 8
            elif parameter.element:
                assert variable.size == parameter.element.nbytes
        assert entry.max_threads == {"copy": 256, "many": 64}[plain]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("saxpy", ("saxpy", None)),
        ("_Z1mPf", ("m", None)),
        ("_ZN3foo1kEPf1Ph6__halfb6float4", ("k", None)),
        ("_Z4copyIfEvPKT_PS0_i", ("copy", ["float"])),
        ("_Z4copyI6__halfEvPKT_PS1_i", ("copy", ["__half"])),
        ("_Z1gIfLi32ELb1EEvPT_", ("g", ["float", "32", "true"])),
        ("_Z1gIN3foo1PEEvPT_", ("g", None)),
    ],
)
def test_the_compilers_names_are_read_back(entry: str, name: tuple[str, list[str] | None]) -> None:
    assert plain_name(entry) == name
