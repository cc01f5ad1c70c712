"""Warp exchanges against the PTX ISA's own pseudo-code, lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.vgpu.isa import Instruction, Pair, Register
from llmcourse.vgpu.warp import WarpFault, bits_of, compile_warp

D, P = Register("%r1", "b32"), Register("%p1", "pred")
A, B, C, M = (Register(f"%r{i}", "b32") for i in (2, 3, 4, 5))
FULL = np.uint32(0xFFFFFFFF)
EVERYONE = np.ones((3, 32), bool)


def op(text: str, *operands):
    opcode, *modifiers = text.split(".")
    instruction = Instruction(opcode, tuple(modifiers), operands, None, None, text)
    compiled = compile_warp(instruction)
    assert compiled is not None
    return compiled


def shuffle_of_the_manual(mode: str, value: np.ndarray, b: np.ndarray, c: np.ndarray):
    """One warp, as the PTX ISA writes shfl.sync."""
    result, inside = value.copy(), np.zeros(32, bool)
    for lane in range(32):
        bval, cval, segmask = int(b[lane]) & 31, int(c[lane]) & 31, int(c[lane]) >> 8 & 31
        max_lane = (lane & segmask) | (cval & ~segmask & 31)
        min_lane = lane & segmask
        if mode == "up":
            j = lane - bval
            pval = j >= max_lane
        elif mode == "down":
            j = lane + bval
            pval = j <= max_lane
        elif mode == "bfly":
            j = lane ^ bval
            pval = j <= max_lane
        else:
            j = min_lane | (bval & ~segmask & 31)
            pval = j <= max_lane
        result[lane], inside[lane] = value[j if pval else lane], pval
    return result, inside


MODES = ("up", "down", "bfly", "idx")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("amount", [0, 1, 3, 16, 31, 32])
def test_a_shuffle_of_every_width_moves_values_as_the_manual_says(mode, width, amount):
    value = np.random.default_rng(amount).integers(0, 2**32, (3, 32), dtype=np.uint32)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    got, inside = op(f"shfl.sync.{mode}.b32", Pair(D, P), A, B, C, M).apply(
        EVERYONE, value, np.uint32(amount), np.uint32(c), FULL
    )
    for w in range(3):
        want, want_inside = shuffle_of_the_manual(mode, value[w], np.full(32, amount), np.full(32, c))
        np.testing.assert_array_equal(got[w], want)
        np.testing.assert_array_equal(inside[w], want_inside)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MODES), st.integers(0, 2**32 - 1))
def test_a_shuffle_takes_a_different_lane_and_clamp_in_every_lane(mode, seed):
    rng = np.random.default_rng(seed)
    value = rng.integers(0, 2**32, (3, 32), dtype=np.uint32)
    b = rng.integers(0, 64, (3, 32), dtype=np.uint32)
    c = rng.integers(0, 2**13, (3, 32), dtype=np.uint32)
    got, inside = op(f"shfl.sync.{mode}.b32", Pair(D, P), A, B, C, M).apply(EVERYONE, value, b, c, FULL)
    for w in range(3):
        want, want_inside = shuffle_of_the_manual(mode, value[w], b[w], c[w])
        np.testing.assert_array_equal(got[w], want)
        np.testing.assert_array_equal(inside[w], want_inside)


def test_floats_travel_bit_for_bit_and_a_uniform_value_stays_itself():
    nan = np.full((1, 32), np.uint32(0x7FC12345))
    shuffle = op("shfl.sync.bfly.b32", Register("%f1", "f32"), A, B, C, M)
    (got, *_) = shuffle.apply(np.ones((1, 32), bool), nan.view(np.float32), np.uint32(1), np.uint32(31), FULL)
    assert got.dtype == np.float32
    assert (got.view(np.uint32) == 0x7FC12345).all()
    (got, *_) = shuffle.apply(np.ones((1, 32), bool), np.uint32(7), np.uint32(1), np.uint32(31), FULL)
    assert (got.view(np.uint32) == 7).all()


def test_a_warp_in_which_nobody_is_active_is_left_alone():
    active = EVERYONE.copy()
    active[1] = False
    value = np.arange(96, dtype=np.uint32).reshape(3, 32)
    (got, *_) = op("shfl.sync.down.b32", D, A, B, C, M).apply(
        active, value, np.uint32(4), np.uint32(31), FULL
    )
    np.testing.assert_array_equal(got[2, :28], value[2, 4:])


def test_lanes_named_in_the_mask_but_elsewhere_are_a_fault():
    active = EVERYONE.copy()
    active[1, 16:] = False
    shuffle = op("shfl.sync.down.b32", D, A, B, C, M)
    with pytest.raises(WarpFault, match="waits for lane 16 of the warp") as fault:
        shuffle.apply(active, FULL, np.uint32(1), np.uint32(31), FULL)
    assert (fault.value.kind, fault.value.warp) == ("divergent barrier", 1)


def test_lanes_that_have_exited_may_be_named_but_not_read():
    active = np.zeros((1, 32), bool)
    active[0, :20] = True
    shuffle = op("shfl.sync.idx.b32", D, A, B, C, M)
    value = np.arange(32, dtype=np.uint32)[None]
    (got, *_) = shuffle.apply(active, value, np.uint32(19), np.uint32(31), FULL, exited=~active)
    assert (got == 19).all()
    with pytest.raises(WarpFault, match="reads the value of lane 20, which has exited") as fault:
        shuffle.apply(active, value, np.uint32(20), np.uint32(31), FULL, exited=~active)
    assert fault.value.kind == "uninitialised"
    seen = []
    shuffle.apply(active, value, np.uint32(20), np.uint32(31), FULL, exited=~active, undefined=seen.append)
    np.testing.assert_array_equal(seen[0], active)


def test_a_clamped_lane_reads_itself_so_nothing_is_undefined():
    active = np.zeros((1, 32), bool)
    active[0, :16] = True
    mask, c = np.uint32(0xFFFF), np.uint32(16 << 8 | 31)
    value = np.arange(32, dtype=np.uint32)[None]
    (got, *_) = op("shfl.sync.down.b32", D, A, B, C, M).apply(active, value, np.uint32(8), c, mask)
    np.testing.assert_array_equal(got[0, :16], [*range(8, 16), *range(8, 16)])
    with pytest.raises(WarpFault, match="lane 8 of the warp reads the value of lane 16"):
        op("shfl.sync.down.b32", D, A, B, C, M).apply(active, value, np.uint32(8), np.uint32(31), mask)


def test_a_lane_that_its_own_mask_leaves_out_is_a_fault():
    with pytest.raises(WarpFault, match="which the mask leaves out") as fault:
        op("vote.sync.any.pred", P, P, M).apply(EVERYONE, EVERYONE, np.uint32(0xFFFF_FFFE))
    assert fault.value.lane == 0
    masks = np.broadcast_to(np.where(np.arange(32) < 16, 0xFFFF, 0xFFFE0000).astype(np.uint32), (3, 32))
    with pytest.raises(WarpFault, match="which the mask leaves out") as fault:
        op("vote.sync.any.pred", P, P, M).apply(EVERYONE, EVERYONE, masks)
    assert fault.value.lane == 16


def test_lanes_that_name_each_other_under_different_masks_are_a_fault():
    masks = np.full((3, 32), FULL)
    masks[2, 5] = 0x0000FFFF
    with pytest.raises(WarpFault, match="but that came with 0xffffffff") as fault:
        op("vote.sync.any.pred", P, P, M).apply(EVERYONE, EVERYONE, masks)
    assert fault.value.warp == 2


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_votes_matches_and_reductions_keep_to_the_lanes_of_their_mask(seed, groups):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, (3, 32))
    active = rng.random((3, 32)) < 0.8
    masks = np.zeros((3, 32), np.uint32)
    for w in range(3):
        for lane in range(32):
            members = active[w] & (group[w] == group[w, lane])
            masks[w, lane] = sum(1 << int(i) for i in np.flatnonzero(members))
    if groups == 1 and seed % 2:
        masks = np.where(active, masks, np.uint32(12345))
    truth = rng.random((3, 32)) < rng.choice([0.05, 0.5, 0.95])
    value = rng.integers(0, 3, (3, 32), dtype=np.uint32) * np.uint32(0x7FFFFFFF)
    signed = value.view(np.int32)

    def run(text, destination, *sources):
        names = (P, M) if "vote" in text else (A, M)
        return op(text, destination, *names).apply(active, *sources, masks)

    votes = {m: run(f"vote.sync.{m}.pred", P, truth)[0] for m in ("all", "any", "uni")}
    (ballot,) = run("vote.sync.ballot.b32", D, truth)
    (same,) = run("match.any.sync.b32", D, value)
    all_same, all_flag = run("match.all.sync.b32", Pair(D, P), value)
    reduced = {
        name: run(f"redux.sync.{name}", D, value)[0].view(np.int32 if name.endswith("s32") else np.uint32)
        for name in ("add.s32", "min.s32", "max.u32", "min.u32", "max.s32", "and.b32", "or.b32", "xor.b32")
    }
    for w in range(3):
        for lane in np.flatnonzero(active[w]):
            inside = active[w] & (group[w] == group[w, lane])
            bits = lambda lanes: sum(1 << int(i) for i in np.flatnonzero(lanes))  # noqa: E731
            assert votes["all"][w, lane] == truth[w, inside].all()
            assert votes["any"][w, lane] == truth[w, inside].any()
            assert votes["uni"][w, lane] == (len(set(truth[w, inside])) == 1)
            assert ballot[w, lane] == bits(inside & truth[w])
            assert same[w, lane] == bits(inside & (value[w] == value[w, lane]))
            agree = len(set(value[w, inside])) == 1
            assert (all_same[w, lane], all_flag[w, lane]) == ((bits(inside), True) if agree else (0, False))
            mine, mine_signed = value[w, inside], signed[w, inside]
            total = int(mine.sum(dtype=np.uint64)) & 0xFFFFFFFF
            assert reduced["add.s32"][w, lane].astype(np.uint32) == total
            assert reduced["min.s32"][w, lane] == mine_signed.min()
            assert reduced["max.s32"][w, lane] == mine_signed.max()
            assert reduced["min.u32"][w, lane] == mine.min()
            assert reduced["max.u32"][w, lane] == mine.max()
            assert reduced["and.b32"][w, lane] == np.bitwise_and.reduce(mine)
            assert reduced["or.b32"][w, lane] == np.bitwise_or.reduce(mine)
            assert reduced["xor.b32"][w, lane] == np.bitwise_xor.reduce(mine)


def test_a_float_minimum_skips_nan_unless_asked_to_keep_it():
    value = np.linspace(3, -5, 32, dtype=np.float32)[None].copy()
    value[0, 4] = np.nan
    here = np.ones((1, 32), bool)
    source = Register("%f2", "f32")
    out = Register("%f1", "f32")
    assert op("redux.sync.min.f32", out, source, M).apply(here, value, FULL)[0][0, 0] == -5
    assert op("redux.sync.max.abs.f32", out, source, M).apply(here, value, FULL)[0][0, 0] == 5
    assert np.isnan(op("redux.sync.min.NaN.f32", out, source, M).apply(here, value, FULL)[0]).all()


def test_match_compares_all_64_bits():
    value = np.arange(32, dtype=np.uint64)[None] << np.uint64(32)
    wide = Register("%rd1", "b64")
    (got,) = op("match.any.sync.b64", D, wide, M).apply(np.ones((1, 32), bool), value, FULL)
    np.testing.assert_array_equal(got[0], 1 << np.arange(32))


def test_activemask_names_the_lanes_that_are_here_and_elect_picks_one_of_them():
    active = np.random.default_rng(1).random((3, 32)) < 0.4
    active[1] = False
    (mask,) = op("activemask.b32", D).apply(active)
    np.testing.assert_array_equal(mask, np.broadcast_to(bits_of(active), (3, 32)))
    number, leader = op("elect.sync", Pair(D, P), M).apply(active, mask)
    for w in (0, 2):
        first = int(np.flatnonzero(active[w])[0])
        np.testing.assert_array_equal(np.flatnonzero(leader[w]), [first])
        assert (number[w] == first).all()


def test_the_old_forms_without_sync_take_the_lanes_that_are_here():
    active = np.zeros((1, 32), bool)
    active[0, :8] = True
    truth = np.arange(32)[None] < 9
    assert op("vote.all.pred", P, P).apply(active, truth)[0][0, 0]
    assert op("vote.ballot.b32", D, P).apply(active, ~truth)[0][0, 0] == 0
    with pytest.raises(WarpFault, match="does not take part"):
        op("shfl.down.b32", D, A, B, C).apply(active, FULL, np.uint32(1), np.uint32(31))


def test_other_instructions_are_not_warp_exchanges():
    assert compile_warp(Instruction("add", ("s32",), (D, A, B), None, None, "")) is None
    assert compile_warp(Instruction("redux", ("sync", "add", "s64"), (D, A, M), None, None, "")) is None
