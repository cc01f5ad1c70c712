"""The digits, the perceptron and its training loop; the drawn graph."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

from llmcourse.autograd import Tensor, cross_entropy
from llmcourse.autograd.digits import load_digits
from llmcourse.autograd.fit import accuracy, fit
from llmcourse.autograd.graph import draw_graph, positions, to_networkx
from llmcourse.autograd.nn import MLP, sgd_step

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_the_split_is_every_fifth_image_and_loses_none(digits) -> None:
    assert (digits.x_train.shape, digits.x_test.shape) == ((1437, 64), (360, 64))
    assert digits.x_train.dtype == np.float32
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 1)
    assert set(digits.y_test) == set(digits.y_train) == set(range(10))


def test_an_mlp_reaches_95_percent_on_digits_it_has_not_seen(digits) -> None:
    model = MLP((64, 64, 32, 10))
    before = accuracy(model, digits.x_test, digits.y_test)
    history = fit(model, digits, epochs=40, lr=0.5)
    assert before < 0.3
    assert history[-1].accuracy > 0.95
    assert history[-1].loss < history[0].loss / 10


def test_training_is_the_same_for_the_same_seed_and_another_for_another(digits) -> None:
    first, again, other = (fit(MLP((64, 16, 10), seed=s), digits, epochs=2, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_three_steps_of_training_equal_torchs(digits) -> None:
    sizes = (64, 16, 8, 10)
    model = MLP(sizes, dtype=np.float64)
    weights = [torch.tensor(p.data, requires_grad=True) for p in model.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.3)
    x, y = digits.x_train[:32].astype(np.float64), digits.y_train[:32]
    for _ in range(3):
        loss = cross_entropy(model(Tensor(x)), y)
        loss.backward()
        sgd_step(model.parameters(), lr=0.3)

        h = torch.tensor(x)
        for i, (w, b) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            h = h @ w + b
            h = h.relu() if i < 2 else h
        optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(h, torch.tensor(y))
        expected.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for p, w in zip(model.parameters(), weights, strict=True):
        np.testing.assert_allclose(p.data, w.detach().numpy(), rtol=1e-10, atol=1e-14)


def mlp_loss() -> Tensor:
    return cross_entropy(MLP((64, 32, 10))(Tensor(np.ones((5, 64), np.float32), name="x")), np.zeros(5, int))


def test_the_drawn_graph_has_every_node_edge_shape_and_byte() -> None:
    graph = to_networkx(mlp_loss())
    nodes = {data["name"]: data for _, data in graph.nodes(data=True)}
    assert sorted(data["name"] for _, data in graph.nodes(data=True)) == sorted(
        ["x", "W1", "b1", "W2", "b2", "matmul", "matmul", "add", "add", "relu", "cross_entropy"]
    )
    assert graph.number_of_edges() == 10
    assert nodes["relu"] | {"column": 0} == {
        "name": "relu",
        "shape": (5, 32),
        "nbytes": 4 * 5 * 32,
        "kind": "keeps bytes",
        "column": 0,
    }
    assert {nodes[n]["kind"] for n in ("W1", "b2")} == {"parameter"}
    assert nodes["x"]["kind"] == "input"
    assert nodes["add"]["kind"] == "keeps nothing"


def test_nothing_is_drawn_on_top_of_anything_and_edges_go_right() -> None:
    a = Tensor(np.ones((4, 3)), requires_grad=True, name="a")
    h = a.sigmoid()
    for loss in (mlp_loss(), (h + h.exp() * a).sum() + h.tanh().mean() * a.max()):
        graph = to_networkx(loss)
        place = positions(graph)
        assert len(set(place.values())) == len(place)
        assert all(place[u][0] < place[v][0] for u, v in graph.edges)


def test_the_picture_is_made_and_carries_the_numbers() -> None:
    from matplotlib import pyplot as plt

    figure = draw_graph(mlp_loss(), "An MLP")
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert "keeps 640 B" in texts
    assert "5 × 32" in texts
    plt.close(figure)
