"""The recall task asks what it says, and tells convolutions from stacks that hold some attention."""

from __future__ import annotations

import pytest
import torch

from llmcourse.errors import ShapeError
from llmcourse.train.recall import Recall, read_back, recall_model, train_recall
from llmcourse.train.tasks import IGNORE

TASK = Recall(pairs=16, keys=32, values=32)


def test_every_query_has_its_answer_in_the_text_and_nothing_else_is_asked():
    batch = next(TASK.batches(batch=5, seed=3))
    (tokens,), targets = batch.inputs, batch.targets
    assert tokens.shape == targets.shape == (5, TASK.length)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:32:2], row[1:32:2], strict=True))
        assert len(pairs) == 16  # keys are distinct
        assert wanted[:32] == [IGNORE] * 32
        assert sorted(row[32:]) == sorted(pairs)
        assert [pairs[key] for key in row[32:]] == wanted[32:]
        assert all(key < 32 <= value < 64 for key, value in pairs.items())


def test_the_same_seed_draws_the_same_sequences_and_another_draws_others():
    def first(seed: int) -> torch.Tensor:
        return next(TASK.batches(batch=4, seed=seed)).inputs[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("pairs", [0, 33])
def test_more_pairs_than_keys_are_refused(pairs):
    with pytest.raises(ShapeError, match="different keys"):
        Recall(pairs=pairs, keys=32)


def test_a_model_depends_on_its_seed_alone():
    weights = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        model = recall_model(("hyena", "attention"), TASK, seed=7)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_state_returns_few_pairs_and_a_larger_one_more():
    assert read_back(1, 16) == 1
    assert read_back(128, 16) < 0.2
    shares = [read_back(32, dim) for dim in (16, 32, 64)]
    assert shares == sorted(shares)
    assert shares[2] > 0.9 > shares[0]


def test_convolutions_lose_on_recall_and_one_attention_layer_recovers_it_on_three_seeds():
    for seed in range(3):
        convolution = train_recall(("hyena", "hyena"), TASK, seed=seed).accuracy
        hybrid = train_recall(("hyena", "attention"), TASK, seed=seed).accuracy
        assert hybrid > 0.9
        assert convolution < 0.3
