"""Checks can ask what a learner's Triton kernels move, without a GPU and in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import randn, softmax_kernel

from llmcourse.grading.cost import counter
from llmcourse.grading.perform import perform
from llmcourse.vgpu.faults import KernelFault


@triton.jit
def row_max_kernel(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + c, mask=c < columns, other=-float("inf"))
    tl.store(out + row, tl.max(v, axis=0))


@triton.jit
def normalise_kernel(x, largest, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + c, mask=c < columns, other=-float("inf"))
    e = tl.exp(v - tl.load(largest + row))
    tl.store(out + row * columns + c, e / tl.sum(e, axis=0), mask=c < columns)


def fused(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    softmax_kernel[(len(x),)](x, out, x.shape[1], x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


def in_two_passes(x: torch.Tensor) -> torch.Tensor:
    out, largest = torch.empty_like(x), x.new_empty(len(x))
    block = triton.next_power_of_2(x.shape[1])
    row_max_kernel[(len(x),)](x, largest, x.shape[1], BLOCK=block)
    normalise_kernel[(len(x),)](x, largest, out, x.shape[1], BLOCK=block)
    return out


def test_a_second_pass_over_the_input_shows_in_the_bytes() -> None:
    x = randn(6, 100)
    with counter("kernel_bytes")(arguments=(x,)) as once:
        fused(x)
    with counter("kernel_bytes")() as twice:
        in_two_passes(x)
    assert (once.values["kernel_load_bytes"], once.values["kernel_store_bytes"]) == (x.nbytes, x.nbytes)
    assert twice.values["kernel_load_bytes"] == 2 * x.nbytes + 24
    assert twice.values["kernel_store_bytes"] == x.nbytes + 24
    assert twice.values["kernel_atomic_bytes"] == 0


def test_a_checked_call_brings_the_cost_of_its_kernels() -> None:
    x = randn(3, 50)
    call = perform(fused, [x], watch=["kernels_here", "kernel_bytes", "kernel_dots"])
    assert call.error is None
    assert call.costs["kernel_load_bytes"] == call.costs["kernel_store_bytes"] == x.nbytes
    assert call.costs["kernel_dot_flops"] == 0
    assert torch.allclose(torch.as_tensor(call.value), x.softmax(1), atol=1e-6)


@triton.jit
def leaving_kernel(x, out, columns, BLOCK: tl.constexpr):
    c = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    tl.store(out + c, tl.load(x + c))


def without_mask(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    leaving_kernel[(len(x),)](x, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


def test_a_kernel_that_leaves_its_tensor_fails_the_call_with_the_fault() -> None:
    call = perform(without_mask, [randn(3, 50)], watch=["kernels_here"])
    assert call.error is not None
    assert call.error.kind == KernelFault.__name__
    assert "x[150]" in call.error.message


def test_a_process_that_imported_nothing_else_finds_the_counter() -> None:
    code = """
import sys
from llmcourse.grading.cost import counter
counter("kernel_bytes")
assert "triton" not in sys.modules
"""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_block_that_raises_has_no_values() -> None:
    with pytest.raises(KernelFault), counter("kernel_bytes")() as count:
        without_mask(randn(2, 50))
    assert count.values == {}
