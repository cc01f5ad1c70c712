"""Lab 09: references that something else agrees with, and a learner's functions in the models' places."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab
from llmcourse.labs.lab09_attention_variants.absorbed_attention import _draw as draw_latent
from llmcourse.labs.lab09_attention_variants.absorbed_attention import expanded
from llmcourse.labs.lab09_attention_variants.grouped_query_attention import attention
from llmcourse.labs.lab09_attention_variants.largest_batch import PUBLISHED, plan
from llmcourse.labs.lab09_attention_variants.window_mask import expected as expected_mask
from llmcourse.models import KVCache, LatentSizes, ModelConfig, random_model
from llmcourse.models.convert_gqa import to_gqa
from llmcourse.models.published import MODELS
from llmcourse.models.reconfigure import with_window
from llmcourse.models.step import window_mask as package_mask
from llmcourse.plug import PlugError, plug

LAB = find_lab("09")
EXERCISES = {e.name: e for e in LAB.exercises}
RIGHT = {name: e.alternatives[0].fn for name, e in EXERCISES.items()}
PLUGGED = ("grouped_query_attention", "window_mask", "rolling_update", "absorbed_attention")
SIZES = {"vocab_size": 50, "d_model": 24, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "d_ff": 32}


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


def a_trial(seed=5):
    return Trial(LocalSubject(len), (), seed, "a test")


# ── the judge's own references ───────────────────────────────────────────────────────────────────────


def test_the_attention_that_judges_equals_torch_s():
    t = a_trial()
    q, k, v = t.normal(2, 6, 3, 8), t.normal(2, 2, 7, 8), t.normal(2, 2, 7, 8)
    seen = torch.ones(3, 7, dtype=torch.bool).tril(4)
    given = [torch.from_numpy(x) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*given, attn_mask=seen, enable_gqa=True)
    assert np.allclose(attention(q, k, v), want.numpy())


def test_the_expanded_form_that_judges_equals_attention_over_concatenated_keys():
    given = draw_latent(a_trial(), 2, 3, 4, 7, (8, 4, 6, 12))
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = (x.double() for x in given)
    keys = torch.einsum("btr,hdr->bhtd", latent, w_uk)
    values = torch.einsum("btr,hdr->bhtd", latent, w_uv)
    k = torch.cat((keys, k_rope[:, None].expand(-1, 3, -1, -1)), dim=-1)
    seen = torch.ones(4, 7, dtype=torch.bool).tril(3)
    want = F.scaled_dot_product_attention(torch.cat((q_nope, q_rope), -1), k, values, attn_mask=seen)
    assert np.allclose(expanded(*given), want.numpy())


def test_the_mask_that_judges_is_the_package_s():
    t = a_trial()
    for _ in range(20):
        queries, keys = t.integers(0, 15, 4), t.integers(-1, 15, 9)
        window, sinks = t.size(1, 6), t.size(0, 3)
        want = package_mask(torch.from_numpy(queries)[None], torch.from_numpy(keys)[None], window, sinks)
        assert np.array_equal(expected_mask(queries, keys, window, sinks), want[0, 0].numpy())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models_are_counted_as_the_package_counts_them(name):
    for context in (1, 5_000, 50_000):
        one, _ = plan(PUBLISHED[name], context, 0, 2)
        if name in MODELS:
            assert one == MODELS[name].cache_bytes(context)


def test_figures_that_are_known_come_out():
    assert plan(PUBLISHED["Llama-3-8B"], 1, 0, 2)[0] == 131_072
    assert plan(PUBLISHED["DeepSeek-V3"], 1, 0, 2)[0] == 70_272


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 52):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, found)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert "return" in str(verdict(name, lambda *args: None)) or "NoneType" in str(
        verdict(name, lambda *a: None)
    )
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 4, (1, 2), "text", float("nan")):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_a_cache_that_keeps_everything_is_not_a_rolling_one():
    def grows(slots, positions, new, start, window, sinks):
        at = torch.arange(start, start + new.shape[2])
        seen, held = torch.cat((slots, new), dim=2), torch.cat((positions, at))
        return seen, held, seen, held

    assert "shape of the cache's slots" in str(verdict("rolling_update", grows))


def test_listing_the_labs_does_not_import_torch():
    code = (
        "import sys; from llmcourse.labs import find_lab; "
        "print([find_lab(n).points for n in ('09', '11')], 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().endswith("False")


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


def model_of(**sizes):
    torch.manual_seed(0)
    model = random_model(ModelConfig(**(SIZES | {"n_layers": 2} | sizes)), dtype=torch.float64)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)  # scores that differ from token to token
    return model


TOKENS = torch.randint(0, 50, (2, 23), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(model, pieces, batch=2):
    cache = KVCache(model.config, batch=batch, max_len=40, dtype=torch.float64)
    return torch.cat([model(piece, cache) for piece in TOKENS[:batch].split(pieces, dim=1)], dim=1)


@torch.no_grad()
def unequal(model):
    """Two prompts of 3 and 7 tokens, each read into its row, then four steps together."""
    cache = KVCache(model.config, batch=2, max_len=40, dtype=torch.float64)
    for b, n in enumerate((3, 7)):
        row = cache.row(b)
        model(TOKENS[b : b + 1, :n], row)
        cache.lengths[b] = row.lengths[0]
    return torch.cat([model(TOKENS[:, 10 + i : 11 + i], cache) for i in range(4)], dim=1)


PIECES = ([23], [5, 1, 1, 9, 1, 2, 4], [1] * 23)


@pytest.mark.parametrize("pieces", PIECES, ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize("which", [0, 1])
def test_grouped_query_attention_gives_the_model_s_logits(which, pieces):
    model = model_of()
    own = read(model, pieces)
    with plug(grouped_query_attention=EXERCISES["grouped_query_attention"].alternatives[which].fn) as used:
        mine = read(model, pieces)
    assert torch.allclose(own, mine)
    assert used.calls["grouped_query_attention"] == 2 * len(pieces)


@pytest.mark.parametrize("pieces", PIECES, ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize(("window", "sinks"), [(4, 0), (4, 2), (30, 2)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_window_model_runs_on_the_rolling_cache_and_the_mask(which, window, sinks, pieces):
    model = with_window(model_of(), window, sinks)
    own = read(model, pieces)
    mine = {n: EXERCISES[n].alternatives[which].fn for n in ("window_mask", "rolling_update")}
    with plug(**mine) as used:
        plugged = read(model, pieces)
    assert torch.allclose(own, plugged)
    assert used.calls["rolling_update"] == 2 * len(pieces)
    assert used.calls["window_mask"] == 2 * len(pieces)  # a mask for each sequence, shared by the layers


@pytest.mark.parametrize("pieces", PIECES, ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("q_rank", [0, 10])
def test_absorbed_attention_gives_a_latent_model_s_logits(q_rank, which, pieces):
    sizes = LatentSizes(q_rank=q_rank, kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5)
    model = model_of(layers=("latent",) * 2, latent=sizes, n_kv_heads=6)
    own = read(model, pieces)
    for block in model.blocks:
        block.mixer.absorb = True
    with plug(absorbed_attention=EXERCISES["absorbed_attention"].alternatives[which].fn) as used:
        assert torch.allclose(own, read(model, pieces))
    assert used.calls["absorbed_attention"] == 2 * len(pieces)


def test_mean_pool_heads_converts_a_model():
    model = model_of(n_kv_heads=6, qkv_bias=True)
    own = to_gqa(model, 2)
    for alternative in EXERCISES["mean_pool_heads"].alternatives:
        with plug(mean_pool_heads=alternative.fn) as used:
            mine, first = to_gqa(model, 2), to_gqa(model, 2, how="first")
        assert used.calls["mean_pool_heads"] == 2 * 2 * 2  # keys and values, weights and biases, two layers
        assert all(torch.allclose(a, b) for a, b in zip(own.parameters(), mine.parameters(), strict=True))
        assert not torch.allclose(first.blocks[0].mixer.qkv.weight, mine.blocks[0].mixer.qkv.weight)


@pytest.mark.parametrize("kind", ["attention", "window", "latent"])
def test_sequences_of_unequal_length_too(kind):
    sizes = LatentSizes(q_rank=0, kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5)
    more = {"latent": {"latent": sizes, "n_kv_heads": 6}, "window": {"window": 4, "sinks": 1}}.get(kind, {})
    model = model_of(layers=(kind,) * 2, **more)
    own = unequal(model)
    with plug(**{name: RIGHT[name] for name in PLUGGED}):
        assert torch.allclose(own, unequal(model))


def test_a_window_stays_with_the_package_s_own_attention():
    model = with_window(model_of(), 4, 1)
    own = read(model, [23])
    with plug(grouped_query_attention=RIGHT["grouped_query_attention"]) as used:
        assert torch.equal(own, read(model, [23]))
    assert used.calls["grouped_query_attention"] == 0


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("grouped_query_attention", lambda q, k, v: None, "None"),
        ("grouped_query_attention", lambda q, k, v: q[:, :1], "has shape"),
        ("mean_pool_heads", lambda w, h, g: w, "has shape"),
        ("window_mask", lambda q, k, w, s: torch.ones(1, 1), "the mask"),
        ("window_mask", lambda q, k, w, s: torch.ones(len(q), len(k)), "torch.float"),
        ("rolling_update", lambda slots, at, new, *rest: (new, at), "a tuple of 2"),
        ("rolling_update", lambda slots, at, new, *rest: (new, at, slots, at), "seen"),
        ("rolling_update", lambda slots, at, new, *rest: (slots, None, slots, at), "seen_positions"),
        ("rolling_update", lambda slots, at, new, *rest: (slots, at, new, at), "slots"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(name, wrong, says):
    model = model_of()
    model = model if name == "grouped_query_attention" else with_window(model, 4, 1)
    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        read(to_gqa(model, 1), [6, 1, 16])


def test_a_wrong_function_changes_the_logits():
    exercise, model = EXERCISES["rolling_update"], with_window(model_of(), 4, 1)
    own = read(model, [5, 1, 1, 9, 1, 2, 4])
    wrong = next(m.fn for m in exercise.mistakes if m.name == "written_first")
    with plug(rolling_update=wrong):
        assert not torch.allclose(own, read(model, [5, 1, 1, 9, 1, 2, 4]))
