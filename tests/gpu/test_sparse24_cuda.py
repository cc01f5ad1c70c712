"""2:4 products on a GPU: right at odd and at real sizes, in CUDA graphs, and as PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from llmcourse.kernels.sparse24 import SparsePlan, mask24, pack24, sparse24_linear

pytestmark = pytest.mark.gpu


def pair(n, k, m, dtype=torch.float16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    w = torch.randn(n, k, device="cuda", generator=generator).to(dtype)
    w = w * mask24(w)
    return w, pack24(w), torch.randn(m, k, device="cuda", generator=generator).to(dtype)


def error(y, x, w):
    exact = x.double() @ w.double().T
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 47), (130, 257), (576, 1536), (4096, 4096)])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 16, 17, 64])
def test_products_are_right_at_any_size(n, k, m):
    w, packed, x = pair(n, k, m)
    assert error(sparse24_linear(x, packed), x, w) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_formats(dtype):
    w, packed, x = pair(200, 300, 5, dtype)
    assert error(sparse24_linear(x, packed), x, w) < (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize(
    "plan", [SparsePlan("select", 8, 512, 2, 4, 3), SparsePlan("expand", 64, 128, 16, 4, 3, 7)]
)
def test_a_captured_product_gives_the_same_at_every_replay(plan):
    w, packed, x = pair(1024, 2048, 4)
    sparse24_linear(x, packed, plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse24_linear(x, packed, plan=plan)
    graph.replay()
    torch.cuda.synchronize()
    first = y.clone()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, first)
    assert error(y, x, w) < 2e-3


def test_as_pytorchs_own_semi_structured_product():
    from torch.sparse import to_sparse_semi_structured

    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("sparse tensor cores begin with Ampere")
    w, packed, x = pair(256, 512, 64)
    theirs = torch.nn.functional.linear(x, to_sparse_semi_structured(w))
    assert torch.allclose(sparse24_linear(x, packed), theirs, rtol=1e-2, atol=1e-1)


def test_weights_are_packed_on_the_gpu_as_on_the_cpu():
    w, packed, _ = pair(64, 100, 1)
    here = pack24(w.cpu())
    assert torch.equal(packed.values.cpu(), here.values)
    assert torch.equal(packed.indices.cpu(), here.indices)
