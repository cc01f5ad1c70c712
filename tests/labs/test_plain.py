"""Plain data: what may pass between a learner's code and its judge, and what is refused."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict, defaultdict, namedtuple
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmcourse.grading import plain as plain_module
from llmcourse.grading.perform import perform
from llmcourse.grading.plain import TENSORS, NotPlainError, laid_out, layout, pack, plain, unpack

FORMATS = ["?", "i1", "u1", "<i2", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", ">f4", ">i8", "<c8", "<c16", "g"]
FEW = settings(max_examples=200, deadline=None)


def identical(a: Any, b: Any) -> bool:
    """The same types and the same bits, all the way down; a NaN in Python's float is a NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (a != a and b != b)
    if isinstance(a, complex):
        return identical(a.real, b.real) and identical(a.imag, b.imag)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return identical(list(a.items()), list(b.items()))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad) and bytes_of(
            a
        ) == bytes_of(b)
    return a == b


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def of_bits(dtype: str, shape: tuple[int, ...], bits: bytes) -> np.ndarray:
    """An array of any bits at all: every NaN payload, every negative zero, every subnormal."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return np.resize(np.frombuffer(bits, np.uint8) % 2 == 1, shape)
    whole = np.frombuffer(bits * kind.itemsize, kind)
    return np.resize(whole, shape) if whole.size else np.zeros(shape, kind)


shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
arrays = st.builds(
    laid_out,
    st.builds(of_bits, st.sampled_from(FORMATS), shapes, st.binary(min_size=1, max_size=64)),
    st.sampled_from(["C", "F", "gaps"]),
)
scalars = arrays.filter(lambda a: a.size > 0).map(lambda a: a.reshape(-1)[0])
simple = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**4000), max_value=2**4000),
    st.floats(),
    st.complex_numbers(allow_nan=True),
    st.text(),
    st.text(alphabet=st.characters(categories=["Cs"]), max_size=3),
    st.binary(max_size=20),
)
keys = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda k: st.lists(k, max_size=3).map(tuple),
    max_leaves=4,
)
values = st.recursive(
    st.one_of(simple, arrays, scalars),
    lambda v: st.one_of(
        st.lists(v, max_size=4), st.lists(v, max_size=4).map(tuple), st.dictionaries(keys, v, max_size=4)
    ),
    max_leaves=12,
)


# ── there and back ───────────────────────────────────────────────────────────────────────────────


@FEW
@given(values)
def test_what_is_packed_comes_back_to_the_bit(value):
    assert identical(unpack(pack(value)), value)


@FEW
@given(values)
def test_plain_data_is_rebuilt_as_it_was(value):
    assert identical(plain(value), value)


@FEW
@given(arrays)
def test_an_array_keeps_its_layout_and_becomes_one_of_its_own(array):
    for made in (unpack(pack(array)), plain(array)):
        assert made.flags.writeable
        assert not np.shares_memory(made, array)
    assert layout(unpack(pack(array))) == layout(array)


@pytest.mark.parametrize(("order", "found"), [("C", "C"), ("F", "F"), ("gaps", "gaps")])
def test_an_array_is_laid_out_as_asked(order, found):
    numbers = np.arange(12.0).reshape(3, 4)
    made = laid_out(numbers, order)
    assert layout(made) == found
    np.testing.assert_array_equal(made, numbers)


def test_between_the_elements_of_an_array_with_gaps_lies_nan():
    made = laid_out(np.zeros((2, 3)), "gaps")
    assert np.isnan(made.base[..., 1::2]).all()
    assert (laid_out(np.zeros(3, np.int16), "gaps").base[1::2] == np.iinfo(np.int16).max).all()


def test_the_payload_of_a_nan_survives():
    bits = np.array([0x7FF8_0000_DEAD_BEEF, 0xFFF0_0000_0000_0001, 0x8000_0000_0000_0000], np.uint64)
    for array in (bits.view(np.float64), laid_out(bits.view(np.float64), "gaps")):
        assert unpack(pack(array)).tobytes() == plain(array).tobytes() == bits.tobytes()


@pytest.mark.parametrize("name", sorted(TENSORS))
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3, 4)])
def test_tensors_of_every_number_format_come_back(name, shape):
    kind = getattr(torch, name)
    torch.manual_seed(1)
    tensor = (torch.randn(shape) * 3).to(kind)
    assert identical(unpack(pack(tensor)), tensor)
    assert identical(plain(tensor), tensor)
    if kind.is_floating_point:
        assert unpack(pack(tensor.requires_grad_())).requires_grad


def test_views_of_tensors_come_back_as_their_numbers():
    base = torch.arange(24.0).reshape(2, 3, 4)
    for view in (base.mT, base[:, ::2], base[0].expand(5, 3, 4), (base * 1j).conj(), (base * 1j).conj().imag):
        for made in (unpack(pack(plain(view))), plain(view)):
            assert made.dtype == view.dtype
            assert torch.equal(made.resolve_conj().resolve_neg(), view.resolve_conj().resolve_neg())
            np.testing.assert_array_equal(made.numpy(), view.resolve_conj().resolve_neg().numpy())


def test_a_single_element_comes_back_though_its_stride_is_not_one():
    part = torch.tensor([[1 + 2j]]).real  # contiguous by torch's reckoning, with a stride of 2
    assert part.stride() == (2, 2)
    assert torch.equal(unpack(pack(part)), torch.tensor([[1.0]]))
    assert perform(lambda x: x, [torch.tensor([1 + 2j]).real]).changed == ()


def test_a_result_has_left_its_graph():
    made = plain({"loss": [torch.ones(2, requires_grad=True).exp()]})["loss"][0]
    assert not made.requires_grad
    assert made.grad_fn is None


def test_every_scalar_type_of_numpy_that_is_a_number_is_plain():
    for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?":
        scalar = np.zeros((), code)[()]
        assert identical(plain(scalar), scalar)
        made = unpack(pack(scalar))
        assert (made, made.dtype) == (scalar, scalar.dtype)


def test_functions_travel_as_numbers_where_they_are_given_one():
    data = pack(["f", len, {"g": max}], callable_id=[len, max].index)
    assert unpack(data, make_callable=lambda i: [len, max][i]) == ["f", len, {"g": max}]
    with pytest.raises(NotPlainError):
        unpack(data)
    with pytest.raises(NotPlainError, match="builtin_function"):
        pack(len)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


class EqualsAll:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Liar:
    """Says that it is an array."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return np.ndarray


class TensorLiar:
    @property
    def __class__(self) -> type:  # type: ignore[override]
        return torch.Tensor


class MyList(list):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class MyFloat(float):
    pass


class MyInt(int):
    pass


class MyStr(str):
    pass


class MyDict(dict):
    pass


class MyScalar(np.float64):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class ScalarWithAFormat(np.float64):
    """Its dtype says float, and is object."""

    class Format:
        kind, dtype = "f", np.dtype(object)

    dtype = Format()


class Arrayish:
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.zeros(3)


class Loose(torch.Tensor):
    """A tensor that answers every question of torch's in its own way."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return EqualsAll()


Pair = namedtuple("Pair", "loss grad")

REFUSED = {
    "EqualsAll": EqualsAll(),
    "Liar": Liar(),
    "TensorLiar": TensorLiar(),
    "Loose": torch.ones(2).as_subclass(Loose),
    "MyFloat": MyFloat(1),
    "MyInt": MyInt(1),
    "MyStr": MyStr("a"),
    "MyScalar": MyScalar(1),
    "ScalarWithAFormat": ScalarWithAFormat(1),
    "Arrayish": Arrayish(),
    "Fraction": Fraction(1, 2),
    "set": {1},
    "range": range(3),
    "generator": (i for i in range(3)),
    "zip": zip(),
    "function": lambda: 0,
    "type": int,
    "ndarray": np.array([EqualsAll()], dtype=object),
    "str_": np.str_("a"),
    "bytes_": np.bytes_(b"a"),
    "datetime64": np.datetime64("2026-01-01"),
    "void": np.zeros(1, "i4,f8")[0],
    "bytearray": bytearray(b"a"),
    "memoryview": memoryview(b"a"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("inside", [lambda v: v, lambda v: [1, (2, v)], lambda v: {"a": [{"b": v}]}])
def test_anything_else_is_refused_by_name_wherever_it_is(name, inside):
    with pytest.raises(NotPlainError) as refusal:
        plain(inside(REFUSED[name]))
    assert refusal.value.what.startswith("the result holds a ")
    assert name in refusal.value.what


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Pair(1, (2.0,)), (1, (2.0,))),
        (MyList([1.0, 2]), [1.0, 2]),
        (MyDict(a=1), {"a": 1}),
        (OrderedDict(b=[1]), {"b": [1]}),
        (defaultdict(float, x=1.0), {"x": 1.0}),
    ],
)
def test_what_extends_a_list_tuple_or_dict_is_rebuilt_as_one(value, base):
    rebuilt = plain(value)
    assert type(rebuilt) is type(base)
    assert rebuilt == base


@pytest.mark.parametrize("key", [1.0, EqualsAll, (1, 2.0), b"a", np.float64(1), MyStr("a"), frozenset()])
def test_a_key_that_is_no_text_or_integer_is_refused(key):
    with pytest.raises(NotPlainError, match="key of a dict"):
        plain({key: 1})


def test_numpys_integers_become_pythons_as_keys():
    (key,) = plain({np.int64(3): 1})
    assert type(key) is int


@pytest.mark.parametrize("sort", ["U3", "S3", "O", "M8[s]", "m8[s]", "i4,f8", "V4"])
def test_an_array_that_holds_no_numbers_is_refused(sort):
    with pytest.raises(NotPlainError, match="holds no numbers"):
        plain(np.zeros(2, sort))


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.ones(2, 2).to_sparse(),
        lambda: torch.ones(2, device="meta"),
        lambda: torch.empty(2, dtype=torch.complex32),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "meta", "complex32", "nested"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_of_a_special_kind_is_refused(tensor):
    special = tensor()
    with pytest.raises(NotPlainError, match=r"holds a torch\.Tensor"):
        plain(special)


def test_a_subclass_of_ndarray_is_rebuilt_without_asking_it():
    asked = []

    class Sly(np.ndarray):
        def __array_finalize__(self, other):
            asked.append("finalize")

        def __array__(self, *args, **kwargs):
            asked.append("array")
            return np.zeros(3)

        def __array_ufunc__(self, *args, **kwargs):
            asked.append("ufunc")
            return True

        def __array_function__(self, *args, **kwargs):
            asked.append("function")
            return True

        def __eq__(self, other):
            asked.append("eq")
            return True

        def view(self, *args, **kwargs):
            asked.append("view")
            return np.zeros(3)

        @property
        def dtype(self):
            asked.append("dtype")
            return np.dtype(float)

        @property
        def shape(self):
            asked.append("shape")
            return (3,)

        nbytes = 0
        __hash__ = None

    sly = np.arange(4.0).view(Sly)
    asked.clear()
    made = plain([sly])[0]
    assert asked == []
    assert type(made) is np.ndarray
    assert made.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_what_lies_under_a_mask_comes_out():
    made = plain(np.ma.array([1.0, 2.0], mask=[False, True]))
    assert type(made) is np.ndarray
    assert made.tolist() == [1.0, 2.0]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_nesting_has_a_limit_in_values_and_in_keys():
    assert identical(unpack(pack(plain(nested(plain_module.MAX_DEPTH)))), nested(plain_module.MAX_DEPTH))
    key: tuple[Any, ...] = ()
    for _ in range(5000):
        key = (key,)
    loop: list[Any] = []
    loop.append(loop)
    for value in (nested(plain_module.MAX_DEPTH + 2), nested(5000), {key: 1}, loop):
        with pytest.raises(NotPlainError):
            plain(value)


def test_what_is_too_large_is_refused_before_it_is_copied(monkeypatch):
    for value in (2**5000, np.broadcast_to(1.0, (10**6, 10**6)), torch.ones(1).expand(10**6, 10**6)):
        with pytest.raises(NotPlainError, match="too large"):
            plain(value)
    monkeypatch.setattr(plain_module, "MAX_BYTES", 10_000)
    monkeypatch.setattr(plain_module, "MAX_ELEMENTS", 1000)
    plain([np.ones(1000), [0] * 900])
    for value in (  # each part is small enough
        [np.ones(100)] * 20,
        [torch.ones(100)] * 30,
        [b"x" * 1000] * 11,
        ["x" * 1000] * 11,
        [[0] * 100] * 11,
        {(0,) * 600: 1, (1,) * 600: 2},
    ):
        with pytest.raises(NotPlainError, match="too large"):
            plain(value)


def test_a_refusal_says_where_what_and_what_to_do():
    with pytest.raises(NotPlainError) as refusal:
        plain({"grad": {1, 2}}, "an argument")
    assert str(refusal.value).splitlines() == [
        "an argument holds a set.",
        "  Only numbers, text, lists, tuples, dicts, arrays and tensors can be compared.",
        "  Try np.asarray(…) on numbers of your own.",
    ]


# ── bytes from anybody ───────────────────────────────────────────────────────────────────────────


def only_refuses(data: bytes) -> None:
    """Unpacking gives a value or NotPlainError, and nothing else."""
    try:
        value = unpack(data, make_callable=lambda i: [len, max][i])
    except NotPlainError:
        return
    pack(value, callable_id=[len, max].index)  # and such a value could have been sent


def message(head: Any, buffers: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + buffers


@FEW
@given(values, st.data())
def test_a_message_that_is_cut_or_lengthened_is_refused(value, data):
    whole = pack(value)
    with pytest.raises(NotPlainError):
        unpack(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(NotPlainError):
        unpack(whole + b"\0")


@FEW
@given(values, st.data())
def test_a_flipped_bit_never_does_more_than_change_a_value(value, data):
    whole = bytearray(pack(value))
    for _ in range(data.draw(st.integers(1, 3))):
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        whole[bit // 8] ^= 1 << bit % 8
    only_refuses(bytes(whole))


@FEW
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    only_refuses(data)
    only_refuses(struct.pack("<Q", len(data)) + data)


tags = st.sampled_from(["f", "c", "b", "l", "t", "d", "n", "a", "T", "F", "x", "", 0, None])
formats = st.sampled_from(
    ["<f8", "?", "O", "U3", "V8", "f8,f8", "(2,)f8", "M8", "float32", "bool", "Tensor", "quint8"]
)
sizes = st.one_of(st.integers(-2, 17), st.sampled_from([2**31, 2**63, 2**64, 10**30, True, 1.5, "8", None]))
heads = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), formats, sizes),
    lambda h: st.one_of(
        st.builds(lambda tag, rest: [tag, *rest], tags, st.lists(h, max_size=4)),
        st.builds(lambda f, s, o, n: ["a", f, s, o, n], formats, st.lists(sizes, max_size=3), tags, sizes),
        st.builds(lambda f, s, g, n: ["T", f, s, g, n], formats, st.lists(sizes, max_size=3), tags, sizes),
        st.builds(lambda f, n: ["n", f, n], formats, sizes),
        st.dictionaries(st.text(max_size=3), h, max_size=2),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(heads, st.sampled_from([0, 1, 8, 16, 64]))
def test_a_head_of_ones_own_making_gives_plain_data_or_nothing(head, extra):
    only_refuses(message(head, bytes(range(extra))))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63),
        message(["a", "<f8", [2], "C", 8], b"\0" * 8),
        message(["a", "<f8", [-1], "C", 8], b"\0" * 8),
        message(["a", "|O", [1], "C", 8], b"\0" * 8),
        message(["a", "<f8", [2**40], "C", 0]),
        message(["n", "<f8", 16], b"\0" * 16),
        message(["n", "<f8", 0]),
        message(["T", "quint8", [8], False, 8], b"\0" * 8),
        message(["T", "Tensor", [8], False, 8], b"\0" * 8),
        message(["T", "load", [8], False, 8], b"\0" * 8),
        message(["T", "int64", [1], True, 8], b"\0" * 8),
        message({"a": 1}),
        message(["d", [["l"], 1]]),
        message(["F", 0]),
        message("[" * 3),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 5000) + b"9" * 5000,
        struct.pack("<Q", 2) + b"\xff\xfe",
    ],
)
def test_bytes_that_no_pack_makes_are_refused_or_harmless(data):
    if data == message("[" * 3):
        assert unpack(data) == "[[["
    else:
        with pytest.raises(NotPlainError, match="these bytes are no message"):
            unpack(data)


def test_a_bool_that_is_neither_0_nor_1_becomes_one_of_them():
    for head in (["a", "|b1", [2], "C", 2], ["T", "bool", [2], False, 2]):
        made = unpack(message(head, b"\x02\x00"))
        assert made.tolist() == [True, False]
        assert int(made.sum()) == 1
        assert bytes(np.asarray(made)) == b"\x01\x00"


def test_infinities_and_nans_are_no_json_numbers():
    data = pack([math.inf, -math.inf, math.nan])
    json.loads(data[8:], parse_constant=lambda c: pytest.fail(c))
    first, second, third = unpack(data)
    assert (first, second, math.isnan(third)) == (math.inf, -math.inf, True)


def test_keys_that_were_chosen_to_have_one_hash_are_refused_at_once():
    """Python's integers have the hash of their remainder by 2⁶¹ − 1: a dict of n of these takes n² steps."""
    pairs = [[k * (2**61 - 1), 0] for k in range(100_000)]
    with pytest.raises(NotPlainError, match="keys"):
        unpack(message(["d", *pairs]))
    assert unpack(pack({-1: 0, -2: 1, **{k * 2**40: k for k in range(5000)}}))[7 * 2**40] == 7


def test_an_array_that_is_there_again_and_again_has_a_limit():
    """Eighty bytes and a list of references would be gigabytes once that list is made an array."""
    one, again = ["a", "<f8", [1_000_000], "C", 8_000_000], ["=", 0]
    with pytest.raises(NotPlainError, match="again"):
        unpack(message(["l", one, *[again] * 40], bytes(8_000_000)))
    few = unpack(message(["l", one, again, again], bytes(8_000_000)))
    assert few[0] is few[1] is few[2]
