"""tensor_cores.cu on the PTX machine: values, FLOPs by who did them, traffic and bank conflicts."""

from __future__ import annotations

import pytest
import torch
from against_float64 import refused

from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.kernels.checks import DtypeError, StrideError

pytest.importorskip("cuda.bindings.nvrtc")

from llmcourse.kernels.tensor_cores import RUNGS, module, multiply

SHAPES = {
    "naive": [(1, 1, 1), (17, 33, 5), (48, 16, 40)],
    "tiled": [(16, 16, 16), (32, 80, 48)],
    "wmma_global": [(16, 16, 16), (32, 80, 48)],
    "wmma_shared": [(64, 64, 64), (128, 64, 192), (64, 192, 128)],
}


def pair(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(m + n + k)
    return torch.randn(m, k, generator=g).half(), torch.randn(k, n, generator=g).half()


@pytest.mark.parametrize(("rung", "shape"), [(r, s) for r, shapes in SHAPES.items() for s in shapes])
def test_products_are_those_of_float64(rung, shape):
    a, b = pair(*shape)
    c, _ = multiply(a, b, rung)
    exact = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()  # what rounding in float32 is relative to
    assert ((c - exact).abs() <= scale * shape[2] * 2**-24 + 1e-30).all()


@pytest.mark.parametrize("rung", RUNGS)
def test_every_flop_is_counted_by_who_did_it(rung):
    m, n, k = SHAPES[rung][-1]
    _, result = multiply(*pair(m, n, k), rung)
    flops = 2 * m * n * k
    on_tensor_cores = rung.startswith("wmma")
    assert result.counters.flops_tensor == (flops if on_tensor_cores else 0)
    assert result.counters.flops_fp32 == (0 if on_tensor_cores else flops)
    assert result.counters.flops == flops


@pytest.mark.parametrize("rung", RUNGS)
def test_threads_ask_for_the_bytes_that_the_docstring_says(rung):
    m, n, k = 128, 64, 192
    _, result = multiply(*pair(m, n, k), rung)
    assert result.counters.global_load_bytes == RUNGS[rung].asked_bytes(m, n, k)
    assert result.counters.global_load_unique_bytes == 2 * (m * k + k * n)
    assert result.counters.global_store_bytes == result.counters.global_store_unique_bytes == 4 * m * n


def test_fragments_from_global_memory_use_half_of_each_sector_they_fetch():
    _, direct = multiply(*pair(64, 64, 64), "wmma_global")
    _, through_shared = multiply(*pair(64, 64, 64), "wmma_shared")
    assert direct.counters.global_load_sectors * 32 == 2 * direct.counters.global_load_bytes
    assert through_shared.counters.global_load_sectors * 32 == through_shared.counters.global_load_bytes


def test_padding_takes_all_bank_conflicts_away():
    """Without it eight rows of 128 bytes, which a fragment reads at once, begin in the same bank."""
    (padded, with_pad), (plain, without) = (
        multiply(*pair(64, 64, 128), "wmma_shared", defines={"PAD": pad}) for pad in (8, 0)
    )
    assert with_pad.counters.bank_conflicts == 0
    assert without.counters.shared_load_bank_conflicts == 7 * with_pad.counters.shared_load_wavefronts
    assert padded.equal(plain)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_no_rung_spills_registers(arch):
    for rung in RUNGS:
        resources = module()[rung].resources(arch)
        assert resources.spill_stores == resources.spill_loads == 0


def test_what_it_cannot_multiply_is_refused_in_three_parts():
    a = torch.zeros(64, 64).half()
    refused(lambda: multiply(a, a, "fast"), UnknownNameError, "wmma_shared")
    refused(lambda: multiply(a.float(), a), DtypeError, "float32")
    refused(lambda: multiply(a[:, :32], a), ShapeError, "one length")
    refused(lambda: multiply(a, a[:, :40].contiguous()), ShapeError, "multiples of 64")
    refused(lambda: multiply(a.T, a, "tiled"), StrideError, "strides (1, 64)")
    refused(lambda: multiply(torch.zeros(4097).half()[1:].view(64, 64), a), StrideError, "2 bytes after")
    refused(lambda: multiply(a[:0], a), ShapeError, "nothing to compute")
