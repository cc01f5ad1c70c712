"""Heads joined into groups: exact where nothing is lost, and the best start for uptraining by the mean."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from llmcourse.errors import ModelError, UnknownNameError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.convert_gqa import Pooling, to_gqa
from llmcourse.models.sizes import LatentSizes
from llmcourse.train.variants import SMALL, Converted, convert, train

CONFIG = ModelConfig(31, 24, 2, 6, 6, 4, 20)
SEEDS = (0, 1, 2)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    for p in model.parameters():  # norms and biases too, so that losing one shows
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tie_embeddings": False}])
def test_joining_equal_heads_changes_nothing(how: str, options: dict[str, bool]) -> None:
    gqa = random_model(replace(CONFIG, n_kv_heads=2, **options))
    mha = Transformer(replace(CONFIG, **options)).eval()
    state = dict(gqa.state_dict())
    for name, weight in state.items():
        if ".qkv." in name:
            heads = weight.unflatten(0, (-1, 4))
            q, k, v = heads[:6], heads[6:8], heads[8:]
            state[name] = torch.cat((q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0))).flatten(0, 1)
    mha.load_state_dict(state)
    tokens = torch.randint(31, (2, 9))
    joined = to_gqa(mha, 2, how=how)
    assert joined.config.n_kv_heads == 2
    torch.testing.assert_close(mha(tokens), gqa(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined(tokens), gqa(tokens), atol=1e-5, rtol=1e-5)


def test_as_many_heads_as_before_is_a_copy() -> None:
    model = random_model(CONFIG)
    same = to_gqa(model, 6)
    tokens = torch.randint(31, (1, 7))
    assert torch.equal(same(tokens), model(tokens))
    with torch.no_grad():
        same.blocks[0].mixer.out.weight += 1
        same.embedding.weight += 1
    assert not torch.equal(same(tokens), model(tokens))
    assert torch.equal(random_model(CONFIG)(tokens), model(tokens)), "the original was changed"


def test_the_mean_is_taken_over_neighbours_head_by_head() -> None:
    model = random_model(CONFIG)
    joined = to_gqa(model, 3)
    old, new = (m.blocks[1].mixer.qkv.weight for m in (model, joined))
    assert new.shape == ((6 + 3 + 3) * 4, 24)
    assert torch.equal(new[:24], old[:24])
    for part, (old_at, new_at) in {"keys": (24, 24), "values": (48, 36)}.items():
        for head in range(3):
            for row in range(4):
                pair = [old[old_at + (2 * head + i) * 4 + row] for i in (0, 1)]
                torch.testing.assert_close(
                    new[new_at + head * 4 + row], (pair[0] + pair[1]) / 2, msg=f"{part} {head} {row}"
                )


def test_already_shared_heads_can_be_joined_further() -> None:
    model = random_model(replace(CONFIG, n_kv_heads=2))
    joined = to_gqa(model, 1, how="first")
    old = model.blocks[0].mixer.qkv.weight
    assert torch.equal(joined.blocks[0].mixer.qkv.weight[24:28], old[24:28])
    assert torch.equal(joined.blocks[0].mixer.qkv.weight[28:32], old[32:36])


def test_random_heads_have_the_spread_of_the_old_and_follow_the_seed() -> None:
    model = random_model(CONFIG)
    a, b, c = (to_gqa(model, 1, how="random", seed=s).blocks[0].mixer.qkv.weight[24:] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert 0.2 < a.std() < 0.4


@pytest.mark.parametrize("heads", [0, 4, 7, -1])
def test_heads_that_do_not_divide_are_refused(heads: int) -> None:
    with pytest.raises(ModelError, match=r"Try n_kv_heads = one of \[1, 2, 3, 6\]"):
        to_gqa(random_model(CONFIG), heads)


def test_layers_without_heads_and_unknown_ways_are_refused() -> None:
    latent = replace(CONFIG, layers=("attention", "latent"), latent=LatentSizes(0, 8, 4, 4, 4))
    with pytest.raises(ModelError, match="'latent'"):
        to_gqa(random_model(latent), 1)
    with pytest.raises(UnknownNameError, match="mean, first, random"):
        to_gqa(random_model(CONFIG), 1, how="last")


@pytest.fixture(scope="module")
def uptrained() -> dict[tuple[int, str], Converted]:
    """Eight trained heads joined to four, and trained 20 steps more."""
    whole = {seed: train(SMALL["MHA"], seed=seed, steps=200) for seed in SEEDS}
    return {
        (seed, how): convert(trained, 4, how) for seed, trained in whole.items() for how in get_args(Pooling)
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_conversion_hurts_and_a_tenth_of_the_training_gives_most_of_it_back(seed: int, uptrained) -> None:
    mean = uptrained[seed, "mean"]
    assert mean.whole < 0.05
    assert mean.at_once > 1
    assert mean.uptrained < mean.at_once / 3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_is_the_best_start_for_uptraining_and_random_heads_the_worst(seed: int, uptrained) -> None:
    mean, first, random = (uptrained[seed, how].uptrained for how in ("mean", "first", "random"))
    assert mean < 0.8 * first
    assert first < 0.8 * random
