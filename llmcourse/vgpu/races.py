"""Data races and uninitialised reads in shared memory, found while a kernel runs.

Two accesses to the same byte *race* when different threads of a block make them, nothing orders them, and
not both are loads or both atomics. `__syncthreads()` orders everything before it, in its block, with
everything after it; `__syncwarp()` does so within its warp. Running in lockstep orders nothing: on a GPU the
warps, and since Volta the lanes of a warp, go on at their own pace. Two stores of the same value are let
pass: many threads that raise one flag are common and harmless.

Whether a race exists does not depend on the order of the accesses, so the monitor only writes them down and
looks when a barrier ends the *epoch*. Most epochs need no look at single lanes:

- loads alone, or atomics alone, cannot race; nor can accesses whose address intervals do not meet;
- blocks mostly do the same thing: where all blocks access the same addresses by the same threads, one stands
  for all, and only the others (at the edges of a grid, say) are looked at themselves;
- a loop repeats itself: an epoch of the same accesses as one found clean is clean.

Else every access is looked at, by the rule in `epochs`.

What this does not know: order by locks or flags that threads spin on, and barriers of some warps only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmcourse.vgpu.epochs import Access, Epoch, Kind, interval, meeting, needed, store_one_value
from llmcourse.vgpu.faults import Index3, KernelFault, index_text
from llmcourse.vgpu.isa import WARP_SIZE, Instruction, SourceLine
from llmcourse.vgpu.patterns import Patterns
from llmcourse.vgpu.written import Written

CHUNK = 1 << 22
"""Bytes, and lane accesses, that one look at an epoch may work on at a time."""
REMEMBERED = 512
"""Verdicts kept for reuse."""


class SharedMonitor:
    """Watches the shared memory of a batch of blocks.

    blocks, threads   blocks in the batch, and threads of each, padded to whole warps
    nbytes            shared memory of a block
    block_index       number of a block in the batch → blockIdx; `thread_index` likewise → threadIdx
    symbols           what to call the arrays: name → (offset, bytes)
    place             line of an instruction → the line to name (of a header's, the one that used it)

    Arrays passed in must not change afterwards: the monitor keeps them until the epoch's end, and takes an
    array that it has seen for the same addresses.
    """

    def __init__(
        self,
        blocks: int,
        nbytes: int,
        threads: int,
        *,
        block_index: Callable[[int], Index3] | None = None,
        thread_index: Callable[[int], Index3] | None = None,
        symbols: Mapping[str, tuple[int, int]] | None = None,
        place: Callable[[SourceLine | None], SourceLine | None] | None = None,
    ) -> None:
        self.blocks, self.nbytes, self.threads = blocks, nbytes, threads
        self._block_index = block_index or (lambda b: (b, 0, 0))
        self._thread_index = thread_index or (lambda t: (t, 0, 0))
        self._symbols = dict(symbols or {})
        self._place = place or (lambda line: line)
        self._written = Written(blocks, nbytes)
        self._patterns = Patterns(blocks, threads)
        self._clean: set[tuple[object, ...]] = set()
        self._log: list[Access] = []
        self._logged: set[tuple[object, ...]] = set()
        self._writes = False
        self._clock = 0
        self._since: np.ndarray | None = None
        self._warp_epoch: int | np.ndarray = 0
        self._warp_barriers = 0
        self._loose, self._loose_limit = 0, CHUNK

    def access(
        self,
        kind: Kind,
        base: np.ndarray | np.generic | int,
        offset: int,
        size: int,
        lanes: np.ndarray | None,
        instruction: Instruction,
        values: object = None,
    ) -> None:
        """Note one access by many lanes, lane l being thread l % threads of block l // threads.

        base     byte address within the block's shared memory: one for each lane of the batch, one for each
                 of `lanes`, or one for all
        lanes    ascending numbers of the lanes that take part, or a mask; None if all do
        values   what is stored: like base, or a sequence of such for a vector; None if unknown
        Raises   KernelFault "uninitialised" for a load of bytes that nobody has written.
        """
        pattern = self._patterns.find(base, lanes)
        if not pattern.size:
            return
        epoch = self._warp_epoch
        if kind != "store":
            key = (kind, pattern.serial, offset, size, self._warp_barriers)
            if key in self._logged:
                return
            if not (kind == "atomic" and "exch" in instruction.modifiers):
                missing = self._written.missing(pattern, offset, size)
                if missing is not None:
                    raise self._uninitialised(kind, *missing, size, instruction)
            self._logged.add(key)
        if kind != "load":
            self._writes = True
            self._written.mark(pattern, offset, size)
        self._log.append(
            Access(self._clock, kind, pattern, offset, size, instruction, epoch, values, lanes, self.threads)
        )
        self._clock += 1
        self._loose += pattern.loose
        if self._loose > self._loose_limit:
            self._thin_out()

    def barrier(self, blocks: np.ndarray | None = None) -> None:
        """bar.sync completed for these blocks ([blocks] bool), or for all. Raises KernelFault "race"."""
        whole = blocks is None or bool(blocks.all())
        if whole and self._since is None:
            self._look(self._log, None)
            self._reset()
            return
        passing = np.ones(self.blocks, bool) if blocks is None else blocks
        since = np.zeros(self.blocks, np.int64) if self._since is None else self._since
        for start in np.unique(since[passing]).tolist():
            self._look([a for a in self._log if a.time >= start], passing & (since == start))
        since = np.where(passing, self._clock, since)
        self._log = [a for a in self._log if (a.pattern.present() & (since <= a.time)).any()]
        self._logged.clear()
        self._since = since
        if not self._log:
            self._reset()

    def warp_barrier(self, warps: np.ndarray | None = None) -> None:
        """bar.warp.sync completed for these warps ([blocks * threads // 32] bool), or for all."""
        self._warp_barriers += 1
        if warps is None or bool(warps.all()):
            self._warp_epoch = self._warp_epoch + 1
        else:
            epochs = self._warp_epoch
            if isinstance(epochs, int):
                epochs = np.full(self.blocks * self.threads // WARP_SIZE, epochs, np.int64)
            self._warp_epoch = epochs + warps

    def finish(self) -> None:
        """The kernel ended: look at what came after the last barrier. Raises KernelFault "race"."""
        self.barrier(None)

    def _reset(self) -> None:
        self._log = []
        self._logged.clear()
        self._writes = False
        self._clock, self._since = 0, None
        self._warp_epoch = 0
        self._loose, self._loose_limit = 0, CHUNK

    # ── looking at an epoch ──

    def _look(self, log: Sequence[Access], blocks: np.ndarray | None) -> None:
        """Raise if accesses of `log` race in one of the blocks ([blocks] bool, None for all)."""
        if not self._writes:
            return
        key: tuple[object, ...] | None = None
        if blocks is None and all(isinstance(a.epoch, int) for a in log):
            key = tuple((a.kind, a.pattern.serial, a.offset, a.size, a.epoch) for a in log)
            if key in self._clean:
                return
        by_value = False
        for group in meeting(log):
            if len({a.kind for a in group}) == 1 and group[0].kind != "store":
                continue
            by_value |= self._look_at_lanes(group, blocks)
        if key is not None and not by_value:
            if len(self._clean) >= REMEMBERED:
                self._clean.clear()
            self._clean.add(key)

    def _look_at_lanes(self, group: list[Access], blocks: np.ndarray | None) -> bool:
        """Raise if these accesses race. True if only equal values of stores spoke against it."""
        among = np.arange(self.blocks) if blocks is None else np.flatnonzero(blocks)
        odd = np.zeros(self.blocks, bool)
        for access in group:
            if access.pattern.odd is not None:
                odd[access.pattern.odd] = True
            if isinstance(access.epoch, np.ndarray):
                rows = access.epoch.reshape(self.blocks, -1)
                odd |= (rows != rows[self._patterns.model]).any(axis=1)
        alike = among[~odd[among]]
        by_value = False
        for chunk in self._chunks(group, np.concatenate([alike[:1], among[odd[among]]])):
            bad, unsure = Epoch(group, chunk, self.threads).verdict(values=False)
            if bad is not None:
                raise self._race(group, int(chunk[bad]))
            by_value |= unsure
        if by_value and not store_one_value(group):
            for chunk in self._chunks(group, among):
                bad, _ = Epoch(group, chunk, self.threads).verdict(values=True)
                if bad is not None:
                    raise self._race(group, int(chunk[bad]))
        return by_value

    def _chunks(self, group: Sequence[Access], blocks: np.ndarray) -> list[np.ndarray]:
        low, high = interval(group)
        cost = max(high - low, sum(a.size for a in group) * self.threads)
        step = max(1, CHUNK // max(1, cost))
        return [blocks[i : i + step] for i in range(0, len(blocks), step)]

    def _thin_out(self) -> None:
        """Forget repeated loads and atomics of blocks that share no pattern: two lanes a byte tell as much.

        Of all loads (atomics) of one granule in one warp epoch it is enough to keep one, and one by another
        warp, or else by another lane: the same warps or lanes stay involved in the same kinds of access.
        """
        for kind in ("load", "atomic"):
            group = [a for a in self._log if a.kind == kind and a.pattern.loose]
            if group:
                kept = iter(needed(group, self.threads))
                self._log = [next(kept) if a.kind == kind and a.pattern.loose else a for a in self._log]
        self._log = [a for a in self._log if a.pattern.size]
        self._loose = sum(a.pattern.loose for a in self._log)
        self._loose_limit = max(CHUNK, 2 * self._loose)

    # ── what was found ──

    def _race(self, group: list[Access], block: int) -> KernelFault:
        epoch = Epoch(group, np.array([block]), self.threads, values=True)
        first, second = epoch.first_pair()
        a, b = group[first.access], group[second.access]
        one_warp = first.thread // WARP_SIZE == second.thread // WARP_SIZE
        low = max(first.address, second.address)
        size = min(first.address + a.size, second.address + b.size) - low
        element = self._name(low, min(a.size, b.size), size)
        other = index_text(self._thread_index(first.thread))
        doing = {"load": "reads", "store": "writes", "atomic": "updates"}
        done = {"load": "read", "store": "wrote", "atomic": "atomically updated"}
        barrier = "__syncwarp()" if one_warp else "__syncthreads()"
        if a.time == b.time:
            what = f"race in shared memory: this thread and thread {other} write {element} in one instruction"
        else:
            what = (
                f"race in shared memory: this thread {doing[b.kind]} {element}, which thread {other} "
                f"{done[a.kind]}{_at(self._place(a.instruction.line))}, with no {barrier} between"
            )
        why = (
            "The lanes of a warp need not run in step; nothing says which of the two accesses comes first."
            if one_warp
            else "Warps run in any order; nothing says which of the two accesses comes first."
        )
        return KernelFault(
            "race",
            what,
            why,
            self._advice(a, b, barrier),
            line=self._place(b.instruction.line),
            block=self._block_index(block),
            thread=self._thread_index(second.thread),
        )

    def _uninitialised(
        self, kind: Kind, block: int, thread: int, address: int, size: int, instruction: Instruction
    ) -> KernelFault:
        verb = "reads" if kind == "load" else "updates"
        return KernelFault(
            "uninitialised",
            f"this thread {verb} {self._name(address, size, size)}, which nobody has written",
            "Shared memory starts with whatever an earlier block left there; it is not zero.",
            "storing to every element that is read later (the tail of a tile and the padding too), then "
            "__syncthreads().",
            line=self._place(instruction.line),
            block=self._block_index(block),
            thread=self._thread_index(thread),
        )

    def _advice(self, a: Access, b: Access, barrier: str) -> str:
        first, second = self._place(a.instruction.line), self._place(b.instruction.line)
        if a.kind == b.kind == "store":
            return "one element for each thread, one writing thread (if (threadIdx.x == 0)), or an atomic."
        if first is not None and second is not None and first.line == second.line:
            if a.kind == "load":
                return f"splitting the line: read into a variable, {barrier}, then write."
            return f"{barrier} after line {first.line}, before the loop comes back to it."
        between = (
            f" between line {first.line} and line {second.line}" if first and second else " between them"
        )
        if first and second and first.line > second.line:
            between = f" after line {first.line}, before the loop comes back to line {second.line}"
        return f"{barrier}{between}."

    def _name(self, address: int, itemsize: int, size: int) -> str:
        """`element 5 of tile (bytes 20–23)`, an element being as large as the smaller access."""
        for name, (start, length) in self._symbols.items():
            if start <= address < start + length:
                inside = address - start
                return f"element {inside // itemsize} of {name} (bytes {inside}–{inside + size - 1})"
        return f"bytes {address}–{address + size - 1} of shared memory"


def _at(line: SourceLine | None) -> str:
    return f" at {line}" if line else ""
