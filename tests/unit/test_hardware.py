"""Occupancy equals CUDA's own calculator and an H100's answers; rooflines follow from published figures."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from llmcourse.bench.records import FOLDER, all_records
from llmcourse.errors import CourseError, UnknownNameError
from llmcourse.hardware import (
    CAPABILITIES,
    GPUS,
    LaunchSizeError,
    bytes_in_flight,
    gpu,
    loads_per_thread,
    occupancy,
    roofline,
)

CALCULATOR = r"""
#include <limits.h>
#include <stdio.h>
#include <cuda_occupancy.h>
int main() {
    int major, minor, threads_sm, sm, optin, reserved, threads, registers;
    unsigned long dynamic;
    while (scanf("%d %d %d %d %d %d %d %d %lu", &major, &minor, &threads_sm, &sm, &optin, &reserved, &threads,
                 &registers, &dynamic) == 9) {
        cudaOccDeviceProp p;
        p.computeMajor = major; p.computeMinor = minor;
        p.maxThreadsPerBlock = 1024; p.maxThreadsPerMultiprocessor = threads_sm;
        p.regsPerBlock = p.regsPerMultiprocessor = 65536;
        p.warpSize = 32; p.sharedMemPerBlock = 49152; p.sharedMemPerMultiprocessor = sm;
        p.numSms = 1; p.sharedMemPerBlockOptin = optin; p.reservedSharedMemPerBlock = reserved;
        cudaOccFuncAttributes a = {};
        a.maxThreadsPerBlock = INT_MAX; a.numRegs = registers; a.sharedSizeBytes = 0;
        a.partitionedGCConfig = PARTITIONED_GC_OFF;
        a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; a.maxDynamicSharedSizeBytes = optin;
        a.numBlockBarriers = 1;
        cudaOccDeviceState s; s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult r;
        int e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, dynamic);
        printf("%d\n", e ? -1 : r.activeBlocksPerMultiprocessor);
    }
}
"""


def cuda_include() -> Path | None:
    from llmcourse.vgpu.headers import include_folders

    found = (Path(f) for f in include_folders() if Path(f, "cuda_occupancy.h").is_file())
    return next(found, None)


@pytest.mark.skipif(shutil.which("g++") is None or cuda_include() is None, reason="no g++ or CUDA headers")
def test_occupancy_equals_the_calculator_that_ships_with_cuda(tmp_path):
    (tmp_path / "ask.cpp").write_text(CALCULATOR)
    command = ["g++", "-O0", "-I", str(cuda_include()), "ask.cpp", "-o", "ask"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    draw = random.Random(0)
    questions = []
    for c in CAPABILITIES.values():
        for _ in range(400):
            shared = draw.choice([0, draw.randrange(0, 20_000), draw.randrange(0, c.shared_per_block + 1)])
            questions.append((c, draw.randint(1, 1024), draw.randint(1, 255), shared))
    lines = [
        f"{c.name.replace('.', ' ')} {c.max_threads} {c.shared_per_sm} {c.shared_per_block} "
        f"{c.shared_reserved} {threads} {registers} {shared}"
        for c, threads, registers, shared in questions
    ]
    run = subprocess.run(
        [str(tmp_path / "ask")], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    answers = [int(x) for x in run.stdout.split()]
    assert len(answers) == len(questions)
    ours = [occupancy(c, *sizes).blocks for c, *sizes in questions]
    wrong = [
        (c.name, sizes, a, b) for (c, *sizes), a, b in zip(questions, ours, answers, strict=True) if a != b
    ]
    assert wrong == []
    assert len(set(answers)) > 10


def test_occupancy_equals_what_cuda_answered_on_the_recorded_gpu():
    records = [r for r in all_records(FOLDER) if r.name == "occupancy"]
    assert records
    for record in records:
        rows = [r for r in record.results if r["name"] == "blocks"]
        capability = record.device["capability"]
        wrong = [
            (row, o.blocks)
            for row in rows
            if (
                o := occupancy(
                    CAPABILITIES[capability], row["threads"], row["registers"], row["static"] + row["dynamic"]
                )
            ).blocks
            != row["blocks"]
        ]
        assert wrong == []
        assert len(rows) >= 60


def test_the_recorded_gpu_has_the_limits_written_down_here():
    records = [r for r in all_records(FOLDER) if r.name == "occupancy"]
    assert records
    for record in records:
        device = record.row(name="attributes")
        published = gpu(record.device["name"])
        c = published.capability
        assert device["MULTIPROCESSOR_COUNT"] == published.sms
        assert device["MAX_THREADS_PER_MULTIPROCESSOR"] == c.max_threads
        assert device["MAX_BLOCKS_PER_MULTIPROCESSOR"] == c.max_blocks
        assert device["MAX_REGISTERS_PER_MULTIPROCESSOR"] == c.registers
        assert device["MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"] == c.shared_per_sm
        assert device["MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"] == c.shared_per_block
        assert device["RESERVED_SHARED_MEMORY_PER_BLOCK"] == c.shared_reserved
        assert device["L2_CACHE_SIZE"] == published.l2
        assert device["CLOCK_RATE"] * 1e3 == published.clock


@pytest.mark.parametrize(
    ("of", "threads", "registers", "shared", "blocks", "limited_by"),
    [
        ("8.0", 256, 32, 0, 8, ("warps", "registers")),
        ("8.0", 256, 64, 0, 4, ("registers",)),
        ("8.0", 256, 33, 0, 6, ("registers",)),  # 33 registers are paid for as 40
        ("8.0", 32, 16, 0, 32, ("blocks",)),
        ("8.0", 1024, 65, 0, 0, ("registers",)),
        ("8.0", 128, 32, 48 * 1024, 3, ("shared memory",)),
        ("8.0", 128, 32, 164 * 1024, 0, ("shared memory",)),  # 1 KiB is the driver's
        ("7.5", 128, 32, 32 * 1024, 2, ("shared memory",)),
        ("T4", 1024, 64, 0, 1, ("warps", "registers")),
        ("H100 SXM", 384, 168, 227 * 1024, 1, ("registers", "shared memory")),
    ],
)
def test_occupancy_of_known_kernels(of, threads, registers, shared, blocks, limited_by):
    found = occupancy(of, threads, registers, shared)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.warps == blocks * -(-threads // 32)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_occupancy_never_rises_with_what_a_kernel_asks_for(capability):
    for threads in (32, 96, 256, 1000):
        by_registers = [occupancy(capability, threads, r).blocks for r in range(256)]
        by_shared = [occupancy(capability, threads, 32, s).blocks for s in range(0, 250_000, 997)]
        assert by_registers == sorted(by_registers, reverse=True)
        assert by_shared == sorted(by_shared, reverse=True)


@pytest.mark.parametrize(
    ("threads", "registers", "shared"), [(0, 32, 0), (1025, 32, 0), (32, 256, 0), (32, 32, -1)]
)
def test_impossible_sizes_are_refused_in_three_parts(threads, registers, shared):
    with pytest.raises(LaunchSizeError) as caught:
        occupancy("9.0", threads, registers, shared)
    assert all((caught.value.what, caught.value.why, caught.value.fix))


@pytest.mark.parametrize("name", GPUS)
def test_the_fp32_peak_is_what_the_lanes_do_at_the_boost_clock(name):
    g = GPUS[name]
    lanes = g.sms * g.capability.fp32_lanes * 2 * g.clock
    assert g.peak["fp32"] == pytest.approx(lanes, rel=0.02)


@pytest.mark.parametrize("name", GPUS)
def test_published_figures_are_complete_and_in_plausible_ranges(name):
    g = GPUS[name]
    assert 0.2e12 < g.bandwidth < 10e12
    assert 4e6 < g.l2 < 200e6
    assert 15e9 <= g.memory < 200e9
    assert g.peak["fp16"] >= g.peak["fp32"]
    assert any(year in g.source for year in map(str, range(2017, 2027)))
    assert g.shared_bandwidth > g.bandwidth


def test_a_gpu_is_found_by_what_cuda_calls_it():
    assert gpu("NVIDIA H100 80GB HBM3").name == "H100 SXM"
    assert gpu("NVIDIA H100 PCIe").name == "H100 PCIe"
    assert gpu("NVIDIA A100-SXM4-40GB").name == "A100 40GB"
    assert gpu("NVIDIA A100-SXM4-80GB").name == "A100 80GB"
    assert gpu("Tesla T4").name == "T4"
    assert gpu("NVIDIA L4").name == "L4"
    assert gpu("NVIDIA H200").name == "H200"
    assert gpu("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    with pytest.raises(UnknownNameError, match="Voodoo"):
        gpu("Voodoo 2")


def test_a_roofline_rises_to_the_ridge_and_stays_flat_after_it():
    roof = roofline("H100 SXM", "bf16")
    assert roof.ridge == pytest.approx(989.4e12 / 3.35e12)
    assert roof.attainable(roof.ridge / 2) == pytest.approx(roof.peak / 2)
    assert roof.attainable(roof.ridge * 2) == roof.peak
    assert (roof.bound(1), roof.bound(1000)) == ("memory", "compute")
    assert roof.seconds(roof.peak, roof.bandwidth * 2) == 2
    assert roofline("H100 SXM", "fp32", level="shared").ridge < roofline("H100 SXM", "fp32").ridge


def test_formats_and_levels_that_a_gpu_does_not_have_are_refused_by_name():
    with pytest.raises(CourseError, match="no bf16 peak for the T4"):
        roofline("T4", "bf16")
    with pytest.raises(CourseError, match="no memory level"):
        roofline("T4", "fp16", level="disk")


def test_littles_law_gives_the_bytes_that_must_be_under_way():
    assert bytes_in_flight(3.35e12, 600e-9) == pytest.approx(2.01e6)
    h100 = GPUS["H100 SXM"]
    full = loads_per_thread(h100, 600e-9, h100.capability.max_threads)
    assert full == pytest.approx(2.01e6 / (132 * 2048 * 4))
    assert loads_per_thread(h100, 600e-9, 1024) == pytest.approx(2 * full)
