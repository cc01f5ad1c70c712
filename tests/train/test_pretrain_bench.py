"""The pre-training benchmark, at its smallest: every kind of row, and figures that follow from each other."""

from __future__ import annotations

import math

import pytest
import torch

from llmcourse.bench import pretrain
from llmcourse.train.pretrain import PLANS, gpu_plan, on_gpu


@pytest.fixture(scope="module")
def rows():
    return pretrain.run("cpu")[0]


def test_the_run_tells_losses_seconds_and_text(rows):
    run = next(r for r in rows if r["kind"] == "run")
    assert len(run["curve"]) == run["steps"]
    assert run["curve"][0] == pytest.approx(math.log(run["vocab_size"]), rel=0.05)
    lowest = min(loss for _, loss in run["held_out_curve"])
    assert run["best_held_out"] == pytest.approx(lowest, abs=1e-5)
    assert lowest < run["curve"][0]
    assert run["best_nats_per_byte"] == run["best_held_out"] / run["bytes_per_token"]
    assert run["train_s"] < run["total_s"]
    assert run["tokens"] == 1024 * run["steps"]
    assert run["sample"].startswith("**KING")


def test_every_rung_and_size_has_a_speed_or_a_loss(rows):
    ladder = [r for r in rows if r["kind"] == "ladder"]
    scaling = [r for r in rows if r["kind"] == "scaling"]
    assert all(r["low"] <= r["tokens_per_s"] <= r["high"] and r["mfu"] > 0 for r in ladder)
    assert all(r["flops"] > 6 * r["params"] * 1024 for r in scaling)
    assert len(scaling) == 2


def test_a_run_taken_up_again_ends_with_the_same_bits_here(rows):
    assert next(r for r in rows if r["kind"] == "resume")["bit_exact"] is True


def test_a_record_that_is_not_there_is_said_and_nothing_is_invented(capsys):
    assert on_gpu("no such benchmark") is None
    assert "there is no record of 'no such benchmark'" in capsys.readouterr().out


def test_a_gpu_without_bfloat16_trains_the_same_model_in_float32_with_a_smaller_batch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_plan() == PLANS["full"]
    assert gpu_plan(60).steps == 60
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    plan = gpu_plan(60)
    assert (plan.precision, plan.steps, plan.batch) == ("float32", 60, PLANS["full"].batch // 4)
    assert plan.config == PLANS["full"].config
