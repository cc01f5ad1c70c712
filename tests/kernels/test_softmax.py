"""Softmax: every rung in Triton's interpreter against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from against_float64 import DTYPES, check, error, refused

from llmcourse.errors import DeviceError, ShapeError, UnknownNameError
from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.counters import counting
from llmcourse.kernels.launch import Plan, multiprocessors
from llmcourse.kernels.softmax import (
    ROW_LIMIT,
    backward,
    minimum_bytes,
    naive_bytes,
    softmax,
    softmax_naive,
    softmax_plan,
)

SHAPES = [(1, 1), (5, 37), (3, 257), (2, 3, 129), (0, 8), (17, 64)]


def interpreted(x, **options):
    return softmax(x, backend="interpret", **options)


def exact(x):
    return torch.softmax(x, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(shape, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    check(interpreted, exact, [x])
    check(softmax, exact, [x])
    check(lambda x: softmax_naive(x, backend="interpret"), exact, [x], backward=False)


@pytest.mark.parametrize(
    "plan",
    [
        Plan("online", block=64),
        Plan("online", block=1024),
        Plan("row", rows=4, block=512),
        Plan("split", block=512),
    ],
    ids=lambda plan: "-".join(map(str, plan)),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_plan_gives_the_same(plan, dtype):
    x = (torch.randn(7, 300) * 3).to(dtype)
    check(lambda x: interpreted(x, plan=plan), exact, [x])


def test_rows_wider_than_registers_hold_are_looped_over():
    x = torch.randn(2, 70_001) * 3
    assert softmax_plan(70_001, most_parts=1).kernel == softmax_plan(60_000).kernel == "online"
    assert softmax_plan(70_001).kernel == "split"
    assert softmax_plan(1 << 20, most_parts=132).kernel == "split"
    assert softmax_plan(1 << 21, most_parts=132).kernel == "online"  # 256 programs do not all run at once
    check(interpreted, exact, [x])


def test_looped_backward_agrees_with_the_row_kernel():
    y, dy = torch.softmax(torch.randn(3, 1000), -1), torch.randn(3, 1000)
    a = backward(y, dy, interpret=True)
    b = backward(y, dy, plan=Plan("online", block=128), interpret=True)
    assert error(b, a) < 1e-6


def test_rows_may_lie_apart():
    whole = torch.randn(6, 100)
    for view in (whole[:, 10:75], whole[::2], whole[::2, :64], whole[0].expand(4, 100)):
        check(interpreted, exact, [view])
    assert torch.equal(whole[:, 75:], whole[:, 75:].clone())


def test_rows_of_minus_infinity_and_large_numbers_are_as_in_torch():
    x = torch.randn(4, 90)
    x[0] = -float("inf")
    x[1, :80] = -float("inf")
    x[2] *= 1e4
    x[3, 5] = float("nan")
    for options in ({}, {"plan": Plan("online", block=16)}, {"plan": Plan("split", block=128)}):
        out = interpreted(x, **options)
        assert out[0].isnan().all()
        assert error(out[1:], torch.softmax(x[1:].double(), -1)) < 1e-6


def test_a_gradient_of_one_number_expanded_is_read_right():
    x = torch.randn(3, 20, requires_grad=True)
    (g,) = torch.autograd.grad(interpreted(x).sum(), x)
    assert float(g.abs().max()) < 1e-6


def test_bytes_are_those_that_the_file_says():
    x = torch.randn(24, 768).bfloat16()
    with counting() as fused:
        softmax(x)
    with counting() as naive:
        softmax_naive(x)
    assert len(fused) == 1
    assert fused.bytes == fused.unique_bytes == minimum_bytes(24, 768, 2)
    assert len(naive) == 5
    assert naive.bytes == naive_bytes(24, 768, 2)


def test_online_reads_twice_and_needs_each_byte_once():
    x = torch.randn(5, 512)
    with counting() as c:
        softmax(x, plan=Plan("online", block=128))
    assert c.bytes == 3 * x.numel() * 4
    assert c.unique_bytes == 2 * x.numel() * 4


def test_plans_hold_a_row_up_to_the_limit():
    for columns in (1, 31, 1000, 1024, 5000, ROW_LIMIT):
        plan = softmax_plan(columns)
        assert plan.kernel == "row"
        assert plan.block >= columns
        assert plan.rows * plan.block <= 2 * ROW_LIMIT
        assert plan.warps in (1, 2, 4, 8, 16, 32)


def test_what_the_kernel_cannot_do_is_refused():
    x = torch.randn(4, 8)
    refused(lambda: softmax(x.double()), DtypeError, "float64", "x.float()")
    refused(lambda: softmax(x.long()), DtypeError, "int64")
    refused(lambda: softmax([1.0]), DtypeError, "list")
    refused(lambda: softmax(x.T), StrideError, "(1, 8)", "contiguous")
    refused(lambda: softmax(torch.randn(4, 6, 8).transpose(0, 1)), StrideError, "merge")
    refused(lambda: softmax(torch.tensor(1.0)), ShapeError, "()")
    refused(lambda: softmax(torch.randn(3, 0)), ShapeError, "(3, 0)")
    refused(lambda: softmax(x, backend="triton"), DeviceError, "cpu", "interpret")
    refused(lambda: softmax(x, backend="cuda"), UnknownNameError, "triton")
    refused(lambda: interpreted(x, plan=Plan("row", block=4)), ShapeError, "block=8")
    refused(lambda: interpreted(x, plan=Plan("split", block=4)), ShapeError, "online")
    refused(lambda: softmax_naive(torch.randn(1, 65537), backend="interpret"), ShapeError, "softmax")


def test_the_interpreter_counts_as_a_small_device():
    assert multiprocessors(torch.device("cpu")) > 1
