"""The arithmetic of the machine: from one PTX instruction to a function on the values of its registers.

    add.s32 %r3, %r1, 4   →   Alu(sources=(%r1,), destinations=(%r3,), apply=lambda a: a + np.uint32(4))

`forms` says what an opcode does to values; here its form is fitted to registers. PTX registers have a type
of their own, which only has to have the right size: NVRTC keeps signed integers in b32 registers, halves in
b16 ones, and lets `cvt` read or write a register wider than its type. Where types differ the value is viewed
as the other (no copy); constants are converted once and stay inside the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Importing a module of forms registers them.
from llmcourse.vgpu import bits, compare, convert, floats, half, integer, moves, special  # noqa: F401
from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.forms import OPCODES, Form, Modifiers, builder_of
from llmcourse.vgpu.isa import (
    DTYPES,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Register,
    Special,
    Symbol,
    Vector,
)

CARRY = Register("%cc", "pred")
"""The carry flag of add.cc, subc, mad.cc, …: a predicate register that no kernel declares; False at first."""


@dataclass(frozen=True)
class Alu:
    """An arithmetic instruction, ready to run.

    sources        what to fetch, in order: Register (`CARRY` too), Special or Symbol. Constants are built in,
                   and a negated predicate comes as its register: the function negates it
    destinations   registers of the results, in order; None for a result that nobody keeps
    apply          (raw value of each source) → a value, or a tuple of them if there are several destinations.
                   Values are arrays of n lanes or NumPy scalars, in their registers' dtype; the result is a
                   scalar only if all values are. No argument is written to. A result may be one of the
                   arguments, or a view of one (mov, cvt between types of one size, selp under a scalar
                   predicate): treat every value as immutable
    flops          (counter, operations per lane), None for an instruction that counts as none
    """

    sources: tuple[Operand, ...]
    destinations: tuple[Register | None, ...]
    apply: Callable[..., Any]
    flops: tuple[str, int] | None = None


def compile_alu(instruction: Instruction) -> Alu | None:
    """The instruction as a function on values; None if it is not arithmetic.

    Raises   PtxError, naming the source line, for a variant of an arithmetic opcode that is not covered.
    """
    if instruction.opcode not in OPCODES:
        return None
    build = builder_of(instruction)
    modifiers = Modifiers(instruction)
    made = build(modifiers) if build else None
    if made is None or modifiers.left:
        raise _not_covered(instruction)
    return _fitted(made, instruction)


def _fitted(made: Form, instruction: Instruction) -> Alu:
    target, *rest = instruction.operands
    results = _flat(target)
    operands = [part for operand in rest for part in _flat(operand)]
    takes, gives = made.takes, made.gives
    if made.reads_carry:
        operands.append(CARRY)
        takes = (*takes, "pred")
    if made.writes_carry:
        results.append(CARRY)
        gives = (*gives, "pred")
    if len(operands) != len(takes) or len(results) != len(gives):
        raise _not_covered(instruction)

    sources: list[Operand] = []
    constants: list[Any] = []
    adapters: list[Adapter | None] = []
    for operand, type_ in zip(operands, takes, strict=True):
        if isinstance(operand, Immediate):
            constants.append(constant(operand.value, type_))
            continue
        constants.append(None)
        if isinstance(operand, Negated):
            sources.append(operand.register)
            adapters.append(np.logical_not)
        elif isinstance(operand, Register):
            sources.append(operand)
            adapters.append(_reader(operand, type_, instruction))
        elif isinstance(operand, Special | Symbol):
            sources.append(operand)
            adapters.append(_as_type(DTYPES[type_]))
        else:
            raise _not_covered(instruction)

    destinations: list[Register | None] = []
    writers: list[Adapter | None] = []
    for result, type_ in zip(results, gives, strict=True):
        if result is not None and not isinstance(result, Register):
            raise _not_covered(instruction)
        kept = result if result is not None and result.name != "_" else None
        destinations.append(kept)
        writers.append(None if kept is None else _writer(kept, type_, instruction))

    function = _with_constants(made.function, constants)
    function = _with_adapters(function, adapters, writers)
    return Alu(tuple(sources), tuple(destinations), function, made.flops)


def _flat(operand: Operand | None) -> list[Operand | None]:
    if isinstance(operand, Vector):
        return list(operand.parts)
    if isinstance(operand, Pair):
        return [operand.first, operand.second]
    return [operand]


def constant(value: int | np.floating, type_: str) -> Any:
    """A constant of the program as a scalar of a type: integers wrap, a float's bits fill a bit type."""
    dtype = DTYPES[type_]
    if dtype.kind == "b":
        return np.bool_(bool(value))
    if not isinstance(value, np.floating):
        raw = np.array(value & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}")
        return raw.view(dtype)[()]
    if dtype.kind == "f":
        return dtype.type(value)
    return np.array(value).view(f"u{value.itemsize}").astype(f"u{dtype.itemsize}").view(dtype)[()]


# ---- registers and the types of instructions

Adapter = Callable[[Any], Any]


def _viewed(dtype: np.dtype) -> Adapter:
    return lambda value: value.view(dtype)


def _as_type(dtype: np.dtype) -> Adapter:
    """For values whose own type is not known before they come."""

    def adapt(value: Any) -> Any:
        if value.dtype == dtype:
            return value
        if value.dtype.itemsize == dtype.itemsize:
            return value.view(dtype)
        return value.astype(f"{value.dtype.kind}{dtype.itemsize}").view(dtype)

    return adapt


def _reader(register: Register, type_: str, instruction: Instruction) -> Adapter | None:
    """From a register's value to the type that the instruction takes: as it is, viewed, or its low bits."""
    have, want = _dtype(register, instruction), DTYPES[type_]
    if have == want:
        return None
    if "b" in (have.kind, want.kind) or have.itemsize < want.itemsize:
        raise _not_covered(instruction)
    if have.itemsize == want.itemsize:
        return _viewed(want)
    wide, narrow = np.dtype(f"u{have.itemsize}"), np.dtype(f"u{want.itemsize}")
    return lambda value: value.view(wide).astype(narrow).view(want)


def _writer(register: Register, type_: str, instruction: Instruction) -> Adapter | None:
    """From the result to the register's type; into a wider register integers are extended by their sign."""
    have, want = DTYPES[type_], _dtype(register, instruction)
    if have == want:
        return None
    if "b" in (have.kind, want.kind) or have.itemsize > want.itemsize:
        raise _not_covered(instruction)
    if have.itemsize == want.itemsize:
        return _viewed(want)
    same = np.dtype(f"{'i' if have.kind == 'i' else 'u'}{have.itemsize}")
    wide = np.dtype(f"{same.kind}{want.itemsize}")
    return lambda value: value.view(same).astype(wide).view(want)


def _dtype(register: Register, instruction: Instruction) -> np.dtype:
    found = DTYPES.get(register.type)
    if found is None:
        raise _not_covered(instruction)
    return found


# ---- building the function: constants and adapters cost nothing where there are none


def _with_constants(function: Callable[..., Any], constants: list[Any]) -> Callable[..., Any]:
    """`function` with its constants filled in; None stands for an argument that comes."""
    match constants:
        case [None, k] if k is not None:
            return lambda a: function(a, k)
        case [k, None] if k is not None:
            return lambda a: function(k, a)
        case [None, None, k] if k is not None:
            return lambda a, b: function(a, b, k)
        case [None, k, None] if k is not None:
            return lambda a, c: function(a, k, c)
        case [k, other, None] if k is not None and other is not None:
            return lambda c: function(k, other, c)
    if all(k is None for k in constants):
        return function
    places = [i for i, k in enumerate(constants) if k is None]

    def filled(*values: Any) -> Any:
        arguments = list(constants)
        for i, value in zip(places, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    return filled


def _with_adapters(
    function: Callable[..., Any], read: list[Adapter | None], write: list[Adapter | None]
) -> Callable[..., Any]:
    if any(read):
        function = _with_readers(function, read)
    if not any(write):
        return function
    if len(write) == 1:
        (finish,) = write
        assert finish is not None
        return _finished(function, finish, len(read))

    def several(*values: Any) -> tuple[Any, ...]:
        results = function(*values)
        return tuple(r if w is None else w(r) for r, w in zip(results, write, strict=True))

    return several


def _with_readers(function: Callable[..., Any], read: list[Adapter | None]) -> Callable[..., Any]:
    match read:
        case [f]:
            return lambda a: function(f(a))  # type: ignore[misc]
        case [f, None]:
            return lambda a, b: function(f(a), b)  # type: ignore[misc]
        case [None, g]:
            return lambda a, b: function(a, g(b))  # type: ignore[misc]
        case [f, g]:
            return lambda a, b: function(f(a), g(b))  # type: ignore[misc]
    return lambda *values: function(*(v if f is None else f(v) for f, v in zip(read, values, strict=True)))


def _finished(function: Callable[..., Any], finish: Adapter, count: int) -> Callable[..., Any]:
    if count == 1:
        return lambda a: finish(function(a))
    if count == 2:
        return lambda a, b: finish(function(a, b))
    return lambda *values: finish(function(*values))


def _not_covered(instruction: Instruction) -> PtxError:
    name = ".".join((instruction.opcode, *instruction.modifiers))
    where = f"{instruction.line}: " if instruction.line else ""
    return PtxError(
        f"{where}the machine does not have this form of {instruction.opcode}: {instruction.text or name}",
        f"It covers what NVRTC emits for ordinary CUDA C++ on sm_75 to sm_90, and {name} is not among it.",
        "another way to write that line, without inline assembly if there is any, or a run on a GPU.",
    )
