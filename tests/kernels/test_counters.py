"""Counting Triton kernels on a CPU: faults, nesting, and that nothing stays changed."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_cases as cases
from cpu_time import least
from scipy import special
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from triton_cases import CASES, copy_kernel, matmul_kernel, randn, softmax_kernel, tuned_kernel

from llmcourse.errors import CourseError, MissingPackageError
from llmcourse.kernels import _interpreter, _rewrite, counters
from llmcourse.kernels._math import libdevice
from llmcourse.kernels._memory import Argument, Memory
from llmcourse.kernels.counters import Counters, count, counting, interpreted, interpreting, is_interpreting
from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.isa import SourceLine


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    CASES[name]()


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


def line_of(text: str, file: str = __file__) -> int:
    """The number of the one line that holds this text and nothing like this call."""
    lines = Path(file).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if text in line and "line_of" not in line)


@triton.jit
def add_one_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i)  # no mask
    tl.store(out + i, v + 1, mask=i < n)


def test_a_load_beyond_the_end_is_found_with_line_argument_index_and_program() -> None:
    x, out = torch.zeros(100), torch.zeros(100)
    with pytest.raises(KernelFault) as fault:
        count(add_one_kernel)[(4,)](x, out, 100, BLOCK=32)
    error = fault.value
    assert error.kind == "out of bounds"
    assert error.line is not None
    assert error.line.line == line_of("# no mask")
    assert error.block == (3, 0, 0)
    assert "load of x[100]" in error.what
    assert "program 3 of add_one_kernel" in error.what
    assert "0 … 99" in error.what
    assert "28 of 32 active lanes" in error.why
    assert "mask" in error.fix


@triton.jit
def back_kernel(x, out, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i - shift, tl.load(x + i))


def test_an_access_before_the_start_is_found() -> None:
    with pytest.raises(KernelFault, match=r"store of out\[-3\]") as fault:
        interpreted(back_kernel)[(1,)](torch.zeros(16), torch.zeros(16), 3, BLOCK=16)
    assert "before its first" in fault.value.why


def test_a_view_may_not_be_left_though_memory_goes_on() -> None:
    memory = torch.zeros(64)
    inside = memory[16:32]
    for start, index in ((0, 16), (-4, -4)):
        shift = -4 if start < 0 else 0
        with pytest.raises(KernelFault, match=re.escape(f"x[{index}]")) as fault:
            interpreted(copy_kernel)[(1,)](inside, torch.zeros(32), 32, 1, shift, BLOCK=32)
        assert "larger tensor that it is a view of" in fault.value.why
    interpreted(copy_kernel, bounds="storage")[(1,)](inside, torch.zeros(32), 32, 1, 0, BLOCK=32)
    with pytest.raises(KernelFault):
        interpreted(copy_kernel, bounds="storage")[(1,)](inside, torch.zeros(64), 64, 1, 0, BLOCK=64)


def test_a_strided_view_ends_with_its_last_element() -> None:
    column = torch.arange(40.0).reshape(8, 5)[:, 2]
    out = torch.zeros(8)
    interpreted(copy_kernel)[(1,)](column, out, 8, 5, 0, BLOCK=8)
    assert torch.equal(out, column)
    with pytest.raises(KernelFault, match=r"x\[40\]"):
        interpreted(copy_kernel)[(1,)](column, torch.zeros(16), 9, 5, 0, BLOCK=16)


def test_an_empty_tensor_has_no_elements_to_touch() -> None:
    empty, out = torch.zeros(0), torch.zeros(4)
    c = count(copy_kernel)[(1,)](empty, out, 0, 1, 0, BLOCK=4)
    assert c.bytes == 0
    assert count(copy_kernel)[(0,)](empty, out, 0, 1, 0, BLOCK=4).load_ops == 0
    with pytest.raises(KernelFault, match="it has no elements"):
        interpreted(copy_kernel)[(1,)](empty, out, 1, 1, 0, BLOCK=4)


@triton.jit
def null_kernel(out, BLOCK: tl.constexpr):
    p = tl.zeros((BLOCK,), tl.int64).to(tl.pointer_type(tl.float32))
    tl.store(out + tl.arange(0, BLOCK), tl.load(p))


@triton.jit
def misaligned_kernel(x, out, BLOCK: tl.constexpr):
    p = (x + 2).to(tl.pointer_type(tl.float32))
    tl.store(out + tl.arange(0, BLOCK), tl.load(p + tl.arange(0, BLOCK)))


def test_null_and_misaligned_pointers_are_found() -> None:
    with pytest.raises(KernelFault, match="in none of its arguments"):
        interpreted(null_kernel)[(1,)](torch.zeros(4), BLOCK=4)
    with pytest.raises(KernelFault, match="load of 4 bytes at byte 2") as fault:
        interpreted(misaligned_kernel)[(1,)](torch.zeros(64, dtype=torch.int8), torch.zeros(4), BLOCK=4)
    assert fault.value.kind == "misaligned"


@triton.jit
def asserting_kernel(x, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    tl.static_assert(EVEN % 2 == 0, "EVEN must be even")
    v = tl.load(x + tl.arange(0, BLOCK))
    tl.device_assert(v >= 0, "negative")
    assert tl.sum(v, 0) < 10, "large"


def test_assertions_of_a_kernel_are_checked() -> None:
    ones = torch.ones(4)
    interpreted(asserting_kernel)[(1,)](ones, BLOCK=4, EVEN=2)
    for x, even, message in ((-ones, 2, "negative"), (5 * ones, 2, "large"), (ones, 3, "EVEN must be even")):
        with pytest.raises(KernelFault, match=message) as fault:
            interpreted(asserting_kernel)[(1,)](x, BLOCK=4, EVEN=even)
        assert fault.value.kind == "assertion"


@triton.jit
def printing_kernel(x, BLOCK: tl.constexpr):
    v = tl.load(x + tl.arange(0, BLOCK))
    tl.device_print("v", v)
    print("again", v)
    tl.static_print("BLOCK is", BLOCK)


def test_prints_of_a_kernel_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    interpreted(printing_kernel)[(1,)](torch.arange(4.0), BLOCK=4)
    out = capsys.readouterr().out
    assert out.count("[0. 1. 2. 3.]") == 2
    assert "BLOCK is 4" in out


@triton.jit
def waiting_kernel(flag):
    while tl.atomic_add(flag, 0) == 0:
        pass


def test_a_loop_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_interpreter, "MOST_TURNS", 200)
    with pytest.raises(KernelFault, match="200 times") as fault:
        interpreted(waiting_kernel)[(1,)](torch.zeros(1, dtype=torch.int32))
    assert fault.value.kind == "endless"


LOOSE = 5


@triton.jit
def global_kernel(out):
    tl.store(out, LOOSE)


@triton.jit
def block_condition_kernel(x, out, BLOCK: tl.constexpr):
    v = tl.load(x + tl.arange(0, BLOCK))
    if v > 0:
        tl.store(out, 1.0)


@triton.jit
def odd_block_kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 0.0)


@triton.jit
def thin_dot_kernel(a, out, K: tl.constexpr):
    i = tl.arange(0, 16)
    k = tl.arange(0, K)
    x = tl.load(a + i[:, None] * K + k[None, :])
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(x, tl.trans(x)))


@triton.jit
def breaking_kernel(x, n):
    for i in range(n):
        if i == 2:
            break
        tl.store(x + i, 1.0)


@triton.jit
def hinting_kernel(x, n):
    tl.store(x + tl.multiple_of(n, 16), 1.0)


@triton.jit
def assembly_kernel(x):
    v = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tl.load(x)], tl.float32, True, 1)
    tl.store(x, v)


def test_what_triton_would_not_compile_does_not_run_here_either() -> None:
    x, out = torch.zeros(64), torch.zeros(256)
    for launch, message in (
        (lambda: interpreted(global_kernel)[(1,)](out), "global LOOSE, which is no tl.constexpr"),
        (lambda: interpreted(block_condition_kernel)[(1,)](x, out, BLOCK=4), "cannot decide an `if`"),
        (lambda: interpreted(odd_block_kernel)[(1,)](x, N=48), "power of 2"),
        (lambda: interpreted(thin_dot_kernel)[(1,)](x, out, K=4), "K >= 16"),
        (lambda: interpreted(breaking_kernel)[(1,)](x, 4), "does not compile Python's break"),
        (lambda: interpreted(hinting_kernel)[(1,)](x, 17), "multiple of 16 .*; the value is 17"),
        (lambda: interpreted(assembly_kernel)[(1,)](x), "inline assembly"),
    ):
        with pytest.raises(KernelFault, match=message) as fault:
            launch()
        assert fault.value.line is not None
        assert fault.value.line.line > 0


def test_wrong_launches_say_what_to_do() -> None:
    x = torch.zeros(8)
    for launch, message in (
        (lambda: count(copy_kernel)[(1,)](x, x, 8, 1, BLOCK=8), "missing a required argument: 'start'"),
        (lambda: count(copy_kernel)[(1,)](x, x, 8, 1, 0, BLOKC=8), "BLOKC"),
        (lambda: count(copy_kernel)[8](x, x, 8, 1, 0, BLOCK=8), "got the grid 8"),
        (lambda: count(copy_kernel)[(1, 70000)](x, x, 8, 1, 0, BLOCK=8), "65,535"),
        (lambda: count(copy_kernel)[(1,)](x.numpy(), x, 8, 1, 0, BLOCK=8), "ndarray"),
        (lambda: count(copy_kernel)[(1,)](x.to("meta"), x, 8, 1, 0, BLOCK=8), "meta"),
        (lambda: count(copy_kernel)[(1,)](x.to(torch.complex64), x, 8, 1, 0, BLOCK=8), "complex64"),
        (lambda: count(tuned_kernel, config=9)[(1,)](x, x, 8), "configuration 9"),
        (lambda: count(torch.softmax), "no Triton kernel"),
    ):
        with pytest.raises(CourseError, match=message):
            launch()


# ── one block of code inside another ─────────────────────────────────────────────────────────────


def softmax(x: torch.Tensor) -> torch.Tensor:
    """A wrapper as learners write it: it knows nothing of counters."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    softmax_kernel[(x.shape[0],)](x, out, x.shape[1], x.stride(0), BLOCK=block, num_warps=4)
    return out


def test_a_counting_block_counts_every_launch_of_unchanged_code() -> None:
    x = randn(5, 300)
    with counting() as c:
        assert not len(c)
        y = softmax(softmax(x))
    assert torch.allclose(y, x.softmax(1).softmax(1), atol=1e-6)
    assert len(c) == 2
    assert c.bytes == 4 * x.nbytes == c.total.bytes
    assert list(c.kernels) == ["softmax_kernel"]
    assert c.kernels["softmax_kernel"].load_bytes == 2 * x.nbytes
    assert c[0].args["x"].load_bytes == x.nbytes
    assert "softmax_kernel" in repr(c)
    with pytest.raises(AttributeError, match="no counter 'loaded_bytes'"):
        _ = c.loaded_bytes


def test_each_block_counts_what_is_inside_it() -> None:
    x = randn(2, 64)
    with counting() as outer:
        softmax(x)
        with counting() as inner:
            softmax(x)
        single = count(softmax_kernel)[(2,)](x, torch.empty_like(x), 64, 64, BLOCK=64)
        with interpreting():
            softmax(x)
    assert (len(outer), len(inner), single.load_bytes) == (4, 1, x.nbytes)


def test_a_kernel_may_be_counted_while_another_launch_is_prepared() -> None:
    x = randn(2, 64)
    inner = []

    def grid(meta: dict[str, Any]) -> tuple[int]:
        inner.append(count(softmax_kernel)[(2,)](x, torch.empty_like(x), 64, 64, BLOCK=64))
        return (2,)

    with counting() as outer:
        count(softmax_kernel)[grid](x, torch.empty_like(x), 64, 64, BLOCK=64)
    assert len(inner) == 1
    assert len(outer) == 2


def test_counts_are_there_after_an_exception() -> None:
    x = randn(2, 64)
    seen = []

    def work() -> None:
        with counting() as c:
            seen.append(c)
            softmax(x)
            raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        work()
    assert len(seen[0]) == 1


def test_wrappers_can_ask_whether_kernels_run_here() -> None:
    assert not is_interpreting()
    with interpreting():
        assert is_interpreting()
    assert not is_interpreting()

    @interpreting()
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return softmax(x)

    x = randn(3, 50)
    assert torch.allclose(decorated(x), x.softmax(1), atol=1e-6)
    assert not is_interpreting()


def test_a_launch_in_a_backward_pass_counts() -> None:
    class Softmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return softmax(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return softmax(grads[0])

    x = randn(2, 32).requires_grad_()
    with counting() as c:
        Softmax.apply(x).backward(torch.ones(2, 32))
    assert len(c) == 2


def test_threads_do_not_count_each_other() -> None:
    x = randn(4, 64)
    found: list[Any] = []

    def work() -> None:
        for _ in range(4):
            with counting() as c:
                y = softmax(x)
            found.append((len(c), c.load_bytes, torch.allclose(y, x.softmax(1), atol=1e-6)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(1, x.nbytes, True)] * 12


# ── nothing stays changed ────────────────────────────────────────────────────────────────────────


def state() -> dict[Any, Any]:
    """Everything that could have been patched: Triton's language, its interpreter, its launchers."""
    owners = [
        tl,
        tl.core,
        tl.math,
        tl.standard,
        tl.random,
        tl.tensor,
        tl.dtype,
        tl.core.tensor_descriptor_base,
    ]
    owners += [stock, stock.InterpreterBuilder, stock.InterpretedFunction, JITFunction, Autotuner]
    owners += [sys.modules[name] for name in sys.modules if name.startswith("triton.language.extra")]
    return {(id(owner), name): value for owner in owners for name, value in list(vars(owner).items())}


@triton.jit
def stopping_kernel(x):
    tl.store(x, 1.0)
    tl.static_print("now")


def test_everything_is_as_it_was_after_a_launch_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(2, 64)
    names = set(globals())
    before = state()
    softmax_counts = count(softmax_kernel)[(2,)](x, torch.empty_like(x), 64, 64, BLOCK=64)
    assert softmax_counts.load_ops == 2
    assert state() == before
    with pytest.raises(KernelFault):
        count(add_one_kernel)[(1,)](x, x, 64, BLOCK=256)
    assert state() == before

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interpreted(stopping_kernel)[(1,)](x)
    monkeypatch.undo()
    assert state() == before
    with counting():
        assert state() != before
    assert state() == before
    assert set(globals()) == names  # the interpreter that Triton brings leaves names in the kernel's module
    assert "TRITON_INTERPRET" not in os.environ


def test_outside_of_a_launch_the_language_refuses_as_ever() -> None:
    with counting(), pytest.raises(ValueError, match=r"Did you forget to add @triton\.jit"):
        tl.arange(0, 8)
    with pytest.raises(RuntimeError, match=r"Cannot call @triton\.jit"):
        cases.times(1, 2)


def compile_softmax(block: int) -> str:
    types = {"x": "*fp32", "out": "*fp32", "columns": "i32", "stride": "i32", "BLOCK": "constexpr"}
    source = ASTSource(softmax_kernel, types, constexprs={(4,): block})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"]


def test_kernels_compile_before_during_and_after_counting() -> None:
    x = randn(2, 64)
    first = compile_softmax(64)
    with counting():
        softmax(x)
        during = compile_softmax(64)
    assert compile_softmax(64) == during == first


def test_another_thread_may_compile_while_a_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiling asks for the same patched functions, with a compiler's semantic of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled: list[Any] = []

    def work() -> None:
        try:
            compiled.append(compile_softmax(256))
        except BaseException as error:
            compiled.append(error)

    def meanwhile(self: Any, *args: Any) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    monkeypatch.setattr(_interpreter.Builder, "create_print", meanwhile)
    interpreted(printing_kernel)[(1,)](torch.arange(4.0), BLOCK=4)
    monkeypatch.undo()
    assert compiled[0] == compiled[1]
    assert "tt.reduce" in compiled[0]
    assert re.sub("256", "64", compiled[0]).count("tt.load") == compile_softmax(64).count("tt.load")


def test_numpy_warns_of_nothing_and_no_tensor_is_kept() -> None:
    x = torch.tensor([[float("inf"), 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interpreted(softmax_kernel)[(1,)](x, torch.empty_like(x), 2, 2, BLOCK=2)
    big = torch.zeros(1000)
    count(copy_kernel)[(1,)](big, big, 8, 1, 0, BLOCK=8)
    holders = [o for o in gc.get_referrers(big) if o is not sys._getframe()]
    assert not [o for o in holders if type(o).__module__.startswith("llmcourse")]


def test_kernels_run_under_tritons_own_switch_too(tmp_path: Path) -> None:
    """TRITON_INTERPRET=1 changes what @triton.jit makes; counting works on that as well."""
    file = Path(cases.__file__)
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(file.parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_triton_the_package_imports_and_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None
import llmcourse.kernels
from llmcourse.kernels import compile_report, counters
assert not counters.is_interpreting()
for use in (lambda: counters.count(None), lambda: counters.interpreted(None), counters.counting().__enter__,
            lambda: compile_report.compile_report(None)):
    try:
        use()
    except counters.MissingPackageError as error:
        assert error.what and error.why and error.fix
    else:
        raise SystemExit("no error")
"""
    root = str(Path(cases.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    assert issubclass(MissingPackageError, CourseError)


def test_notebooks_do_not_wait_for_counts() -> None:
    x = randn(64, 1024)
    a, out = randn(256, 256), torch.empty(256, 256)
    launches = {
        0.3: lambda: count(softmax_kernel)[(64,)](x, torch.empty_like(x), 1024, 1024, BLOCK=1024),
        1.5: lambda: count(matmul_kernel)[(4, 4)](a, a, out, 256, 256, 256, BM=64, BN=64, BK=32),
    }
    for seconds, launch in launches.items():
        assert least(launch, within=seconds) < seconds


# ── what is shown ────────────────────────────────────────────────────────────────────────────────


def test_lines_and_arguments_add_up_to_the_total() -> None:
    a, b, out = randn(48, 32), randn(32, 40), torch.empty(48, 40)
    c = count(matmul_kernel)[(3, 3)](a, b, out, 48, 40, 32, BM=16, BN=16, BK=16)
    for name in ("load_bytes", "store_bytes", "load_sectors", "load_ops"):
        assert (
            sum(x[name] for x in c.lines.values()) == sum(x[name] for x in c.args.values()) == c.total[name]
        )
    dot = line_of("acc = tl.dot", cases.__file__)
    assert c.lines[dot].dot_flops == c.dot_flops == 2 * 48 * 48 * 32
    assert c.lines[line_of("x = tl.load(a +", cases.__file__)].load_bytes == c.args["a"].load_bytes


def test_a_function_of_another_file_counts_on_the_line_that_calls_it() -> None:
    x, out = randn(64), torch.zeros(64)
    c = count(calling_kernel)[(1,)](x, out, BLOCK=64)
    assert torch.equal(out, 3 * x)
    assert c.lines[line_of("# from elsewhere")].load_bytes == x.nbytes
    assert c.lines[line_of("# of this file")].load_bytes == x.nbytes


@triton.jit
def leaving_elsewhere_kernel(x):
    tl.store(x, cases.load_twice(x + 9))  # leaves


def test_a_fault_in_a_function_of_another_file_names_both_lines() -> None:
    with pytest.raises(KernelFault) as fault:
        interpreted(leaving_elsewhere_kernel)[(1,)](torch.zeros(8))
    line = fault.value.line
    assert line is not None
    assert (line.file, line.line) == ("triton_cases.py", line_of("return 2 * tl.load(p)", cases.__file__))
    assert line.inlined_at == SourceLine("test_counters.py", line_of("# leaves"))


def test_memory_of_another_device_is_copied_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_interpreter._Arguments, "here", "nowhere")  # so that the CPU is another device
    memory = torch.arange(64.0)
    x, out = memory[:32], memory[32:]
    before = memory.clone()
    c = count(copy_kernel)[(2,)](x, out, 20, 1, 0, BLOCK=16)
    assert torch.equal(memory[32:52], before[:20])
    assert torch.equal(memory[52:], before[52:])
    assert c.load_bytes == 80
    with pytest.raises(KernelFault):
        interpreted(add_one_kernel)[(2,)](x, out, 20, BLOCK=32)
    assert torch.equal(memory[32:52], before[:20])  # a failed launch leaves the device as it was


@triton.jit
def load_here(p):
    return tl.load(p)  # of this file


@triton.jit
def calling_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, load_here(x + i) + cases.load_twice(x + i))  # from elsewhere


def test_annotated_source_shows_each_line_with_its_counts() -> None:
    x, out = randn(64), torch.zeros(64)
    annotated = count(calling_kernel)[(1,)](x, out, BLOCK=64).annotated()
    text = repr(annotated)
    loads = next(line for line in text.splitlines() if "# from elsewhere" in line)
    assert re.search(r"\b256\b.*\b256\b.*\b16\b", loads)  # loaded, stored, sectors
    assert "return tl.load(p)" in text
    assert annotated.hottest() == line_of("# from elsewhere")
    page = annotated._repr_html_()
    assert "background:rgba" in page
    assert "loaded bytes" in page
    with pytest.raises(CourseError, match="no column called 'cycles'"):
        count(calling_kernel)[(1,)](x, out, BLOCK=64).annotated(("cycles",))


def test_counts_print_as_a_table() -> None:
    x, out = randn(3, 64), torch.empty(3, 64)
    c = count(softmax_kernel)[(3,)](x, out, 64, 64, BLOCK=64)
    assert repr(c).splitlines()[-1] == "softmax_kernel: 3 programs"
    assert "<table>" in c._repr_html_()
    assert Counters({"load_bytes": 3}).load_bytes == 3
    assert "load_bytes=3" in repr(Counters({"load_bytes": 3}))


# ── parts on their own ───────────────────────────────────────────────────────────────────────────


def test_sectors_equal_a_count_by_sets_for_random_addresses() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        size = int(generator.choice([1, 2, 4, 8]))
        n = int(generator.integers(1, 3000))
        storage = np.zeros(n * size, np.uint8)
        memory = Memory("k", counting=True, where=lambda: SourceLine("f", 1))
        start = memory.add(Argument("x", storage, 0, 0, n * size, size, (n,), 0))
        touched: set[int] = set()
        total = 0
        for _ in range(3):
            index = generator.integers(0, n, int(generator.integers(1, 400)))
            mask = generator.random(index.size) < 0.7
            memory.load((start + index * size).astype(np.uint64), mask, None, np.dtype(f"u{size}"))
            total += len({i * size // 32 for i in index[mask].tolist()})
            touched |= set(index[mask].tolist())
        tally = memory.tallies[(1, "x", "load")] if touched else None
        assert (tally.sectors if tally else 0) == total
        if touched:
            wanted = (len(touched) * size, len({i * size // 32 for i in touched}))
            assert memory.unique()["load"]["x"] == memory.unique()["load"][""] == wanted


def test_rewritten_code_keeps_its_line_numbers() -> None:
    lines = ["def f(a, b):\n", "    x = a\n", "    x += b\n", "    return x if a < b < 3 else not b\n"]
    syntax = frozenset({"Assign", "AugAssign", "Return", "IfExp", "Compare", "UnaryOp", "Name", "Constant"})
    code, names = _rewrite.rewrite(lines, 41, "file.py", frozenset(), syntax)
    assert {line for _, _, line in code.co_lines() if line} >= {42, 43, 44}
    assert code.co_filename == "file.py"
    assert names >= {"a", "b", "x"}


def test_every_mathematical_function_of_the_library_agrees_with_scipy() -> None:
    x = np.linspace(0.05, 0.95, 37)
    one = {
        "__nv_tgamma": special.gamma,
        "__nv_lgamma": special.gammaln,
        "__nv_erfcx": special.erfcx,
        "__nv_erfinv": special.erfinv,
        "__nv_normcdf": special.ndtr,
        "__nv_normcdfinv": special.ndtri,
        "__nv_cyl_bessel_i0": special.i0,
        "__nv_j0": special.j0,
        "__nv_y1": special.y1,
        "__nv_exp10": special.exp10,
        "__nv_cbrt": special.cbrt,
        "__nv_sinpi": lambda v: np.sin(np.pi * v),
        "__nv_acosh": lambda v: np.arccosh(v),
        "__nv_dsqrt_rn": np.sqrt,
        "__nv_rsqrt": lambda v: v**-0.5,
    }
    for symbol, expected in one.items():
        function = libdevice(symbol)
        assert function is not None, symbol
        at = x + 1 if symbol == "__nv_acosh" else x
        assert np.allclose(function(at), expected(at), rtol=1e-10), symbol
        assert libdevice(symbol + "f") is not None or symbol.endswith("_rn"), symbol
    gamma = libdevice("__nv_tgamma")
    assert gamma is not None
    assert np.allclose(gamma(np.array([-0.5, -1.5, 4.0])), special.gamma([-0.5, -1.5, 4.0]))
    integers = np.array([0, 1, 12, -1, 2**31 - 1], np.int32)
    for symbol, wanted in (
        ("__nv_popc", [0, 1, 2, 32, 31]),
        ("__nv_clz", [32, 31, 28, 0, 1]),
        ("__nv_ffs", [0, 1, 3, 1, 1]),
        ("__nv_brev", [0, -(2**31), 0b0011 << 28, -1, -2]),
    ):
        function = libdevice(symbol)
        assert function is not None
        assert function(integers).tolist() == wanted, symbol
    assert libdevice("__nv_fadd_rd") is None


def test_counters_know_no_other_names() -> None:
    assert set(counters.COUNTERS) == set(Counters())
    with pytest.raises(KeyError):
        Counters({"loads": 1})
