"""The ledger against what is really kept, and against the peak of whole training steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.bench import training_memory
from llmcourse.bench.records import Record
from llmcourse.bench.training_memory import CPU_SETUPS, GPU_SETUPS, peak_row, recorded_table, time_rows
from llmcourse.errors import ModelError, ShapeError, UnknownNameError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build, one_thread
from llmcourse.train.ledger import Setup, block_bytes, ledger
from llmcourse.train.saved import saved_tensors
from llmcourse.widgets import training_ledger


@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 40),
    st.integers(1, 3), st.integers(2, 33),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_what_a_block_keeps_is_predicted_to_the_byte(kv, group, half, inner, batch, length):
    config = ModelConfig(31, 20, 1, kv * group, kv, 2 * half, inner, max_len=64)
    model = build(Transformer, config, seed=0)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    step, x = model.plan(tokens, None), model.embedding(tokens)
    with saved_tensors(model, step.cos, step.sin) as saved:
        model.blocks[0](x, step, None)
    assert saved.bytes == block_bytes(Setup(config, batch, length, device="cpu"))


@pytest.mark.parametrize("name", CPU_SETUPS)
@one_thread()
def test_the_peak_of_a_training_step_is_predicted_within_one_percent(name):
    row = peak_row(name, CPU_SETUPS[name], "cpu")
    assert abs(row["error"]) < 0.01, row


@pytest.mark.parametrize(("every", "accumulates"), [(0, True), (1, False), (2, False)])
@one_thread()
def test_odd_sizes_are_predicted_within_two_percent(every, accumulates):
    config = ModelConfig(61, 96, 5, 4, 2, 24, 250, max_len=48)
    setup = Setup(config, 5, 41, every=every, accumulates=accumulates, device="cpu")
    assert abs(peak_row("odd", setup, "cpu")["error"]) < 0.02


def test_each_remedy_takes_down_its_own_part():
    plain = GPU_SETUPS["all kept"]
    bills = {
        "plain": ledger(plain),
        "checkpointed": ledger(replace(plain, every=1)),
        "fused": ledger(replace(plain, fused_loss=True, chunk_bytes=1 << 28)),
        "half the batch": ledger(replace(plain, batch=4)),
    }
    kept = {name: bill.moments["the loss"]["kept by the blocks"] for name, bill in bills.items()}
    loss = {name: bill.moments["the loss"]["head and loss"] for name, bill in bills.items()}
    assert kept["checkpointed"] < kept["plain"] / 15
    assert kept["half the batch"] == kept["plain"] / 2
    assert kept["fused"] == kept["plain"]
    assert loss["fused"] < loss["plain"] / 3
    assert all(bill.peak <= bills["plain"].peak for bill in bills.values())
    assert all(bill.peak == max(bill.totals.values()) for bill in bills.values())


def test_static_memory_is_sixteen_bytes_a_parameter_once_gradients_are_there():
    for name in ("all kept", "float32"):
        setup = GPU_SETUPS[name]
        parts = ledger(setup).moments["the optimizer"]
        known = 16 if not setup.masters else 18  # gradients stand in float32 for the masters' step
        assert sum(parts.values()) == known * setup.config.n_params


def test_what_the_ledger_does_not_know_is_refused():
    config = GPU_SETUPS["float32"].config
    with pytest.raises(ModelError, match="no entries"):
        Setup(replace(config, mlp="gelu"), 1, 8)
    with pytest.raises(ModelError, match="float32 and the plain loss"):
        Setup(config, 1, 8, itemsize=2, device="cpu")
    with pytest.raises(ShapeError, match="batch 0"):
        Setup(config, 0, 8)


# ── the benchmark and the picture ────────────────────────────────────────────────────────────────


def test_the_record_is_shown_with_its_caption_and_its_absence_is_told(monkeypatch):
    rows = [peak_row("each block", CPU_SETUPS["each block"], "cpu")]
    rows += time_rows(replace(CPU_SETUPS["all kept"], batch=1, length=8), "cpu", pieces=(1,), offloaded=True)
    assert [r["name"] for r in rows] == ["each block", "all kept", "pieces of 1", "offloaded"]
    record = Record("training_memory", {"name": "a GPU"}, {"torch": "2"}, "2026-01-01", "", rows)
    monkeypatch.setattr(training_memory, "recorded", lambda *_, **__: record)
    for kind in ("peak", "time"):
        assert "recorded on a GPU, 2026-01-01" in repr(recorded_table(kind))

    def none(*_, **__):
        raise UnknownNameError("no record.", "None.", "one.")

    monkeypatch.setattr(training_memory, "recorded", none)
    assert "not recorded yet" in recorded_table("peak")


def test_the_explorable_draws_every_choice():
    shown = training_ledger.explore()
    first = shown.image.value
    for name, value in (("every", 1), ("loss", True), ("precision", "float32"), ("model", "Llama-3.1-8B")):
        before = shown.image.value
        shown.controls[name].value = value
        assert shown.image.value != before, name
    assert first[:4] == b"\x89PNG"
    with pytest.raises(UnknownNameError, match="GPT-9"):
        training_ledger.bill("GPT-9", 2048, "float32", 0, False)


def test_only_setups_that_fit_the_gpu_and_its_formats_are_offered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16e9, 16e9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert list(training_memory.that_fit()) == ["float32", "float32, small batch"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4.5e9, 16e9))
    assert list(training_memory.that_fit()) == ["float32, small batch"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert list(training_memory.that_fit()) == list(GPU_SETUPS)
