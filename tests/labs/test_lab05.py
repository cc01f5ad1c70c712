"""Lab 05: kernels judged by what they move, whoever wrote them and however the tensors lie."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from llmcourse.grading.cost import counter
from llmcourse.grading.perform import perform
from llmcourse.grading.plain import pack, tensor_laid_out, tensor_layout, unpack
from llmcourse.grading.session import Cell, RemoteSubject, Session
from llmcourse.grading.trial import LocalSubject
from llmcourse.grading.verdict import judge
from llmcourse.kernels.add_rms_norm import add_rms_norm
from llmcourse.kernels.rms_norm import rms_norm
from llmcourse.kernels.softmax import softmax, softmax_naive
from llmcourse.kernels.swiglu import swiglu
from llmcourse.labs import find_lab

LAB = find_lab("05")


def verdict(name, fn, seed=0):
    return judge(LAB.exercise(name), LocalSubject(fn, name), seed)


# ── judged by somebody else's kernels ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fn", [swiglu, softmax], ids=lambda fn: fn.__name__)
def test_the_package_s_own_kernels_pass(fn):
    for seed in range(3):
        found = verdict(fn.__name__, fn, seed)
        assert found.ok, found


@pytest.mark.parametrize("fn", [rms_norm, add_rms_norm], ids=lambda fn: fn.__name__)
def test_the_package_s_norms_fail_for_the_row_statistics_that_they_keep_for_backward(fn):
    def in_the_lab_s_order(*args):
        found = fn(*args)
        return found[::-1] if fn is add_rms_norm else found

    for seed in range(3):
        found = verdict(fn.__name__, in_the_lab_s_order, seed)
        assert [r.check.name for r in found.results if not r.ok] == ["traffic"]
        assert "bytes are stored, expected" in found.results[-1].text


def test_the_package_s_unfused_softmax_fails_for_its_bytes_alone():
    found = verdict("softmax", softmax_naive)
    assert [r.check.name for r in found.results if not r.ok] == ["traffic"]


@pytest.mark.parametrize("name", [e.name for e in LAB.exercises])
def test_a_verdict_takes_less_than_two_seconds(name):
    exercise = LAB.exercise(name)
    verdict(name, exercise.alternatives[0].fn)
    quickest = min(verdict(name, exercise.mistakes[-2].fn, seed).seconds for seed in range(3))
    assert quickest < 2.0


# ── what a learner is told ───────────────────────────────────────────────────────────────────────────


@triton.jit
def two_rows_kernel(x, y, x_stride, rows, columns, BLOCK: tl.constexpr):
    r = tl.program_id(0) * 2 + tl.arange(0, 2)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    v = tl.load(x + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=1)[:, None])
    tl.store(y + r * columns + c, e / tl.sum(e, axis=1)[:, None], mask=inside)


def test_a_mistake_is_named_in_a_kernel_of_another_shape():
    def softmax(x):
        y = torch.empty(x.shape, dtype=x.dtype)
        rows, columns = x.shape
        block = triton.next_power_of_2(columns)
        two_rows_kernel[(triton.cdiv(rows, 2),)](x, y, x.stride(0), rows, columns, BLOCK=block)
        return y

    found = verdict("softmax", softmax)
    assert found.mistake is not None
    assert (found.mistake.name, found.sure) == ("zeros_outside", True)


CELL = """
import torch, triton, triton.language as tl

@triton.jit
def kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    {body}

def swiglu(gate, up):
    out = torch.empty_like(gate)
    kernel[(triton.cdiv(gate.numel(), 256),)](gate, up, out, gate.numel(), BLOCK=256)
    return out
"""
RIGHT = """g = tl.load(gate + i, mask=i < n).to(tl.float32)
    tl.store(out + i, g * tl.sigmoid(g) * tl.load(up + i, mask=i < n), mask=i < n)"""


@pytest.fixture(scope="module")
def in_another_process():
    """The verdict on swiglu with that body, defined in a cell of a process of its own."""

    def judged(body):
        with Session([Cell("mine", CELL.format(body=body))], sandbox=False) as session:
            return judge(LAB.exercise("swiglu"), RemoteSubject(session, "swiglu"), 0)

    return judged


def test_a_kernel_of_a_notebook_cell_passes_in_a_process_of_its_own(in_another_process):
    found = in_another_process(RIGHT)
    assert found.ok, found


def test_an_access_outside_is_told_with_the_cell_s_line(in_another_process):
    found = in_another_process(RIGHT.replace("gate + i, mask=i < n", "gate + i"))
    first = found.first_failure
    assert first is not None
    assert first.check.name == "tail"
    assert "line 6: g = tl.load(gate + i).to(tl.float32)\nload of gate[" in first.text
    assert found.mistake is not None
    assert found.mistake.name == "unmasked"


def test_a_kernel_that_is_still_the_stub_is_open_and_not_failed(in_another_process):
    found = in_another_process('raise NotImplementedError("not implemented yet")')
    assert found.state == "open"
    assert str(found) == "○ swiglu is not implemented yet."


def test_what_triton_does_not_compile_is_told_with_the_kernel_s_line(in_another_process):
    found = in_another_process("tl.store(out + i, tl.no_such_function(i), mask=i < n)")
    first = found.first_failure
    assert first is not None
    assert "line 6: " in first.text
    assert "no_such_function" in first.text


# ── tensors as they lie, and memory that nobody wrote ────────────────────────────────────────────────


@pytest.mark.parametrize("order", ["C", "T", "rows"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (1, 1), (7,), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_s_layout_survives_the_way_to_another_process(order, shape, dtype):
    numbers = (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
    laid = tensor_laid_out(numbers, order)
    back = unpack(pack(laid))
    assert torch.equal(laid, numbers)
    assert torch.equal(back, numbers)
    assert back.dtype == dtype
    if numbers.numel() > 1:  # else every layout is C
        assert back.stride() == laid.stride()
        assert laid.is_contiguous() or tensor_layout(laid) == order


def test_a_function_gets_its_tensors_as_they_lie_with_nan_between_rows():
    x = tensor_laid_out(torch.ones(3, 4), "rows")
    call = perform(lambda t: (t.stride(), torch.as_strided(t, (1,), (1,), 4)), [x])
    assert call.error is None
    strides, gap = call.value
    assert strides == x.stride() == (7, 1)
    assert torch.isnan(gap).all()


def test_memory_that_was_not_written_is_nan_during_a_check_and_not_after():
    before = torch.are_deterministic_algorithms_enabled()
    call = perform(lambda x: torch.empty_like(x), [torch.ones(5)], watch=["kernels_here"])
    assert torch.isnan(call.value).all()
    with pytest.raises(ZeroDivisionError), counter("kernels_here")():
        raise ZeroDivisionError
    assert torch.are_deterministic_algorithms_enabled() == before
