"""The order of basic blocks: lanes that part meet as early as the program allows."""

import numpy as np
from running import run, zeros

from llmcourse.vgpu import flow


def precedes(order, *nodes):
    places = [order.index(n) for n in nodes]
    return places == sorted(places)


def test_the_sides_of_a_branch_come_before_their_meeting_point():
    order = flow.order([[1, 2], [3], [3], []])
    assert order[0] == 0
    assert order[-1] == 3


def test_a_loop_stands_before_its_exit_even_if_the_text_has_the_exit_first():
    #  0 → 1 (header) → 2 (exit) or 3 (body) → 1
    order = flow.order([[1], [2, 3], [], [1]])
    assert precedes(order, 0, 1, 3, 2)


def test_nested_loops_stay_together():
    # 0 → 1 outer header → 5 exit | 2 inner header → 4 outer latch | 3 inner body → 2 ; 4 → 1
    order = flow.order([[1], [5, 2], [4, 3], [2], [1], []])
    assert precedes(order, 0, 1, 2, 3, 4, 5)


def test_a_break_out_of_a_loop_waits_for_the_rest_of_the_loop():
    # 1 header → 2; 2 → 3 (break: after the loop) | 4; 4 → 1 | 3
    order = flow.order([[1], [2], [3, 4], [], [1, 3]])
    assert precedes(order, 1, 2, 4, 3)


def test_blocks_that_nothing_reaches_are_kept_and_hold_nobody_up():
    order = flow.order([[2], [2], []])
    assert sorted(order) == [0, 1, 2]
    assert precedes(order, 0, 2)


def test_lanes_meet_after_a_loop_of_different_lengths():
    """Each lane loops as often as its number; the store after the loop is one request."""
    source = """
    __global__ void k(int* x, const int* n) {
      int i = threadIdx.x, s = 0;
      #pragma unroll 1
      for (int j = 0; j < n[i]; ++j) { if (j % 3 == 1) s += j; else s ^= j; }
      x[i] = s;
    }"""
    x, n = zeros(32, dtype="i4"), np.arange(32, dtype="i4")
    counters = run(source, 1, 32, x, n).counters
    expected = []
    for count in n:
        s = 0
        for j in range(count):
            s = s + j if j % 3 == 1 else s ^ j
        expected.append(s)
    assert x.tolist() == expected
    assert counters.global_store_requests == 1


def test_lanes_that_leave_a_loop_early_meet_at_once():
    source = """
    __global__ void k(const int* x, int* y) {
      int i = threadIdx.x, found = -1;
      #pragma unroll 1
      for (int j = 0; j < 8; ++j) if (x[j] == i) { found = j; break; }
      y[i] = found;
    }"""
    x, y = np.array([5, 3, 9, 31, 0, 7, 8, 1], "i4"), zeros(32, dtype="i4")
    counters = run(source, 1, 32, x, y).counters
    assert y.tolist() == [x.tolist().index(i) if i in x else -1 for i in range(32)]
    assert counters.global_store_requests == 1
