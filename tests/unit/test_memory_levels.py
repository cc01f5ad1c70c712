"""The kernels that measure a GPU's memory do what their numbers assume: the machine counts it."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.bench import memory_levels
from llmcourse.bench.memory_levels import LINE, STEPS, latencies, links
from llmcourse.errors import UnknownNameError


@pytest.fixture(scope="module")
def module():
    return memory_levels._module()


@pytest.mark.parametrize(("nbytes", "line"), [(LINE, LINE), (4096, 4), (32 << 10, LINE), (1 << 20, LINE)])
def test_links_lead_through_every_line_once_and_back(nbytes, line) -> None:
    chain, at, seen = links(nbytes, line=line), 0, []
    for _ in range(nbytes // line):
        seen.append(at)
        at = int(chain[at])
    assert at == 0
    assert sorted(seen) == list(range(0, nbytes // 4, line // 4))


def test_a_chase_loads_one_line_after_the_other(module) -> None:
    chain, taken, end = links(32 << 10), np.zeros(2, np.int64), np.zeros(1, np.uint32)
    result = module.chase[1, 1](chain, 100, taken, end, where="machine")
    at = 0
    for _ in range(200):
        at = int(chain[at])
    assert end[0] == at
    assert result.counters.global_load_requests == result.counters.global_load_sectors == 200


def test_a_chase_in_shared_memory_meets_no_other_memory(module) -> None:
    chain, taken, end = links(4096, line=4), np.zeros(2, np.int64), np.zeros(1, np.uint32)
    result = module.chase_shared[1, 1](chain, 1024, taken, end, where="machine")
    assert end[0] == 0  # all the way round
    assert result.counters.shared_load_requests == 1024
    assert result.counters.global_load_bytes == 4096


def test_bandwidth_kernels_read_exactly_the_bytes_that_are_counted(module) -> None:
    out = np.zeros(1, np.float32)
    array = np.zeros(2 * 64 * 4 * 4 * 3, np.float32)
    read = module.read_all[2, 64](array, out, array.size // 4, 2, where="machine").counters
    assert (read.global_load_bytes, read.global_load_sectors_per_request) == (2 * array.nbytes, 16)
    own = np.zeros(2 * 256 * 4, np.float32)
    read = module.read_own[2, 64](own, out, 256, 3, where="machine").counters
    assert (read.global_load_bytes, read.global_load_sectors_per_request) == (3 * own.nbytes, 16)
    read = module.read_shared[2, 64](out, 3, where="machine").counters
    assert (read.shared_load_bytes, read.shared_load_bank_conflicts) == (2 * 3 * (16 << 10), 0)


@pytest.mark.parametrize("width", [1, 4])
def test_a_copy_with_one_load_under_way_copies(module, width) -> None:
    name = "copy_one_by_one<float>" if width == 1 else "copy_one_by_one<float4>"
    source = np.random.default_rng(1).random((333, width), np.float32)
    target = np.zeros_like(source)
    module[name][2, 64](source, target, 333, where="machine")
    np.testing.assert_array_equal(target, source)


def test_latencies_grow_from_level_to_level_and_say_where_they_are_from() -> None:
    found, caption = latencies()
    assert list(found) == ["shared memory", "L1", "L2", "memory"]
    assert found["shared memory"] <= found["L1"] < found["L2"] < found["memory"] < 5e-6
    assert caption.startswith(("recorded on", "a round figure"))
    assert STEPS >= 10_000


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="measures a GPU"):
        memory_levels.run("cpu")
