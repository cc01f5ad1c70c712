"""tensor_cores.cu on a GPU: the same values as on the PTX machine, at sizes of many blocks."""

from __future__ import annotations

import pytest
import torch

from llmcourse.kernels.tensor_cores import RUNGS, multiply


@pytest.mark.parametrize("rung", RUNGS)
def test_products_are_those_of_float64_and_of_the_machine(rung):
    a, b = (torch.randn(s, device="cuda").half() for s in ((256, 448), (448, 192)))
    c, result = multiply(a, b, rung, counters=True)
    on_machine, _ = multiply(a.cpu(), b.cpu(), rung)
    exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # Tensor cores add in their own format and cut bits off: held to 2⁻²⁰ of the sum of magnitudes.
    assert ((c - exact).abs() <= scale * 2**-20).all()
    torch.testing.assert_close(c.cpu(), on_machine, atol=float(scale.max()) * 2**-20, rtol=0)
    assert result.where == "gpu"
    assert result.counters.flops == 2 * 256 * 448 * 192


def test_wmma_multiplies_many_blocks_right_with_and_without_padding():
    a, b = (torch.randn(1024, 1024, device="cuda").half() for _ in range(2))
    exact = a.double() @ b.double()
    for defines in ({}, {"PAD": 0}):
        c, _ = multiply(a, b, defines=defines)
        assert float((c - exact).abs().max() / exact.abs().max()) < 1e-5
