"""softmax.cu on the PTX machine: values, races, and what it moves, beside the Triton kernel's."""

from __future__ import annotations

import pytest
import torch
from against_float64 import DTYPES, check, refused

from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.softmax import minimum_bytes

pytest.importorskip("cuda.bindings.nvrtc")

from llmcourse.kernels.softmax_cuda import HELD, TYPES, module, softmax_cuda, vector_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 3, 129), (2, 1024), (0, 8), (1, 40_000)])
def test_values_are_those_of_float64(shape, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    check(softmax_cuda, lambda x: torch.softmax(x, -1), [x], backward=False)


def test_rows_apart_and_rows_of_minus_infinity():
    whole = torch.randn(4, 100)
    whole[1, :60] = -float("inf")
    for view in (whole[:, 3:], whole[::2, :64]):
        check(softmax_cuda, lambda x: torch.softmax(x, -1), [view], backward=False)
    whole[1] = -float("inf")
    assert softmax_cuda(whole)[1].isnan().all()


def test_a_row_moves_once_each_way_in_whole_sectors():
    x, rows, columns = torch.randn(4, 512).bfloat16(), 4, 512
    y = torch.empty_like(x)
    result = module()[f"softmax_rows<__nv_bfloat16, 8, {HELD}>"][rows, 32](x, y, columns, columns, columns)
    c = result.counters
    assert c is not None
    assert c.global_load_bytes + c.global_store_bytes == minimum_bytes(rows, columns, 2)
    assert (c.global_load_sectors + c.global_store_sectors) * 32 == minimum_bytes(rows, columns, 2)
    assert c.shared_load_bank_conflicts == 0


def test_vectors_are_wide_where_rows_are_aligned():
    x = torch.empty(4, 64, dtype=torch.bfloat16)
    assert vector_of(x, x) == 8
    assert vector_of(x[:, 1:], x[:, 1:]) == 1
    assert vector_of(x[:, :60], x) == 1
    assert vector_of(torch.empty(4, 60), torch.empty(4, 60)) == 4


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_no_kernel_spills(arch):
    for name in module():
        resources = module()[name].resources(arch)
        assert resources.spill_stores == resources.spill_loads == 0, name
        assert resources.registers <= 64, name  # 1024 threads a block must fit


def test_every_format_has_its_kernels():
    assert len(list(module())) == 4 * len(TYPES)


def test_what_it_cannot_do_is_refused():
    refused(lambda: softmax_cuda(torch.randn(2, 3).double()), DtypeError, "float64")
    refused(lambda: softmax_cuda(torch.randn(2, 3).T), StrideError, "contiguous")
