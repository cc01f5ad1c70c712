"""A learner's code in place of the engine's: the numbers stay, the calls are counted, all is set back."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest

import llmcourse.autograd.graph
import llmcourse.compress
import llmcourse.finetune
import llmcourse.models
from llmcourse.autograd import (
    Tensor,
    apply,
    check,
    cross_entropy,
    functional,
    gradcheck,
    no_grad,
    reverse,
    saved_bytes,
)
from llmcourse.autograd.digits import load_digits
from llmcourse.autograd.fit import fit
from llmcourse.autograd.function import Function
from llmcourse.autograd.nn import MLP
from llmcourse.autograd.ops import elementwise
from llmcourse.autograd.ops.matmul import Matmul
from llmcourse.errors import CourseError, GraphError, UnknownNameError
from llmcourse.plug import PlugError, Point, plug, point, points, register

# ── what a learner would hand in, written without the package ───────────────────────────────────────


def topological_order(root, parents):
    order, seen = [], set()

    def visit(node):
        if node not in seen:
            seen.add(node)
            for parent in parents(node):
                visit(parent)
            order.append(node)

    visit(root)
    return order[::-1]


def backward_pass(order, grad, parents, vjp):
    grads = {order[0]: grad}
    for node in order:
        for parent, part in zip(parents(node), vjp(node, grads[node]), strict=True):
            if part is not None:
                grads[parent] = grads[parent] + part if parent in grads else part
    return grads


def sum_to(grad, shape):
    while grad.ndim > len(shape):
        grad = grad.sum(axis=0)
    for axis, n in enumerate(shape):
        if n == 1:
            grad = grad.sum(axis=axis, keepdims=True)
    return grad


def matmul_backward(grad, a, b):
    grad_a = np.einsum("...nm,...km->...nk", grad, b)
    grad_b = np.einsum("...nk,...nm->...km", a, grad)
    return sum_to(grad_a, a.shape), sum_to(grad_b, b.shape)


def my_cross_entropy(logits, labels):
    rows = np.arange(len(labels))
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    loss = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    return loss, p / len(labels)


def numeric_gradient(f, x, h=1e-6):
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        out[i] = (f(x + step) - f(x - step)) / (2 * h)
    return out


ALL = {
    "topological_order": topological_order,
    "backward_pass": backward_pass,
    "sum_to": sum_to,
    "matmul_backward": matmul_backward,
    "cross_entropy": my_cross_entropy,
    "numeric_gradient": numeric_gradient,
}
AUTOGRAD = [name for name, p in point.POINTS.items() if p.places[0].startswith("llmcourse.autograd")]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    rng = np.random.default_rng(3)
    return [Tensor(rng.normal(size=s), requires_grad=True, name=f"t{i}") for i, s in enumerate(shapes)]


def small_loss() -> Tensor:
    x, w, b = tensors((4, 3), (3, 2), (2,))
    return cross_entropy((x @ w + b).tanh(), [0, 1, 1, 0])


def standing() -> dict[str, object]:
    """What stands at every place of the engine's points."""
    found = {}
    for name in AUTOGRAD:
        for place in point.POINTS[name].places:
            owner, attribute = point._resolve(place)
            found[f"{name} {place}"] = getattr(owner, attribute)
    return found


@pytest.fixture(autouse=True)
def everything_is_set_back():
    before = standing()
    yield
    assert standing() == before
    assert not point._standing


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return type(data)(data.x_train.astype(np.float64), data.y_train, data.x_test, data.y_test)


# ── the engine runs on it ────────────────────────────────────────────────────────────────────────────


def trained(digits) -> list[np.ndarray]:
    model = MLP((64, 16, 10), seed=1, dtype=np.float64)
    fit(model, digits, epochs=1)
    return [p.data for p in model.parameters()]


def test_a_network_trained_through_plugged_code_has_the_weights_of_one_trained_without(digits):
    own = trained(digits)
    with plug(**ALL) as used:
        plugged = trained(digits)
    for a, b in zip(own, plugged, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    steps = -(-len(digits.x_train) // 64)
    assert used.calls == {
        "topological_order": steps,
        "backward_pass": steps,
        "sum_to": 4 * steps,  # two operands of each of two additions
        "matmul_backward": 2 * steps,
        "cross_entropy": steps,
        "numeric_gradient": 0,
    }


@pytest.mark.parametrize("name", ["topological_order", "backward_pass", "sum_to"])
def test_a_piece_that_does_the_same_arithmetic_gives_the_same_bits(name, digits):
    own = trained(digits)
    with plug(**{name: ALL[name]}):
        plugged = trained(digits)
    assert all(np.array_equal(a, b) for a, b in zip(own, plugged, strict=True))


def test_float32_stays_float32():
    data = load_digits()
    model = MLP((64, 8, 10))
    with plug(**{name: fn for name, fn in ALL.items() if name != "numeric_gradient"}):
        fit(model, data, epochs=1)
    assert {p.data.dtype for p in model.parameters()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 2)),
        ((5, 3, 4), (5, 4, 2)),
        ((5, 3, 4), (4, 2)),
        ((3, 4), (5, 4, 2)),
        ((2, 1, 3, 4), (5, 4, 2)),
        ((4,), (4, 2)),
        ((3, 4), (4,)),
        ((4,), (4,)),
        ((4,), (5, 4, 2)),
        ((5, 3, 4), (4,)),
    ],
)
def test_matrices_vectors_and_batches_all_go_through_the_plugged_matmul(a, b):
    with plug(matmul_backward=matmul_backward) as used:
        gradcheck(lambda x, y: x @ y, *tensors(a, b))
    assert used.calls["matmul_backward"] == 1


def test_a_matmul_that_wants_one_gradient_only_is_handed_shapes_that_fit():
    (w,) = tensors((3, 2))
    shapes = []

    def spy(grad, a, b):
        shapes.append((grad.shape, a.shape, b.shape))
        return matmul_backward(grad, a, b)

    with plug(matmul_backward=spy):
        gradcheck(lambda w: Tensor(np.ones((4, 3))) @ w, w)
        gradcheck(lambda w: w @ Tensor(np.ones((2, 5))), w)
        unwanted, wanted = (Tensor(np.ones((4, 3))) @ w).node.backward(np.ones((4, 2)))
    assert unwanted is None
    np.testing.assert_array_equal(wanted, np.full((3, 2), 4.0))
    assert shapes[:2] == [((4, 2), (4, 3), (3, 2)), ((3, 5), (3, 2), (2, 5))]


def test_gradcheck_passes_with_every_piece_plugged_in():
    with plug(**ALL) as used:
        report = gradcheck(lambda x, w, b: ((x @ w + b).tanh() * b).sum(), *tensors((4, 3), (3, 2), (2,)))
        gradcheck(lambda z: cross_entropy(z, [0, 2, 1]), *tensors((3, 3)))
    assert report.elements == 20
    assert used.calls["numeric_gradient"] == 4
    assert all(used.calls.values())


WRONG: dict[str, Callable] = {
    "sum_to": lambda grad, shape: grad.mean(axis=0) if grad.ndim > len(shape) else grad,
    "matmul_backward": lambda grad, a, b: (grad @ b.T, a.T @ grad / len(a)),
    "cross_entropy": lambda z, y: (my_cross_entropy(z, y)[0], my_cross_entropy(z, y)[1] * len(y)),
    "numeric_gradient": lambda f, x, h: numeric_gradient(f, x, h) * 2,
    "backward_pass": lambda order, grad, parents, vjp: backward_pass(
        order, grad, parents, lambda n, g: [None if p is None else p / 2 for p in vjp(n, g)]
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_gradcheck_finds_a_wrong_piece(name):
    with plug(**{name: WRONG[name]}), pytest.raises(check.GradientMismatch):
        gradcheck(lambda x, w, b: cross_entropy(x @ w + b, [0, 1, 1, 0]), *tensors((4, 3), (3, 2), (2,)))


def test_a_backward_pass_that_overwrites_instead_of_adding_is_found():
    def overwriting(order, grad, parents, vjp):
        grads = {order[0]: grad}
        for node in order:
            grads.update((p, g) for p, g in zip(parents(node), vjp(node, grads[node]), strict=True))
        return grads

    (x,) = tensors((3,))
    with plug(backward_pass=overwriting), pytest.raises(check.GradientMismatch):
        gradcheck(lambda x: x * x.exp(), x)


def test_the_drawn_graph_follows_the_plugged_order():
    with plug(topological_order=topological_order) as used:
        graph = llmcourse.autograd.graph.to_networkx(small_loss())
    assert used.calls["topological_order"] == 1
    assert len(graph) == 7


def test_the_loss_keeps_one_array_of_the_logits_size_and_nothing_without_a_gradient():
    (z,) = tensors((4, 3))
    with plug(cross_entropy=my_cross_entropy):
        with saved_bytes() as kept:
            loss = cross_entropy(z, [0, 1, 2, 0])
        with no_grad(), saved_bytes() as nothing:
            cross_entropy(z, [0, 1, 2, 0])
    assert kept.bytes == z.data.nbytes
    assert nothing.peak == 0
    loss.backward()  # the code that computed the loss computed this gradient with it
    np.testing.assert_allclose(z.grad, my_cross_entropy(z.data, np.array([0, 1, 2, 0]))[1], rtol=1e-14)
    assert kept.bytes == 0


def test_intermediate_gradients_and_a_second_pass_work_as_without_a_plug():
    x, w = tensors((4, 3), (3, 2))
    with plug(**ALL):
        h = (x @ w).retain_grad()
        loss = (h * h).sum()
        loss.backward(retain_graph=True)
        once = w.grad
        loss.backward()
        with pytest.raises(GraphError, match="already used"):
            loss.backward()
    np.testing.assert_allclose(h.grad, 4 * h.data)
    np.testing.assert_allclose(w.grad, 2 * once)


def test_the_learners_numeric_gradient_sees_a_function_of_an_array():
    x = np.array([1.0, 2.0, 3.0])
    with plug(numeric_gradient=numeric_gradient):
        found = check.numeric_gradient(lambda: float((x**2).sum()), x)
    np.testing.assert_allclose(found, [2, 4, 6], rtol=1e-9)
    np.testing.assert_array_equal(x, [1, 2, 3])


# ── put in, and set back ─────────────────────────────────────────────────────────────────────────────


def test_every_module_that_holds_a_replaced_function_is_one_of_its_places():
    """Otherwise a part of the package would go on with its own; kernels/ is left to the points of kernels."""
    parts = tuple(
        f"llmcourse.{part}."
        for part in ("autograd", "compress", "engine", "finetune", "models", "text", "train")
    )
    for part in (llmcourse.compress, llmcourse.finetune, llmcourse.models):
        for found in pkgutil.iter_modules(part.__path__, f"{part.__name__}."):
            importlib.import_module(found.name)
    for p in point.POINTS.values():
        owner, attribute = point._resolve(p.places[0])
        original = getattr(owner, attribute)
        assert getattr(original, "__module__", "llmcourse.").startswith("llmcourse.")  # a table has none
        if not isinstance(owner, type(sys)):
            continue  # a method: everyone has it through its class
        holders = {
            f"{module}:{name}"
            for module, m in list(sys.modules.items())
            if module.startswith(parts)
            for name, value in vars(m).items()
            if value is original
        }
        assert holders == {place for place in p.places if place.startswith(parts)}


def test_everything_is_set_back_after_an_exception():
    before = standing()
    during = {}

    def interrupted(grad, shape):
        during.update(standing())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), plug(**ALL | {"sum_to": interrupted}):
        small_loss().backward()
    assert all(during[place] is not own for place, own in before.items())
    assert standing() == before


def test_the_innermost_of_nested_plugs_is_in_use():
    used = []

    def named(name):
        def f(grad, shape):
            used.append(name)
            return sum_to(grad, shape)

        return f

    grad = np.ones((2, 3))
    with plug(sum_to=named("outer")) as outer:
        elementwise.sum_to(grad, (3,))
        with plug(sum_to=named("inner")) as inner:
            elementwise.sum_to(grad, (3,))
        elementwise.sum_to(grad, (3,))
    assert used == ["outer", "inner", "outer"]
    assert (outer.calls["sum_to"], inner.calls["sum_to"]) == (2, 1)


def test_one_plug_can_be_entered_twice_and_used_again():
    mine = plug(sum_to=sum_to)
    with mine, mine:
        elementwise.sum_to(np.ones((2, 3)), (3,))
    with mine:
        elementwise.sum_to(np.ones((2, 3)), (3,))
    elementwise.sum_to(np.ones((2, 3)), (3,))
    assert mine.calls == {"sum_to": 2}


def test_plugs_may_end_in_any_order():
    original, first, second = elementwise.sum_to, plug(sum_to=sum_to), plug(sum_to=sum_to)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    elementwise.sum_to(np.ones((2, 3)), (3,))
    assert (first.calls, second.calls) == ({"sum_to": 0}, {"sum_to": 1})
    second.__exit__()
    assert elementwise.sum_to is original


def test_if_one_point_cannot_be_put_in_none_is():
    broken = Point("broken", (), "nothing", "", ("llmcourse.autograd.reverse:no_such",), lambda code: code)
    with mock.patch.dict(point.POINTS):
        register(broken)
        with pytest.raises(AttributeError), plug(sum_to=sum_to, broken=lambda: None):
            pass


def test_a_new_point_is_one_registration():
    """As later labs will do it: a place, and an adapter that hands the call on."""
    own = reverse.accumulate
    p = Point(
        "accumulate",
        ("grads", "node", "grad"),
        "None",
        "Adds grad to the node's.",
        ("llmcourse.autograd.reverse:accumulate",),
        lambda code: code,
    )
    with mock.patch.dict(point.POINTS):
        register(p)
        with plug(accumulate=lambda grads, node, grad: own(grads, node, grad)) as used:
            small_loss().backward()
        assert "accumulate(grads, node, grad) -> None" in repr(points())
    assert used.calls["accumulate"] == 6


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────


def test_the_plug_prints_as_a_table_of_calls():
    with plug(sum_to=sum_to, cross_entropy=my_cross_entropy) as used:
        small_loss().backward()
    assert repr(used).splitlines() == [
        "point          your function     calls",
        "─────────────  ────────────────  ─────",
        "sum_to         sum_to                4",
        "cross_entropy  my_cross_entropy      1",
    ]
    assert "<td" in used._repr_html_()


def test_points_lists_every_point_with_its_signature():
    listed = repr(points())
    for p in point.POINTS.values():
        assert p.signature in listed
        assert p.says in listed
    assert set(ALL) == set(AUTOGRAD)  # those of the models: test_plug_kernels


@pytest.mark.parametrize(
    ("functions", "error", "says"),
    [
        ({"sum_too": sum_to}, UnknownNameError, "no point called 'sum_too'"),
        ({"retention": sum_to}, UnknownNameError, "no point called 'retention'"),
        (
            {"sum_to": sum_to(np.ones(3), (3,))},
            PlugError,
            r"an array of shape \(3,\) in float64, which cannot",
        ),
        ({"sum_to": lambda grad: grad}, PlugError, "too many positional arguments"),
        ({"numeric_gradient": lambda f, x: x}, PlugError, "too many positional arguments"),
        ({"sum_to": lambda grad, shape, axis: grad}, PlugError, "missing a required argument: 'axis'"),
    ],
)
def test_what_cannot_be_plugged_in_is_refused_with_the_list_of_points(functions, error, says):
    with pytest.raises(error, match=says) as caught:
        plug(**functions)
    assert isinstance(caught.value, CourseError)
    for p in point.POINTS.values():
        assert p.signature in caught.value.why
    assert caught.value.fix


def test_a_near_name_is_suggested():
    with pytest.raises(UnknownNameError) as caught:
        plug(topologic_order=topological_order)
    assert caught.value.fix == "plug(topological_order=…)."


@pytest.mark.parametrize(
    ("name", "fn", "says"),
    [
        ("sum_to", lambda g, s: None, "None, and should be an array of shape (4, 2)"),
        ("sum_to", lambda g, s: g[:1], "of shape (1, 2), and should be of shape (4, 2)"),
        ("sum_to", lambda g, s: sum_to(g, s).astype(np.float32), "in float32, and should be in float64"),
        ("sum_to", lambda g, s: sum_to(g, s).tolist(), "a list of 4, and should be an array"),
        (
            "matmul_backward",
            lambda g, a, b: g @ b.T,
            "an array of shape (4, 3) in float64, and should be (grad_a",
        ),
        ("matmul_backward", lambda g, a, b: (g @ b.T, g.T @ a), "grad_b for grad (4, 2), a (4, 3), b (3, 2)"),
        ("matmul_backward", lambda g, a, b: None, "the result is None"),
        ("cross_entropy", lambda z, y: 1.5, "a float, and should be (loss, grad_logits)"),
        ("cross_entropy", lambda z, y: (np.ones(4), z), "should be a single number"),
        ("cross_entropy", lambda z, y: (1.5, z.sum(axis=1)), "of shape (4,), and should be of shape (4, 2)"),
        ("cross_entropy", lambda z, y: ("1.5", z), "loss for logits (4, 2) is a str"),
        ("topological_order", lambda root, parents: None, "it returned None, not a list of nodes"),
        ("topological_order", lambda root, parents: [root, "w"], "not a list of nodes"),
        ("topological_order", lambda r, parents: topological_order(r, parents)[::-1], "not begin with root"),
        ("topological_order", lambda r, parents: topological_order(r, parents)[:-1], "leaves out"),
        ("topological_order", lambda r, parents: [*topological_order(r, parents), r], "twice"),
        (
            "topological_order",
            lambda r, parents: [r, *topological_order(r, parents)[:0:-1]],
            "which was computed from it",
        ),
        ("backward_pass", lambda order, grad, parents, vjp: [], "it returned a list of 0"),
        ("backward_pass", lambda order, grad, parents, vjp: {}, "no gradient for t"),
        ("backward_pass", lambda order, grad, parents, vjp: [vjp(order[0], grad) for _ in "12"], "vjp twice"),
        (
            "backward_pass",
            lambda order, grad, parents, vjp: vjp(order[0], grad[None]),
            "what it gave to vjp for cross_entropy () is of shape (1,)",
        ),
    ],
)
def test_a_result_that_does_not_fit_is_an_error_in_three_parts_that_names_the_function(name, fn, says):
    fn.__name__ = "my_function"
    with plug(**{name: fn}), pytest.raises(PlugError) as caught:
        small_loss().backward()
    assert str(caught.value).startswith(f"my_function does not fit the point {name}(")
    assert says in caught.value.what
    assert caught.value.why
    assert caught.value.fix


def test_an_order_with_a_consumer_too_late_is_refused_before_it_gives_wrong_gradients():
    """Breadth first: h is reached early, though the longer way to it has not been walked."""

    def breadth_first(root, parents):
        order = [root]
        for node in order:
            order += [p for p in parents(node) if p not in order]
        return order

    (x,) = tensors((3,))
    h = x.exp()
    with plug(topological_order=breadth_first), pytest.raises(PlugError, match="before mul"):
        (h + (h.tanh() * h).exp()).sum().backward()


def test_an_error_in_the_learners_code_keeps_its_type_and_says_at_which_point_it_was():
    def mine(grad, shape):
        return {}[shape]

    with plug(sum_to=mine, backward_pass=backward_pass), pytest.raises(KeyError) as caught:
        small_loss().backward()
    assert caught.value.__notes__ == ["Raised while mine ran at the point sum_to(grad, shape) -> array."]
    assert caught.traceback[-1].name == "mine"


def test_writing_into_the_packages_arrays_is_stopped_and_explained():
    def mine(grad, shape):
        grad *= 1
        return sum_to(grad, shape)

    with plug(sum_to=mine), pytest.raises(ValueError, match="read-only") as caught:
        small_loss().backward()
    assert "make a new one" in caught.value.__notes__[0]


def test_code_that_calls_the_packages_own_is_told_that_this_is_itself():
    with (
        plug(sum_to=lambda grad, shape: elementwise.sum_to(grad, shape)),
        pytest.raises(RecursionError) as caught,
    ):
        elementwise.sum_to(np.ones((2, 3)), (3,))
    assert "that is itself" in caught.value.__notes__[0]


def test_bad_targets_are_the_engines_error_not_the_learners():
    (z,) = tensors((4, 3))
    with plug(cross_entropy=my_cross_entropy) as used, pytest.raises(CourseError, match="from 0 to 3"):
        cross_entropy(z, [0, 1, 2, 3])
    assert used.calls["cross_entropy"] == 0


# ── the engine's own pass, which the point replaces ──────────────────────────────────────────────────


def test_the_engines_pass_keeps_only_the_gradients_that_were_asked_for():
    kept = []

    def spy(order, grad, vjp):
        kept.append(own(order, grad, vjp))
        return kept[-1]

    own = reverse.backward_pass
    with mock.patch.object(reverse, "backward_pass", spy):
        loss = small_loss()
        loss.backward()
    assert sorted(node.name for node in kept[0]) == ["t0", "t1", "t2"]


def test_a_backward_with_too_few_gradients_is_an_error():
    class Pair(Function):
        def forward(self, a, b):
            return a + b

        def backward(self, grad):
            return (grad,)

    a, b = tensors((2,), (2,))
    with pytest.raises(ValueError, match="zip"):
        apply(Pair(), a, b).sum().backward()


def test_the_places_are_those_that_the_engine_reads():
    """A guard for the test above them: the class and the module attributes are really replaced."""
    own = functional.CrossEntropy, Matmul.backward
    with plug(cross_entropy=my_cross_entropy, matmul_backward=matmul_backward):
        assert functional.CrossEntropy is not own[0]
        assert functional.CrossEntropy.label == "cross_entropy"
        assert Matmul.backward is not own[1]
    assert (functional.CrossEntropy, Matmul.backward) == own
