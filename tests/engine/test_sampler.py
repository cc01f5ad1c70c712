"""Samplers are tested as distributions: against scipy and transformers, with a stated false-alarm rate."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from llmcourse.engine.sampler import Sampler, SamplingError, SamplingParams, probabilities

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.9])


def warped(params: SamplingParams) -> torch.Tensor:
    """The distribution that transformers' own warpers give."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(params.temperature)(None, LOGITS[None])
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)[0]


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, top_k=3),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.3, top_k=4, top_p=0.7),
    SamplingParams(temperature=1.0, top_p=0.01),
    SamplingParams(temperature=1.0, top_k=100),
]


@pytest.mark.parametrize("params", CASES)
def test_the_distribution_is_the_one_transformers_warpers_give(params):
    torch.testing.assert_close(probabilities(LOGITS, params), warped(params))


@pytest.mark.parametrize("params", [CASES[0], CASES[2], CASES[4]])
def test_draws_follow_the_distribution(params):
    """Chi-square, false-alarm rate 1e-6; the same draws must reject a temperature 30 % higher."""
    sampler = Sampler([params])
    n = 20_000
    counts = torch.bincount(torch.cat([sampler(LOGITS[None]) for _ in range(n)]), minlength=len(LOGITS))
    probs = probabilities(LOGITS, params).double()
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    assert chisquare(counts[kept], n * probs[kept] / probs[kept].sum()).pvalue > 1e-6
    wrong = probabilities(
        LOGITS, SamplingParams(temperature=params.temperature * 1.3, top_k=int(kept.sum()))
    ).double()
    assert chisquare(counts[kept], n * wrong[kept] / wrong[kept].sum()).pvalue < 1e-6


def test_greedy_takes_the_likeliest_token():
    assert Sampler([SamplingParams()])(LOGITS[None]).tolist() == [0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_parameters_outside_their_range_are_refused(bad):
    with pytest.raises(SamplingError, match=next(iter(bad))):
        SamplingParams(**bad)
