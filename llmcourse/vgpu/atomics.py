"""Atomic operations: lanes that want the same word take turns.

The machine gives the turns in lane order, one of the orders that hardware may choose. Additions of floats
are therefore reproducible here; on a GPU their rounding varies from run to run.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu import requests
from llmcourse.vgpu.access import locate, space_of, stored, whole, widen
from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.isa import DTYPES, Address, Instruction, Register
from llmcourse.vgpu.lanes import Active, scattered

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Program, Step

OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_UFUNCS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def compile_atomic(program: Program, instruction: Instruction) -> Step:
    """atom and red. An atom whose result nobody reads is a red, as ptxas makes it."""
    operation = next((m for m in instruction.modifiers if m in OPERATIONS), "")
    kind = instruction.modifiers[-1]
    if kind == "noftz":
        kind = instruction.modifiers[-2]
    operands = list(instruction.operands)
    target = operands.pop(0) if instruction.opcode == "atom" else None
    where = operands[0]
    if not operation or not isinstance(where, Address) or (kind not in DTYPES and kind not in _PACKED):
        raise PtxError(
            f"{instruction.line}: the machine has no {instruction.text}.",
            f"It has atomic {', '.join(OPERATIONS)} on 16, 32 and 64 bits.",
            "atomicCAS in a loop for other operations.",
        )
    packed = _PACKED.get(kind)
    dtype = np.dtype("u4") if kind in ("f16x2", "bf16x2") else np.dtype("u2") if packed else DTYPES[kind]
    wanted = isinstance(target, Register) and target.name in program.read
    base, offset, space = whole(program, where.base), where.offset, space_of(instruction)
    first = stored(program, operands[1], dtype)
    second = stored(program, operands[2], dtype) if operation == "cas" else None
    index = program.index[target.name] if wanted and isinstance(target, Register) else None
    register = DTYPES[target.type] if isinstance(target, Register) else dtype

    def step(batch: Batch, active: Active) -> None:
        view, at, known = locate(
            batch, active, instruction, space, base(batch), offset, dtype.itemsize, "atomic", dtype
        )
        _contention(batch, active, instruction, known.bytes)
        value = np.broadcast_to(first(batch, active), at.shape)
        other = None if second is None else np.broadcast_to(second(batch, active), at.shape)
        if packed is not None:
            old = _turns(view, at, lambda o, v, _: packed(o, v), value, None)
        elif index is None and operation in _UFUNCS:
            _UFUNCS[operation].at(view, at, value)  # type: ignore[attr-defined]
            return
        elif operation == "add" and dtype.kind in "iu":
            old = _running_sums(view, at, value)
        else:
            old = _turns(view, at, _COMBINE[operation], value, other)
        if index is not None:
            batch.registers[index] = scattered(batch.registers[index], widen(old, register), active)

    return step


def _contention(batch: Batch, active: Active, instruction: Instruction, address: np.ndarray) -> None:
    if space_of(instruction) != "shared":
        counts = batch.counters.at(batch.program.number(instruction.line))
        rows = requests.rows_of(address, active.lanes)
        if active.lanes is not None:
            rows = _own_values(rows, active)
        counts["global_atomic_contention"] += requests.most_equal(rows)


def _own_values(rows: np.ndarray, active: Active) -> np.ndarray:
    """Give lanes that take no part addresses of their own, so that they queue for nothing."""
    mask = active.warps_taking_part()
    return np.where(mask, rows, -1 - np.arange(rows.shape[1]))


def _running_sums(view: np.ndarray, at: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Integer additions with their old values, however many lanes share a word."""
    order = np.argsort(at, kind="stable")
    where, amount = at[order], value[order]
    new = np.empty(len(where), bool)
    new[:1] = True
    np.not_equal(where[1:], where[:-1], out=new[1:])
    total = np.cumsum(amount, dtype=view.dtype)
    before = total - amount
    group = np.cumsum(new) - 1
    old_sorted = view[where] + before - before[new][group]
    np.add.at(view, at, value)
    old = np.empty_like(old_sorted)
    old[order] = old_sorted
    return old


def _turns(view: np.ndarray, at: np.ndarray, combine, value: np.ndarray, other) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Lane after lane for each word: all first comers together, then all second comers, …"""
    order = np.argsort(at, kind="stable")
    where = at[order]
    new = np.empty(len(where), bool)
    new[:1] = True
    np.not_equal(where[1:], where[:-1], out=new[1:])
    position = np.arange(len(where))
    rank = position - np.maximum.accumulate(np.where(new, position, 0))
    old = np.empty(len(at), view.dtype)
    by_rank = np.argsort(rank, kind="stable")
    edges = np.searchsorted(rank[by_rank], np.arange(rank.max() + 2))
    for start, stop in pairwise(edges):
        lanes = order[by_rank[start:stop]]
        places = at[lanes]
        before = view[places]
        old[lanes] = before
        view[places] = combine(before, value[lanes], None if other is None else other[lanes])
    return old


def _of_two(function):  # type: ignore[no-untyped-def]
    return lambda old, value, _: function(old, value)


def _increment(old: np.ndarray, limit: np.ndarray, _: object) -> np.ndarray:
    return np.where(old >= limit, 0, old + 1).astype(old.dtype)


def _decrement(old: np.ndarray, limit: np.ndarray, _: object) -> np.ndarray:
    return np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype)


_COMBINE = {
    **{name: _of_two(function) for name, function in _UFUNCS.items()},
    "exch": lambda o, v, _: v,
    "cas": lambda o, v, new: np.where(o == v, new, o),
    "inc": _increment,
    "dec": _decrement,
}


def _half_add(old: np.ndarray, value: np.ndarray) -> np.ndarray:
    """f16 and f16x2: element by element, each rounded once."""
    return (old.view(np.float16) + value.view(np.float16)).view(old.dtype)


def _bfloat_add(old: np.ndarray, value: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return (old.view(ml_dtypes.bfloat16) + value.view(ml_dtypes.bfloat16)).view(old.dtype)


_PACKED = {"f16": _half_add, "f16x2": _half_add, "bf16": _bfloat_add, "bf16x2": _bfloat_add}
