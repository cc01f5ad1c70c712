"""Matrix fragments between memory and registers: wmma.load, wmma.store, ldmatrix, stmatrix as machine steps.

Each request of a fragment's plan is one ordinary access by the lanes of a warp, so that bounds, counters and
the watch over shared memory are those of any load or store.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu.access import Kind, locate, space_of, whole, widen
from llmcourse.vgpu.fragments import FragmentPlan, Request, fragment_accesses
from llmcourse.vgpu.isa import DTYPES, WARP_SIZE, Instruction, Register
from llmcourse.vgpu.lanes import Active, active_lanes, scattered
from llmcourse.vgpu.matrix import check_whole_warps

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Program, Step


def compile_tile(program: Program, instruction: Instruction) -> Step | None:
    """The step of a fragment's load or store, None for other instructions."""
    plan = fragment_accesses(instruction)
    if plan is None:
        return None
    base, space = whole(program, plan.pointer.base), space_of(instruction)
    stride = None if plan.stride is None else program.fetch(plan.stride)
    unit = np.dtype(f"u{plan.itemsize}")
    addresses = _Addresses(plan, instruction)

    def accesses(batch: Batch, active: Active, kind: Kind, data: list[np.ndarray] | None) -> list[np.ndarray]:
        """Carry out the requests; return what was loaded, [warps, 32, count] for each."""
        check_whole_warps(plan.name, active.warps_taking_part())
        everyone = replace(active, lanes=None) if active.sparse else active
        step = np.uint64(plan.default_stride) if stride is None else stride(batch, everyone)
        loaded = []
        for number, (request, where) in enumerate(
            zip(plan.requests, addresses.of(batch, active, base(batch), step), strict=True)
        ):
            some = _first_lanes(batch, active, request.lanes)
            values = None
            if data is not None:
                values = [data[number][:, : request.lanes, j].reshape(-1) for j in range(request.count)]
            view, index, _ = locate(
                batch, some, instruction, space, where, 0, request.count * plan.itemsize, kind, unit, values
            )
            if values is not None:
                for j, value in enumerate(values):
                    view[index + j if j else index] = value
                continue
            found = view[index[:, None] + np.arange(request.count)].reshape(-1, request.lanes, request.count)
            if request.lanes < WARP_SIZE:
                full = np.zeros((len(found), WARP_SIZE, request.count), unit)
                full[:, : request.lanes] = found
                found = full
            loaded.append(found)
        return loaded

    if plan.store:
        fetches = [program.fetch(part) for part in plan.parts if part is not None]

        def store(batch: Batch, active: Active) -> None:
            parts = []
            for fetch in fetches:
                value = fetch(batch, active)
                if not isinstance(value, np.ndarray):
                    value = np.full(active.threads, value)
                elif active.lanes is not None and not active.sparse:
                    value = value[active.lanes]
                parts.append(value.reshape(-1, WARP_SIZE))
            accesses(batch, active, "store", plan.scatter(parts))

        return store

    targets = [
        (program.index[p.name], DTYPES[p.type]) if isinstance(p, Register) and p.name != "_" else None
        for p in plan.parts
    ]

    def load(batch: Batch, active: Active) -> None:
        loaded = accesses(batch, active, "load", None)
        for target, value in zip(targets, plan.assemble(loaded), strict=True):
            if target is not None:
                index, dtype = target
                new = widen(np.ascontiguousarray(value).reshape(-1), dtype)
                batch.registers[index] = scattered(batch.registers[index], new, active)

    return load


def _first_lanes(batch: Batch, active: Active, lanes: int) -> Active:
    """The first lanes of each active warp: those whose addresses ldmatrix takes."""
    if lanes == WARP_SIZE:
        return active
    found = active.cache.get(("first", lanes))
    if not isinstance(found, Active):
        first = np.arange(batch.count) % WARP_SIZE < lanes
        found = active.cache["first", lanes] = active_lanes(active.mask & first, batch.all_live.threads)
    return found


class _Addresses:
    """Every lane's address for each request, kept for registers seen before, and checked once."""

    def __init__(self, plan: FragmentPlan, instruction: Instruction) -> None:
        self.plan, self.instruction = plan, instruction

    def of(
        self, batch: Batch, active: Active, base: np.ndarray | int, stride: np.ndarray | np.generic
    ) -> list[np.ndarray]:
        key = (id(self), id(base), id(stride) if isinstance(stride, np.ndarray) else int(stride))
        known = active.cache.get(key)
        if isinstance(known, tuple) and known[0] is base and (known[1] is stride or known[1] == int(stride)):
            return known[2]  # type: ignore[no-any-return]
        pointer = np.asarray(base).astype(np.int64) + self.plan.pointer.offset
        steps = np.asarray(stride).astype(np.int64) * self.plan.itemsize
        if self.plan.stride_alignment > 1:
            self._check(batch, active, pointer, steps)
        made = [self._lanes(batch, pointer, steps, request) for request in self.plan.requests]
        kept = stride if isinstance(stride, np.ndarray) else int(stride)
        active.cache[key] = (base, kept, made)
        return made

    def _lanes(self, batch: Batch, pointer: np.ndarray, steps: np.ndarray, request: Request) -> np.ndarray:
        warps = batch.count // WARP_SIZE
        major, minor = (np.tile(a, warps) for a in (request.major, request.minor))
        return pointer + (major * steps + minor * self.plan.itemsize)

    def _check(self, batch: Batch, active: Active, pointer: np.ndarray, steps: np.ndarray) -> None:
        """A tile's pointer and stride: the same in all lanes of a warp, and aligned."""
        rows = np.asarray(active.by_warp().any(axis=1))
        for what, value, alignment in (
            ("pointer", pointer, self.plan.pointer_alignment),
            ("stride", steps, self.plan.stride_alignment),
        ):
            each = np.broadcast_to(value, batch.count).reshape(-1, WARP_SIZE)
            unlike = rows[:, None] & (each != each[:, :1])
            if unlike.any():
                raise batch.fault(
                    "unsupported",
                    f"lanes of a warp call {self.plan.name} with different {what}s",
                    "The whole warp moves one tile: every lane must give the same pointer and stride.",
                    "an address computed from the number of the warp, threadIdx.x / 32, not of the thread.",
                    self.instruction.line,
                    int(np.flatnonzero(unlike.reshape(-1))[0]),
                )
            uneven = np.logical_and(rows, each[:, 0] % alignment != 0)
            if uneven.any():
                warp = int(np.flatnonzero(uneven)[0])
                raise batch.fault(
                    "misaligned",
                    f"{self.plan.name} with a {what} that is no multiple of {alignment} bytes, "
                    f"{int(each[warp, 0]) % alignment} past",
                    "wmma takes tiles that start at multiples of 32 bytes (8 for int8), with rows that are "
                    "multiples of 16 bytes apart.",
                    "__align__(32) on a shared array, and padding of rows by 16 bytes (8 halves, 4 floats).",
                    self.instruction.line,
                    warp * WARP_SIZE,
                )
