"""The shared-memory monitor against a search of all pairs of accesses, and on kernels' usual patterns."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from cpu_time import least
from running import run

from llmcourse.vgpu import patterns, races, written
from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.isa import Instruction, SourceLine
from llmcourse.vgpu.races import SharedMonitor


def at(line: int, opcode: str = "ld", *modifiers: str) -> Instruction:
    return Instruction(opcode, modifiers, (), None, SourceLine("k.cu", line), "")


# ── all pairs, one at a time ──


@dataclass
class Touch:
    """One lane's access to one byte."""

    time: int
    line: int
    block: int
    thread: int
    epoch: int
    kind: str
    value: int | None


class AllPairs:
    """What the monitor must find, byte by byte and pair by pair."""

    def __init__(self, blocks: int, nbytes: int, threads: int) -> None:
        self.blocks, self.threads = blocks, threads
        self.written = np.zeros((blocks, nbytes), bool)
        self.touches: dict[tuple[int, int], list[Touch]] = {}
        self.epoch = [0] * (blocks * threads // 32)
        self.now = 0

    def access(self, kind, addresses, lanes, size, line, values) -> set:
        """(kind, block, thread, line) of each lane that reads what nobody wrote."""
        missing = set()
        for n, lane in enumerate(lanes):
            b, t = divmod(int(lane), self.threads)
            for j in range(size):
                byte = int(addresses[n]) + j
                if kind != "store" and not self.written[b, byte]:
                    missing.add(("uninitialised", b, t, line))
                value = None if values is None or kind != "store" else int(values[n][j])
                self.touches.setdefault((b, byte), []).append(
                    Touch(self.now, line, b, t, self.epoch[lane // 32], kind, value)
                )
        if kind != "load":
            for n, lane in enumerate(lanes):
                a = int(addresses[n])
                self.written[int(lane) // self.threads, a : a + size] = True
        self.now += 1
        return missing

    def barrier(self, passing) -> set:
        """("race", block, thread, line) of each conflicting pair's later access; forgets those blocks."""
        found = set()
        for (block, byte), touches in list(self.touches.items()):
            if not passing[block]:
                continue
            for i, a in enumerate(touches):
                for b in touches[:i]:
                    if conflict(a, b):
                        found.add(("race", block, a.thread, a.line))
                        found |= {("race", block, b.thread, b.line)} if a.time == b.time else set()
            del self.touches[block, byte]
        return found


def conflict(a: Touch, b: Touch) -> bool:
    if a.thread == b.thread or (a.thread // 32 == b.thread // 32 and a.epoch != b.epoch):
        return False
    if a.kind == b.kind == "store":
        return a.value is None or a.value != b.value
    return a.kind != b.kind or a.kind == "store"


def random_program(rng: random.Random, steps: int = 14) -> set:
    """Run one random program on both, until the first finding; return the search's."""
    blocks, threads, nbytes = rng.choice([1, 2, 3, 5]), rng.choice([32, 64]), 1040
    lanes_all = np.arange(blocks * threads)
    thread, block = lanes_all % threads, lanes_all // threads
    monitor = SharedMonitor(blocks, nbytes, threads)
    truth = AllPairs(blocks, nbytes, threads)
    bases: list = []
    masks: list = [None, None, None, np.flatnonzero(thread < 20), np.flatnonzero(thread % 2 == 0)]
    masks += [np.flatnonzero(thread == 3), np.flatnonzero(thread < 32)]
    masks.append(
        np.flatnonzero(np.random.default_rng(rng.random().__hash__() % 2**32).random(len(thread)) < 0.5)
    )
    masks.append(np.flatnonzero((block != blocks - 1) | (thread < 5)))
    masks.append(thread < 7)
    whole = rng.random() < 0.8
    conflicts = rng.random() < 0.5

    def step(index: int) -> set:
        action = rng.choices(["access", "barrier", "warps", "some"], [6, 2.5, 1.5, 0 if whole else 1.5])[0]
        if action == "barrier":
            expected = truth.barrier([True] * blocks)
            return compare(expected, lambda: monitor.barrier(None))
        if action == "some":
            passing = np.array([rng.random() < 0.5 for _ in range(blocks)])
            return compare(truth.barrier(passing), lambda: monitor.barrier(passing))
        if action == "warps":
            warps = None
            if rng.random() < 0.7:
                warps = np.array([rng.random() < 0.6 for _ in range(blocks * threads // 32)])
                if rng.random() < 0.5:
                    warps = np.tile(warps[: threads // 32], blocks)
            truth.epoch = [e + (warps is None or bool(warps[i])) for i, e in enumerate(truth.epoch)]
            monitor.warp_barrier(warps)
            return set()
        kind = rng.choices(["load", "store", "atomic"], [5, 4, 1])[0]
        size = rng.choice([4, 4, 4, 1, 2, 8, 16])
        if bases and rng.random() < 0.5:
            base = rng.choice(bases)
        else:
            shape = rng.choices(["own", "one", "turned", "row", "random", "odd"], [6, 1, 1, 1, 0.5, 1])[0]
            base = {
                "own": lambda: thread * 16,
                "one": lambda: rng.choice([np.uint32(16 * rng.randrange(4)), 16 * rng.randrange(4)]),
                "turned": lambda: (thread + rng.choice([1, 32])) % threads * 16,
                "row": lambda: thread // 4 * 16,
                "random": lambda: 16 * np.array([rng.randrange(64) for _ in thread]),
                "odd": lambda: np.where(block == 0, thread, (thread + 7) % threads) * 16,
            }[shape]()
            if isinstance(base, np.ndarray):
                base = base.astype(rng.choice([np.int64, np.uint32, np.uint64, np.int32]))
            if shape not in ("own",) and not conflicts and rng.random() < 0.8:
                kind = "load"
            bases.append(base)
        offset = rng.choice([0, 0, 0, 4, 16]) // size * size
        lanes = rng.choice(masks)
        number = lanes_all if lanes is None else np.flatnonzero(lanes) if lanes.dtype == bool else lanes
        address = np.broadcast_to(base, len(lanes_all)).astype(np.int64)[number] + offset
        values = None
        raw = None
        form = rng.choice(["same", "scalar", "thread", "none", "parts"])
        if kind == "store" and form != "none":
            if form == "same":
                values = np.full((len(lanes_all), size), rng.randrange(2), np.uint8)
            elif form == "scalar" and size in (1, 2, 4, 8):
                values = np.frombuffer(rng.randrange(2).to_bytes(size, "little") * len(lanes_all), np.uint8)
                values = values.reshape(-1, size)
                raw = values[0].copy().view(f"u{size}")[0]
            elif form == "parts" and size in (8, 16):
                parts = [rng.choice([np.uint32(5), thread.astype(np.uint32)]) for _ in range(size // 4)]
                raw = parts
                values = np.stack([np.broadcast_to(p, thread.shape) for p in parts], 1).copy().view(np.uint8)
            else:
                values = (thread[:, None] + np.zeros(size)).astype(np.uint8)
            if raw is None:
                raw = values.view(f"u{size}")[:, 0] if size <= 8 else values
        sparse = lanes is not None and rng.random() < 0.3
        if sparse and isinstance(raw, np.ndarray) and raw.ndim:
            raw = raw[number]
        given = base[number] if sparse and isinstance(base, np.ndarray) else base
        expected = truth.access(
            kind, address, number, size, index, None if values is None else values[number]
        )
        return compare(expected, lambda: monitor.access(kind, given, offset, size, lanes, at(index), raw))

    # Something written everywhere, so that most loads are of written bytes.
    start = rng.random()
    if start < 0.9:
        everything = np.arange(0, nbytes - 15, 16)[: threads + 1]
        for i, a in enumerate(everything):
            lane = np.flatnonzero(thread == i % threads)
            truth.access("store", np.full(len(lane), a), lane, 16, -1, None)
            monitor.access("store", int(a), 0, 16, lane, at(-1), None)
        truth.barrier([True] * blocks)
        monitor.barrier(None)
    for index in range(steps):
        if found := step(index):
            return found
    return compare(truth.barrier([True] * blocks), monitor.finish)


def compare(expected: set, act) -> set:
    """Run a step of the monitor; it must find something just where the search does, and one of the same."""
    if not expected:
        act()
        return expected
    with pytest.raises(KernelFault) as raised:
        act()
    fault = raised.value
    assert (fault.kind, fault.block[0], fault.thread[0], fault.line.line) in expected, str(fault)
    return expected


@pytest.mark.parametrize("seed", range(5))
def test_the_monitor_finds_just_what_a_search_of_all_pairs_finds(seed):
    rng = random.Random(seed)
    kinds = [next(iter(random_program(rng)), ("clean",))[0] for _ in range(30)]
    assert {"race", "clean"} <= set(kinds)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_same_in_small_pieces_and_with_a_short_memory(seed, monkeypatch):
    monkeypatch.setattr(races, "CHUNK", 200)
    monkeypatch.setattr(written, "CHUNK", 200)
    monkeypatch.setattr(races, "REMEMBERED", 2)
    monkeypatch.setattr(patterns, "REMEMBERED", 2)
    rng = random.Random(100 + seed)
    for _ in range(25):
        random_program(rng, steps=20)


# ── what kernels do ──

B, T = 6, 64
TID = np.tile(np.arange(T, dtype=np.uint32), B)
OWN = 4 * TID


def monitor(**names) -> SharedMonitor:
    made = SharedMonitor(B, 1024, T, symbols=names or {"tile": (0, 1024)})
    made.access("store", OWN, 0, 4, None, at(1), TID)
    made.barrier(None)
    return made


def found(act, *args) -> KernelFault:
    with pytest.raises(KernelFault) as fault:
        act(*args)
    return fault.value


def test_a_missing_syncthreads_names_both_lines_threads_and_the_element():
    m = monitor(tile=(0, 256))
    m.access("store", OWN, 0, 4, None, at(5), TID)
    m.access("load", 4 * ((TID + 32) % T), 0, 4, None, at(7))
    fault = found(m.barrier)
    assert (fault.kind, fault.line.line, fault.block, fault.thread) == ("race", 7, (0, 0, 0), (0, 0, 0))
    assert fault.what == (
        "k.cu:7: race in shared memory: this thread reads element 32 of tile (bytes 128–131), "
        "which thread 32 wrote at k.cu:5, with no __syncthreads() between (block 0, thread 0)"
    )
    assert "__syncthreads() between line 5 and line 7" in fault.fix


def test_the_second_barrier_of_a_tiled_loop_is_asked_for_too():
    m = monitor()
    m.access("load", 4 * ((TID + 32) % T), 0, 4, None, at(7))
    m.access("store", OWN, 0, 4, None, at(5), TID)
    fault = found(m.finish)
    assert "which thread 32 read at k.cu:7" in fault.what
    assert "after line 7, before the loop comes back to line 5" in fault.fix


def test_lanes_of_one_warp_need_a_syncwarp_although_they_run_in_step():
    def last_warp_of_a_reduction(sync: bool) -> SharedMonitor:
        m = monitor()
        first = np.flatnonzero(TID < 32)
        for step in (16, 8, 4):
            m.access("load", OWN, 4 * step, 4, first, at(8))
            if sync:
                m.warp_barrier(np.arange(B * T // 32) % 2 == 0)
            m.access("store", OWN, 0, 4, first, at(9), TID)
            if sync:
                m.warp_barrier(None)
        return m

    last_warp_of_a_reduction(sync=True).finish()
    fault = found(last_warp_of_a_reduction(sync=False).finish)
    assert "with no __syncwarp() between" in fault.what
    assert "The lanes of a warp need not run in step" in fault.why


def test_where_warps_and_lanes_both_race_the_barrier_that_cures_both_is_named():
    m = monitor()
    m.access("store", OWN, 0, 4, None, at(5), TID)
    m.access("load", 4 * ((TID + 1) % T), 0, 4, None, at(7))
    fault = found(m.finish)
    assert fault.thread == (31, 0, 0)
    assert "__syncthreads() between line 5 and line 7" in fault.fix


def test_a_race_on_one_line_says_on_which_side_of_it_the_barrier_goes():
    m = monitor()
    m.access("load", 4 * ((TID + 32) % T), 0, 4, None, at(7))
    m.access("store", OWN, 0, 4, None, at(7), TID)
    assert "splitting the line" in found(m.finish).fix
    m = monitor()
    m.access("store", OWN, 0, 4, None, at(7), TID)
    m.access("load", 4 * ((TID + 32) % T), 0, 4, None, at(7))
    assert "after line 7, before the loop comes back" in found(m.finish).fix


def test_a_syncwarp_orders_no_other_warp():
    m = monitor()
    m.access("store", OWN, 0, 4, None, at(5), TID)
    m.warp_barrier(None)
    m.access("load", 4 * ((TID + 32) % T), 0, 4, None, at(7))
    assert "__syncthreads()" in found(m.finish).fix


def test_many_threads_may_store_one_value_to_one_place_but_not_different_ones():
    m = monitor()
    m.access("store", np.uint32(0), 0, 4, None, at(5), np.uint32(1))
    m.access("store", np.uint32(0), 0, 4, np.flatnonzero(TID % 3 == 0), at(6), np.ones(B * T, np.uint32))
    m.barrier(None)
    m.access("store", np.uint32(0), 0, 4, None, at(8), TID)
    fault = found(m.barrier)
    assert "this thread and thread 0 write element 0 of tile (bytes 0–3) in one instruction" in fault.what
    assert "one writing thread" in fault.fix


def test_equal_values_in_the_block_that_stands_for_all_excuse_no_other_block():
    m = monitor()
    value = np.zeros(B * T, np.uint32)
    value[5 * T + 40] = 1
    m.access("store", np.uint32(0), 0, 4, None, at(8), value)
    assert found(m.barrier).block == (5, 0, 0)


@pytest.mark.parametrize("odd", range(B))
def test_a_block_in_which_another_thread_takes_part_is_looked_at_by_itself(odd):
    m = monitor()
    block = np.arange(B * T) // T
    m.access("store", np.uint32(0), 0, 4, np.flatnonzero(np.where(block == odd, 5, 0) == TID), at(5), TID)
    m.access("load", np.uint32(0), 0, 4, np.flatnonzero(TID == 0), at(7))
    assert found(m.barrier).block == (odd, 0, 0)


def test_atomics_race_with_loads_and_stores_but_not_with_each_other():
    m = monitor()
    m.access("atomic", 4 * (TID % 3), 0, 4, None, at(5, "atom", "add"))
    m.access("atomic", np.uint32(0), 0, 4, None, at(6, "atom", "add"))
    m.barrier(None)
    m.access("atomic", 4 * (TID % 3), 0, 4, None, at(5, "atom", "add"))
    m.access("load", OWN, 0, 4, None, at(7))
    assert "atomically updated at k.cu:5" in found(m.barrier).what


def test_reading_what_nobody_wrote_names_the_first_thread_that_does():
    m = SharedMonitor(B, 1024, T, symbols={"sums": (512, 128)})
    m.access("store", OWN, 0, 4, None, at(3), TID)
    m.barrier(None)
    fault = found(m.access, "load", OWN, 320, 4, None, at(4))
    assert (fault.kind, fault.block, fault.thread) == ("uninitialised", (0, 0, 0), (0, 0, 0))
    assert "bytes 320–323 of shared memory, which nobody has written" in fault.what
    fault = found(m.access, "atomic", np.uint32(520), 0, 4, None, at(5, "atom", "add"))
    assert "updates element 2 of sums (bytes 8–11)" in fault.what
    m.access("atomic", np.uint32(520), 0, 4, None, at(6, "atom", "exch"))
    m.access("load", np.uint32(520), 0, 4, None, at(7))


def test_what_one_block_wrote_is_not_written_in_another():
    m = SharedMonitor(B, 1024, T)
    m.access("store", OWN, 0, 4, np.arange(3 * T), at(3), TID)
    m.access("load", OWN, 0, 4, np.arange(3 * T), at(4))
    assert found(m.access, "load", OWN, 0, 4, None, at(5)).block == (3, 0, 0)


def test_a_verdict_on_one_epoch_is_not_taken_for_another_of_other_offsets():
    m = SharedMonitor(B, 1024, T)
    m.access("store", np.uint32(0), 0, 16, np.flatnonzero(TID == 0), at(1), None)
    m.access("store", OWN, 16, 4, None, at(1), None)
    m.barrier(None)
    for offset in (0, 0, 4):
        m.access("store", OWN, 0, 4, None, at(2), TID)
        m.access("load", OWN, offset, 4, None, at(3))
        if offset == 0:
            m.barrier(None)
    assert found(m.barrier).kind == "race"


def test_an_array_that_takes_another_s_place_is_not_taken_for_it():
    for _ in range(20):
        m = monitor()
        m.access("store", OWN.copy(), 0, 4, None, at(2), TID)
        m.access("load", 4 * ((TID + 32) % T), 0, 4, None, at(3))
        assert found(m.barrier).kind == "race"
        m = monitor()
        m.access("store", OWN.copy(), 0, 4, np.flatnonzero(TID < 32), at(2), TID)
        m.access("store", OWN.copy(), 4, 4, np.flatnonzero(TID < 33), at(3), TID)
        assert found(m.barrier).kind == "race"


def test_a_load_repeated_after_a_syncwarp_counts_again():
    m = monitor()
    one, two = np.flatnonzero(TID == 1), np.flatnonzero(TID == 0)
    for _ in range(2):
        m.access("load", np.uint32(0), 0, 4, one, at(4))
        m.warp_barrier(None)
    m.access("load", np.uint32(0), 0, 4, one, at(4))
    m.access("store", np.uint32(0), 0, 4, two, at(6), TID)
    assert found(m.barrier).line.line == 6


def test_blocks_may_pass_a_barrier_at_different_times():
    m = monitor()
    some = np.arange(B) % 2 == 0
    load, store = np.flatnonzero(TID == 1), np.flatnonzero(TID == 40)
    m.access("load", np.uint32(4), 0, 4, load, at(4))
    m.barrier(some)
    m.access("load", np.uint32(4), 0, 4, load, at(4))
    m.barrier(~some)
    m.access("store", np.uint32(4), 0, 4, store, at(6), TID)
    fault = found(m.barrier, some)
    assert (fault.line.line, fault.block) == (6, (0, 0, 0))


LOOP = """
__global__ void k(float* x, int n) {
  __shared__ float s[64];
  int t = threadIdx.x, b = blockIdx.x;
  if (b == 4 || b == 9) return;
  float v = 0;
  for (int i = 0; i <= b - b / 3 * 3; ++i) {
    s[t] = x[b * 64 + t] + i;
    __syncthreads();
    v += s[63 - t];
    %s
  }
  x[b * 64 + t] = v;
}"""


def test_blocks_that_pass_different_numbers_of_barriers_are_told_apart():
    x = np.arange(640, dtype="f4")
    want = x.reshape(10, 64).copy()
    for b, row in enumerate(want):
        if b not in (4, 9):
            row[:] = sum(row[::-1] + i for i in range(b % 3 + 1))
    run(LOOP % "__syncthreads();", 10, 64, x, 0)
    np.testing.assert_array_equal(x.reshape(10, 64), want)
    fault = found(run, LOOP % "", 10, 64, x, 0)
    assert (fault.kind, fault.block, fault.line.line) == ("race", (1, 0, 0), 8)
    assert "read at kernel.cu:10" in fault.what


def test_a_block_that_has_ended_does_not_hold_up_the_others():
    m = monitor()
    rest = np.arange(B) > 1
    lanes = np.flatnonzero(np.repeat(rest, T))
    for i in range(50):
        m.access("store", OWN, 4 * i, 4, lanes, at(4), TID)
        m.barrier(rest)
        assert not m._log
    m.finish()


@pytest.mark.parametrize("seed", range(4))
def test_forgetting_repeated_accesses_of_unlike_blocks_forgets_no_race(seed, monkeypatch):
    monkeypatch.setattr(races, "CHUNK", 100)
    rng = np.random.default_rng(seed)
    verdicts = set()
    for _ in range(40):
        m, truth = SharedMonitor(2, 64, 64), AllPairs(2, 64, 64)
        lanes, everywhere = np.arange(128), np.arange(0, 64, 4)
        for a in everywhere:
            m.access("store", int(a), 0, 4, lanes[:1], at(0), None)
            m.access("store", int(a), 0, 4, lanes[64:65], at(0), None)
            truth.access("store", [a, a], lanes[[0, 64]], 4, 0, None)
        m.barrier(None)
        truth.barrier([True, True])
        kind = rng.choice(["load", "atomic"])
        width = int(rng.choice([1, 2, 8]))
        for i in range(10):
            # Most granules are touched by the lanes of one group only: alone, of one warp, of two.
            base = 4 * rng.integers(0, 16, 128)
            base = np.where(rng.random() < 0.97, lanes % 64 // width % 16 * 4, base)
            some = np.flatnonzero(rng.random(128) < 0.3)
            m.access(kind, base, 0, 4, some, at(i))
            truth.access(kind, base[some], some, 4, i, None)
            if rng.random() < 0.3:
                warps = rng.random(4) < 0.5
                m.warp_barrier(warps)
                truth.epoch = [e + bool(w) for e, w in zip(truth.epoch, warps, strict=True)]
        if rng.random() < 0.5:
            m.warp_barrier(None)
            truth.epoch = [e + 1 for e in truth.epoch]
        one = rng.integers(0, 128, 1)
        target = np.where(rng.random() < 0.7, lanes % 64 // width % 16, rng.integers(0, 16, 128)) * 4
        m.access("store", target, 0, 4, one, at(99), np.uint32(1))
        truth.access("store", target[one], one, 4, 99, np.ones((1, 4), int))
        verdicts.add(bool(compare(truth.barrier([True, True]), m.finish)))
    assert verdicts == {True, False}


def test_a_tiled_matmul_of_256_blocks_costs_little():
    """The budget is 0.15 s; the test allows for a busy machine."""
    blocks, threads = 256, 256
    tid = np.tile(np.arange(threads, dtype=np.uint32), blocks)
    own, row, column = 4 * tid, tid // 16 * 64, tid % 16 * 4 + 1024

    def watched() -> None:
        m = SharedMonitor(blocks, 2048, threads)
        for _ in range(16):
            m.access("store", own, 0, 4, None, at(10), tid)
            m.access("store", own, 1024, 4, None, at(11), tid)
            m.barrier(None)
            for k in range(16):
                m.access("load", row, 4 * k, 4, None, at(13))
                m.access("load", column, 64 * k, 4, None, at(13))
            m.barrier(None)
        m.finish()

    assert least(watched, within=0.15) < 0.15
