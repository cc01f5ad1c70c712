"""What a kernel is handed: values that would be misread are refused, with what to pass instead."""

from __future__ import annotations

import ctypes
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcourse.vgpu.arguments import Argument, as_numpy, bind
from llmcourse.vgpu.isa import DTYPES, Variable
from llmcourse.vgpu.memory import ArgumentError
from llmcourse.vgpu.signature import parameters

SIZES = {
    "float": "f32",
    "double": "f64",
    "int": "u32",
    "unsigned": "u32",
    "long long": "u64",
    "size_t": "u64",
    "unsigned char": "u8",
    "char": "u8",
    "bool": "u8",
    "short": "u16",
}


def take(declaration: str, value: object, *, size: int | None = None, known: bool = True) -> Argument:
    """What one parameter makes of one value; `known` says whether the source is at hand."""
    (parameter,) = parameters(f"__global__ void k({declaration}) {{}}", "k") or [None]
    assert parameter is not None
    if parameter.pointer:
        variable = Variable("p", "param", 8, 8, type="u64")
    elif size is not None:
        variable = Variable("p", "param", 4, size, type="b8")
    else:
        kind = SIZES[declaration.rpartition(" ")[0]]
        variable = Variable("p", "param", 4, DTYPES[kind].itemsize, type=kind)
    (argument,) = bind("k", [variable], [parameter] if known else None, [value])
    return argument


def refused(declaration: str, value: object, **options: object) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        take(declaration, value, **options)  # type: ignore[arg-type]
    assert "argument 1 of k" in caught.value.what
    assert caught.value.why
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("known", [True, False])
@given(st.integers(-(1 << 31), (1 << 31) - 1))
def test_an_int_arrives_with_the_bits_of_the_number(known: bool, number: int) -> None:
    data = take("int n", number, known=known).data
    assert data.tobytes() == struct.pack("<i", number)


@given(st.integers(1 << 31, (1 << 32) - 1))
def test_an_unsigned_number_may_use_the_last_bit(number: int) -> None:
    assert take("unsigned n", number).data.tobytes() == struct.pack("<I", number)
    assert take("unsigned n", number, known=False).data.tobytes() == struct.pack("<I", number)
    refused("int n", number)


@given(st.floats(width=32))
def test_a_float_arrives_rounded_once(number: float) -> None:
    data = take("float a", number).data
    assert data.dtype == np.float32
    np.testing.assert_array_equal(data, np.float32(number))


@pytest.mark.parametrize(
    ("declaration", "value", "expected"),
    [
        ("long long n", -5, struct.pack("<q", -5)),
        ("size_t n", 1 << 63, struct.pack("<Q", 1 << 63)),
        ("unsigned char c", 255, b"\xff"),
        ("char c", -1, b"\xff"),
        ("bool b", True, b"\x01"),
        ("short s", -2, b"\xfe\xff"),
        ("double d", 0.1, struct.pack("<d", 0.1)),
        ("float f", 3, struct.pack("<f", 3.0)),
        ("float f", float("inf"), struct.pack("<f", float("inf"))),
        ("int n", np.int64(7), struct.pack("<i", 7)),
        ("float f", np.float64(0.5), struct.pack("<f", 0.5)),
        ("int n", torch.tensor(9), struct.pack("<i", 9)),
        ("float f", np.array(2.5), struct.pack("<f", 2.5)),
    ],
)
def test_numbers_take_the_parameters_type(declaration: str, value: object, expected: bytes) -> None:
    assert take(declaration, value).data.tobytes() == expected


@pytest.mark.parametrize(
    ("declaration", "value", "says"),
    [
        ("int n", 2.5, "// instead of /"),
        ("int n", 4.0, "int(4.0)"),
        ("int n", 1 << 31, "long long"),
        ("unsigned n", -1, "0 to 4,294,967,295"),
        ("unsigned char c", 256, "0 to 255"),
        ("bool b", 2, "0 to 1"),
        ("float f", 1e39, "float('inf')"),
        ("float f", "3", "number"),
        ("float f", None, "number"),
        ("float f", 1 + 2j, "number"),
        ("int n", [1, 2], "number"),
        ("int n", torch.zeros(3), "declared as a pointer"),
        ("int n", np.zeros(1, "i4"), "declared as a pointer"),
        ("float* x", 3.0, "array of float32"),
        ("float* x", [1.0], "array of float32"),
    ],
)
def test_a_value_that_would_change_is_refused(declaration: str, value: object, says: str) -> None:
    assert says in str(refused(declaration, value))


MATCHING = [
    ("float", "float32"),
    ("double", "float64"),
    ("int", "int32"),
    ("unsigned int", "uint32"),
    ("unsigned", "int32"),  # torch has few unsigned types: the sign is the kernel's affair
    ("unsigned char", "uint8"),
    ("signed char", "int8"),
    ("bool", "bool"),
    ("long long", "int64"),
    ("float4", "float32"),
    ("float2", "complex64"),
    ("half", "float16"),
    ("__half2", "float16"),
]


@pytest.mark.parametrize(("element", "dtype"), MATCHING)
def test_matching_arrays_are_taken_as_they_are(element: str, dtype: str) -> None:
    array = np.zeros(3, dtype)
    assert take(f"const {element}* x", array).data is array
    tensor = torch.zeros(3, dtype=getattr(torch, dtype))
    assert take(f"{element} *__restrict__ x", tensor).data is tensor


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        ("float", "float64"),
        ("double", "float32"),
        ("float", "int32"),
        ("int", "float32"),
        ("int", "int64"),
        ("half", "bfloat16"),
        ("__nv_bfloat16", "float16"),
        ("float", "float16"),
        ("__nv_fp8_e4m3", "float8_e5m2"),
        ("half", "int16"),
        ("bool", "int32"),
    ],
)
def test_arrays_that_would_be_misread_are_refused(element: str, dtype: str) -> None:
    error = refused(f"{element}* x", torch.zeros(3, dtype=getattr(torch, dtype)))
    assert dtype in error.what
    assert ".to(torch." in error.fix or "astype" in error.fix


def test_nothing_is_checked_that_is_not_known() -> None:
    for declaration in ("MyType* x", "void* x", "T* x"):
        assert take(declaration, np.zeros(2)).is_array
    assert take("float* x", np.zeros(2), known=False).is_array


def test_formats_that_numpy_lacks_may_come_as_raw_bits() -> None:
    assert take("__nv_bfloat16* x", np.zeros(2, "u2")).is_array
    assert take("__nv_bfloat16* x", np.zeros(2, ml_dtypes.bfloat16)).is_array
    assert take("__nv_fp8_e4m3* x", torch.zeros(2, dtype=torch.uint8)).is_array


def test_a_null_pointer_is_none() -> None:
    for known in (True, False):
        assert take("float* x", None, known=known).data == np.uint64(0)


@pytest.mark.parametrize(
    "value",
    [np.zeros(2, ">f4"), np.array([object()]), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()],
)
def test_memory_that_a_kernel_cannot_read_is_refused(value: object) -> None:
    refused("void* x", value)


def test_autograd_is_not_bypassed_in_silence() -> None:
    watched = torch.ones(3, requires_grad=True)
    assert "detach" in refused("float* x", watched).fix
    assert take("const float* x", watched).is_array
    with torch.no_grad():
        assert take("float* x", watched).is_array


def test_structures_travel_as_bytes_of_their_size() -> None:
    class P(ctypes.Structure):
        _fields_ = (("a", ctypes.c_float), ("d", ctypes.c_double))

    scalar = np.zeros(1, np.dtype([("a", "f4"), ("d", "f8")], align=True))[0]
    for value in (P(1.5, 2.5), struct.pack("f4xd", 1.5, 2.5), scalar, bytearray(16)):
        data = take("P p", value, size=16).data
        assert isinstance(data, bytes)
        assert len(data) == 16
    assert take("P p", P(1.5, 2.5), size=16).data == struct.pack("f4xd", 1.5, 2.5)
    assert "16 bytes, and 12" in refused("P p", struct.pack("<fd", 1.5, 2.5), size=16).what
    assert "structure" in refused("P p", 3.0, size=16).what


def test_vector_and_half_values_are_packed() -> None:
    assert take("float4 v", (1, 2, 3, 4), size=16).data == struct.pack("<4f", 1, 2, 3, 4)
    assert take("half h", 1.5, size=2).data == struct.pack("<e", 1.5)
    assert take("__nv_bfloat16 h", 1.5, size=2).data == b"\xc0\x3f"
    assert "4 numbers" in str(refused("float4 v", (1, 2, 3), size=16))


@given(st.floats(width=32))
def test_a_bfloat16_value_is_rounded_as_torch_rounds_it(number: float) -> None:
    expected = torch.tensor(number, dtype=torch.bfloat16)
    found = torch.frombuffer(bytearray(take("nv_bfloat16 h", number, size=2).data), dtype=torch.bfloat16)[0]
    assert found == expected or (number != number and found != found)


def test_a_wrong_number_of_arguments_names_those_that_are_missing() -> None:
    declared = parameters("__global__ void k(float* x, float a, int n) {}", "k")
    sizes = [
        Variable(f"p{i}", "param", 8, size, type=t)
        for i, (size, t) in enumerate([(8, "u64"), (4, "f32"), (4, "u32")])
    ]
    with pytest.raises(ArgumentError, match=r"3 arguments .*x, float a, int n., and 1 were passed") as few:
        bind("k", sizes, declared, [np.zeros(1, "f4")])
    assert "float a and int n" in few.value.fix
    with pytest.raises(ArgumentError, match="grid and block"):
        bind("k", sizes, None, [1, 2, 3, 4])


def test_a_declaration_that_does_not_fit_the_ptx_is_not_used() -> None:
    """Macros can hide parameters: then sizes alone decide."""
    declared = parameters("__global__ void k(float* x, EXTRA) {}", "k")
    sizes = [Variable(f"p{i}", "param", 8, 8, type="u64") for i in range(3)]
    assert [a.name for a in bind("k", sizes, declared, [np.zeros(1), 5, None])] == ["arg0", "arg1", "arg2"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.int64]
)
def test_a_tensor_and_its_numpy_form_share_memory(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, 6).to(dtype).t()[1:, ::2]
    array = as_numpy(tensor)
    assert array.ctypes.data == tensor.data_ptr()
    assert array.shape == tuple(tensor.shape)
    assert array.strides == tuple(s * tensor.element_size() for s in tensor.stride())
