"""The variants at equal parameters: the task is fair, and on three seeds each keeps its place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmcourse.bench import attention_variants as bench
from llmcourse.errors import ShapeError
from llmcourse.models import KVCache, Transformer
from llmcourse.models.mla import LatentAttention
from llmcourse.models.sizes import LatentSizes
from llmcourse.train.tasks import IGNORE
from llmcourse.train.variants import (
    BASE,
    RECORDS,
    SMALL,
    book_vocab,
    draw,
    equal_parameters,
    grouped,
    latent,
    phone_book,
    train,
)

SEEDS = (0, 1, 2)


def test_every_question_of_a_telephone_book_is_answered_by_one_record_of_it() -> None:
    batch = next(phone_book(batch=50, seed=3, records=7))
    (tokens,) = batch.inputs
    assert tokens.shape == batch.targets.shape == (50, 14)
    assert int(tokens.max()) < book_vocab(7)
    assert (batch.targets[:, :7] == IGNORE).all()
    for row, answers in zip(tokens.tolist(), batch.targets.tolist(), strict=True):
        book = {record // 7: record % 7 for record in row[:7]}
        assert sorted(book) == sorted(book.values()) == list(range(7))
        assert [book[question - 49] for question in row[7:]] == answers[7:]


def test_books_follow_their_seed_and_never_repeat() -> None:
    def draws(seed: int, n: int = 2) -> list[torch.Tensor]:
        books = phone_book(batch=4, seed=seed)
        return [next(books).inputs[0] for _ in range(n)]

    assert all(torch.equal(a, b) for a, b in zip(draws(5), draws(5), strict=True))
    assert not torch.equal(*draws(5))
    assert not torch.equal(draws(5)[0], draws(6)[0])


def test_all_variants_have_the_bases_parameters_to_within_a_feature() -> None:
    feature = 3 * BASE.d_model * BASE.n_layers
    for name, config in SMALL.items():
        assert abs(config.n_params - BASE.n_params) <= feature / 2, name
        assert sum(p.numel() for p in Transformer(config).parameters()) == config.n_params, name


def test_a_variant_that_leaves_no_feed_forward_part_is_refused() -> None:
    with pytest.raises(ShapeError, match="parameters more than MHA"):
        equal_parameters(BASE, {"MLA": latent(500, 4)})


def test_caches_of_the_variants_are_as_small_as_computed() -> None:
    numbers = {name: config.kv_bytes_per_token(1) for name, config in SMALL.items()}
    assert numbers == {
        "MHA": 64,
        "GQA, 2 heads": 16,
        "MQA": 8,
        "MQA, heads of 6": 12,
        "MLA, rank 8": 12,
        "window of 4": 64,
    }
    for name, config in SMALL.items():
        held = KVCache(config, 1, 16, dtype=torch.float32).nbytes
        assert held == config.cache_bytes(16, 4), name
    assert SMALL["window of 4"].cache_bytes(16, 1) == 4 * 64


@pytest.fixture(scope="module")
def losses() -> dict[tuple[str, int], float]:
    return {(name, s): train(config, seed=s).loss for name, config in SMALL.items() for s in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_fewer_key_value_heads_learn_the_book_more_slowly(seed: int, losses) -> None:
    assert losses["MHA", seed] < losses["GQA, 2 heads", seed] < losses["MQA", seed]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_latent_for_all_heads_beats_one_head_of_as_many_bytes(seed: int, losses) -> None:
    assert losses["MLA, rank 8", seed] < losses["MQA, heads of 6", seed]
    assert losses["MLA, rank 8", seed] < losses["GQA, 2 heads", seed]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_window_that_does_not_reach_the_book_guesses(seed: int, losses) -> None:
    """It may keep more than the others: what it keeps is not what is asked for."""
    assert losses["window of 4", seed] == pytest.approx(math.log(RECORDS), abs=0.05)
    assert all(losses[n, seed] < losses["window of 4", seed] - 0.4 for n in SMALL if "window" not in n)


def test_with_more_training_one_head_is_enough_for_eight_records() -> None:
    """So what sharing heads cost above was time, not ability."""
    assert train(SMALL["MQA"], seed=0, steps=400).loss < 0.1


def test_the_same_seed_gives_the_same_weights_on_every_machine() -> None:
    first = draw(Transformer(BASE), seed=1).embedding.weight.double().sum().item()
    again = draw(Transformer(BASE), seed=1).embedding.weight.double().sum().item()
    other = draw(Transformer(BASE), seed=2).embedding.weight.double().sum().item()
    assert first == again != other


# ------------------------------------------------------------------------------------------- the benchmark


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return bench.run("cpu")[0]


def test_the_benchmark_has_a_row_for_every_variant_pooling_and_way_to_decode(rows) -> None:
    names = {
        kind: {r["name"] for r in rows if r["kind"] == kind} for kind in ("text", "uptraining", "decode")
    }
    assert {"MHA", "GQA, 2 heads", "MQA", "window of 32", "window of 1"} < names["text"]
    assert {n.partition(", ")[2] for n in names["uptraining"]} == set(bench.POOLINGS)
    assert names["decode"] == {*bench.DECODE_VARIANTS, "MLA, three launches"}
    assert all(math.isfinite(r["loss"]) for r in rows if "loss" in r)


def test_decode_rows_count_the_bytes_that_the_configurations_say(rows) -> None:
    for r in rows:
        if r["kind"] == "decode" and r["name"] == "GQA, 8 heads":
            config = grouped(8)(bench.decode_config(small=True))
            assert r["cache_bytes"] == config.cache_bytes(r["context"]) * r["batch"]


def test_attention_in_three_launches_is_the_absorbed_form() -> None:
    config = replace(bench.decode_config(small=True), layers=("latent",), latent=LatentSizes(0, 32, 8, 4, 8))
    torch.manual_seed(0)
    layer = LatentAttention(config).eval().requires_grad_(False)
    torch.manual_seed(1)
    module, _ = bench._decode_step(config, layer, 3, 9, torch.float32, "cpu")
    torch.manual_seed(1)
    apart = bench._three_launches(config, layer, 3, 9, torch.float32, "cpu")
    torch.testing.assert_close(apart(), module(), atol=1e-5, rtol=1e-4)
