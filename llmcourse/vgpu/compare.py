"""Comparisons and choices: setp, set, selp, slct, testp.

A float comparison is *ordered* (false if either side is NaN) or, with a `u` at its end, *unordered* (true
then). For integers lo, ls, hi and hs are the unsigned spellings of lt, le, gt and ge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.vgpu.bits import BOOLEAN
from llmcourse.vgpu.floats import flushed
from llmcourse.vgpu.forms import FLOATS, Form, Modifiers, form, unsigned
from llmcourse.vgpu.isa import DTYPES, Immediate, Pair
from llmcourse.vgpu.vector import Value, select

Comparison = Callable[[Value, Value], Value]

INTEGER: dict[str, Comparison] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
FLOAT: dict[str, Comparison] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def comparison(m: Modifiers, type_: str) -> tuple[Comparison, str] | None:
    """The comparison that the modifiers name, and the type that it takes."""
    table = FLOAT if type_ in FLOATS else INTEGER
    name = m.take(*table)
    if not name:
        return None
    compare = table[name]
    if type_ in FLOATS:
        if type_ == "f32" and m.flag("ftz"):
            return lambda a, b: compare(flushed(a), flushed(b)), type_
        return compare, type_
    if type_[0] == "b" or name in ("eq", "ne", "lo", "ls", "hi", "hs"):
        return compare, unsigned(type_)
    return compare, type_


def combined(m: Modifiers, compare: Comparison, takes: str) -> tuple[Callable[..., Value], tuple[str, ...]]:
    """`compare`, and then .and, .or or .xor with a predicate if the instruction has one."""
    combine = m.take("and", "or", "xor")
    if not combine:
        return compare, (takes, takes)
    boolean = BOOLEAN[combine]
    return lambda a, b, c: boolean(compare(a, b), c), (takes, takes, "pred")


@form("setp")
def _setp(m: Modifiers) -> Form | None:
    """p|q: q has the comparison inverted before it is combined."""
    found = comparison(m, m.type())
    if found is None:
        return None
    compare, takes = found
    return predicates(m, compare, takes)


def predicates(m: Modifiers, compare: Comparison, takes: str) -> Form:
    if not isinstance(m.instruction.operands[0], Pair):
        function, types = combined(m, compare, takes)
        return Form(function, types, ("pred",))
    combine = m.take("and", "or", "xor")

    def both(a: Value, b: Value, *c: Value) -> tuple[Value, Value]:
        holds = compare(a, b)
        if not combine:
            return holds, np.logical_not(holds)
        return BOOLEAN[combine](holds, *c), BOOLEAN[combine](np.logical_not(holds), *c)

    return Form(both, (takes, takes, *(("pred",) if combine else ())), ("pred", "pred"))


@form("set")
def _set(m: Modifiers) -> Form | None:
    """The comparison as a number: 1.0 for a float result, all ones for an integer."""
    result, operand = m.type(), m.type()
    if result not in ("u32", "s32", "b32", "f32") or not operand:
        return None
    found = comparison(m, operand)
    if found is None:
        return None
    function, types = combined(m, *found)
    return Form(lambda *values: truth(function(*values), result), types, (result,))


def truth(holds: Value, type_: str) -> Value:
    dtype = DTYPES[type_]
    number = holds.astype(dtype)
    return number if dtype.kind == "f" else np.negative(number)


@form("selp")
def _selp(m: Modifiers) -> Form | None:
    type_ = m.type()
    if type_ not in FLOATS:
        type_ = unsigned(type_)
    if m.instruction.operands[1:3] == (Immediate(1), Immediate(0)):  # the comparison as a C++ bool
        dtype = DTYPES[type_]
        return Form(lambda _, __, p: p.astype(dtype), (type_, type_, "pred"), (type_,))
    return Form(lambda a, b, p: select(p, a, b), (type_, type_, "pred"), (type_,))


@form("slct")
def _slct(m: Modifiers) -> Form | None:
    """a where c is not negative (−0 included), b elsewhere; NaN counts as negative."""
    type_, condition = m.type(), m.type()
    if condition not in ("s32", "f32"):
        return None
    flush = m.flag("ftz") and condition == "f32"
    if type_ not in FLOATS:
        type_ = unsigned(type_)

    def apply(a: Value, b: Value, c: Value) -> Value:
        return select((flushed(c) if flush else c) >= c.dtype.type(0), a, b)

    return Form(apply, (type_, type_, condition), (type_,))


@form("testp", types=FLOATS)
def _testp(m: Modifiers) -> Form | None:
    type_, what = m.type(), m.take(*_TESTS)
    if not what:
        return None
    return Form(_TESTS[what], (type_,), ("pred",))


def _normal(a: Value) -> Value:
    """Neither subnormal nor infinite nor NaN. Zero passes, as on an H100: it is what is left over."""
    return np.isfinite(a) & ((np.abs(a) >= np.finfo(a.dtype).smallest_normal) | (a == 0))


_TESTS: dict[str, Callable[[Any], Value]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
    "normal": _normal,
    "subnormal": lambda a: (np.abs(a) < np.finfo(a.dtype).smallest_normal) & (a != 0),
}
