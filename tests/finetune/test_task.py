"""The task of the chapter, and the real model learning it."""

from __future__ import annotations

import pytest
import torch

from llmcourse.assets import AssetError
from llmcourse.errors import UnknownNameError
from llmcourse.finetune import task
from llmcourse.finetune.lora import PLACES, LoRA, attach
from llmcourse.models import load, random_model
from llmcourse.train.fit import fit
from llmcourse.train.small import small


class Characters:
    def encode(self, text):
        return [ord(c) % 97 for c in text]


def test_no_record_is_both_learned_and_held_out_and_they_are_always_the_same():
    learned, held_out = task.records(500), task.records(200, held_out=True)
    assert not set(learned) & set(held_out)
    assert learned[:9] == task.records(9)


@pytest.mark.parametrize("style", task.STYLES)
def test_answers_alone_are_learned_and_hold_the_record(style):
    batch = task.examples(Characters(), style, 5)
    for record, row, learned in zip(task.records(5), batch.tokens, batch.learned, strict=True):
        answer = task.STYLES[style](*record)
        assert row[learned].tolist() == Characters().encode(answer)
        assert all(str(part) in answer for part in record)
    with pytest.raises(UnknownNameError, match="style"):
        task.examples(Characters(), "rhyme", 2)


def test_reading_ahead_changes_no_loss_and_exact_is_what_greedy_answers_are():
    torch.manual_seed(0)
    model = random_model(small(97, 3), dtype="float32")
    batch = task.examples(Characters(), "csv", 6)
    found = [task.test(model, task.read_ahead(model, batch, first)) for first in (0, 2, 3)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] == pytest.approx(found[2], abs=1e-5)
    ahead = task.read_ahead(model, batch, 0)
    fit(model.requires_grad_(True), ahead.batches(6, seed=0), steps=150, lr=1e-2, loss=task.loss)
    right = []
    for row, learned in zip(batch.tokens, batch.learned, strict=True):
        first, count = int(learned.nonzero()[0]), int(learned.sum())
        tokens = row[:first].tolist()
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        right.append(tokens[first:] == row[learned].tolist())
    share = task.test(model, ahead)[1]
    assert share == pytest.approx(sum(right) / 6)
    assert share > 0.5


def test_rows_come_once_each_before_any_comes_again():
    model = random_model(small(97, 1), dtype="float32")
    ahead = task.read_ahead(model, task.examples(Characters(), "csv", 6), 0)
    batches = ahead.batches(2, seed=0)
    seen = torch.cat([next(batches).tokens for _ in range(3)])
    assert sorted(seen.tolist()) == sorted(ahead.tokens.tolist())


def test_the_real_model_writes_records_it_has_not_seen_with_half_the_loss_after_ten_steps():
    try:
        model, tokenizer = load(device="cpu", dtype="float32")
    except AssetError:
        pytest.skip("the model is not here")
    held_out = task.read_ahead(model, task.examples(tokenizer, "say", 12, held_out=True), 26)
    learn = task.read_ahead(model, task.examples(tokenizer, "say", 32), 26)
    before = task.test(model, held_out)
    attach(model, LoRA(8, 16, tuple(PLACES), layers=(26, 27, 28, 29)))
    fit(model, learn.batches(8, seed=0), steps=10, lr=1e-2, loss=task.loss, weight_decay=0.0)
    after = task.test(model, held_out)
    assert before[1] == 0
    assert after[0] < before[0] / 2
