"""Bytes kept for backward: equal to hand-derived numbers, to torch's, and to what the process allocates."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
import torch

from llmcourse.autograd import Function, Tensor, apply, cross_entropy, no_grad, saved_bytes
from llmcourse.autograd.memory import traced_peak
from llmcourse.autograd.nn import MLP, sgd_step
from llmcourse.autograd.peer import bytes_kept, torch_bytes_kept, torch_saved_bytes

N = 1000  # elements of 8 bytes
VECTOR = np.random.default_rng(0).uniform(0.5, 2.0, N)

# operation: (ours, torch's, bytes by hand)
KEPT = {
    "add": (lambda a, b: a + b, None, 0),
    "sub": (lambda a, b: a - b, None, 0),
    "mul": (lambda a, b: a * b, None, 16 * N),
    "div": (lambda a, b: a / b, None, 16 * N),
    "square as a product": (lambda a, b: a * a, None, 8 * N),  # the same buffer twice counts once
    "power": (lambda a, b: a**3, None, 8 * N),
    "neg": (lambda a, b: -a, None, 0),
    "exp": (lambda a, b: a.exp(), None, 8 * N),
    "log": (lambda a, b: a.log(), None, 8 * N),
    "relu": (lambda a, b: a.relu(), None, 8 * N),
    "tanh": (lambda a, b: a.tanh(), None, 8 * N),
    "sigmoid": (lambda a, b: a.sigmoid(), None, 8 * N),
    "sum": (lambda a, b: a.sum(), None, 0),
    "mean": (lambda a, b: a.mean(), None, 0),
    "reshape": (lambda a, b: a.reshape(10, 100), None, 0),
    "transpose": (lambda a, b: a.reshape(10, 100).T, None, 0),
    "slice": (lambda a, b: a[10:20], None, 0),
    "matmul": (lambda a, b: a.reshape(10, 100) @ b.reshape(100, 10), None, 16 * N),
    "dot": (lambda a, b: a @ b, None, 16 * N),
    "softmax": (lambda a, b: a.softmax(-1), None, 8 * N),
    "log_softmax": (lambda a, b: a.log_softmax(-1), None, 8 * N),
    "max of rows": (
        lambda a, b: a.reshape(10, 100).max(axis=1),
        lambda a, b: a.reshape(10, 100).max(1).values,
        10 * 8,
    ),
    "fancy index": (
        lambda a, b: a[np.arange(7)],
        lambda a, b: a[torch.arange(7)],
        7 * 8,
    ),
    # one saved element keeps all of the memory that it stands in
    "product of two elements": (lambda a, b: a[3] * b[4], None, 16 * N),
    # exp keeps its output, and the product keeps the same buffer: once, with b
    "shared": (lambda a, b: a.exp() * b, None, 16 * N),
}


@pytest.mark.parametrize("name", KEPT)
def test_saved_bytes_equal_the_hand_derived_number_and_torchs(name: str) -> None:
    ours, theirs, by_hand = KEPT[name]
    a, b = (Tensor(VECTOR.copy(), requires_grad=True) for _ in range(2))
    with saved_bytes() as kept:
        result = ours(a, b)
    assert kept.bytes == by_hand
    p, q = (torch.tensor(VECTOR, requires_grad=True) for _ in range(2))
    assert torch_saved_bytes(lambda: (theirs or ours)(p, q)) == by_hand
    result.backward(np.ones(result.shape))
    assert kept.bytes == 0
    assert kept.peak == by_hand


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_an_mlp_keeps_what_was_derived_by_hand_and_what_torch_keeps(batch: int) -> None:
    x, y = np.ones((batch, 64), np.float32), np.zeros(batch, int)
    model = MLP((64, 32, 16, 10))
    with saved_bytes() as kept:
        loss = cross_entropy(model(Tensor(x)), y)
    assert kept.by_role() == {
        "parameter": 4 * (32 * 16 + 16 * 10),  # W1 would serve the gradient of x, which nobody wants
        "input": 4 * batch * 64 + 8 * batch,
        "activation": 4 * batch * (32 + 16 + 10),
    }
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 10),
    )
    theirs = torch_saved_bytes(
        lambda: torch.nn.functional.cross_entropy(net(torch.tensor(x)), torch.tensor(y))
    )
    assert theirs - kept.bytes == 4  # torch's loss also keeps the sum of its class weights, one float
    loss.backward()
    assert kept.bytes == 0


def test_no_grad_saves_no_byte() -> None:
    model = MLP((64, 32, 10))
    with saved_bytes() as kept, no_grad():
        loss = cross_entropy(model(Tensor(np.ones((7, 64), np.float32))), np.zeros(7, int))
    assert not loss.requires_grad
    assert (kept.bytes, kept.peak, kept.timeline) == (0, 0, [])


def test_data_that_wants_no_gradient_saves_no_byte() -> None:
    a = Tensor(VECTOR)
    with saved_bytes() as kept:
        (a.exp() * a).sum()
    assert kept.peak == 0


def test_bytes_are_let_go_when_the_graph_is_dropped_without_backward() -> None:
    a = Tensor(VECTOR.copy(), requires_grad=True)
    with saved_bytes() as kept:
        y = a.exp()
        assert kept.bytes == 8 * N
        del y
        assert kept.bytes == 0
    assert kept.peak == 8 * N


def test_the_timeline_rises_in_the_forward_pass_and_falls_to_nothing_in_the_backward_pass() -> None:
    model = MLP((64, 32, 10))
    with saved_bytes() as kept:
        loss = cross_entropy(model(Tensor(np.ones((7, 64), np.float32))), np.zeros(7, int))
    forward = len(kept.timeline)
    loss.backward()
    held = [nbytes for _, nbytes in kept.timeline]
    assert held[:forward] == sorted(held[:forward])
    assert held[forward - 1 :] == sorted(held[forward - 1 :], reverse=True)
    assert held[-1] == 0


def test_nested_counters_each_count_their_own_block() -> None:
    a = Tensor(VECTOR.copy(), requires_grad=True)
    with saved_bytes() as outer:
        y = a.exp()
        with saved_bytes() as inner:
            z = a.tanh()
    assert (outer.bytes, inner.bytes) == (16 * N, 8 * N)
    del y, z


def test_a_view_of_a_parameter_counts_as_the_parameter() -> None:
    x, w = Tensor(np.ones((5, 3)), requires_grad=True), Tensor(np.ones((4, 3)), requires_grad=True)
    with saved_bytes() as kept:
        y = (x + 1) @ w.T
    assert kept.by_role() == {"parameter": 8 * 12, "input": 0, "activation": 8 * 15}
    del y


def test_the_count_is_what_the_process_really_holds() -> None:
    """tracemalloc sees every NumPy allocation; the graph's own Python objects are the small rest."""
    batch, width, depth = 256, 128, 6
    model = MLP([width] * depth)
    x = Tensor(np.ones((batch, width), np.float32))
    model(x)
    gc.collect()
    tracemalloc.start()
    try:
        with saved_bytes() as kept:
            out = model(x)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - out.data.nbytes
    finally:
        tracemalloc.stop()
    counted = kept.by_role()["activation"]
    assert counted == 4 * batch * width * (depth - 2)
    assert counted <= held <= counted * 1.05


def test_saving_the_input_of_a_sigmoid_costs_a_buffer_that_saving_its_output_does_not() -> None:
    class FromInput(Function):
        def forward(self, a):
            self.save(a)
            return 1 / (1 + np.exp(-a))

        def backward(self, grad):
            y = 1 / (1 + np.exp(-self.saved[0]))
            return (grad * y * (1 - y),)

    counts = []
    for sigmoid in (Tensor.sigmoid, lambda t: apply(FromInput(), t)):
        model = MLP((64, 32, 10), activation=sigmoid, dtype=np.float64)
        with saved_bytes() as kept:
            loss = model(Tensor(np.ones((7, 64)))).sum()
        counts.append(kept.by_role()["activation"])
        loss.backward()
    assert counts == [8 * 7 * 32, 2 * 8 * 7 * 32]


def test_a_step_before_a_retained_backward_is_noticed() -> None:
    model = MLP((4, 3, 2))
    loss = cross_entropy(model(Tensor(np.ones((5, 4), np.float32))), np.zeros(5, int))
    loss.backward(retain_graph=True)
    sgd_step(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="version"):
        loss.backward()


def test_one_operation_is_put_to_both_engines() -> None:
    def scaled(a, b):
        return a.exp() * b

    assert bytes_kept(scaled, VECTOR, VECTOR) == torch_bytes_kept(scaled, VECTOR, VECTOR) == 16 * N


def test_the_traced_peak_is_the_most_that_was_allocated_at_one_time() -> None:
    def run() -> int:
        for _ in range(3):
            np.ones(100 * N)  # freed before the next one
        return 7

    peak, result = traced_peak(run)
    assert result == 7
    assert 800 * N <= peak < 1000 * N
    assert not tracemalloc.is_tracing()


@pytest.mark.parametrize("depth", [2, 5, 9])
def test_inference_holds_three_results_however_deep_the_network(depth: int) -> None:
    unit = 4 * 256 * 256
    model, x = MLP([256] * (depth + 1)), Tensor(np.ones((256, 256), np.float32))
    with no_grad():
        peak, _ = traced_peak(lambda: model(x))
    assert round(peak / unit) == 3
