"""Instructions in which the lanes of a warp exchange values: shuffle, vote, match, reduce.

These need no shared memory: a lane reads another lane's register. Each names the lanes that take part in a
*member mask*, and is right only if exactly those lanes (less the ones that have exited) arrive together with
the same mask (CUDA C++ Programming Guide, "Warp Shuffle Functions"). A GPU does not check that; this does.

None of them orders memory. Only bar.warp.sync (`__syncwarp()`) lets one lane see what another stored.

`compile_warp` turns an instruction into a `WarpOp` once; `WarpOp.apply` runs it for all warps, [W, 32] lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmcourse.vgpu.isa import DTYPES, WARP_SIZE, Instruction, Operand, Pair, Register

LANES = np.arange(WARP_SIZE)
LANE_BITS = np.uint32(1) << LANES.astype(np.uint32)

Values = Sequence[np.ndarray]
Run = Callable[["Members", Values], tuple[np.ndarray, ...]]


class WarpFault(Exception):
    """A warp instruction that its lanes may not carry out: which warp of the batch, which lane, and why.

    The machine, which knows line, block and thread, makes a `KernelFault` of it.

    kind     "divergent barrier": the mask names lanes that are elsewhere, or leaves out one that is here
             "uninitialised": the lane would receive a value that is undefined
    """

    def __init__(self, kind: str, warp: int, lane: int, what: str, why: str, fix: str) -> None:
        self.kind, self.warp, self.lane = kind, warp, lane
        self.what, self.why, self.fix = what, why, fix
        super().__init__(f"{what} (warp {warp}, lane {lane})")


@dataclass(frozen=True)
class WarpOp:
    """An instruction ready to run on whole warps.

    name           what CUDA C++ calls it, for messages
    sources        operands to evaluate, each as the PTX type at the same place in `source_types`
    destinations   registers that take the results; None for one that the program does not want
    flops          (counter, operations) of one execution by one warp
    """

    name: str
    sources: tuple[Operand, ...]
    source_types: tuple[str, ...]
    destinations: tuple[Register | None, ...]
    run: Run
    flops: tuple[str, int] | None = None

    def apply(
        self,
        active: np.ndarray,
        *values: np.ndarray | np.generic,
        exited: np.ndarray | None = None,
        undefined: Callable[[np.ndarray], None] | None = None,
    ) -> tuple[np.ndarray, ...]:
        """The results, one [W, 32] array for each destination; they mean nothing in inactive lanes.

        active      [W, 32] bool: the lanes that carry the instruction out
        values      one for each source: [W, 32], or a scalar where all lanes hold the same
        exited      [W, 32] bool: lanes that have returned or never existed; a mask may still name them
        undefined   called with the [W, 32] lanes whose result is undefined; without it that is a fault
        Raises      WarpFault.
        """
        members = Members(self.name, active, exited, undefined)
        arrays = [
            _as_type(np.asarray(value), DTYPES[type_])
            for value, type_ in zip(values, self.source_types, strict=True)
        ]
        results = self.run(members, arrays)
        return tuple(
            np.broadcast_to(_as_type(result, DTYPES[register.type]) if register else result, active.shape)
            for result, register in zip(results, self.destinations, strict=False)
        )


def compile_warp(instruction: Instruction) -> WarpOp | None:
    """The WarpOp of an instruction, None for one that is not a warp exchange or is not known."""
    compiler = _COMPILERS.get(instruction.opcode)
    return compiler(instruction) if compiler else None


class Members:
    """The lanes that take part: who is here, who has exited, and whom each lane's mask names."""

    def __init__(
        self,
        name: str,
        active: np.ndarray,
        exited: np.ndarray | None,
        undefined: Callable[[np.ndarray], None] | None,
    ) -> None:
        self.name, self.active, self.exited = name, active, exited
        self.undefined = undefined

    @property
    def active_bits(self) -> np.ndarray:
        """[W, 1] uint32."""
        return bits_of(self.active)

    def check(self, mask: np.ndarray) -> np.ndarray:
        """Check the member mask; return [W, 1] or [W, 32] uint32, the mask's lanes that are here."""
        here = self.active_bits
        if mask.ndim and not _same_in_rows(mask, self.active):
            return self._check_each(mask, here)
        mask = _any_row_value(mask, self.active)
        waited_for = mask if self.exited is None else mask & ~bits_of(self.exited)
        occupied = here != 0
        missing = np.where(occupied, waited_for & ~here, np.uint32(0))
        strangers = np.where(occupied, here & ~mask, np.uint32(0))
        if missing.any():
            self._missing(missing, np.broadcast_to(mask, missing.shape))
        if strangers.any():
            self._stranger(strangers, np.broadcast_to(mask, strangers.shape))
        return mask & here

    def _check_each(self, mask: np.ndarray, here: np.ndarray) -> np.ndarray:
        """Lanes with different masks: each mask is a group of its own, and its lanes must agree on it."""
        mask = np.broadcast_to(mask, self.active.shape)
        self_bit = np.where(self.active, LANE_BITS, np.uint32(0))
        strangers = self_bit & ~mask
        if strangers.any():
            self._stranger(strangers.max(axis=1, keepdims=True), _of_first(strangers != 0, mask))
        waited_for = mask if self.exited is None else mask & ~bits_of(self.exited)
        missing = np.where(self.active, waited_for & ~here, np.uint32(0))
        if missing.any():
            self._missing(_of_first(missing != 0, missing), _of_first(missing != 0, mask))
        for lane in range(WARP_SIZE):
            named = self.active & ((mask >> np.uint32(lane)) & np.uint32(1)).astype(bool)
            differs = named & self.active[:, [lane]] & (mask != mask[:, [lane]])
            if differs.any():
                warp, other = (int(i) for i in np.argwhere(differs)[0])
                raise WarpFault(
                    "divergent barrier",
                    warp,
                    other,
                    f"{self.name}: lane {other} of the warp names lane {lane} in its mask "
                    f"{int(mask[warp, other]):#010x}, but that came with {int(mask[warp, lane]):#010x}",
                    "All lanes named in a member mask must execute the instruction with that same mask.",
                    "computing the mask once, with __ballot_sync() before the branch, for all its lanes.",
                )
        return mask & here

    def _missing(self, missing: np.ndarray, mask: np.ndarray) -> None:
        warp = int(np.flatnonzero(missing)[0])
        lane = _lowest(int(missing[warp, 0]))
        here = int(self.active_bits[warp, 0])
        raise WarpFault(
            "divergent barrier",
            warp,
            _lowest(here),
            f"{self.name} with the mask {int(mask[warp, 0]):#010x} waits for lane {lane} of the warp, "
            f"which is not here: only the lanes {here:#010x} are",
            "Every lane named in the mask must reach the same instruction; in a branch that some lanes skip, "
            "the result is undefined or the warp waits for ever.",
            "moving the call out of the branch, or naming only the lanes that enter it "
            "(unsigned mask = __ballot_sync(0xffffffff, condition) before the branch).",
        )

    def _stranger(self, strangers: np.ndarray, mask: np.ndarray) -> None:
        warp = int(np.flatnonzero(strangers)[0])
        lane = _lowest(int(strangers[warp, 0]))
        raise WarpFault(
            "divergent barrier",
            warp,
            lane,
            f"{self.name} with the mask {int(mask[warp, 0]):#010x} is executed by lane {lane} of the warp, "
            "which the mask leaves out",
            "A lane must name itself in the member mask, or its result is undefined.",
            "the mask 0xffffffff where the whole warp takes part, else one with every lane that gets there.",
        )

    def report_undefined(self, lanes: np.ndarray, sources: np.ndarray) -> None:
        """Tell that `lanes` ([W, 32] bool) receive the register of `sources`, lanes that are not here."""
        if self.undefined is not None:
            self.undefined(lanes)
            return
        warp, lane = (int(i) for i in np.argwhere(lanes)[0])
        source = int(np.broadcast_to(sources, lanes.shape)[warp, lane])
        gone = self.exited is not None and bool(self.exited[warp, source])
        raise WarpFault(
            "uninitialised",
            warp,
            lane,
            f"{self.name}: lane {lane} of the warp reads the value of lane {source}, which "
            + ("has exited or is beyond the end of the block" if gone else "does not take part"),
            "The value of a lane that does not execute the shuffle is undefined.",
            "letting every lane of the warp reach the shuffle with a neutral value (0 for a sum), "
            "or a width that keeps the exchange among the lanes of the mask.",
        )


def bits_of(lanes: np.ndarray) -> np.ndarray:
    """[W, 32] bool → [W, 1] uint32 with bit l for lane l."""
    return np.packbits(lanes, axis=1, bitorder="little").view("<u4")


def _lanes_of(bits: np.ndarray) -> np.ndarray:
    """[W, 1] or [W, 32] uint32 → [W, 32] bool: whether each lane is in its own row's bits."""
    return (bits & LANE_BITS) != 0


def _as_type(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if value.dtype == dtype:
        return value
    if value.dtype.itemsize == dtype.itemsize and dtype.kind != "b" and value.dtype.kind != "b":
        return value.view(dtype)
    if value.ndim == 0 and value.dtype.kind in "iu" and dtype.kind in "iu":
        return np.asarray(int(value) & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)
    return value.astype(dtype)


def _same_in_rows(values: np.ndarray, active: np.ndarray) -> bool:
    """Whether the active lanes of each warp hold the same."""
    if (values == values[:, :1]).all():
        return True
    return bool((~active | (values == _any_row_value(values, active))).all())


def _any_row_value(values: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The value of each row's first active lane, [W, 1]; a scalar stays one."""
    return _of_first(active, values) if values.ndim else values


def _of_first(lanes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[W, 1]: `values` in each row's first lane of `lanes` (the first lane of a row without any)."""
    return np.take_along_axis(np.broadcast_to(values, lanes.shape), lanes.argmax(axis=1)[:, None], axis=1)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _registers(operand: Operand) -> tuple[Register | None, Register | None]:
    if isinstance(operand, Pair):
        return operand.first, operand.second
    return (operand if isinstance(operand, Register) else None), None


# Shuffles


def _shfl(instruction: Instruction) -> WarpOp | None:
    """shfl{.sync}.{up, down, bfly, idx}.b32 d|p, a, b, c{, membermask}.

    c packs two things: bits 0–4 the highest (for `up`, lowest) lane to read from, bits 8–12 a mask that cuts
    the warp into segments. `__shfl_down_sync(…, width)` gives (32 − width) << 8 | 31.
    """
    sync = instruction.has("sync")
    mode = next((m for m in instruction.modifiers if m in ("up", "down", "bfly", "idx")), None)
    if mode is None or len(instruction.operands) != 4 + sync:
        return None

    def run(members: Members, values: Values) -> tuple[np.ndarray, ...]:
        here = _lanes_of(members.check(values[3])) if sync else members.active
        source, inside = shuffle_source(mode, values[1], values[2])
        everyone = bool(here.all())
        if not everyone:
            wanted = np.take_along_axis(here, np.broadcast_to(source, here.shape), axis=1)
            lost = members.active & ~wanted
            if lost.any():
                members.report_undefined(lost, source)
        value = values[0]
        if value.ndim == 0:
            return value, inside
        if source.ndim == 1:
            return value[:, source], inside
        return np.take_along_axis(value, source, axis=1), inside

    return WarpOp(
        name="__shfl" + {"idx": "", "bfly": "_xor"}.get(mode, f"_{mode}") + ("_sync" if sync else ""),
        sources=instruction.operands[1:],
        source_types=("b32", "u32", "u32", "u32")[: 3 + sync],
        destinations=_registers(instruction.operands[0]),
        run=run,
    )


def shuffle_source(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which lane each lane reads from, and whether that lies in its segment (if not, it reads itself).

    b and c are scalars or [W, 32]; so are the results, [32] or [W, 32]. PTX ISA, "shfl.sync".
    """
    amount = (b & np.uint32(31)).astype(np.int64)
    clamp = (c & np.uint32(31)).astype(np.int64)
    segment = ((c >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
    low = LANES & segment
    limit = low | (clamp & ~segment)
    if mode == "up":
        source = LANES - amount
        inside = source >= limit
    else:
        source = {
            "down": LANES + amount,
            "bfly": LANES ^ amount,
            "idx": low | (amount & ~segment),
        }[mode]
        inside = source <= limit
    return np.where(inside, source, LANES), inside


# Votes


def _vote(instruction: Instruction) -> WarpOp | None:
    """vote{.sync}.{all, any, uni}.pred p, {!}a{, membermask}, and vote{.sync}.ballot.b32 d, …"""
    sync = instruction.has("sync")
    mode = next((m for m in instruction.modifiers if m in ("all", "any", "uni", "ballot")), None)
    if mode is None or len(instruction.operands) != 2 + sync:
        return None

    def run(members: Members, values: Values) -> tuple[np.ndarray, ...]:
        group = members.check(values[1]) if sync else members.active_bits
        holds = bits_of(np.broadcast_to(values[0], members.active.shape)) & group
        if mode == "ballot":
            return (holds,)
        if mode == "any":
            return (holds != 0,)
        return (holds == group if mode == "all" else (holds == group) | (holds == 0),)

    return WarpOp(
        name=f"__{mode}" + ("_sync" if sync else ""),
        sources=instruction.operands[1:],
        source_types=("pred", "u32")[: 1 + sync],
        destinations=_registers(instruction.operands[0])[:1],
        run=run,
    )


def _activemask(instruction: Instruction) -> WarpOp:
    return WarpOp(
        name="__activemask",
        sources=(),
        source_types=(),
        destinations=_registers(instruction.operands[0])[:1],
        run=lambda members, values: (members.active_bits,),
    )


def _elect(instruction: Instruction) -> WarpOp | None:
    """elect.sync d|p, membermask: one lane of the mask, here the lowest, gets p; all get its number."""
    if len(instruction.operands) != 2:
        return None

    def run(members: Members, values: Values) -> tuple[np.ndarray, ...]:
        group = members.check(values[0])
        leader = _lanes_of(group & (~group + np.uint32(1)))
        number = np.bitwise_count((group & (~group + np.uint32(1))) - np.uint32(1)).astype(np.uint32)
        return number, leader

    return WarpOp("elect.sync", instruction.operands[1:], ("u32",), _registers(instruction.operands[0]), run)


# Match


def _match(instruction: Instruction) -> WarpOp | None:
    """match.any.sync d, a, membermask: lanes that hold my value. match.all.sync d|p: all of them, or none."""
    mode = next((m for m in instruction.modifiers if m in ("all", "any")), None)
    type_ = next((m for m in instruction.modifiers if m in ("b32", "b64")), None)
    if mode is None or type_ is None or len(instruction.operands) != 3:
        return None

    def run(members: Members, values: Values) -> tuple[np.ndarray, ...]:
        group = members.check(values[1])
        value = np.broadcast_to(values[0], members.active.shape)
        if mode == "any":
            equal = np.zeros(value.shape, np.uint32)
            for lane in range(WARP_SIZE):
                equal |= np.where(value == value[:, [lane]], LANE_BITS[lane], np.uint32(0))
            return (equal & group,)
        if group.shape[-1] == 1:
            same = (~_lanes_of(group) | (value == _of_first(_lanes_of(group), value))).all(axis=1)[:, None]
        else:
            same = np.ones(value.shape, bool)
            for lane in range(WARP_SIZE):
                same &= ((group & LANE_BITS[lane]) == 0) | (value == value[:, [lane]])
        return np.where(same, group, np.uint32(0)), same

    return WarpOp(
        name=f"__match_{mode}_sync",
        sources=instruction.operands[1:],
        source_types=(type_, "u32"),
        destinations=_registers(instruction.operands[0])[: 1 if mode == "any" else 2],
        run=run,
    )


# Reductions

_REDUCTIONS: dict[str, tuple[np.ufunc, Callable[[np.dtype], object]]] = {
    "add": (np.add, lambda dtype: 0),
    "min": (np.minimum, lambda dtype: np.inf if dtype.kind == "f" else np.iinfo(dtype).max),
    "max": (np.maximum, lambda dtype: -np.inf if dtype.kind == "f" else np.iinfo(dtype).min),
    "and": (np.bitwise_and, lambda dtype: np.iinfo(dtype).max),
    "or": (np.bitwise_or, lambda dtype: 0),
    "xor": (np.bitwise_xor, lambda dtype: 0),
}
"""Operation → its ufunc, and the value that changes nothing."""


def _redux(instruction: Instruction) -> WarpOp | None:
    """redux.sync.op{.abs}{.NaN}.type d, a, membermask. Without .NaN any number is preferred to NaN."""
    operation = next((m for m in instruction.modifiers if m in _REDUCTIONS), None)
    if operation is None or instruction.type not in ("s32", "u32", "b32", "f32"):
        return None
    if len(instruction.operands) != 3:
        return None
    ufunc, neutral_of = _REDUCTIONS[operation]
    dtype = DTYPES[instruction.type]
    absolute, keeps_nan = instruction.has("abs"), instruction.has("NaN")
    if dtype.kind == "f" and not keeps_nan:
        ufunc = {"min": np.fmin, "max": np.fmax}[operation]
    neutral = np.asarray(neutral_of(dtype)).astype(dtype)

    def run(members: Members, values: Values) -> tuple[np.ndarray, ...]:
        group = members.check(values[1])
        value = np.broadcast_to(np.abs(values[0]) if absolute else values[0], members.active.shape)

        def reduce(lanes: np.ndarray) -> np.ndarray:
            result = ufunc.reduce(np.where(lanes, value, neutral), axis=1, keepdims=True, dtype=dtype)
            if dtype.kind != "f":
                return result
            # The hardware's NaN is the canonical one; nothing but NaN gives NaN.
            nothing = (np.isnan(value) | ~lanes).all(axis=1, keepdims=True)
            return np.where(nothing | np.isnan(result), CANONICAL_NAN, result)

        if group.shape[-1] == 1:
            return (reduce(_lanes_of(group)),)
        result = np.zeros(value.shape, dtype)
        for lane in range(WARP_SIZE):
            result[:, lane] = reduce(_lanes_of(group[:, [lane]]))[:, 0]
        return (result,)

    return WarpOp(
        name=f"__reduce_{operation}_sync",
        sources=instruction.operands[1:],
        source_types=(instruction.type, "u32"),
        destinations=_registers(instruction.operands[0])[:1],
        run=run,
    )


CANONICAL_NAN = np.uint32(0x7FFFFFFF).view(np.float32)

_COMPILERS: dict[str, Callable[[Instruction], WarpOp | None]] = {
    "shfl": _shfl,
    "vote": _vote,
    "match": _match,
    "redux": _redux,
    "activemask": _activemask,
    "elect": _elect,
}
