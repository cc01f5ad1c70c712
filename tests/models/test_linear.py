"""Linear layers give F.linear's result whatever kernel computes them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from llmcourse.models.linear import Linear, linear, onednn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 33), (1, 7, 33), (5, 1, 33), (2, 3, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_the_float64_product_rounded(dtype, shape, bias):
    torch.manual_seed(1)
    layer = Linear(33, 17, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(shape, dtype=dtype)
    wide = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for packed in (True, False):
        layer.packed = packed
        torch.testing.assert_close(layer(x).double(), wide, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        linear(x, layer.weight, layer.bias).double(), wide, atol=tolerance, rtol=tolerance
    )


def test_a_packed_weight_follows_its_weight():
    layer = Linear(8, 4, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 8, dtype=torch.bfloat16)
    before = layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before, atol=1e-2, rtol=1e-2)
    layer.load_state_dict({"weight": torch.zeros(4, 8)})
    assert layer(x).abs().max() == 0
    assert deepcopy(layer)(x).abs().max() == 0


def test_a_weight_made_in_inference_mode_is_never_stale():
    with torch.inference_mode():
        layer = Linear(8, 4, bias=False, dtype=torch.bfloat16)
        x = torch.randn(1, 8, dtype=torch.bfloat16)
        before = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_sees_an_ordinary_product(dtype):
    """The operations that are used here have no lowering for weights that are not constants."""
    layer = Linear(8, 4, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, 8, dtype=dtype)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-2, rtol=1e-2)
    assert not [name for name in seen if "mkldnn" in name]


def test_gradients_flow_as_through_nn_linear():
    layer = Linear(5, 3)
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).square().sum().backward()
    peer = torch.nn.Linear(5, 3)
    peer.load_state_dict(layer.state_dict())
    y = x.detach().requires_grad_()
    peer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.weight.grad, peer.weight.grad)


def test_without_onednn_everything_still_works(monkeypatch):
    from llmcourse.models import linear as module

    monkeypatch.setattr(module, "onednn", lambda dtype: False)
    layer = Linear(5, 3, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_this_pytorch_has_the_operations_that_are_used():
    """PyTorch may rename what is not public: then this fails, and the model only gets slower."""
    if torch.backends.mkldnn.is_available():
        assert onednn(torch.float32)
    assert not onednn(torch.float64)
