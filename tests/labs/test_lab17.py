"""Lab 17: its bank, the judges' own references, and a model that runs on a learner's code."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.compress.masks import Pattern, keep, wanda_scores
from llmcourse.compress.prune import prune
from llmcourse.compress.sparse_linear import pack_model
from llmcourse.compress.sparsegpt import update
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.kernels.counters import interpreting
from llmcourse.kernels.sparse24 import pack24
from llmcourse.labs import find_lab
from llmcourse.labs.lab17_pruning import mask_24, pack_24, sparse_gemv, sparsegpt_update
from llmcourse.models import ModelConfig, random_model
from llmcourse.plug import PlugError, plug

LAB = find_lab("17")
EXERCISES = {e.name: e for e in LAB.exercises}


def reference(exercise):
    import sys

    return sys.modules[f"llmcourse.labs.lab17_pruning.{exercise.name}"]


def a_trial(seed=5):
    return Trial(LocalSubject(len), (), seed, "a test")


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


# ── the judge's own references ───────────────────────────────────────────────────────────────────────


def test_the_mask_that_judges_is_the_packages():
    w, x = torch.randn(5, 16), torch.randn(9, 16)
    want = keep(wanda_scores(w, x.norm(dim=0)), Pattern(n=2, m=4))
    assert np.array_equal(reference(mask_24).expected(w, x), want.numpy())


def test_the_update_that_judges_is_the_packages():
    weight, gram, mask = reference(sparsegpt_update).draw(a_trial(), 5, 11)
    want = update(weight, gram, mask)
    assert np.allclose(reference(sparsegpt_update).expected(weight, gram, mask), want.numpy())


def test_the_packing_that_judges_is_the_packages():
    weight, mask = reference(pack_24).draw(a_trial(), 3, 32)
    values, places = reference(pack_24).expected(weight, mask)
    packed = pack24(weight, mask)
    assert np.array_equal(values.astype(np.float32), packed.values.numpy())
    assert np.array_equal(places, packed.indices.view(torch.uint8).numpy())


def test_the_product_that_judges_is_the_dense_one():
    weight, mask = reference(pack_24).draw(a_trial(), 4, 24)
    values, places = reference(pack_24).expected(weight, mask)
    x = torch.randn(24)
    got = reference(sparse_gemv).expected(torch.from_numpy(values), torch.from_numpy(places), x)
    assert np.allclose(got, ((weight * mask).double() @ x.double()).numpy())


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 41 if name == "sparse_gemv" else 52):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, str(found))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert verdict(name, lambda *args: None).state == "failed"
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2), [], "text", float("nan"), [0, "a"]):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_a_right_product_that_reads_too_much_fails_on_its_bytes_alone():
    wasteful = next(m for m in EXERCISES["sparse_gemv"].mistakes if m.name == "byte_for_each_value")
    found = verdict("sparse_gemv", wasteful.fn)
    assert [r.check.name for r in found.results if not r.ok] == ["traffic"]
    assert "bytes are loaded" in str(found)


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return random_model(ModelConfig(50, 32, 2, 4, 2, 8, 24))


TOKENS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))


def halved(net):
    half = copy.deepcopy(net)
    prune(half, "wanda+move", Pattern(n=2, m=4), TOKENS)
    pack_model(half)
    return half(TOKENS[:1, :2])


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_pruned_packed_and_run_by_a_learners_functions_is_the_packages(net, which):
    own = halved(net)
    mine = {name: e.alternatives[which].fn for name, e in EXERCISES.items()}
    with plug(**mine) as used, interpreting():
        logits = halved(net)
    assert used.calls == {"mask_24": 8, "sparsegpt_update": 8, "pack_24": 8, "sparse_gemv": 16}
    assert torch.allclose(logits, own, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("mask_24", lambda weight, x: weight != 0, "4 of columns 0 to 3 of row 0 stay"),
        ("mask_24", lambda weight, x: weight, "float32"),
        ("sparsegpt_update", lambda weight, gram, mask: weight, "not zero"),
        ("sparsegpt_update", lambda weight, gram, mask: None, "return"),
        ("pack_24", lambda weight, mask: weight, "values, places"),
        ("pack_24", lambda weight, mask: (weight, mask), "values has shape"),
        ("sparse_gemv", lambda values, places, x: x, "has shape"),
    ],
)
def test_what_does_not_fit_is_refused(net, name, wrong, says):
    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        halved(net)


def test_a_wrong_mask_changes_the_model(net):
    wrong = next(m.fn for m in EXERCISES["mask_24"].mistakes if m.name == "smallest")
    with plug(mask_24=wrong):
        mine = halved(net)
    assert not torch.allclose(mine, halved(net), atol=1e-3)
