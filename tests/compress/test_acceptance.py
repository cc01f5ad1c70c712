"""The acceptance rate, against speculative sampling itself, run token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llmcourse.compress import acceptance
from llmcourse.compress.acceptance import compare, expected_passes, expected_tokens, measure
from llmcourse.compress.draft_report import acceptance_report, draft_report
from llmcourse.errors import CourseError


class Chain(nn.Module):
    """The next token depends on the last alone: a table of logits [V, V]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens):
        return self.table[tokens]


def chains(seed=0, size=5, apart=0.8):
    generator = torch.Generator().manual_seed(seed)
    table = 1.5 * torch.randn(size, size, generator=generator)
    return Chain(table), Chain(table + apart * torch.randn(size, size, generator=generator))


def speculate(p, q, length, gamma, rng):
    """Speculative sampling by its definition; the text, and the passes of the target that it took."""
    text, passes = [0], 0
    while len(text) <= length:
        passes += 1
        guesses, last = [], text[-1]
        for _ in range(gamma):
            last = rng.choice(len(q), p=q[last])
            guesses.append(last)
        for guess in guesses:
            before = text[-1]
            if rng.random() < min(1, p[before][guess] / q[before][guess]):
                text.append(guess)
                continue
            rest = np.maximum(p[before] - q[before], 0)
            text.append(rng.choice(len(p), p=rest / rest.sum()))
            break
        else:
            text.append(rng.choice(len(p), p=p[text[-1]]))
    return text, passes


@pytest.mark.parametrize("gamma", [1, 3])
def test_playing_on_the_targets_text_gives_the_passes_of_speculative_sampling(gamma):
    target, draft = chains()
    p, q = (m.table.detach().double().softmax(-1).numpy() for m in (target, draft))
    rng = np.random.default_rng(1)
    text, passes = speculate(p, q, 20_000, gamma, rng)
    really = (len(text) - 1) / passes
    own = [0]
    for _ in range(20_000):
        own.append(rng.choice(len(p), p=p[own[-1]]))
    with torch.inference_mode():
        played = measure(target, draft, [(own[:1], own[1:])]).tokens_per_pass(gamma)
    assert played == pytest.approx(really, rel=0.02)


def test_the_overlap_is_the_mean_acceptance_of_guesses_and_of_written_tokens():
    p, q = (m.table.detach().double() for m in chains(2))
    rng = torch.Generator().manual_seed(0)
    tokens = p.softmax(-1).multinomial(50_000, replacement=True, generator=rng)
    for row in range(len(p)):
        copies = p[row].expand(50_000, -1), q[row].expand(50_000, -1)
        overlap, accepted = compare(*copies, tokens[row])
        assert float(accepted.mean()) == pytest.approx(float(overlap[0]), abs=0.01)
        a, b = p[row].softmax(-1), q[row].softmax(-1)
        assert float(overlap[0]) == pytest.approx(float((b * (a / b).clamp(max=1)).sum()))


def test_greedy_models_accept_where_they_choose_the_same():
    target = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 1.0]])
    draft = torch.tensor([[0.0, 9.0, 0.0], [0.0, 1.0, 0.0]])
    overlap, accepted = compare(target, draft, torch.tensor([1, 0]), temperature=0)
    assert overlap.tolist() == accepted.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_independent_places_of_a_long_text_follow_the_formula(rate, length):
    count = 6000
    passes = expected_passes(torch.full((count,), rate, dtype=torch.float64), length)
    assert count / passes == pytest.approx(expected_tokens(rate, length), rel=2e-3)


def test_greedy_runs_are_counted_as_they_are():
    chances = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    # γ = 2: passes begin at 0, 3 (after two guesses and one token), 4, 6, 7
    assert expected_passes(chances, 2) == 5


def test_the_report_is_the_same_from_probabilities():
    target, draft = chains(3)
    rng = np.random.default_rng(0)
    texts = [([0, 1], rng.integers(0, 5, 12).tolist()) for _ in range(3)]
    places = measure(target, draft, texts)
    table = draft_report(target, draft, texts, length=3)
    assert table.rows[-1][2] == f"{places.rate:.3f}"
    assert table.rows[-1][4] == f"{places.tokens_per_pass(3):.2f}"
    p, q = (m.table.detach().double().softmax(-1).numpy()[[1, *texts[0][1][:-1]]] for m in (target, draft))
    rate, accepted, _ = acceptance_report(p, q, np.array(texts[0][1]), 3)
    assert rate == pytest.approx(float(places.overlap[0].mean()), abs=1e-6)
    assert np.allclose(accepted, places.accepted[0], atol=1e-6)


def test_speed_is_tokens_a_pass_over_its_cost():
    assert acceptance.speedup(0.6, 2, 0.1) == pytest.approx((1 + 0.6 + 0.36) / 1.2)
    assert "1.63×" in repr(
        acceptance.Places([torch.full((900,), 0.6)], [torch.full((900,), 0.6)]).table([2], 0.1)
    )


def test_what_cannot_be_compared_is_refused():
    z = torch.zeros(3, 4)
    with pytest.raises(CourseError, match="same places"):
        compare(z, torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(CourseError, match="temperature is -1"):
        compare(z, z, torch.zeros(3, dtype=torch.long), temperature=-1)
    with pytest.raises(CourseError, match="drafts of 0"):
        expected_passes(torch.ones(3), 0)
    with pytest.raises(CourseError, match="no token"):
        measure(*chains(), [([1, 2], [])])
