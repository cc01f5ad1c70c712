"""The experiments of chapter 02, held on more seeds than the notebook shows."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from llmcourse.errors import ShapeError
from llmcourse.train.digits import TRAINING, digits, silent_units, train_digits
from llmcourse.train.optim import LAMB, AdamW

SEEDS = range(3)


def test_every_digit_is_there_once_and_the_split_holds_all_ten():
    from sklearn.datasets import load_digits

    pixels, labels = digits()
    raw, shown = load_digits(return_X_y=True)
    assert sorted(map(tuple, (pixels * 16).int().tolist())) == sorted(map(tuple, raw.astype(int).tolist()))
    assert torch.bincount(labels).tolist() == [int((shown == k).sum()) for k in range(10)]
    assert len(labels[TRAINING:].unique()) == 10


def test_the_same_seed_gives_the_same_curve_and_another_batch_fewer_steps():
    a, b = (train_digits(AdamW, batch=352, lr=0.01, seed=4, epochs=3) for _ in range(2))
    assert a.curve == b.curve
    assert len(a.curve) == 12
    assert len(train_digits(AdamW, batch=704, lr=0.01, seed=4, epochs=3).curve) == 6


@pytest.mark.parametrize("batch", [0, TRAINING + 1])
def test_a_batch_that_the_digits_do_not_fill_is_refused(batch):
    with pytest.raises(ShapeError, match=f"batches of {batch} digits"):
        train_digits(AdamW, batch=batch, lr=0.01, seed=0)


def test_the_rule_for_large_batches_carries_lamb_s_rate_and_not_adamw_s():
    ruled = 0.02 * math.sqrt(704 / 32)
    accuracy = {
        kind: [train_digits(kind, batch=704, lr=ruled, seed=s).accuracy for s in SEEDS]
        for kind in (AdamW, LAMB)
    }
    assert min(accuracy[LAMB]) > max(accuracy[AdamW]) + 0.1
    retuned = [train_digits(AdamW, batch=704, lr=0.02, seed=s).accuracy for s in SEEDS]
    assert sum(retuned) > sum(accuracy[AdamW]) + 0.5


def test_a_bold_rate_needs_its_warm_up():
    bold = {"batch": 64, "lr": 0.02, "epochs": 6, "layers": 6}
    short = partial(AdamW, betas=(0.9, 0.99))
    without, with_it = (
        [train_digits(short, warmup=w, seed=s, **bold).accuracy for s in SEEDS] for w in (0.0, 0.3)
    )
    assert sum(with_it) > sum(without) + 0.3


def test_a_long_step_kills_relus_and_spares_units_that_let_something_through():
    leaky = partial(F.leaky_relu, negative_slope=0.01)
    for seed in SEEDS:
        assert silent_units(F.relu, lr=2.0, seed=seed) > 0.7
        assert silent_units(F.relu, lr=0.5, seed=seed) < 0.15
        assert silent_units(leaky, lr=2.0, seed=seed) == 0
