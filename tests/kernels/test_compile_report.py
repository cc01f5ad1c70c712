"""Compile reports: what they say is in the machine code, and what cannot be compiled is said too."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_cases import (
    arguments_kernel,
    cast_kernel,
    device_descriptor_kernel,
    host_descriptor_kernel,
    matmul_kernel,
    softmax_kernel,
    times,
    tuned_kernel,
)

from llmcourse.errors import CourseError, UnknownNameError
from llmcourse.kernels import compile_report as module
from llmcourse.kernels.compile_report import (
    Signature,
    SignatureError,
    Target,
    _opcodes,
    _reason,
    compile_report,
    signature_of,
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """A cache of its own, so that nothing compiled earlier is what is tested."""
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield
    shutil.rmtree(folder)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_softmax_loads_sixteen_bytes_a_thread_and_spills_nothing_on_any_of_the_three() -> None:
    x = torch.empty(64, 1024)
    report = compile_report(softmax_kernel, x, x, 1024, 1024, BLOCK=1024, num_warps=8)
    assert [t.ptx_target for t in report] == ["sm_75", "sm_80", "sm_90a"]
    for target in report:
        assert target.load_widths == {128: 1}  # 1024 floats for 256 threads: 4 each
        assert target.store_widths == {128: 1}
        assert 8 < target.registers < 64
        assert (target.spills, target.stack_bytes, target.tensor_cores, target.warps) == (0, 0, 0, 8)
        assert target.count("BAR") or target.count("SHFL")
        assert target.fits
    assert report.spills == 0


def test_a_stride_that_is_no_multiple_of_16_makes_loads_narrow() -> None:
    x = torch.empty(64, 1023)
    report = compile_report(softmax_kernel, x, x, 1023, 1023, BLOCK=1024, num_warps=8, capabilities=(80,))
    assert report[80].load_widths == {32: 4}
    offset = torch.empty(2048)[1:]
    assert "x" not in signature_of(softmax_kernel, offset, x, 1024, 1024, BLOCK=1024).multiples


def test_a_matmul_uses_the_tensor_cores_that_there_are() -> None:
    tile = {"BM": 64, "BN": 64, "BK": 32}
    a = meta(256, 256, dtype=torch.float16)
    report = compile_report(matmul_kernel, a, a, meta(256, 256), 256, 256, 256, **tile, capabilities=(80, 90))
    assert set(report[80].tensor_core_opcodes) == {"HMMA"}
    assert set(report[90].tensor_core_opcodes) == {"HGMMA"}
    assert report[90].tma == 0
    small = {"BM": 16, "BN": 16, "BK": 16}
    turing = compile_report(matmul_kernel, a, a, meta(256, 256), 256, 256, 256, **small, capabilities=(75,))[
        75
    ]
    assert turing.tensor_cores == 0  # Triton has none for a T4
    assert turing.count("FFMA") > 0


def test_tensor_descriptors_use_the_tensor_memory_accelerator_of_a_hopper_only() -> None:
    x = meta(256, 256, dtype=torch.float16)
    report = compile_report(device_descriptor_kernel, x, x, 256, 256, BM=64, BN=64, capabilities=(80, 90))
    assert report[80].tma == 0
    assert report[90].count("UTMALDG") == 1
    assert report[90].count("UTMASTG") == 1
    d = TensorDescriptor.from_tensor(torch.empty(256, 256, dtype=torch.float16), [64, 64])
    host = compile_report(host_descriptor_kernel, d, d, N=64, BM=64, BN=64, capabilities=(90,))
    assert host[90].tma == 2


def test_eight_bit_floats_are_reported_as_missing_where_they_are() -> None:
    report = compile_report(cast_kernel, "*fp32:16", "*fp8e4nv:16", "i32", BLOCK=1024)
    for capability in (75, 80):
        assert report[capability].error == "fp8e4nv does not exist on this GPU"
        assert not report[capability].fits
    assert report[90].error is None
    assert len(report.compiled) == 1
    assert "sm_75: fp8e4nv does not exist on this GPU" in repr(report)
    assert "<table>" in report._repr_html_()


@triton.jit
def greedy_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(out + i, v / tl.sum(tl.exp(v), 0))


@triton.jit
def wrong_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def test_spills_are_seen() -> None:
    x = torch.empty(16384)
    report = compile_report(greedy_kernel, x, x, BLOCK=16384, num_warps=1, capabilities=(80,), maxnreg=64)
    target = report[80]
    assert target.spill_store_bytes > 0
    assert target.spill_load_bytes > 0
    assert target.stack_bytes > 0
    assert target.registers <= 64
    assert report.spills == target.spills == target.spill_store_bytes + target.spill_load_bytes
    assert f"{target.spills:,}" in repr(report)


def test_too_much_shared_memory_is_seen() -> None:
    tile = {"BM": 128, "BN": 128, "BK": 64}
    a = meta(1024, 1024, dtype=torch.float16)
    numbers = (1024, 1024, 1024)
    report = compile_report(
        matmul_kernel, a, a, meta(1024, 1024), *numbers, **tile, num_stages=8, capabilities=(80,)
    )
    assert report[80].shared_bytes > module.SHARED_LIMIT[80]
    assert not report[80].fits
    assert "cannot be launched" in repr(report)


def test_a_kernel_that_is_wrong_is_reported_not_raised(capfd: pytest.CaptureFixture[str]) -> None:
    report = compile_report(wrong_kernel, "*i32", BLOCK=64, capabilities=(80,))
    assert report[80].error
    assert "shape" in report[80].error.lower()
    small = compile_report(cast_kernel, "*fp8e5:16", "*fp8e4nv:16", "i32", BLOCK=1024, capabilities=(90,))
    assert small[90].error
    assert "fp8" in small[90].error  # no conversion between the two; MLIR says so in C++
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UnknownNameError, match="80"):
        _ = report[90]


def test_signatures_follow_from_arguments() -> None:
    x = torch.empty(4, dtype=torch.bfloat16)
    made = signature_of(
        arguments_kernel, x, None, True, 0.5, 1, 2**40, "*fp32", x.to(torch.float8_e5m2), tl.bfloat16, times
    )
    assert made.types == {
        "p": "*bf16",
        "nothing": "constexpr",
        "flag": "i1",
        "f": "fp32",
        "one": "constexpr",
        "big": "i64",
        "pair": "*fp32",
        "out": "*fp8e5",
        "DT": "constexpr",
        "FN": "constexpr",
        "NAME": "constexpr",
    }
    assert made.constants == {"nothing": None, "one": 1, "DT": tl.bfloat16, "FN": times, "NAME": "no"}
    assert made.multiples == {"p", "big", "out"}
    written = signature_of(softmax_kernel, "*bf16:16", "*bf16", "i32:16", "i32", BLOCK=64)
    assert written.multiples == {"x", "columns"}
    given = compile_report(softmax_kernel, signature=written, capabilities=(80,))
    assert given[80].error is None


def test_autotuned_kernels_take_a_configuration_and_their_heuristics() -> None:
    x = torch.empty(4096)
    report = compile_report(tuned_kernel, x, x, 4096, config=3, capabilities=(80,))
    assert report.signature.constants == {"BLOCK": 128, "EVEN": True}
    assert report[80].warps == 4
    assert signature_of(tuned_kernel, x, x, 4095).constants == {"BLOCK": 64, "EVEN": False}


def test_wrong_arguments_say_what_to_do() -> None:
    x = torch.empty(8)
    for make, message in (
        (lambda: compile_report(softmax_kernel, x, x, BLOCK=64), "needs columns, stride"),
        (lambda: compile_report(softmax_kernel, x, x, 1, 1, 64, 99), "too many positional"),
        (lambda: compile_report(softmax_kernel, x, "*fp31", 64, 64, BLOCK=64), "fp31"),
        (lambda: compile_report(softmax_kernel, x, x.numpy(), 64, [], BLOCK=64), "whose type is not known"),
        (lambda: compile_report(torch.softmax, x), "no Triton kernel"),
    ):
        with pytest.raises(SignatureError, match=message) as error:
            make()
        assert isinstance(error.value, CourseError)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;    /* 0x0000000402048981 */
        /*0020*/               @P1 LDG.E.U16 R6, [R2.64] ;
        /*0030*/             @!UP2 UTMALDG.2D [UR4], [UR6] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0050*/                   STG.E.64 [R2.64], R4 ;
        /*0060*/                   NOP ;
"""


def test_opcodes_are_read_with_their_modifiers() -> None:
    opcodes = _opcodes(SASS)
    target = Target(90, opcodes=opcodes)
    assert opcodes == Counter(
        ["LDC", "LDG.E.128.CONSTANT", "LDG.E.U16", "UTMALDG.2D", "HMMA.16816.F32", "STG.E.64"]
    )
    assert target.load_widths == {16: 1, 128: 1}
    assert target.store_widths == {64: 1}
    assert (target.tensor_core_opcodes, target.tma, target.instructions) == ({"HMMA": 1}, 1, 6)
    assert target.count("LDG", "128") == 1


def test_reasons_are_one_line() -> None:
    log = "PTXAS error\nptxas x.ptx, line 149; error   : Feature 'cvt' requires .target sm_89 or higher\nmore"
    assert _reason(RuntimeError(log)) == "ptxas: Feature 'cvt' requires .target sm_89 or higher"
    assert _reason(ValueError("first\n  last  \n   ^")) == "ValueError: last"


def test_tools_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    module._tools.cache_clear()
    with pytest.raises(CourseError, match="cuobjdump, nvdisasm, ptxas"):
        compile_report(softmax_kernel, signature=Signature({}))
    module._tools.cache_clear()
