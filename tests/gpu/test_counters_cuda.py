"""The interpreter beside a GPU: the same results, the same counts on either, and no trace left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import triton_cases as cases
from triton_cases import SMALL, awkward, every, randn

from llmcourse.kernels.counters import count, counting, interpreted

pytestmark = pytest.mark.gpu


def test_tensors_on_a_gpu_count_as_they_do_on_a_cpu_and_get_the_results() -> None:
    x = randn(33, 500)
    found = []
    for device in ("cpu", "cuda"):
        here = x.to(device)
        out = torch.empty_like(here)
        c = count(cases.softmax_kernel)[(33,)](here, out, 500, 500, BLOCK=512)
        assert torch.allclose(out.cpu(), x.softmax(1), atol=1e-6)
        found.append(cases.counters(c))
    assert found[0] == found[1]


def test_views_of_one_storage_on_a_gpu_stay_one_memory() -> None:
    memory = torch.arange(64.0, device="cuda")
    before = memory.clone()
    interpreted(cases.copy_kernel)[(1,)](memory[:32], memory[32:], 20, 1, 0, BLOCK=32)
    assert torch.equal(memory[32:52], before[:20])
    assert torch.equal(memory[52:], before[52:])


def test_kernels_run_on_the_gpu_again_after_counting() -> None:
    x = randn(8, 256).cuda()
    compiled, counted = torch.empty_like(x), torch.empty_like(x)
    cases.softmax_kernel[(8,)](x, compiled, 256, 256, BLOCK=256)
    with counting() as c:
        assert cases.softmax_kernel[(8,)](x, counted, 256, 256, BLOCK=256) is None
    again = torch.empty_like(x)
    assert cases.softmax_kernel[(8,)](x, again, 256, 256, BLOCK=256) is not None
    assert torch.equal(compiled, again)
    assert torch.allclose(compiled, counted, atol=1e-6)
    assert len(c) == 1


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        cases.softmax_kernel[(len(x),)](x, out, x.shape[1], x.shape[1], BLOCK=64)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return Softmax.forward(ctx, grads[0])


def test_launches_of_a_backward_pass_on_its_own_thread_are_counted() -> None:
    x = randn(2, 64).cuda().requires_grad_()
    with counting() as c:
        Softmax.apply(x).backward(torch.ones(2, 64, device="cuda"))
    assert len(c) == 2


def both(
    kernel: Any, *args: Any, grid: tuple[int, ...] = (1,), **meta: Any
) -> list[tuple[torch.Tensor, ...]]:
    """The tensors after a launch on the GPU, and after the same launch in the interpreter."""
    out = []
    for launch in (kernel, interpreted(kernel)):
        given = [a.clone().cuda() if isinstance(a, torch.Tensor) else a for a in args]
        launch[grid](*given, **meta)
        out.append(tuple(a.cpu() for a in given if isinstance(a, torch.Tensor)))
    return out


@pytest.mark.parametrize("to", SMALL, ids=str)
def test_conversions_are_those_of_the_hardware(to: torch.dtype) -> None:
    """But for what float8e5 cannot hold (infinity in the interpreter and in torch, 57344 on the GPU), and for
    its own infinities and NaN, which Triton's code for the GPU widens as if they were numbers."""
    sources = [awkward(), *(every(d) for d in SMALL if 2 in (d.itemsize, to.itemsize) and d != to)]
    for x in sources:
        if to == torch.float8_e5m2:
            x = torch.where(x.float().abs() >= 61440, torch.zeros_like(x), x)
        if x.dtype == torch.float8_e5m2:
            x = x[x.float().isfinite()]
        n = x.numel()
        grid = (triton.cdiv(n, 1024),)
        (_, gpu), (_, here) = both(cases.cast_kernel, x, torch.zeros(n, dtype=to), n, grid=grid, BLOCK=1024)
        a, b = gpu.float(), here.float()
        assert torch.equal(a.isnan(), b.isnan()), x.dtype
        assert torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)), x.dtype


def test_integers_are_those_of_the_hardware() -> None:
    (gpu,), (here,) = both(
        cases.integer_kernel, torch.zeros(12, dtype=torch.int32), -7, 3, 0xFEDCBA9876543210 - 2**64
    )
    defined = [i for i in range(12) if i != 8]  # a compiler that sees NaN may make anything of int(NaN)
    assert torch.equal(gpu[defined], here[defined])


def test_sixteen_bit_arithmetic_is_that_of_the_hardware() -> None:
    n = 512
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros(10, n, dtype=dtype)
        (*_, gpu), (*_, here) = both(
            cases.arithmetic_kernel, randn(n).to(dtype), randn(n, seed=1).to(dtype), out, B=n
        )
        for row in range(10):
            if row == 3:  # a GPU divides by multiplying with a reciprocal: the last bit may differ
                assert torch.allclose(gpu[row].float(), here[row].float(), rtol=2**-7)
            else:
                assert torch.equal(gpu[row], here[row]) or row == 9, (dtype, row)
        assert torch.allclose(gpu[9].float(), here[9].float(), rtol=2**-7)


def test_reductions_scans_and_library_functions_are_those_of_the_hardware() -> None:
    n = 64
    (_, gpu, index), (_, here, expected) = both(
        cases.reductions_kernel, randn(n), torch.zeros(8 + 6 * n), torch.zeros(2, dtype=torch.int32), B=n
    )
    assert torch.allclose(gpu, here, rtol=1e-4, atol=1e-5)
    assert torch.equal(index, expected)
    (_, gpu), (_, here) = both(cases.library_kernel, randn(32), torch.zeros(7, 32), B=32)
    assert torch.allclose(gpu, here, rtol=1e-5, atol=1e-6)
    (gpu,), (here,) = both(cases.random_kernel, torch.zeros(4096), B=4096)
    assert torch.equal(gpu, here)
    (_, gpu), (_, here) = both(
        cases.nan_kernel, torch.tensor([1.0, float("nan"), -3.0, 2.0]), torch.zeros(5), B=4
    )
    told = slice(0, 4)  # which bound NaN is clamped to is not specified: the lower here, the upper on an H100
    assert torch.equal(gpu[told].nan_to_num(nan=9e9), here[told].nan_to_num(nan=9e9))
    rounded = both(cases.toward_zero_kernel, randn(64), torch.zeros(64, dtype=torch.bfloat16), BLOCK=64)
    assert torch.equal(rounded[0][1], rounded[1][1])
