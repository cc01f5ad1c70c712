"""The explorer of rank and alpha draws what the bill says, and what Adam's first step is."""

from __future__ import annotations

import pytest

from llmcourse.bench.lora import recorded_table
from llmcourse.bench.multi_lora import COLUMNS
from llmcourse.bench.multi_lora import recorded_table as recorded_batches
from llmcourse.widgets.explorable import png
from llmcourse.widgets.lora_rank import RANKS, draw, explore, first_step


def test_with_alpha_over_r_the_first_step_is_the_same_at_every_rank_and_with_its_root_it_grows():
    same = [first_step(r, 16 / r) for r in RANKS]
    assert max(same) < 1.1 * min(same)
    assert first_step(64, 16 / 8) == pytest.approx(8 * first_step(1, 16), rel=0.1)


def test_controls_redraw_the_picture_up_to_their_ends():
    shown = explore()
    first = shown.image.value
    shown.controls["r"].value = 128
    assert shown.image.value != first
    assert png(draw("Llama-3.1-8B", "q, v", 1, 1.0)) != png(draw("Llama-3.1-8B", "everywhere", 1, 1.0))


def test_a_record_that_is_not_there_is_said_and_no_number_is_made_up():
    assert "not recorded" in recorded_table("rank", device="no such device").note
    for kind in COLUMNS:
        assert recorded_batches(kind, device="no such device").rows == []
