"""Properties of the model itself: the cache changes nothing, and neither do the switches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.errors import ShapeError
from llmcourse.models import KVCache, ModelConfig, random_model

SMALL = ModelConfig(
    vocab_size=97, d_model=24, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=6, d_ff=40, max_len=128
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return random_model(SMALL, dtype="float32")


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), batch=st.integers(1, 3))
def test_reading_in_any_pieces_through_the_cache_gives_the_same_logits(cuts, batch):
    torch.manual_seed(3)
    model = random_model(SMALL, dtype="float32")
    ids = torch.randint(0, 97, (batch, sum(cuts)))
    cache = KVCache(SMALL, batch, sum(cuts) + 3)
    with torch.inference_mode():
        pieces = [model(part, cache) for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-5)


def test_sequences_of_unequal_length_decode_as_if_alone(model):
    prompts = [torch.randint(0, 97, (1, n)) for n in (1, 13, 6)]
    following = torch.randint(0, 97, (3, 5))
    cache = KVCache(SMALL, 3, 32)
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            row = cache.row(i)
            model(prompt, row)
            cache.lengths[i] = row.lengths[0]
        together = torch.cat([model(following[:, t : t + 1], cache) for t in range(5)], dim=1)
        for i, prompt in enumerate(prompts):
            alone = model(torch.cat((prompt, following[i : i + 1]), dim=1))[:, -5:]
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_token_never_sees_what_comes_after_it(model):
    ids = torch.randint(0, 97, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    with torch.inference_mode():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_fused_and_separate_projections_agree(model):
    ids = torch.randint(0, 97, (2, 15))
    with torch.inference_mode():
        fused = model.fuse(True)(ids)
        apart = model.fuse(False)(ids)
    model.fuse(True)
    torch.testing.assert_close(fused, apart, atol=1e-5, rtol=1e-5)


def test_last_only_gives_the_last_position_alone(model):
    ids = torch.randint(0, 97, (2, 15))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_kv_bytes_per_token_equals_what_the_cache_allocates():
    cache = KVCache(SMALL, 3, 17, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 17 * SMALL.kv_bytes_per_token(itemsize=2)


def test_known_models_take_the_kv_bytes_their_authors_publish():
    # Llama 3 8B: 32 layers, 8 key/value heads of 128 features, bfloat16 (arXiv:2407.21783, table 3).
    llama3 = ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, tie_embeddings=False)
    assert llama3.kv_bytes_per_token() == 131_072
    assert llama3.n_params == 8_030_261_248


@pytest.mark.parametrize(
    ("ids", "cache", "says"),
    [
        (torch.zeros(5, dtype=torch.long), None, "shape [5]"),
        (torch.zeros(1, 0, dtype=torch.long), None, "shape [1, 0]"),
        (torch.zeros(2, 3, dtype=torch.long), KVCache(SMALL, 1, 8), "2 sequences came for a cache of 1"),
        (torch.zeros(1, 9, dtype=torch.long), KVCache(SMALL, 1, 8), "9 new ones do not fit 8"),
        (torch.zeros(0, 3, dtype=torch.long), None, "shape [0, 3]"),
        (torch.zeros(1, 3), None, "float32"),
        (torch.full((1, 3), 97), None, "id 97 is not one of 97 tokens"),
        (torch.full((1, 3), -1), None, "id -1"),
        (torch.zeros(1, 3, dtype=torch.long), KVCache(SMALL, 1, 8, dtype=torch.bfloat16), "bfloat16"),
        (
            torch.zeros(1, 3, dtype=torch.long),
            KVCache(replace(SMALL, n_layers=1), 1, 8),
            "a cache for layers",
        ),
        (
            torch.zeros(1, 3, dtype=torch.long),
            KVCache(replace(SMALL, layers=("window",) * 2, window=2), 1, 8),
            "'window', 'window'",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_refused_with_the_numbers(model, ids, cache, says):
    with pytest.raises(ShapeError, match="Try") as error:
        model(ids, cache)
    assert says in str(error.value)
    if cache is not None:  # nothing was half done
        assert cache.lengths == [0]
        assert all(not tensor.any() for state in cache.layers for tensor in state.tensors.values())


def test_rows_are_counted_from_either_end_and_no_further(model):
    """`tensor[-1:0]` is empty, and writing one row into none is no error to PyTorch."""
    cache = KVCache(SMALL, 3, 9)
    last = cache.row(-1)
    with torch.no_grad():
        model(torch.arange(5)[None], last)
    assert last.layers[0].k.data_ptr() == cache.layers[0].k[2].data_ptr()
    assert cache.layers[0].k[2].any()
    assert not cache.layers[0].k[:2].any()
    for index in (3, -4):
        with pytest.raises(ShapeError, match=f"row {index} of a cache of 3"):
            cache.row(index)


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(ShapeError, match="32 query heads cannot share 5 key/value heads"):
        ModelConfig(100, 64, 1, 32, 5, 2, 64)


def test_decoding_past_the_rotary_tables_rebuilds_them_once_per_doubling(monkeypatch):
    from llmcourse.models import rope

    table = rope.Rope(SMALL, 16)
    built = []
    frequencies = rope.frequencies
    monkeypatch.setattr(rope, "frequencies", lambda *a: built.append(1) or frequencies(*a))
    for length in range(1, 200):
        table.grow(length)
        assert len(table.cos) >= length
    assert len(built) == 4  # 32, 64, 128, 256
