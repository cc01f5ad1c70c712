"""Exercise `numeric_gradient`: the judge of every backward, central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.grading.compare import as_array, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs.lab01_backprop.graphs import uncounted, within

numeric_gradient = Exercise(
    "numeric_gradient",
    title="A gradient from the function alone",
    arguments=("f", "x", "h"),
    shapes=(
        "f       function: f(y), for an array y of x's shape, is a number",
        "x       float64 array of any shape, () too, in any memory layout; as it was when the",
        "        call returns",
        "h       the step; None means one of your choice",
        "returns float64 array of x's shape: the derivative of f for each element of x; f is",
        "        asked twice for each element",
    ),
    formula="out[i] = (f(x + h·eᵢ) − f(x − h·eᵢ)) / 2h, where eᵢ is 1 at place i and 0 elsewhere",
    difficulty=2,
    importance=4,
    minutes=15,
    points=3,
    hints=(
        "A partial derivative says what f does when one element moves and all others stay. How often must f "
        "be asked for an x of 6 elements, and what does each of the calls get?",
        "For each place in x: a copy of x that is h larger there, a copy that is h smaller there, and the "
        "difference of f at the two, divided by how far they are apart. np.ndindex(x.shape) gives the places "
        "of an array of any shape. And h: the notebook's picture has its best step near the cube root of the "
        "machine epsilon of float64.",
        "out = np.zeros(x.shape); for i in np.ndindex(x.shape): step = np.zeros(x.shape); step[i] = h; "
        "out[i] = (f(x + step) - f(x - step)) / (2 * h). Default: h=6e-6.",
    ),
)

ROUGH = 0.02  # of the largest derivative: shows what is computed, leaves open how well
ERROR = 1e-7  # of the largest derivative: central steps from about 1e-8 to 1e-4 stay below it
ONCE_EACH = "two calls of f for each element, and none besides."


class Function:
    """A function with a known gradient at `x`, which notes how far from `x` it was asked."""

    def __init__(self, says: str, x: np.ndarray, value: Callable[[np.ndarray], Any]) -> None:
        self.says, self.x, self.value = says, x, value
        self.least = self.most = 0.0

    def __call__(self, y: Any) -> float:
        if not isinstance(y, np.ndarray | np.floating | float) or np.shape(y) != self.x.shape:
            raise ValueError(f"f needs an array of x's shape {self.x.shape}, and got {describe(y)}")
        if np.asarray(y).dtype != np.float64:
            raise ValueError(f"f needs float64, as x is, and got {np.asarray(y).dtype}")
        moved = np.asarray(y) - self.x
        self.least = min(self.least, float(moved.min(initial=0.0)))
        self.most = max(self.most, float(moved.max(initial=0.0)))
        return float(self.value(np.asarray(y)))

    def advice(self) -> tuple[str, str]:
        """Where f was asked, and what about that makes the result less exact than it can be."""
        h = max(-self.least, self.most)
        if not h or min(-self.least, self.most) < h / 2:
            return f"f was asked on one side of x only, {h:.0e} away", "f(x + h·eᵢ) − f(x − h·eᵢ), over 2h."
        away = f"f was asked {h:.0e} away from x"
        if h < 3e-8:
            return (
                away,
                "a larger step: here most digits are lost when two nearly equal numbers are subtracted.",
            )
        return away, "a smaller step: f bends too much on the way." if h > 1e-5 else ""


def smooth(t: Trial, x: np.ndarray) -> tuple[Function, np.ndarray]:
    """Σ w·exp(x), plus a little that ties the elements together; and its gradient at `x`."""
    w = t.rng.uniform(2, 4, x.shape) * t.rng.choice([-1, 1], x.shape)
    f = Function("= Σ w·exp(x) + (Σ x)²/20", x, lambda y: (w * np.exp(y)).sum() + y.sum() ** 2 / 20)
    return f, w * np.exp(x) + x.sum() / 10


def stiff(t: Trial, x: np.ndarray, cubic: float) -> tuple[Function, np.ndarray]:
    """g·d + dᵀHd/2 + cubic·Σd³ with d = y − x; its gradient at `x` is g, whatever H and the cubic part are.

    H, the curvature, is about 1000 in all of its elements, and central differences do not feel it: even
    powers of the step cancel. One-sided ones are wrong by 1000·h/2, central ones by cubic·h².
    """
    g = t.rng.uniform(0.5, 1.5, x.shape) * t.rng.choice([-1, 1], x.shape)
    curvature = t.rng.uniform(900, 1100, (x.size, x.size))

    def value(y: np.ndarray) -> float:
        d = (y - x).reshape(-1)
        return g.reshape(-1) @ d + d @ curvature @ d / 2 + cubic * (d**3).sum()

    says = "= g·d + dᵀHd/2" + (f" + {cubic:g}·Σd³" if cubic else "") + " with d the distance from x"
    return Function(says, x, value), g


def _gradient(t: Trial, f: Function, x: np.ndarray, *h: float) -> np.ndarray:
    """The learner's gradient of `f` at `x`. Mismatch unless it has the shape of `x`."""
    what = f"f was asked too often for an x of {x.size} elements"
    oracle = uncounted(f, f.says)
    got = within(t, oracle, 20 * x.size + 20, what, ONCE_EACH, oracle, x, *h)
    t.close(None if got is None else np.zeros(as_array(got).shape), np.zeros(x.shape))
    return as_array(got)


def _roughly(t: Trial, x: np.ndarray) -> np.ndarray:
    f, gradient = smooth(t, x)
    got = _gradient(t, f, x)
    t.close(got, gradient, rtol=ROUGH)
    return got


@numeric_gradient.check("each element is the derivative of f along its own axis")
def values(t: Trial) -> None:
    for n in (t.odd(5, 9), 1, 2, t.size(10, 14)):
        _roughly(t, t.normal(n, scale=0.5))
    _roughly(t, np.array([0.5, 0.5, 0.0, -0.5, 0.0, 0.5]))


@numeric_gradient.check("x can have any shape; f gets that shape, and the result has it, in float64")
def shapes(t: Trial) -> None:
    n, m = t.odd(3, 7), t.size(2, 4)
    for shape in [(n, m), (2, n, m), (1, 1), (), (n, 1), (0, m)]:
        got = _roughly(t, t.normal(*shape, scale=0.5))
        t.equal(str(got.dtype), "float64", "number format")


@numeric_gradient.check("x can lie in memory in any way")
def layouts(t: Trial) -> None:
    n, m = t.odd(3, 7), t.size(2, 4)
    for x in [*t.layouts(t.normal(n, m, scale=0.5))[::-1], *t.layouts(t.normal(2, m, 3, scale=0.5))]:
        _roughly(t, x)


@numeric_gradient.check("x is left as it was")
def untouched(t: Trial) -> None:
    for shape in [(t.odd(9, 13),), (5, t.size(3, 5)), (), (2, 3, 2)]:
        x = np.asarray(t.normal(*shape) * 10.0 ** t.integers(-12, 2, *shape))  # large, small, tiny
        for laid in t.layouts(x) if x.ndim == 3 else [x]:
            _gradient(t, stiff(t, laid, cubic=0)[0], laid)
            t.unchanged()


@numeric_gradient.check("f is asked twice for each element")
def calls(t: Trial) -> None:
    for shape in [(t.odd(5, 9),), (3, t.size(2, 4)), ()]:
        x = t.normal(*shape)
        f, _ = smooth(t, x)
        t.call(t.oracle(f, f.says, limit=20 * x.size + 20), x)
        t.at_most(t.counts[-1], 2 * x.size + 1, f"calls of f for an x of {x.size} elements", ONCE_EACH)


@numeric_gradient.check("the error is below 1e-7 of the largest derivative, however much f is curved")
def accuracy(t: Trial) -> None:
    for shape in [(t.odd(5, 9),), (3, t.size(2, 4))]:
        x = t.normal(*shape)
        for f, gradient in (stiff(t, x, cubic=0), stiff(t, x, cubic=1), smooth(t, x)):
            got = _gradient(t, f, x)
            error = float(np.abs(got - gradient).max() / np.abs(gradient).max())
            single = x.size > 2 and np.array_equal(got, got.astype(np.float32))
            t.holds(not single, "the result has the digits of float32 only", "np.zeros(x.shape) for it.")
            where, tries = f.advice()
            t.holds(
                error <= ERROR,
                f"the largest error is {error:.0e} of the largest derivative, expected at most {ERROR:.0e} "
                f"({where})",
                tries,
            )


@numeric_gradient.check("a step that the caller gives is the one that is taken")
def step(t: Trial) -> None:
    for shape, h in [((t.odd(3, 7),), 0.125 * t.size(1, 4)), ((2, t.odd(3, 5)), 0.125 * t.size(1, 4))]:
        x = t.normal(*shape) + t.rng.choice([-3, 3], shape)
        f, gradient = stiff(t, x, cubic=2)
        got = _gradient(t, f, x, h)
        t.close(got, gradient + 2 * h**2, f"with h = {h} (which leaves an error of 2h² here)", rtol=1e-6)
        t.unchanged()
        got = _gradient(t, f, x)
        t.close(got, gradient, f"without h, after a call with h = {h}", rtol=1e-6)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def moved(x: Any, i: Any, h: float) -> Any:
    """A copy of `x` with `h` added at place `i`."""
    y = np.array(x)
    y[i] += h
    return y


@numeric_gradient.mistake(
    says="f(x + h·eᵢ) − f(x − h·eᵢ) is divided by h, though the two lie 2h apart",
    tries="/ (2 * h).",
    caught_by="values",
)
def over_h(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return 2 * central(f, x, h)


@numeric_gradient.mistake(
    says="the difference is multiplied by h, not divided by it: a / 2 * h is (a / 2)·h",
    tries="/ (2 * h).",
    caught_by="values",
)
def times_h(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return central(f, x, h) * h * h


@numeric_gradient.mistake(
    says="only f(x + h·eᵢ) is divided by 2h, and f(x − h·eᵢ) is not",
    tries="parentheses around the difference: (above - below) / (2 * h).",
    caught_by="values",
)
def difference_unbracketed(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        out[i] = f(moved(x, i, h)) - f(moved(x, i, -h)) / (2 * h)
    return out


@numeric_gradient.mistake(
    says="the difference is taken the wrong way round",
    tries="f(x + h·eᵢ) − f(x − h·eᵢ).",
    caught_by="values",
)
def wrong_sign(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return -central(f, x, h)


@numeric_gradient.mistake(
    says="all elements of x are moved at once, which gives the sum of the derivatives in every place",
    tries="moving one element, while all others stay.",
    caught_by="values",
)
def all_at_once(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return np.full(x.shape, (f(x + h) - f(x - h)) / (2 * h))


@numeric_gradient.mistake(
    says="the derivatives are put into an array of integers",
    tries="np.zeros(x.shape), which is float64.",
    caught_by="values",
)
def integers(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return central(f, x, h).astype(int)


@numeric_gradient.mistake(
    says="the derivatives are put into an array of float32",
    tries="np.zeros(x.shape), which is float64.",
    caught_by="shapes",
)
def single(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return central(f, x, h).astype(np.float32)


@numeric_gradient.mistake(
    says="the result is flat",
    tries=".reshape(x.shape) at the end, or np.ndindex(x.shape) for the places.",
    caught_by="shapes",
)
def flat(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return central(f, x, h).reshape(-1)


@numeric_gradient.mistake(
    says="f is given a flat copy of x, or a row of it, and not an array of x's shape",
    tries=".reshape(x.shape) before f is called: f may need the rows and columns.",
    caught_by="shapes",
)
def flat_to_f(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return central(f, x.reshape(-1), h).reshape(x.shape)


@numeric_gradient.mistake(
    says="rows are moved, not elements: a loop over range(len(x)) sees the first axis only",
    tries="for i in np.ndindex(x.shape): the places of an array of any shape, () too.",
    caught_by="shapes",
)
def rows(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out = np.zeros(x.shape)
    for i in range(len(x)):
        out[i] = (f(moved(x, i, h)) - f(moved(x, i, -h))) / (2 * h)
    return out


@numeric_gradient.mistake(
    says="a flat x, or np.zeros_like(x), is written to; of a transposed array, reshape(-1) is a copy",
    tries="x[i] and out[i] for i in np.ndindex(x.shape); or a flat np.zeros(x.size), reshaped at the end.",
    caught_by="layouts",
)
def into_a_copy(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out, places = np.zeros(x.shape), x.reshape(-1)
    for i, middle in enumerate(places.tolist()):
        places[i] = middle + h
        above = f(x)
        places[i] = middle - h
        below = f(x)
        places[i] = middle
        out.reshape(-1)[i] = (above - below) / (2 * h)
    return out


@numeric_gradient.mistake(
    says="the derivatives are stored in out.flatten(), which is always a copy, and out stays 0",
    tries="out[i] for i in np.ndindex(x.shape); or a flat np.zeros(x.size), reshaped at the end.",
    caught_by="values",
)
def flattened(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out = np.zeros(x.shape)
    out.flatten()[:] = central(f, x, h).reshape(-1)
    return out


@numeric_gradient.mistake(
    says="one copy of x serves for all elements, and each one stays moved while the next are",
    tries="a fresh copy for each element, or putting the element back after the call of f.",
    caught_by="values",
)
def copies_not_put_back(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out, above, below = np.zeros(x.shape), np.array(x), np.array(x)
    for i in np.ndindex(x.shape):
        above[i] += h
        below[i] -= h
        out[i] = (f(above) - f(below)) / (2 * h)
    return out


@numeric_gradient.mistake(
    says="x is moved in place and not put back, so that later elements are differentiated elsewhere",
    tries="keeping the element in a variable, and storing it again after the second call of f.",
    caught_by="untouched",
)
def not_put_back(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        x[i] += h
        above = f(x)
        x[i] -= 2 * h
        out[i] = (above - f(x)) / (2 * h)
    return out


@numeric_gradient.mistake(
    says="x is put back by arithmetic: x + h − 2h + h is rounded three times, and not always x",
    tries="keeping the element in a variable, and storing it again after the second call of f.",
    caught_by="untouched",
)
def put_back_rounded(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        x[i] += h
        above = f(x)
        x[i] -= 2 * h
        below = f(x)
        x[i] += h
        out[i] = (above - below) / (2 * h)
    return out


@numeric_gradient.mistake(
    says="four values of f are taken for each element; the error falls faster with h, at twice the cost",
    tries="f(x + h·eᵢ) and f(x − h·eᵢ) alone: a gradient check has digits enough with them.",
    caught_by="calls",
)
def four_points(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return (4 * central(f, x, h) - central(f, x, 2 * h)) / 3


@numeric_gradient.mistake(
    says="the difference is one-sided: its error is the curvature times h/2",
    tries="f(x + h·eᵢ) − f(x − h·eᵢ), over 2h: the curvature cancels.",
    caught_by="accuracy",
)
def forward(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out, here = np.zeros(x.shape), f(x)
    for i in np.ndindex(x.shape):
        out[i] = (f(moved(x, i, h)) - here) / h
    return out


@numeric_gradient.mistake(
    says="the difference is one-sided, to the left: its error is the curvature times h/2",
    tries="f(x + h·eᵢ) − f(x − h·eᵢ), over 2h: the curvature cancels.",
    caught_by="accuracy",
)
def backward(f: Any, x: Any, h: Any = 6e-6) -> Any:
    return forward(f, x, -h)


@numeric_gradient.mistake(
    says="the step is so small that the difference of f is mostly rounding",
    tries="h near the cube root of 2.2e-16, about 6e-6.",
    caught_by="accuracy",
)
def tiny_step(f: Any, x: Any, h: Any = 1e-13) -> Any:
    return central(f, x, h)


@numeric_gradient.mistake(
    says="the step is so large that f bends on the way: the error grows as h²",
    tries="h near the cube root of 2.2e-16, about 6e-6.",
    caught_by="accuracy",
)
def large_step(f: Any, x: Any, h: Any = 1e-2) -> Any:
    return central(f, x, h)


@numeric_gradient.mistake(
    says="a step of the function's own is taken, whatever h is",
    tries="h in the body; 6e-6 only as its default.",
    caught_by="step",
)
def own_step(f: Any, x: Any, h: Any = None) -> Any:
    return central(f, x, 6e-6)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@numeric_gradient.alternative("place by place, in copies of x")
def central(f: Any, x: Any, h: Any = 6e-6) -> Any:
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        out[i] = (f(moved(x, i, h)) - f(moved(x, i, -h))) / (2 * h)
    return out


@numeric_gradient.alternative("in place, each element stored again, whatever f does")
def in_place(f: Any, x: Any, h: Any = 1e-5) -> Any:
    out = np.empty_like(x)
    for i in np.ndindex(x.shape):
        middle = x[i]
        try:
            x[i] = middle + h
            above = f(x)
            x[i] = middle - h
            out[i] = (above - f(x)) / (2 * h)
        finally:
            x[i] = middle
    return out


@numeric_gradient.alternative("along the rows of the identity matrix, reshaped to x's shape")
def one_hot(f: Any, x: Any, h: Any = 1e-6) -> Any:
    steps = h * np.eye(x.size).reshape(x.size, *x.shape)
    slopes = [(f(x + step) - f(x - step)) / (2 * h) for step in steps]
    return np.array(slopes, np.float64).reshape(x.shape)


@numeric_gradient.alternative("flat copies, a step that suits the element and can be represented")
def relative_step(f: Any, x: Any, h: Any = 6e-6) -> Any:
    places = np.array(x).reshape(-1)
    out = np.zeros(places.size)
    for i in range(places.size):
        above, below = places.copy(), places.copy()
        above[i] += h
        below[i] -= h
        out[i] = (f(above.reshape(x.shape)) - f(below.reshape(x.shape))) / (above[i] - below[i])
    return out.reshape(x.shape)
