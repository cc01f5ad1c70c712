"""Sectors and wavefronts against a count by sets, one lane at a time."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcourse.vgpu import requests


def counted_sectors(addresses, lanes):
    by_warp = {}
    for address, lane in zip(addresses, lanes, strict=True):
        by_warp.setdefault(lane // 32, set()).add(address // 32)
    return sum(len(s) for s in by_warp.values())


def counted_wavefronts(addresses, lanes, size):
    """(passes, passes without any conflict), one lane at a time.

    A warp goes as one for up to 4 bytes a lane, by halves for 8, by quarters for 16; two neighbouring parts
    go together if every lane wants what the lane beside it wants, or every lane what the next but one does.
    """
    asked = dict(zip(map(int, lanes), map(int, addresses), strict=True))
    unit = {8: 32, 16: 16}.get(size, 32)
    passes = parts = 0
    for start in range(0, max(asked) + 1, unit):
        group = {lane: a for lane, a in asked.items() if start <= lane < start + unit}
        pieces = [group]
        together = any(
            all(group.get(lane ^ d, address) == address for lane, address in group.items()) for d in (1, 2)
        )
        if size > 4 and not together:
            middle = start + unit // 2
            pieces = [{k: v for k, v in group.items() if (k < middle) == low} for low in (True, False)]
        for piece in pieces:
            banks = {}
            for address in piece.values():
                for word in range(address // 4, -(-(address + size) // 4)):
                    banks.setdefault(word % 32, set()).add(word)
            passes += max(map(len, banks.values()), default=0)
            parts += bool(piece)
    return passes, parts


@st.composite
def access(draw):
    warps = draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    kind = draw(st.sampled_from(["stride", "random", "same", "backwards"]))
    n = 32 * warps
    lane = np.arange(n)
    if kind == "stride":
        address = lane * size * draw(st.integers(1, 40)) + size * draw(st.integers(0, 9))
    elif kind == "backwards":
        address = (n - lane) * size
    elif kind == "same":
        address = np.full(n, size * draw(st.integers(0, 99)))
    else:
        seed = draw(st.integers(0, 2**31))
        address = np.random.default_rng(seed).integers(0, 500, n) * size
    mask = np.ones(n, bool)
    if draw(st.booleans()):
        mask = np.random.default_rng(draw(st.integers(0, 99))).random(n) < 0.5
        mask[draw(st.integers(0, n - 1))] = True
    return address.astype(np.int64), mask, size


@given(access())
def test_sectors_are_the_distinct_32_byte_pieces_of_each_warp(case):
    address, mask, _ = case
    lanes = np.flatnonzero(mask)
    rows = requests.rows_of(address[mask], None if mask.all() else lanes)
    assert requests.sectors(rows) == counted_sectors(address[mask], lanes)


@given(access())
def test_wavefronts_are_the_passes_of_the_busiest_bank(case):
    address, mask, size = case
    lanes = np.flatnonzero(mask)
    rows = requests.rows_of(address[mask], None if mask.all() else lanes)
    active = mask.reshape(-1, 32)
    active = None if mask.all() else active[active.any(axis=1)]
    passes, conflicts = requests.wavefronts(rows, size, active)
    expected, parts = counted_wavefronts(address[mask], lanes, size)
    assert (passes, conflicts) == (expected, expected - parts)


@given(access())
def test_atomics_visit_a_sector_as_often_as_its_busiest_word_is_wanted(case):
    address, mask, _ = case
    lanes = np.flatnonzero(mask)
    visits = 0
    for warp in set(lanes // 32):
        wanted = Counter(address[lanes[lanes // 32 == warp]].tolist())
        by_sector = {}
        for word, count in wanted.items():
            by_sector[word // 32] = max(by_sector.get(word // 32, 0), count)
        visits += sum(by_sector.values())
    assert requests.atomic_sectors(address[mask], None if mask.all() else lanes) == visits


@pytest.mark.parametrize(
    ("words", "passes"),
    [([0] * 32, 1), (range(32), 1), (range(0, 64, 2), 2), (range(0, 1024, 32), 32), (range(0, 1056, 33), 1)],
)
def test_textbook_bank_patterns(words, passes):
    rows = np.array([list(words)]) * 4
    assert requests.wavefronts(rows, 4) == (passes, passes - 1)


def test_the_commonest_address_of_each_request_is_counted():
    rows = np.array([[0] * 32, list(range(32)), [7, 7, *range(100, 130)]])
    assert requests.most_equal(rows) == 32 + 1 + 2
