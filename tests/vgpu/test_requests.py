"""Sectors and wavefronts against a count by sets, one lane at a time."""

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
    """Each part of a warp (all, halves or quarters) needs as many passes as its busiest bank has words."""
    parts = max(1, size // 4)
    by_part = {}
    for address, lane in zip(addresses, lanes, strict=True):
        words = by_part.setdefault(lane // (32 // parts), {})
        for word in range(address // 4, -(-(address + size) // 4)):
            words.setdefault(word % 32, set()).add(word)
    return sum(max(len(words) for words in part.values()) for part in by_part.values())


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
    address, _, size = case
    lanes = np.arange(len(address))
    passes, conflicts = requests.wavefronts(requests.rows_of(address, None), size)
    assert passes == counted_wavefronts(address, lanes, size)
    assert conflicts == passes - len(address) // 32 * max(1, size // 4)


@given(access())
def test_lanes_that_take_no_part_add_no_wavefront(case):
    address, mask, size = case
    if size > 4:
        return
    lanes = np.flatnonzero(mask)
    passes, _ = requests.wavefronts(requests.rows_of(address[mask], lanes), size)
    assert passes == counted_wavefronts(address[mask], lanes, size)


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
