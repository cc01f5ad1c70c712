"""Broadcasting's backward is a sum: held against torch on shapes that hypothesis makes up."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import broadcastable_shapes, mutually_broadcastable_shapes

from llmcourse.autograd import Tensor
from llmcourse.autograd.ops.elementwise import sum_to


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).uniform(0.5, 2.0, shape))


@settings(max_examples=60, deadline=None)
@given(
    shapes=mutually_broadcastable_shapes(num_shapes=2, min_dims=0, max_dims=4, min_side=1, max_side=3),
    operation=st.sampled_from(["add", "sub", "mul", "div"]),
)
def test_two_broadcast_inputs_get_torchs_gradients(shapes, operation) -> None:
    compute = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
    }[operation]
    data = [numbers(shape, seed) for seed, shape in enumerate(shapes.input_shapes)]
    x = [Tensor(a, requires_grad=True) for a in data]
    y = [torch.tensor(a, requires_grad=True) for a in data]
    out, expected = compute(*x), compute(*y)
    assert out.shape == shapes.result_shape
    grad = numbers(out.shape, 7)
    out.backward(grad)
    expected.backward(torch.tensor(grad))
    for a, b in zip(x, y, strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sum_to_counts_how_often_each_element_was_repeated(data) -> None:
    wide = data.draw(st.lists(st.integers(1, 3), max_size=4).map(tuple))
    narrow = data.draw(
        broadcastable_shapes(wide, max_dims=len(wide), max_side=3).filter(
            lambda s: len(s) <= len(wide) and np.broadcast_shapes(s, wide) == wide
        )
    )
    summed = sum_to(np.ones(wide), narrow)
    assert summed.shape == narrow
    assert (summed == np.prod(wide, dtype=int) / np.prod(narrow, dtype=int)).all()


@settings(max_examples=40, deadline=None)
@given(
    shapes=mutually_broadcastable_shapes(signature="(n,k),(k,m)->(n,m)", max_dims=2, min_side=1, max_side=3)
)
def test_batched_matmul_gets_torchs_gradients(shapes) -> None:
    data = [numbers(shape, seed) for seed, shape in enumerate(shapes.input_shapes)]
    x = [Tensor(a, requires_grad=True) for a in data]
    y = [torch.tensor(a, requires_grad=True) for a in data]
    out, expected = x[0] @ x[1], y[0] @ y[1]
    grad = numbers(out.shape, 7)
    out.backward(grad)
    expected.backward(torch.tensor(grad))
    for a, b in zip(x, y, strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-12)
