"""The machine's counters equal those that Nsight Compute read on an H100, kernel by kernel."""

import json

import pytest

from llmcourse.bench.records import recorded
from llmcourse.vgpu.corpus.cases import CASES
from llmcourse.vgpu.corpus.compare import EXACT, EXCEPTIONS, OTHERS, WHY, compare, evidence, readings
from llmcourse.vgpu.corpus.device import checksum


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_requests_sectors_and_bank_conflicts_are_the_hardware_s(case):
    comparison = compare(case)
    if comparison.different:
        assert case.kernel in EXCEPTIONS, comparison.different
        assert evidence(case.kernel)


def test_every_case_that_was_measured_is_compared_and_none_is_dropped():
    assert [row["name"] for row in readings().results] == [case.name for case in CASES]
    assert len({case.kernel for case in CASES}) >= 30


def test_the_hardware_ran_on_the_same_arguments():
    rows = {row["name"]: row["arguments"] for row in readings().results}
    for case in CASES:
        assert checksum(case.arguments()) == rows[case.name], case.name


def test_at_most_one_kernel_in_ten_is_an_exception():
    kernels = {case.kernel for case in CASES}
    assert set(EXCEPTIONS) <= kernels
    assert len(EXCEPTIONS) <= len(kernels) / 10


def test_exceptions_are_not_in_the_ptx():
    """What the SASS shows was ptxas's doing: the PTX of those kernels has no such access."""
    from llmcourse.vgpu.corpus.compare import module_of

    files = {case.kernel: case.file for case in CASES}
    scan = module_of(files["scan_blelloch"]).kernels["scan_blelloch"]
    assert not any(i.has("v2") for i in scan.code if i.opcode in ("ld", "st"))
    for kernel in ("sparse_rows", "ragged_sum"):
        loads = [
            i for i in module_of(files[kernel]).kernels[kernel].code if i.opcode == "ld" and i.has("global")
        ]
        sass = recorded("ncu_sass").row(name=kernel)["sass"]
        assert sum("LDG" in line for line in sass) > 2 * len(loads)


def test_each_exception_differs_today():
    """An exception that is equal is none, and has to go."""
    for kernel in EXCEPTIONS:
        assert any(compare(case).different for case in CASES if case.kernel == kernel), kernel


def test_the_record_says_what_measured_it():
    record = readings()
    assert "H100" in record.device["name"]
    assert {"ncu", "driver", "nvrtc"} <= set(record.versions)
    assert json.dumps(record.results[0])


def test_each_counter_that_is_only_near_has_its_reason():
    assert set(OTHERS) == set(WHY)
    assert not set(OTHERS) & set(EXACT)
