"""The walk through the graph: accumulation, order, freeing, in-place writes, messages."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest

from llmcourse.autograd import Function, Tensor, apply, concat, cross_entropy, gradcheck, no_grad, stack
from llmcourse.autograd.check import GradientMismatch
from llmcourse.autograd.reverse import topological_order
from llmcourse.errors import CourseError, GraphError, ShapeError


def parameter(*values: float) -> Tensor:
    return Tensor(np.array(values), requires_grad=True)


def grad_of(tensor: Tensor) -> list[float]:
    assert tensor.grad is not None
    return tensor.grad.tolist()


def test_gradients_of_several_backward_passes_add_up() -> None:
    a = parameter(3.0)
    (a * a).sum().backward()
    (a * 5).sum().backward()
    assert grad_of(a) == [2 * 3 + 5]


def test_every_path_through_a_diamond_counts() -> None:
    a = parameter(2.0)
    b = a * 3
    (b * b + b).sum().backward()  # d(9a² + 3a)/da
    assert grad_of(a) == [18 * 2 + 3]


def test_twenty_stacked_diamonds_take_twenty_steps_and_not_a_million() -> None:
    a = parameter(1.0)
    b = a
    for _ in range(20):
        b = b + b
    assert len(topological_order(b.node)) == 21
    b.sum().backward()
    assert grad_of(a) == [2**20]


def test_consumers_come_before_what_they_consume() -> None:
    a, b = parameter(1.0), parameter(2.0)
    h = a * b
    order = topological_order(((h + a) * h.exp()).sum().node)
    place = {node: i for i, node in enumerate(order)}
    assert all(place[node] < place[parent] for node in order for parent in node.parents)


@pytest.mark.parametrize("use", ["backward", "drop"])
def test_a_chain_of_ten_thousand_operations_works(use: str) -> None:
    a = parameter(1.0)
    b = a
    for _ in range(10_000):
        b = b * 1.0
    if use == "backward":
        b.sum().backward()
        assert grad_of(a) == [1.0]
    del b
    gc.collect()


def test_a_second_backward_through_a_used_graph_says_why_it_cannot_work() -> None:
    a = parameter(2.0)
    loss = (a * a).sum()
    loss.backward()
    with pytest.raises(GraphError, match="already used") as caught:
        loss.backward()
    assert "retain_graph=True" in caught.value.fix
    assert grad_of(a) == [4.0]


def test_a_retained_graph_can_be_used_again() -> None:
    a = parameter(2.0)
    loss = (a * a).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert grad_of(a) == [8.0]


def test_a_result_that_is_not_one_number_takes_a_gradient() -> None:
    a = parameter(1.0, 2.0)
    with pytest.raises(GraphError, match=r"shape \(2,\) without a gradient"):
        (a * a).backward()
    (a * a).backward([1.0, 10.0])
    assert grad_of(a) == [2.0, 40.0]
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        (a * a).backward([1.0, 1.0, 1.0])


def test_intermediate_results_keep_a_gradient_only_when_asked() -> None:
    a = parameter(2.0)
    kept, lost = (a * 3).retain_grad(), a * 4
    (kept * lost).sum().backward()
    assert grad_of(kept) == [8.0]
    assert lost.grad is None


def test_detached_tensors_share_memory_and_pass_no_gradient() -> None:
    a = parameter(3.0)
    (a * a.detach()).sum().backward()
    assert grad_of(a) == [3.0]
    assert np.shares_memory(a.detach().data, a.data)


def test_no_grad_records_nothing_and_ends_with_its_block() -> None:
    a = parameter(3.0)
    with no_grad():
        b = a * a
    assert not b.requires_grad
    with pytest.raises(GraphError, match="no graph"):
        b.backward()
    with pytest.raises(ZeroDivisionError), no_grad():
        _ = 1 / 0
    assert (a * a).requires_grad


def test_an_intermediate_that_nothing_saved_is_freed_at_once() -> None:
    a = parameter(1.0, 2.0)
    middle = a + 1
    alive = weakref.ref(middle.data)
    loss = (middle + 1).sum()
    del middle
    assert alive() is None
    loss.backward()
    assert grad_of(a) == [1.0, 1.0]


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1.0),
        lambda t: t.mul_(2.0),
        lambda t: t.copy_([9.0, 9.0]),
        lambda t: t.__setitem__(0, 5.0),
        lambda t: t[1:].add_(1.0),  # through a view
        lambda t: t.reshape(2, 1).detach().mul_(3.0),
    ],
)
def test_writing_into_a_saved_tensor_is_noticed(write: Callable[[Tensor], object]) -> None:
    a, b = parameter(1.0, 2.0), parameter(3.0, 4.0)
    loss = (a * b).sum()
    with no_grad():
        write(a)
    with pytest.raises(GraphError, match=r"mul saved an array .* version 0, .* version 1"):
        loss.backward()
    assert a.grad is None
    assert b.grad is None


def test_writing_into_a_tensor_that_nobody_saved_is_fine() -> None:
    a, b = parameter(1.0), parameter(2.0)
    loss = (a + b).sum()
    with no_grad():
        a.add_(100.0)
    loss.backward()
    assert grad_of(b) == [1.0]
    (a * b).sum().backward()  # saved after the write: the new version is the right one
    assert grad_of(b) == [102.0]


def test_writing_in_place_where_the_graph_would_have_to_know_is_refused() -> None:
    a = parameter(1.0)
    with pytest.raises(GraphError, match="in place"):
        a.add_(1.0)
    constant = Tensor([1.0])
    constant.add_(1.0)
    assert constant.data.tolist() == [2.0]


def test_a_backward_of_the_wrong_shape_is_named() -> None:
    class NoSum(Function):
        """Add without the sum over broadcast axes."""

        def forward(self, a, b):
            return a + b

        def backward(self, grad):
            return grad, grad

    a, b = Tensor(np.ones((4, 3)), requires_grad=True), Tensor(np.ones(3), requires_grad=True)
    with pytest.raises(ShapeError, match=r"NoSum.backward gave \(4, 3\) for input 1, whose shape is \(3,\)"):
        apply(NoSum(), a, b).sum().backward()
    assert a.grad is None  # nothing half done


class TestGradcheck:
    def test_finds_a_lost_factor_and_says_which(self) -> None:
        class Halved(Function):
            def forward(self, a):
                self.save(a)
                return a * a

            def backward(self, grad):
                return (grad * self.saved[0],)

        with pytest.raises(GradientMismatch, match=r"is 0\.5 times") as caught:
            gradcheck(lambda t: apply(Halved(), t), parameter(1.0, 2.0, 3.0))
        assert "input 0 at (0,)" in caught.value.what
        assert "3 of 3" in caught.value.what

    def test_finds_a_single_wrong_element(self) -> None:
        class Forgets(Function):
            def forward(self, a):
                return a * 2

            def backward(self, grad):
                grad = grad * 2
                grad[1, 2] = 0
                return (grad,)

        with pytest.raises(GradientMismatch, match=r"at \(1, 2\) is 0,.*1 of 6"):
            gradcheck(lambda t: apply(Forgets(), t), Tensor(np.ones((2, 3)), requires_grad=True))

    def test_finds_an_engine_that_overwrites_where_it_should_add(self) -> None:
        def overwrite(grads, node, grad):
            grads[node] = grad

        square = lambda t: t * t  # noqa: E731
        with mock.patch("llmcourse.autograd.reverse.accumulate", overwrite), pytest.raises(GradientMismatch):
            gradcheck(square, parameter(1.0, 2.0))
        gradcheck(square, parameter(1.0, 2.0))

    def test_asks_for_float64(self) -> None:
        with pytest.raises(GraphError, match="float32"):
            gradcheck(lambda t: t, Tensor(np.ones(2, np.float32), requires_grad=True))

    def test_leaves_its_inputs_alone(self) -> None:
        a = parameter(1.0, 2.0)
        gradcheck(lambda t: t * t, a)
        assert a.data.tolist() == [1.0, 2.0]
        assert a.grad is None


FOUR_BY_THREE = Tensor(np.zeros((4, 3)))
BAD = {
    "add": (lambda: FOUR_BY_THREE + Tensor(np.zeros((2, 3))), "(4, 3) and (2, 3)"),
    "mul": (lambda: FOUR_BY_THREE * Tensor(np.zeros(4)), "axis -1 has 3 and 4"),
    "matmul": (lambda: FOUR_BY_THREE @ FOUR_BY_THREE, "inner sizes are 3 and 4"),
    "matmul vector": (lambda: Tensor(np.zeros(2)) @ FOUR_BY_THREE, "inner sizes are 2 and 4"),
    "matmul number": (lambda: FOUR_BY_THREE @ 2.0, "single number"),
    "matmul batches": (lambda: Tensor(np.zeros((2, 1, 1))) @ Tensor(np.zeros((3, 1, 1))), "batch axes"),
    "reshape": (lambda: FOUR_BY_THREE.reshape(5, 3), "12 elements of shape (4, 3)"),
    "reshape unknown": (lambda: FOUR_BY_THREE.reshape(-1, 5), "(-1, 5)"),
    "transpose": (lambda: FOUR_BY_THREE.transpose(0, 0), "(0, 0)"),
    "broadcast_to": (lambda: FOUR_BY_THREE.broadcast_to(4, 6), "(4, 3) cannot be repeated to (4, 6)"),
    "axis": (lambda: FOUR_BY_THREE.sum(axis=2), "(4, 3) has no axis 2"),
    "axis twice": (lambda: FOUR_BY_THREE.sum(axis=(0, -2)), "twice"),
    "axis of a number": (lambda: Tensor(1.0).max(axis=0), "() has no axis 0"),
    "max of none": (lambda: Tensor(np.zeros((0, 3))).max(axis=0), "(0, 3) has no element"),
    "softmax axis": (lambda: FOUR_BY_THREE.softmax(5), "no axis 5"),
    "index": (lambda: FOUR_BY_THREE[7], "out of bounds"),
    "too many indices": (lambda: FOUR_BY_THREE[0, 0, 0], "too many indices"),
    "concat": (lambda: concat([FOUR_BY_THREE, Tensor(np.zeros((4, 2)))]), "array 1 has shape (4, 2)"),
    "concat of none": (lambda: concat([]), "no tensors"),
    "stack": (lambda: stack([FOUR_BY_THREE, Tensor(np.zeros(3))]), "array 1 has shape (3,)"),
    "classes": (lambda: cross_entropy(FOUR_BY_THREE, [0, 1, 2, 3]), "from 0 to 3, for 3 classes"),
    "rows": (lambda: cross_entropy(FOUR_BY_THREE, [0, 1]), "(4, 3) and targets of shape (2,)"),
    "float classes": (lambda: cross_entropy(FOUR_BY_THREE, [0.0, 1, 2, 0]), "float64, not integers"),
    "item": (lambda: FOUR_BY_THREE.item(), "(4, 3)"),
    "integer parameter": (lambda: Tensor([1, 2], requires_grad=True), "int64"),
    "tensor exponent": (lambda: FOUR_BY_THREE**FOUR_BY_THREE, "exponent is a Tensor"),
    "add_": (lambda: Tensor(np.zeros(3)).add_(np.zeros(2)), "add_: shapes (3,) and (2,)"),
    "write": (lambda: Tensor(np.zeros(3)).copy_(np.zeros(2)), "shape (2,) into a tensor of shape (3,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused_with_the_actual_shapes(name: str) -> None:
    act, says = BAD[name]
    with pytest.raises(CourseError) as caught:
        act()
    assert says in caught.value.what
    assert caught.value.why
    assert caught.value.fix
