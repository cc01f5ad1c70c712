"""Each architecture learns the task it suits, in seconds and on three seeds; the orderings of notebook 07 hold."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.encoder import Encoder
from llmcourse.models.encoder_decoder import EncoderDecoder
from llmcourse.train import Batch, accuracy, build, fit, tasks
from llmcourse.train.tasks import Text

SEEDS = (0, 1, 2)


def sizes(vocab_size: int, n_layers: int = 2) -> ModelConfig:
    return ModelConfig(
        vocab_size, d_model=64, n_layers=n_layers, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128, max_len=64
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_an_encoder_knows_which_brackets_close_and_a_decoder_only_guesses(seed):
    config, ceiling = sizes(2), tasks.causal_ceiling(16)
    reached = {}
    for make, options in ((Encoder, {"classes": 2}), (Transformer, {})):
        model = build(make, config, seed=seed, **options)
        fit(model, tasks.brackets(batch=48, length=16, seed=seed), steps=110)
        reached[make] = accuracy(model, next(tasks.brackets(batch=1000, length=16, seed=100)))
    assert reached[Encoder] > ceiling + 0.15
    assert reached[Transformer] < ceiling + 0.03  # no model without the right side does better, but for luck
    assert reached[Transformer] > 0.6  # it was trained, too


@pytest.mark.parametrize("seed", SEEDS)
def test_an_encoder_decoder_rewrites_dates_and_needs_the_source_for_it(seed):
    model = build(EncoderDecoder, sizes(len(tasks.DATE_CHARACTERS), n_layers=1), seed=seed)
    fit(model, tasks.dates(batch=32, seed=seed), steps=200, lr=6e-3)
    held_out = next(tasks.dates(batch=200, seed=100))
    source, target, lengths = held_out.inputs
    written = model.generate(source, lengths, start=tasks.START, end=tasks.END, room=12)
    right = [
        tasks.decode_date(a) == tasks.decode_date(b)
        for a, b in zip(written, held_out.targets.tolist(), strict=True)
    ]
    assert sum(right) / len(right) > 0.5
    other = Batch((source.roll(1, 0), target, lengths.roll(1)), held_out.targets)
    assert accuracy(model, held_out) > accuracy(model, other) + 0.2


@torch.no_grad()
def loss_from_prefixes(model: torch.nn.Module, batch: Batch) -> float:
    """Nats a character when each is predicted from what stands before it, as in generation."""
    (tokens,), losses = batch.inputs, []
    for n in range(8, tokens.shape[1] + 1, 8):
        losses.append(F.cross_entropy(model(tokens[:, :n])[:, -1], batch.targets[:, n - 1]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_decoder_learns_text_and_an_encoder_learns_to_look_at_the_answer(seed):
    text = Text.shakespeare(plays=4)
    held_out = next(text.batches(batch=300, length=48, seed=100, held_out=True))
    curves, honest = {}, {}
    for make in (Transformer, Encoder):
        model = build(make, sizes(text.vocab_size), seed=seed)
        curves[make] = fit(model, text.batches(batch=16, length=48, seed=seed), steps=150, lr=5e-3)
        honest[make] = loss_from_prefixes(model, held_out)
    assert honest[Transformer] < text.bigram_loss()
    assert curves[Encoder][-1] < 0.5 < curves[Transformer][-1]  # the next character is in sight
    assert honest[Encoder] > text.bigram_loss()


def test_the_curves_are_the_same_when_run_again():
    config = sizes(2)
    runs = [
        fit(build(Encoder, config, classes=2, seed=0), tasks.brackets(batch=8, length=12, seed=0), steps=5)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    batches = tasks.brackets(batch=8, length=12, seed=0)
    first, second = islice(batches, 2)
    assert not torch.equal(first.inputs[0], second.inputs[0])
