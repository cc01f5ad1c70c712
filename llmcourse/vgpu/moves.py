"""mov: from register to register, and between a register and the parts it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.vgpu.forms import Form, Modifiers, form, unsigned
from llmcourse.vgpu.isa import Vector
from llmcourse.vgpu.vector import Value, high, joined, low, parts, spread, whole


@form("mov")
def _mov(m: Modifiers) -> Form | None:
    type_ = m.type()
    target, source = m.instruction.operands[0], m.instruction.operands[-1]
    if type_ in ("", "f32x2") or (isinstance(target, Vector) and isinstance(source, Vector)):
        return None
    if isinstance(target, Vector):
        return _unpack(type_, len(target.parts))
    if isinstance(source, Vector):
        return _pack(type_, len(source.parts))
    if type_ in ("pred", "f32", "f64"):
        return Form(_same, (type_,), (type_,))
    return Form(_same, (unsigned(type_),), (unsigned(type_),))


def _same(value: Value) -> Value:
    return value


def _unpack(type_: str, count: int) -> Form | None:
    """mov.b64 {%r1, %r2}, %rd3: the first part is the low one."""
    part = f"u{int(type_[1:]) // count}"
    if part == "u16" and count == 2:
        return Form(lambda v: (low(v, np.uint16), high(v, np.uint16)), (unsigned(type_),), (part, part))
    if part == "u32" and count == 2:
        return Form(lambda v: (low(v, np.uint32), high(v, np.uint32)), (unsigned(type_),), (part, part))
    if part not in ("u8", "u16"):
        return None
    dtype = np.dtype(f"u{int(part[1:]) // 8}")

    def split(value: Value) -> tuple[Value, ...]:
        pieces = parts(value, dtype)
        if pieces.ndim == 1:
            return tuple(pieces)
        return tuple(np.ascontiguousarray(pieces[:, i]) for i in range(count))

    return Form(split, (unsigned(type_),), (part,) * count)


def _pack(type_: str, count: int) -> Form | None:
    """mov.b32 %r1, {%rs1, %rs2}"""
    part = f"u{int(type_[1:]) // count}"
    function: Callable[..., Any]
    if count == 2 and part in ("u8", "u16", "u32"):
        function = joined
    elif part in ("u8", "u16"):
        dtype = np.dtype(f"u{int(type_[1:]) // 8}")

        def function(*values: Value) -> Value:
            return whole(np.stack(spread(values), axis=-1), dtype)

    else:
        return None
    return Form(function, (part,) * count, (unsigned(type_),))
