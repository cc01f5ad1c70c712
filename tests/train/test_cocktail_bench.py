"""The benchmark of slow links: its rows add up, and its committed record says what notebook 13 claims."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest
import torch
from matplotlib.figure import Figure

from llmcourse.bench import BENCHMARKS, cocktail
from llmcourse.bench.records import recorded
from llmcourse.errors import DeviceError
from llmcourse.train.parallel.fine_tune import pretrain
from llmcourse.train.parallel.link import Link

SHORT = replace(cocktail.LOSS, steps=4)


def test_every_way_starts_alike_and_sends_what_its_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cocktail, "PRETRAINED", 2)
    rows = {row["sent"]: row for row in cocktail.losses(1, 2, cocktail.WAYS, backend="gloo", task=SHORT)}
    assert list(rows) == list(cocktail.WAYS)
    bits = [row["bits_a_weight"] for row in rows.values()]
    assert bits == pytest.approx([32, 16, 32 * 0.02 + 1, 0.18], rel=0.02)
    assert all(row["equal_on_all"] and abs(row["above_dense"]) < 5 for row in rows.values())


def test_a_slow_link_sets_the_pace_of_all_gradients_and_half_of_them_take_half_as_long() -> None:
    task, link = replace(SHORT, steps=5), Link(5)
    start = pretrain(task, 0)
    (whole, whole_steps), (half, half_steps) = (
        cocktail.timed(name, link, start, task, backend="gloo")
        for name in ("all gradients, float32", "all gradients, float16")
    )
    assert whole["sending_ms"] == pytest.approx(2 * half["sending_ms"])
    assert 1e3 * min(whole_steps) > 0.95 * whole["sending_ms"]
    assert median(half_steps) < median(whole_steps)


def test_the_record_holds_the_papers_setting_within_a_hundredth_of_dense() -> None:
    assert "cocktail" in BENCHMARKS
    rows = recorded("cocktail").results
    losses = [row for row in rows if row["name"] == "loss" and row["sent"] == "cocktail"]
    assert {row["seed"] for row in losses} == set(cocktail.SEEDS)
    assert {row["workers"] for row in losses} >= {2, 4}
    assert all(row["above_dense"] < 1 and row["equal_on_all"] for row in losses)
    assert all(row["bits_a_weight"] < 0.3 for row in losses)
    slow = {row["sent"]: row["ms"] for row in rows if row.get("mbit_per_s") == 100}
    assert slow["cocktail"] < slow["all gradients, float16"] < slow["all gradients, float32"]


def test_what_is_shown_of_the_record_is_in_it() -> None:
    record = recorded("cocktail")
    lines = cocktail.ends(record)
    assert [line.partition(":")[0] for line in lines][-1] == "cocktail, 4 workers"
    assert len(lines) == len(cocktail.WAYS)  # three beside all gradients, and the cocktail with 4 workers
    axes = Figure().subplots()
    cocktail.draw(axes, record)
    dots = {y for line in axes.lines if line.get_marker() == "o" for y in line.get_ydata()}
    assert dots == {row["ms"] for row in record.results if row.get("mbit_per_s")}


def test_one_gpu_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="this machine has 1 GPU"):
        cocktail.run("cuda")
