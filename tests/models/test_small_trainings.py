"""Each architecture learns the task it suits, in seconds and on three seeds, as notebook 07 says."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from llmcourse.models import Transformer
from llmcourse.models.encoder import Encoder
from llmcourse.models.encoder_decoder import EncoderDecoder
from llmcourse.train import Batch, accuracy, build, fit, tasks
from llmcourse.train.fit import cross_entropy
from llmcourse.train.small import continue_text, deep, loss_from_prefixes, small
from llmcourse.train.tasks import Text
from llmcourse.widgets.architectures import draw_architectures

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_encoder_knows_which_brackets_close_and_a_decoder_only_guesses(seed):
    ceiling = tasks.causal_ceiling(16)
    reached = {}
    for make, options in ((Encoder, {"classes": 2}), (Transformer, {})):
        model = build(make, small(2), seed=seed, **options)
        fit(model, tasks.brackets(batch=32, length=16, seed=seed), steps=100)
        reached[make] = accuracy(model, next(tasks.brackets(batch=1000, length=16, seed=100)))
    assert reached[Encoder] > ceiling + 0.15
    assert reached[Transformer] < ceiling + 0.03  # no model without the right side does better, but for luck
    assert reached[Transformer] > 0.6  # it was trained, too


@pytest.mark.parametrize("seed", SEEDS)
def test_an_encoder_decoder_rewrites_dates_and_needs_the_source_for_it(seed):
    model = build(EncoderDecoder, small(len(tasks.DATE_CHARACTERS), n_layers=1), seed=seed)
    fit(model, tasks.dates(batch=32, seed=seed), steps=170, lr=6e-3)
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


@pytest.mark.parametrize("seed", SEEDS)
def test_a_decoder_learns_text_and_an_encoder_learns_to_look_at_the_answer(seed):
    text = Text.shakespeare(plays=4)
    held_out = next(text.batches(batch=300, length=48, seed=100, held_out=True))
    curves, honest = {}, {}
    for make, steps in ((Transformer, 120), (Encoder, 80)):
        model = build(make, small(text.vocab_size), seed=seed)
        curves[make] = fit(model, text.batches(batch=16, length=48, seed=seed), steps=steps, lr=5e-3)
        honest[make] = loss_from_prefixes(model, held_out)
    assert honest[Transformer] < text.bigram_loss()
    assert curves[Encoder][-1] < 1.2 < curves[Transformer][-1]  # the next character is in sight
    assert honest[Encoder] > text.bigram_loss() + 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_post_norm_with_large_weights_learns_letter_frequencies_only(seed):
    text = Text.shakespeare(plays=4)
    frequency = torch.bincount(text.train) / len(text.train)
    unigram = -(frequency * frequency.clamp_min(1e-9).log()).sum().item()
    end = {}
    for post_norm in (False, True):
        model = deep(text.vocab_size, 8, post_norm=post_norm, seed=seed)
        curve = fit(model, text.batches(batch=8, length=32, seed=seed), steps=60)
        end[post_norm] = sum(curve[-10:]) / 10
    assert end[False] < unigram - 0.2 < end[True]


def test_the_last_gradient_falls_with_depth_under_pre_norm_only():
    text = Text.shakespeare(plays=1)
    batch = next(text.batches(batch=8, length=32, seed=0))
    found = {}
    for n_layers in (6, 24):
        for post_norm in (False, True):
            model = deep(text.vocab_size, n_layers, post_norm=post_norm)
            cross_entropy(model, batch).backward()
            grads = [p.grad.flatten() for p in model.blocks[-1].parameters()]
            found[n_layers, post_norm] = torch.cat(grads).norm().item()
    assert found[24, False] < 0.7 * found[6, False]  # 1/√4 by the theory
    assert found[24, True] > 0.7 * found[6, True]


def test_text_continues_from_its_prompt_the_same_for_the_same_seed():
    text = Text("to be or not to be\n" * 60)
    model = build(Transformer, small(text.vocab_size), seed=0)
    first = continue_text(model, text, "to be", length=7, seed=1)
    assert first.startswith("to be")
    assert len(first) == 12
    assert continue_text(model, text, "to be", length=7, seed=1) == first
    assert continue_text(model, text, "to be", length=7, seed=2) != first


def test_the_picture_of_three_architectures_shows_the_date_that_is_read():
    from matplotlib.text import Text as Words

    writer = build(EncoderDecoder, small(len(tasks.DATE_CHARACTERS), 1), seed=0).eval()
    dates = next(tasks.dates(batch=3, seed=7))
    figure, _ = draw_architectures(writer, dates)
    figure.draw_without_rendering()
    columns = [t.get_text() for t in figure.axes[2].get_xticklabels()]
    assert "".join(columns) == tasks.decode_date(dates.inputs[0][0].tolist())
    assert any("may look" in words.get_text() for words in figure.findobj(Words))


def test_the_curves_are_the_same_when_run_again():
    config = small(2)
    runs = [
        fit(build(Encoder, config, classes=2, seed=0), tasks.brackets(batch=8, length=12, seed=0), steps=5)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    batches = tasks.brackets(batch=8, length=12, seed=0)
    first, second = islice(batches, 2)
    assert not torch.equal(first.inputs[0], second.inputs[0])
