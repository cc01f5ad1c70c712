"""The small tasks ask what they say they ask, the same for the same seed; the loop trains as PyTorch does."""

from __future__ import annotations

import datetime
from itertools import islice, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.errors import GraphError, ShapeError
from llmcourse.train import IGNORE, Batch, accuracy, build, fit, tasks
from llmcourse.train.fit import cross_entropy, one_thread, scale_at
from llmcourse.train.tasks import Text

TEXT = "It was the best of times, it was the worst of times.\n" * 40


def supplies(seed: int) -> dict:
    return {
        "brackets": tasks.brackets(batch=5, length=12, seed=seed),
        "dates": tasks.dates(batch=5, seed=seed),
        "dates in one sequence": tasks.in_one_sequence(tasks.dates(batch=5, seed=seed)),
        "text": Text(TEXT).batches(batch=5, length=12, seed=seed),
    }


def drawn(name: str, seed: int) -> list[torch.Tensor]:
    return [t for b in islice(supplies(seed)[name], 3) for t in (*b.inputs, b.targets)]


@pytest.mark.parametrize("name", supplies(0))
def test_a_seed_gives_the_same_batches_and_another_seed_others(name):
    same = zip(drawn(name, 1), drawn(name, 1), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(drawn(name, 1), drawn(name, 2), strict=True)
    )


def closed_by_reduction(text: str) -> list[int]:
    """The same labels, found by striking out "()" until none is left: what was struck out is closed."""
    alive = list(range(len(text)))
    while True:
        pairs = [k for k in range(len(alive) - 1) if text[alive[k]] == "(" and text[alive[k + 1]] == ")"]
        if not pairs:
            break
        del alive[pairs[0] : pairs[0] + 2]
    return [IGNORE if c == ")" else int(i not in alive) for i, c in enumerate(text)]


@given(st.text(alphabet="()", max_size=24))
def test_a_bracket_is_closed_if_striking_out_pairs_strikes_it_out(text):
    assert tasks.closed(["()".index(c) for c in text]) == closed_by_reduction(text)


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_the_causal_ceiling_is_that_of_all_texts_of_the_length(length):
    """By brute force: the best answer for each prefix, over every text that continues it."""
    votes: dict[str, list[int]] = {}
    for text in map("".join, product("()", repeat=length)):
        for i, answer in enumerate(closed_by_reduction(text)):
            if answer != IGNORE:
                votes.setdefault(text[: i + 1], []).append(answer)
    right = sum(max(sum(v), len(v) - sum(v)) for v in votes.values())
    assert tasks.causal_ceiling(length) == pytest.approx(right / sum(map(len, votes.values())), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_dates_are_rewritten_as_the_calendar_says(seed):
    batch = next(tasks.dates(batch=4, seed=seed))
    source, target, lengths = batch.inputs
    for row, length in enumerate(lengths.tolist()):
        written = tasks.decode_date(source[row].tolist())
        assert len(written) == length
        form = "%B %d, %Y" if "," in written else "%d %B %Y"
        iso = datetime.datetime.strptime(written, form).date().isoformat()
        assert tasks.decode_date(batch.targets[row].tolist()) == iso
        assert target[row, 0] == tasks.START
        assert torch.equal(target[row, 1:], batch.targets[row, :-1])
        assert batch.targets[row, -1] == tasks.END
        again, (n,) = tasks.encode_dates([written])
        assert torch.equal(again[0], source[row, :n])


def test_in_one_sequence_the_answer_follows_its_source():
    pairs, joined = (
        next(tasks.dates(batch=6, seed=3)),
        next(tasks.in_one_sequence(tasks.dates(batch=6, seed=3))),
    )
    (tokens,), (source, target, lengths) = joined.inputs, pairs.inputs
    for row, n in enumerate(lengths.tolist()):
        end = n + target.shape[1]
        assert torch.equal(tokens[row, :n], source[row, :n])
        assert torch.equal(tokens[row, n:end], target[row])
        assert torch.equal(joined.targets[row, n:end], pairs.targets[row])
        assert (joined.targets[row, :n] == IGNORE).all()
        assert (joined.targets[row, end:] == IGNORE).all()


def test_the_target_of_a_character_is_the_next_one():
    text = Text(TEXT)
    batch = next(text.batches(batch=4, length=20, seed=0))
    for row in range(4):
        stretch = text.decode(batch.inputs[0][row]) + text.decode(batch.targets[row, -1:])
        assert stretch in TEXT
        assert torch.equal(batch.inputs[0][row, 1:], batch.targets[row, :-1])
    assert text.decode(text.encode("best of times")) == "best of times"


def test_what_is_held_out_is_not_trained_on():
    text = Text("a" * 900 + "b" * 100)
    trained = next(text.batches(batch=50, length=10, seed=0))
    held_out = next(text.batches(batch=50, length=10, seed=0, held_out=True))
    assert text.decode(trained.inputs[0].flatten().unique()) == "a"
    assert text.decode(held_out.inputs[0].flatten().unique()) == "b"


def test_the_bigram_loss_is_the_tables_cross_entropy():
    import math

    text = Text("abab" * 90 + "abba" * 10)  # 40 characters held out, all of them from "abba"
    pairs = list(zip("abab" * 90, ("abab" * 90)[1:], strict=False))
    held = list(zip("abba" * 10, ("abba" * 10)[1:], strict=False))
    total = 0.0
    for a, b in held:
        row = [p for p in pairs if p[0] == a]
        total -= math.log((row.count((a, b)) + 1) / (len(row) + 2))
    assert text.bigram_loss() == pytest.approx(total / len(held), abs=1e-5)


def test_shakespeare_is_the_course_text_without_markdowns_trailing_blanks():
    text = Text.shakespeare(plays=1)
    whole = text.decode(text.train)
    assert len(whole) > 50_000
    assert " \n" not in whole
    assert "THESEUS" in whole


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tasks.encode_dates(["7 märz 1871"]), "ä"),
        (lambda: Text(TEXT).encode("zebra"), "z"),
        (lambda: next(Text(TEXT).batches(batch=1, length=5000, seed=0)), "5000"),
        (lambda: fit(nn.Linear(1, 1), [], steps=0), "0 steps"),
        (lambda: fit(nn.Linear(1, 1), [1], steps=3, loss=lambda m, b: m.weight.sum()), "after 1 of 3"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_three_parts(call, says):
    with pytest.raises(ShapeError) as error:
        call()
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 3


# ---------------------------------------------------------------- the loop


def small() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)), seed=1)


def pairs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, 9, (4, 7), generator=generator)
        yield Batch((tokens,), torch.where(tokens == 3, IGNORE, (tokens + 1) % 9))


def test_the_same_seeds_give_the_same_curve_whatever_was_drawn_before():
    first = fit(small(), pairs(), steps=12)
    torch.manual_seed(99)
    torch.randn(5)
    assert fit(small(), pairs(), steps=12) == first
    assert fit(small(), pairs(1), steps=12) != first


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    small()
    assert torch.equal(torch.randn(3), expected)


def test_the_steps_are_those_of_torch_adamw_with_clipped_gradients():
    ours, theirs = small(), small()
    curve = fit(ours, pairs(), steps=9, lr=0.02, clip=0.5, warmup=3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=(0.9, 0.98), weight_decay=0.1)
    for group in list(optimizer.param_groups):
        group["params"] = [p for p in theirs.parameters() if p.dim() > 1]
    optimizer.add_param_group(
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0}
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale_at(step, 9, 3))
    for expected, batch in zip(curve, pairs(), strict=False):
        loss = cross_entropy(theirs, batch)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_rate_climbs_then_falls_to_a_tenth():
    scales = [scale_at(step, 100, 10) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == scales[10] == 1
    assert sorted(scales[10:], reverse=True) == scales[10:]
    assert scales[100] == pytest.approx(0.1)


def test_clipping_bounds_what_one_odd_batch_can_do():
    model = nn.Linear(1, 1, bias=False)

    def loss(model: nn.Module, scale: float) -> torch.Tensor:
        norms.append(scale)
        return model.weight.sum() * scale

    norms: list[float] = []
    fit(model, [1.0, 1e6], steps=2, lr=0.1, loss=loss, warmup=1, weight_decay=0.0)
    assert norms == [1.0, 1e6]
    assert model.weight.grad.norm() <= 1.0 + 1e-6


def test_a_model_leaves_training_in_the_mode_in_which_it_came():
    for training in (True, False):
        model = small().train(training)
        fit(model, pairs(), steps=1)
        assert model.training is training


def test_accuracy_counts_only_what_is_asked():
    class Echo(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(tokens, 9).float()

    tokens = torch.tensor([[1, 2, 3, 4]])
    assert accuracy(Echo(), Batch((tokens,), torch.tensor([[1, 0, IGNORE, 4]]))) == pytest.approx(2 / 3)


def test_a_small_model_learns_a_small_task():
    model = small()
    curve = fit(model, pairs(), steps=150, lr=0.02)
    assert curve[-1] < 0.2 * curve[0]
    assert accuracy(model, next(pairs(7))) == 1.0


def test_a_frozen_model_is_refused_and_not_trained():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(GraphError, match="no weight of this Linear"):
        fit(model, [], steps=1)


def test_an_interrupted_training_leaves_the_model_as_it_was_used():
    model = nn.Linear(2, 2).eval()

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, [0], steps=1, loss=interrupted)
    assert not model.training


def test_one_thread_gives_the_others_back_whatever_happens():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert one_thread()(torch.get_num_threads)() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 / (torch.get_num_threads() - 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
