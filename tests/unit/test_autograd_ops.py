"""Every operation: forward and backward equal PyTorch's, and backward equals finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmcourse.autograd import Tensor, concat, cross_entropy, gradcheck, stack

CLASSES = np.array([2, 0, 4, 4, 1])
ROWS = np.array([0, 2, 2, 1, 0])  # repeated on purpose
MASK = np.array([True, False, True, True, False])

# name: (what to compute with t = our Tensor or torch's, shapes of its inputs)
SAME = {
    "add": (lambda a, b: a + b, [(5, 3), (5, 3)]),
    "add a number": (lambda a: 2.5 + a + 1, [(3, 1)]),
    "sub": (lambda a, b: a - b, [(5, 1), (3,)]),
    "number minus tensor": (lambda a: 1.0 - a, [(7,)]),
    "mul": (lambda a, b: a * b, [(2, 1, 3), (5, 1)]),
    "a tensor by itself": (lambda a: a * a, [(3, 5)]),
    "div": (lambda a, b: a / (b * b + 1), [(5, 3), (3,)]),
    "number by tensor": (lambda a: 3.0 / (a * a + 1), [(3, 3)]),
    "neg": (lambda a: -a, [()]),
    "cube": (lambda a: a**3, [(5,)]),
    "power 0": (lambda a: a**0, [(5,)]),
    "power 1": (lambda a: a**1, [(5,)]),
    "root": (lambda a: (a * a + 0.5) ** 0.5, [(3, 2)]),
    "reciprocal": (lambda a: (a * a + 1) ** -1, [(4,)]),
    "exp": (lambda a: a.exp(), [(3, 1, 2)]),
    "log": (lambda a: (a * a + 0.5).log(), [(5, 3)]),
    "relu": (lambda a: a.relu(), [(7, 3)]),
    "tanh": (lambda a: a.tanh(), [(7, 3)]),
    "sigmoid": (lambda a: a.sigmoid(), [(7, 3)]),
    "sum": (lambda a: a.sum(), [(3, 5)]),
    "mean": (lambda a: a.mean(), [(1,)]),
    "matrix by matrix": (lambda a, b: a @ b, [(5, 3), (3, 7)]),
    "batches": (lambda a, b: a @ b, [(2, 5, 3), (2, 3, 1)]),
    "broadcast batches": (lambda a, b: a @ b, [(2, 1, 5, 3), (4, 3, 1)]),
    "batch by one matrix": (lambda a, b: a @ b, [(4, 1, 3), (3, 5)]),
    "vector by vector": (lambda a, b: a @ b, [(3,), (3,)]),
    "matrix by vector": (lambda a, b: a @ b, [(5, 3), (3,)]),
    "vector by matrix": (lambda a, b: a @ b, [(3,), (3, 5)]),
    "batch by vector": (lambda a, b: a @ b, [(2, 5, 3), (3,)]),
    "vector by batch": (lambda a, b: a @ b, [(3,), (2, 3, 5)]),
    "one by one": (lambda a, b: a @ b, [(1, 1), (1, 1)]),
    "reshape": (lambda a: a.reshape(5, -1) * a.reshape(5, 6), [(2, 3, 5)]),
    "transposed": (lambda a: a.T @ a, [(5, 3)]),
    "row": (lambda a: a[1] * a[-1], [(3, 5)]),
    "element": (lambda a: a[2, 0], [(3, 5)]),
    "slices": (lambda a: a[1:, ::2] * 2, [(3, 5)]),
    "overlapping slices": (lambda a: a[1:] * a[:-1], [(5, 2)]),
    "new axis and ellipsis": (lambda a: a[..., None, 1] * a[None, ..., :1], [(3, 5)]),
    "softmax": (lambda a: a.softmax(-1) * a, [(5, 7)]),
    "softmax of columns": (lambda a: a.softmax(0) * a, [(5, 7)]),
    "log_softmax": (lambda a: a.log_softmax(-1) * a, [(5, 7)]),
    "diamond": (lambda a: a.exp() * a.tanh() + a, [(3,)]),
}
# name: (ours, torch's, shapes)
DIFFERENT: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "sum of columns": (lambda a: a.sum(axis=0), lambda a: a.sum(0), [(5, 3)]),
    "sum of two axes": (
        lambda a: a.sum(axis=(0, -1), keepdims=True),
        lambda a: a.sum((0, -1), keepdim=True),
        [(3, 5, 2)],
    ),
    "mean of rows": (
        lambda a: a.mean(axis=-1, keepdims=True) * a,
        lambda a: a.mean(-1, keepdim=True) * a,
        [(5, 3)],
    ),
    "max": (lambda a: a.max(), lambda a: a.max(), [(5, 3)]),
    "max of columns": (lambda a: a.max(axis=0), lambda a: a.max(0).values, [(5, 3)]),
    "max kept": (
        lambda a: a.max(axis=1, keepdims=True),
        lambda a: a.max(1, keepdim=True).values,
        [(3, 5, 2)],
    ),
    "max of the first axis": (lambda a: a.max(axis=0), lambda a: a.max(0).values, [(3, 5, 2)]),
    "max of two axes": (lambda a: a.max(axis=(0, 2)), lambda a: a.amax((0, 2)), [(3, 5, 2)]),
    "transpose": (lambda a: a.transpose(2, 0, 1) * 3, lambda a: a.permute(2, 0, 1) * 3, [(3, 5, 2)]),
    "transpose from the end": (
        lambda a: a.transpose((-1, 0, 1)),
        lambda a: a.permute(2, 0, 1),
        [(3, 5, 2)],
    ),
    "broadcast_to": (
        lambda a: a.broadcast_to(4, 5, 3) * 2,
        lambda a: a.broadcast_to(4, 5, 3) * 2,
        [(5, 1)],
    ),
    "repeated rows": (lambda a: a[ROWS], lambda a: a[torch.tensor(ROWS)], [(3, 5)]),
    "picked elements": (
        lambda a: a[np.arange(5), CLASSES],
        lambda a: a[torch.arange(5), torch.tensor(CLASSES)],
        [(5, 7)],
    ),
    "list and slice": (lambda a: a[[0, 0, 2], 1:], lambda a: a[[0, 0, 2], 1:], [(3, 5)]),
    "masked": (lambda a: a[MASK], lambda a: a[torch.tensor(MASK)], [(5, 3)]),
    "concat": (
        lambda a, b: concat([a, b, a], axis=-1),
        lambda a, b: torch.cat([a, b, a], -1),
        [(3, 5), (3, 2)],
    ),
    "stack": (lambda a, b: stack([a, b], axis=1), lambda a, b: torch.stack([a, b], 1), [(3, 5), (3, 5)]),
    "stack of numbers": (lambda a, b: stack([a, b]), lambda a, b: torch.stack([a, b]), [(), ()]),
    "cross_entropy": (
        lambda z: cross_entropy(z, CLASSES),
        lambda z: torch.nn.functional.cross_entropy(z, torch.tensor(CLASSES)),
        [(5, 7)],
    ),
}
CASES = {name: (f, f, shapes) for name, (f, shapes) in SAME.items()} | DIFFERENT
each_operation = pytest.mark.parametrize("name", CASES)


def arrays(shapes: list[tuple[int, ...]], dtype: type = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(len(shapes) * 100 + sum(map(sum, shapes)))
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@each_operation
def test_forward_and_backward_equal_torch(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    data = arrays(shapes)
    x = [Tensor(a, requires_grad=True) for a in data]
    y = [torch.tensor(a, requires_grad=True) for a in data]
    out, expected = ours(*x), theirs(*y)
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=1e-12, atol=1e-14)
    assert out.shape == tuple(expected.shape)
    grad = arrays([out.shape])[0]
    out.backward(grad)
    expected.backward(torch.tensor(grad))
    for a, b in zip(x, y, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-11, atol=1e-13)


@each_operation
def test_backward_equals_finite_differences(name: str) -> None:
    ours, _, shapes = CASES[name]
    report = gradcheck(ours, *[Tensor(a, requires_grad=True) for a in arrays(shapes)])
    assert report.elements == sum(int(np.prod(s)) for s in shapes)


@each_operation
def test_float32_stays_float32_in_both_directions(name: str) -> None:
    ours, _, shapes = CASES[name]
    x = [Tensor(a, requires_grad=True) for a in arrays(shapes, np.float32)]
    out = ours(*x)
    assert out.dtype == np.float32
    out.backward(np.ones(out.shape))
    assert all(a.grad is not None and a.grad.dtype == np.float32 for a in x)


@each_operation
def test_backward_leaves_what_was_saved_as_it_was(name: str) -> None:
    ours, _, shapes = CASES[name]
    x = [Tensor(a, requires_grad=True) for a in arrays(shapes)]
    out = ours(*x)
    grad = arrays([out.shape])[0]
    out.backward(grad, retain_graph=True)
    once = [np.array(a.grad) for a in x]
    out.backward(grad)
    for a, b in zip(x, once, strict=True):
        np.testing.assert_array_equal(a.grad, b + b)


def test_only_the_inputs_that_ask_get_a_gradient() -> None:
    a, b = arrays([(5, 3), (3, 2)])
    for wants_a, wants_b in ((True, False), (False, True)):
        for combine in (lambda x, y: x @ y, lambda x, y: (x.sum() / y) * x.sum() - y):
            x, y = Tensor(a, requires_grad=wants_a), Tensor(b, requires_grad=wants_b)
            combine(x, y).sum().backward()
            assert (x.grad is not None, y.grad is not None) == (wants_a, wants_b)


def test_of_equal_maxima_the_first_gets_the_gradient() -> None:
    a = Tensor([[1.0, 3.0, 3.0]], requires_grad=True)
    a.max(axis=1).sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [[0, 1, 0]]


def test_sigmoid_and_cross_entropy_do_not_overflow_at_extreme_inputs() -> None:
    z = Tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    with np.errstate(all="raise", under="ignore"):
        y = z.sigmoid()
        loss = cross_entropy(z, [0, 0])
        loss.backward()
    assert y.data.tolist() == [[1, 0], [0, 1]]
    assert loss.item() == 1e4  # right: 0; wrong by 2·10⁴: mean 10⁴
    assert z.grad is not None
    assert z.grad.tolist() == [[0, 0], [-0.5, 0.5]]


def test_views_share_memory_with_what_they_view_and_copies_do_not() -> None:
    a = Tensor(np.arange(12.0).reshape(3, 4), requires_grad=True)
    for view in (a.reshape(2, 6), a.T, a[1:, ::2], a[0], a[1, 2], a[None], a.broadcast_to(2, 3, 4)):
        assert np.shares_memory(view.data, a.data), view
    for copy in (a[[0, 1]], a[a.data > 3], a + 0, concat([a, a])):
        assert not np.shares_memory(copy.data, a.data), copy


def test_a_gradient_returned_to_two_leaves_is_not_shared_by_them() -> None:
    a, b = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0], requires_grad=True)
    (a + b).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    a.grad *= 10  # writable, and a's alone
    assert b.grad.tolist() == [1, 1]


def test_arrays_and_numbers_may_stand_on_the_left() -> None:
    t = Tensor([1.0, 2.0])
    array = np.array([3.0, 4.0])
    for result, expected in (
        (array + t, [4, 6]),
        (array - t, [2, 2]),
        (array * t, [3, 8]),
        (array / t, [3, 2]),
        (array @ t, 11),
        (5 - t, [4, 3]),
        (2 / t, [2, 1]),
    ):
        assert isinstance(result, Tensor)
        assert result.data.tolist() == expected


def test_a_tensor_prints_its_numbers_and_where_it_came_from() -> None:
    a = Tensor([1.0, 2.0], requires_grad=True)
    assert repr(a) == "Tensor([1., 2.], requires_grad=True)"
    assert repr(a * 2) == "Tensor([2., 4.], from mul)"
    assert [row.shape for row in Tensor(np.zeros((3, 2)))] == [(2,)] * 3
