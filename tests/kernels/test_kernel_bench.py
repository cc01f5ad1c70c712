"""The benchmark of the kernels and the sanitizer's reader, as far as they go without a GPU."""

from __future__ import annotations

import pytest

from llmcourse.bench import kernel_sweep, kernels, sanitize
from llmcourse.bench.kernel_traffic import launches, rows
from llmcourse.errors import DeviceError
from llmcourse.kernels.counters import counting

CLEAN = """
{"kernel": "softmax", "error": 0.001}
{"kernel": "rope", "error": 0.002}
========= ERROR SUMMARY: 0 errors
"""
FOUND = """
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at planted_overrun(float *, int)+0xa0
=========     by thread (0,0,0) in block (8,0,0)
=========     Address 0x7f001000 is out of bounds
{"kernel": "planted_overrun", "raised": "CUDA error: unspecified launch failure"}
========= ERROR SUMMARY: 1 error
"""
HAZARD = """
========= Error: Race reported between Write access at planted_race(float *)+0x60
=========     and Read access at planted_race(float *)+0x90 [64 hazards]
{"kernel": "planted_race", "error": 0.0}
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_every_rung_moves_the_bytes_of_its_formula():
    for kernel, rung, formula, launch in launches():
        with counting() as c:
            launch()
        assert c.unique_bytes == formula, f"{kernel} {rung}"


def test_fusing_saves_launches_and_bytes():
    by_name = {row["name"]: row for row in rows()}
    for kernel, fused in (("softmax", "row"), ("rms_norm", "row"), ("swiglu", "fused"), ("rope", "fused")):
        naive, good = by_name[f"{kernel} naive"], by_name[f"{kernel} {fused}"]
        assert good["launches"] == 1 < naive["launches"]
        assert good["unique_bytes"] < 0.7 * naive["unique_bytes"]


def test_on_a_cpu_the_benchmark_counts_instead_of_timing():
    found, notes = kernels.run("cpu")
    assert {"asked_bytes", "unique_bytes", "formula_bytes"} <= set(found[0])
    assert "no times" in notes[0]


def test_searches_are_chosen_by_parts_of_their_names():
    names = list(kernel_sweep.MAKERS)
    assert [n for n in names if kernel_sweep.is_wanted(n, "")] == names
    chosen = [n for n in names if kernel_sweep.is_wanted(n, "rope,vector_add fp32")]
    assert chosen == ["vector_add fp32", "rope BHSD", "rope BSHD"]


def test_a_sanitizer_log_is_read():
    clean = sanitize.parse(CLEAN)
    assert (clean["launched"], clean["errors"]) == ({"softmax": 0.001, "rope": 0.002}, 0)
    found = sanitize.parse(FOUND)
    assert found["errors"] == 1
    assert "planted_overrun" in found["findings"][0]
    assert found["raised"] == {"planted_overrun": "CUDA error: unspecified launch failure"}
    hazard = sanitize.parse(HAZARD)
    assert hazard["errors"] == 1
    assert "planted_race" in hazard["findings"][0]
    assert sanitize.parse("nothing at all")["errors"] is None


def row(name, errors, worst=1e-3):
    return {"name": name, "errors": errors, "findings": ["f"], "worst_error": worst}


def test_silence_counts_only_if_the_planted_fault_was_found():
    good = [row("memcheck", 0), row("memcheck, planted fault", 1, None)]
    assert sanitize.verdict(good) == []
    assert "not found" in sanitize.verdict([good[0], row("memcheck, planted fault", 0)])[0]
    assert "no summary" in sanitize.verdict([row("memcheck", None)])[0]
    assert "3 findings" in sanitize.verdict([row("racecheck", 3)])[0]
    assert "off by" in sanitize.verdict([row("racecheck", 0, 0.5)])[0]
    assert "off by" in sanitize.verdict([row("racecheck", 0, float("nan"))])[0]


def test_the_sanitizer_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError):
        sanitize.main([])
