"""One call of a learner's function: what is seen of it, and that nothing of it comes out otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.errors import UnknownNameError
from llmcourse.grading.perform import GUARD, Call, guarded, perform
from llmcourse.grading.plain import NotPlainError, laid_out, layout, pack, unpack

as_strided = np.lib.stride_tricks.as_strided


def stretched(array: np.ndarray, before: int = 0, after: int = 0) -> np.ndarray:
    """A view of a 1-D array that reaches `before` and `after` elements past its ends."""
    (step,) = array.strides
    start = as_strided(array, (1,), (step,))
    whole = as_strided(start, (len(array) + after,), (step,))
    if not before:
        return whole
    base = array.base
    assert isinstance(base, np.ndarray)
    first = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // step - before
    return as_strided(base[first:], (before + len(array) + after,), (step,))


# ── guard bands ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", ["C", "F", "gaps"])
@pytest.mark.parametrize("shape", [(5,), (1,), (3, 4), (2, 3, 4), (0,), (3, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_, np.complex64])
def test_a_function_gets_the_same_numbers_in_the_same_layout(order, shape, dtype):
    array = laid_out((np.arange(np.prod(shape)) % 2).reshape(shape).astype(dtype), order)
    seen: dict[str, Any] = {}

    def look(x):
        seen.update(layout=layout(x), shares=np.shares_memory(x, array), writeable=x.flags.writeable)
        return x

    call = perform(look, (array,))
    assert seen == {"layout": layout(array), "shares": False, "writeable": True}
    assert call.value.dtype == array.dtype
    np.testing.assert_array_equal(call.value, array)
    assert (call.changed, call.overrun, call.error) == ((), (), None)


def test_reading_past_the_end_brings_nan_or_the_largest_integer():
    assert np.isnan(perform(lambda x: stretched(x, after=1).sum(), (np.ones(5),)).value)
    assert np.isnan(perform(lambda x: stretched(x, before=1).sum(), (np.ones(5, np.float32),)).value)
    for dtype in (np.int32, np.uint8):
        most = np.iinfo(dtype).max
        assert perform(lambda x: stretched(x, after=1).max(), (np.zeros(5, dtype),)).value == most
    assert perform(lambda x: stretched(x, after=1).any(), (np.zeros(5, bool),)).value


def test_reading_between_the_elements_of_an_array_with_gaps_brings_nan():
    call = perform(lambda x: as_strided(x, (5,), (8,)).sum(), (laid_out(np.ones(5), "gaps"),))
    assert np.isnan(call.value)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (0, GUARD), (GUARD, 0)])
def test_writing_past_either_end_is_seen(before, after):
    def write(a, x):
        stretched(x, before, after)[-1 if after else 0] = 7

    call = perform(write, (np.zeros(2), np.zeros(5)))
    assert (call.overrun, call.changed) == ((1,), ())


def test_writing_between_the_elements_of_an_array_with_gaps_is_seen():
    def write(x):
        as_strided(x, (2,), (8,))[1] = 7

    call = perform(write, (laid_out(np.zeros((3, 5)), "gaps"),))
    assert (call.overrun, call.changed) == ((0,), ())


def test_writing_inside_is_a_change_and_no_overrun():
    def write(x, y):
        y[0, -1] = 7

    for order in ("C", "F", "gaps"):
        call = perform(write, (np.zeros(3), laid_out(np.zeros((2, 3)), order)))
        assert (call.overrun, call.changed) == ((), (1,))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(-GUARD, GUARD + 8), st.floats(allow_nan=False))
def test_every_write_is_seen_as_a_change_or_as_an_overrun(size, place, number):
    place = min(place, size + GUARD - 1)

    def write(x):
        stretched(x, GUARD, GUARD)[GUARD + place] = number

    call = perform(write, (np.full(size, 0.5),))
    inside = 0 <= place < size
    assert call.overrun == (() if inside else (0,))
    assert call.changed == ((0,) if inside and number != 0.5 else ())


def test_the_result_is_taken_before_the_arguments_get_their_numbers_back():
    def in_place(x):
        x *= 2
        return x

    assert perform(in_place, (np.ones(3),)).value.tolist() == [2, 2, 2]


def test_the_guards_hold_the_array_in_the_middle():
    buffer, window = guarded(np.arange(6.0).reshape(2, 3))
    assert buffer[GUARD:-GUARD].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isnan(buffer[:GUARD]).all()
    assert np.isnan(buffer[-GUARD:]).all()
    assert np.shares_memory(buffer, window)


# ── written arguments ────────────────────────────────────────────────────────────────────────────


class EqualsAll:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return 1


class Raises:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("do not compare me")

    def __hash__(self) -> int:
        return 0


def put(value):
    return lambda x: x.__setitem__(0, value)


WRITES = {
    "an element of an array": (np.zeros(3), put(1.0)),
    "the sign of a zero": (np.zeros(3), put(-0.0)),
    "the sign of a nan": (np.full(3, np.nan), lambda x: np.negative(x, out=x)),
    "a number without axes": (np.zeros(()), lambda x: x.__setitem__((), 1.0)),
    "an array's shape": (np.zeros((2, 3)), lambda x: setattr(x, "shape", (3, 2))),
    "an array in a list": ([np.zeros(3)], lambda x: x[0].__setitem__(1, 1.0)),
    "an array in a dict in a tuple": (({"w": np.zeros(3)},), lambda x: x[0]["w"].fill(1)),
    "a list": ([1, 2], lambda x: x.append(3)),
    "the order of a list": ([1, 2], lambda x: x.reverse()),
    "an inner list": ([[1], [2]], lambda x: x[1].append(3)),
    "a list's element for None": ([[1], [2]], put(None)),
    "a list's element for its equal": ([1, 2], put(1.0)),
    "a list's element for what equals all": ([1, 2], put(EqualsAll())),
    "a list in a list for what equals all": ([[1], [2]], put(EqualsAll())),
    "an array in a list for what equals all": ([np.zeros(1)], put(EqualsAll())),
    "a list's element for what raises": ([1, 2], put(Raises())),
    "a dict": ({"a": 1}, lambda x: x.update(b=2)),
    "a dict's value": ({"a": [1]}, lambda x: x["a"].clear()),
    "a dict's key": ({1: 2}, lambda x: (x.clear(), x.update({Raises(): 2}))),
    "a tensor": (torch.zeros(3), lambda x: x.add_(1)),
    "a tensor's shape": (torch.zeros(2, 3), lambda x: x.t_()),
    "a tensor of integers": (torch.zeros(3, dtype=torch.int64), lambda x: x.add_(1)),
    "a tensor in bfloat16": (torch.zeros(3, dtype=torch.bfloat16), lambda x: x.add_(1)),
    "a tensor in a list": ([torch.zeros(3)], lambda x: x[0].add_(1)),
    "a tensor in a list for its equal": ([torch.zeros(3)], put(np.zeros(3))),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_written_argument_is_seen_and_the_callers_own_is_untouched(what):
    argument, write = WRITES[what]
    before = pack([argument])

    def fn(other, x):
        write(x)

    call = perform(fn, ([1, 2], argument))
    assert call.error is None
    assert call.changed == (1,)
    assert pack([argument]) == before


UNWRITTEN = [
    np.array([np.nan, 0.0]),
    np.array(3.0),
    [np.nan, float("nan"), complex("nanj"), np.float32("nan")],
    {"a": (1, "b"), (1, None): [True, b""], 3: {}},
    {np.int64(3): 1},
    torch.tensor([float("nan"), 1.0]),
    [torch.zeros(2), torch.tensor(1)],
    torch.nn.Parameter(torch.zeros(2)),
    torch.zeros(4, 6)[::2, ::3],
    torch.zeros(2, dtype=torch.bool),
    "text",
    2**100,
    None,
]


@pytest.mark.parametrize("argument", UNWRITTEN, ids=repr)
def test_an_argument_that_was_only_read_is_unchanged(argument):
    call = perform(lambda x: [x], (argument,))
    assert (call.changed, call.overrun, call.error) == ((), (), None)


def test_written_arguments_are_seen_also_if_the_function_raises():
    def write_and_raise(x, y):
        y[0] = 1
        raise ValueError

    call = perform(write_and_raise, (np.zeros(2), np.zeros(2)))
    assert call.error.kind == "ValueError"
    assert call.changed == (1,)


def test_a_function_among_the_arguments_is_handed_on_as_it_is():
    assert perform(lambda f, x: f(x), (abs, -3)).value == 3
    assert perform(lambda f: f is abs, (abs,)).value is True


# ── what it raises ───────────────────────────────────────────────────────────────────────────────


def test_a_failure_names_the_last_line_of_the_learners_own():
    source = "def helper(x):\n    return x.missing\n\ndef fn(x):\n    return helper(x)\n"
    namespace: dict[str, Any] = {}
    exec(compile(source, "<cell 3>", "exec"), namespace)
    error = perform(namespace["fn"], (1,)).error
    assert (error.kind, error.line) == ("AttributeError", 2)
    assert "missing" in error.message
    assert error.trace.endswith(error.message)


def test_the_line_is_the_learners_where_a_library_raised():
    def fn(x):
        return x @ x  # this one

    error = perform(fn, (np.zeros((2, 3)),)).error
    assert error.kind == "ValueError"
    assert error.source == "return x @ x  # this one"


class Mute(Exception):
    def __str__(self) -> str:
        raise KeyError("no text either")


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), MemoryError(), RecursionError(), Mute()])
def test_nothing_that_a_function_raises_comes_out(error):
    def fn():
        raise error

    assert perform(fn, ()).error.kind == type(error).__name__


def test_a_recursion_without_end_is_a_failure():
    def fn(x):
        return fn(x)

    assert perform(fn, (1,)).error.kind == "RecursionError"


def test_an_interrupt_comes_out():
    def fn():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(fn, ())


def test_a_result_that_is_no_plain_data_is_a_failure_that_names_it():
    error = perform(lambda: {1, 2}, ()).error
    assert error.kind == "NotPlainError"
    assert error.message.startswith("the result holds a set. Only numbers, text,")


def test_a_long_message_is_cut():
    def fn():
        raise ValueError("x" * 100_000)

    error = perform(fn, ()).error
    assert len(error.message) + len(error.trace) < 10_000


@pytest.mark.filterwarnings("error")
def test_warnings_stay_inside():
    call = perform(lambda x: np.log(x) / x, (np.zeros(2),))
    assert np.isnan(call.value).all() or np.isinf(call.value).all()


# ── costs and gradients ──────────────────────────────────────────────────────────────────────────


def test_gradients_of_the_tensors_that_can_have_one():
    x, n = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 3])
    call = perform(lambda x, n, a: x * x * n, (x, n, np.ones(3)), grads=True)
    assert call.grads[0].tolist() == [2.0, 8.0, 18.0]
    assert call.grads[1:] == (None, None)
    assert not call.value.requires_grad
    assert x.grad is None


def test_several_results_are_sent_backward_together():
    x = torch.tensor([1.0, 2.0])
    call = perform(lambda x: (x.sum(), (3 * x).bfloat16(), torch.arange(2)), (x,), grads=True)
    assert call.grads[0].tolist() == [4.0, 4.0]


def test_a_result_that_does_not_depend_on_a_tensor_has_no_gradient():
    call = perform(lambda x: x.detach() * 2, (torch.ones(2),), grads=True)
    assert call.error is None
    assert call.grads == (None,)


def test_a_backward_pass_that_raises_is_the_functions_failure():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no backward yet")

    call = perform(Broken.apply, (torch.ones(2),), grads=True)
    assert call.error.kind == "ValueError"


def test_counters_count_the_call_and_its_backward_pass():
    x = torch.ones(1000)
    call = perform(lambda x: x.exp(), (x,), watch=["saved_bytes", "launches"], grads=True)
    assert call.costs["saved_bytes"] == 4000  # exp keeps its output
    forward = perform(lambda x: x.exp(), (x,), watch=["launches"])
    assert forward.costs["launches"] < call.costs["launches"]
    assert perform(lambda x: x + 1, (x,), watch=["saved_bytes"], grads=True).costs["saved_bytes"] == 0


def test_a_counter_that_does_not_exist_is_no_failure_of_the_function():
    with pytest.raises(UnknownNameError):
        perform(abs, (1,), watch=["steps"])


def test_a_call_that_raises_has_no_costs():
    def fn(x):
        raise ValueError

    assert perform(fn, (torch.ones(2),), watch=["saved_bytes"]).costs == {}


# ── between processes ────────────────────────────────────────────────────────────────────────────


def again(call: Call) -> Call:
    return Call.from_plain(unpack(pack(call.as_plain())), call.args)


def test_a_call_travels_as_plain_data():
    def fn(x, y):
        y.mul_(2)
        return {"a": [x.numpy().copy(), y.sum()]}

    call = perform(fn, (torch.ones(2), torch.ones(3)), watch=["launches"], grads=False)
    there = again(call)
    assert vars(there).keys() == vars(call).keys()
    assert pack(there.as_plain()) == pack(call.as_plain())
    assert there.changed == (1,)
    failed = perform(lambda x: 1 / x, (0,))
    assert again(failed).error == failed.error


@pytest.mark.parametrize(
    "field",
    [
        {"changed": (1,)},
        {"overrun": (-1,)},
        {"changed": "x"},
        {"changed": None},
        {"grads": ()},
        {"grads": [None]},
        {"grads": 3},
        {"costs": []},
        {"costs": {"launches": None}},
        {"seconds": "soon"},
        {"error": 3},
        {"error": {}},
        {"error": {"kind": "E", "message": "m", "line": "one", "source": "", "trace": ""}},
    ],
    ids=repr,
)
def test_a_record_that_no_call_makes_is_refused(field):
    record = perform(abs, (-1,)).as_plain()
    with pytest.raises((TypeError, KeyError, ValueError, AttributeError)):
        Call.from_plain(record | field, (-1,))


def test_a_record_needs_all_its_fields():
    record = perform(abs, (-1,)).as_plain()
    for name in record:
        with pytest.raises(KeyError):
            Call.from_plain({k: v for k, v in record.items() if k != name}, (-1,))


def test_an_argument_that_is_no_plain_data_is_the_callers_mistake():
    with pytest.raises(NotPlainError, match="an argument holds a set"):
        perform(abs, ({1},))


def test_leaked_bytes_are_what_every_call_leaves_behind_not_what_it_returns():
    hoard, cache = [], {}

    def leaks(x):
        hoard.append(x * 2)
        return x + 1

    def caches(x):
        cache.setdefault("once", x * 2)
        return x + 1

    x = np.ones(1000)
    assert perform(leaks, (x,), ["leaked_bytes"]).costs["leaked_bytes"] == x.nbytes
    assert perform(caches, (x,), ["leaked_bytes"]).costs["leaked_bytes"] == 0
    t = torch.ones(500)
    assert perform(leaks, (t,), ["leaked_bytes"], grads=True).costs["leaked_bytes"] >= 2000
    assert perform(lambda t: (t * t).sum(), (t,), ["leaked_bytes"], grads=True).costs["leaked_bytes"] == 0
