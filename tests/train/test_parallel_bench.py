"""The benchmark's sections run on CPUs, and their rows add up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmcourse.bench import parallel
from llmcourse.bench.parallel_steps import ON_A_CPU
from llmcourse.errors import DeviceError
from llmcourse.train.parallel.launch import run_workers

TINY = replace(ON_A_CPU, d_model=32, n_layers=2, batch=2, length=8)


def test_every_way_of_data_parallel_training_has_a_time_and_ours_its_bytes() -> None:
    rows = {row["name"]: row for row in run_workers(parallel.data, 2, TINY, timeout=100, echo=False)[0]}
    assert set(rows) == {f"data, {name}" for name in parallel.DATA_WAYS}
    assert rows["data, alone"]["efficiency"] == 1
    assert all(row["ms"] > 0 and row["count"] == TINY.repeats for row in rows.values())
    by_us = {name: row["bytes_a_step"] for name, row in rows.items() if row["who"] == "ours"}
    assert by_us["data, data parallel"] == by_us["data, data parallel, no overlap"]
    assert by_us["data, ZeRO-1"] == pytest.approx(by_us["data, data parallel"], rel=0.01)
    assert by_us["data, ZeRO-3"] > 1.2 * by_us["data, ZeRO-2"]


def test_losses_of_every_way_are_those_of_one_process() -> None:
    rows = run_workers(parallel.equality, 2, TINY, timeout=100, echo=False)[0]
    assert len(rows) >= 4
    assert all(row["losses_apart"] < 1e-5 for row in rows)


def test_one_gpu_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(DeviceError, match="this machine has 1 GPU"):
        parallel.run("cuda")


def test_splits_compute_what_the_whole_does() -> None:
    rows = run_workers(parallel.tensor, 2, TINY, timeout=100, echo=False)[0]
    rows += run_workers(parallel.pipeline, 2, TINY, timeout=100, echo=False)[0]
    assert {row["who"] for row in rows} == {"one process", "ours", "PyTorch"}
    assert len(rows) == len(parallel.TENSOR_WAYS) + len(parallel.PIPELINE_WAYS)
    assert all(row["apart"] < 1e-5 and row["efficiency"] > 0 for row in rows)
    assert {row["without_bubble"] for row in rows if "without_bubble" in row} == {1, 4 / 5}
