"""Accumulated gradients are the whole batch's, whatever its pieces and masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.errors import ShapeError
from llmcourse.grading.cost import counter
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.accumulate import accumulate, asked, micro_batches
from llmcourse.train.fit import build
from llmcourse.train.tasks import IGNORE, Batch

CONFIG = ModelConfig(23, 16, 1, 2, 1, 8, 24, max_len=32)
MODEL = build(Transformer, CONFIG, seed=0).double()


def drawn(rows, length, share, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, 23, (2, rows, length), generator=generator)
    targets = torch.where(torch.rand(rows, length, generator=generator) < share, IGNORE, targets)
    targets[0, 0] = 1
    return Batch((tokens,), targets)


def gradients(backward):
    MODEL.zero_grad()
    value = backward()
    return value, torch.cat([p.grad.flatten() for p in MODEL.parameters()])


def at_once(batch):
    value = F.cross_entropy(MODEL(*batch.inputs).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    value.backward()
    return value.item()


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 8), st.floats(0, 0.95), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_pieces_of_any_batch_give_its_gradient(rows, length, size, share, seed):
    batch = drawn(rows, length, share, seed)
    loss, want = gradients(lambda: at_once(batch))
    mean, got = gradients(lambda: accumulate(MODEL, list(micro_batches(batch, size))))
    assert mean == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_workers_with_parts_of_a_batch_add_up_to_it():
    batch = drawn(6, 8, 0.5, 3)
    _, want = gradients(lambda: at_once(batch))
    parts = list(micro_batches(batch, 2))

    def both():
        accumulate(MODEL, parts[:2], count=asked(batch))
        accumulate(MODEL, parts[2:], count=asked(batch))

    torch.testing.assert_close(gradients(both)[1], want, rtol=1e-10, atol=1e-13)


def test_a_scale_multiplies_gradients_and_not_the_loss():
    pieces = list(micro_batches(drawn(3, 5, 0.0, 1), 2))
    loss, want = gradients(lambda: accumulate(MODEL, pieces))
    scaled, got = gradients(lambda: accumulate(MODEL, pieces, scale=1024.0))
    assert scaled == loss
    torch.testing.assert_close(got, 1024 * want, rtol=1e-12, atol=1e-12)


def test_gradients_are_added_to_those_that_are_there():
    pieces = list(micro_batches(drawn(3, 5, 0.0, 1), 2))
    _, once = gradients(lambda: accumulate(MODEL, pieces))
    _, twice = gradients(lambda: [accumulate(MODEL, pieces) for _ in range(2)])
    torch.testing.assert_close(twice, 2 * once)


def test_memory_is_that_of_a_piece():
    batch, kept = drawn(8, 16, 0.0, 2), {}
    for rows in (8, 1):
        with counter("saved_bytes")(arguments=(MODEL,)) as count:
            accumulate(MODEL, list(micro_batches(batch, rows)))
        kept[rows] = count.values["saved_bytes"]
    MODEL.zero_grad()
    assert kept[1] < kept[8] / 6


def test_a_batch_that_asks_nothing_and_empty_pieces_are_refused():
    batch = drawn(2, 4, 0.0, 0)
    with pytest.raises(ShapeError, match="nothing is asked"):
        accumulate(MODEL, [Batch(batch.inputs, torch.full_like(batch.targets, IGNORE))])
    with pytest.raises(ShapeError, match="micro-batches of 0"):
        list(micro_batches(batch, 0))
