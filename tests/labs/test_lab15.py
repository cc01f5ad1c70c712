"""Lab 15: its bank, the judges' own references, and models that run on a learner's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcourse.finetune.lora import LoRA, attach
from llmcourse.finetune.serve import grouped as packages_own
from llmcourse.finetune.serve import serve
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab
from llmcourse.labs.lab15_lora.grouped import expected as groups_of
from llmcourse.labs.lab15_lora.lora_linear import expected as by_hand
from llmcourse.labs.lab15_lora.multi_lora import _draw
from llmcourse.labs.lab15_lora.multi_lora import expected as row_by_row
from llmcourse.models import ModelConfig, random_model
from llmcourse.plug import PlugError, plug

LAB = find_lab("15")
EXERCISES = {e.name: e for e in LAB.exercises}
CONFIG = ModelConfig(61, 24, 2, 3, 1, 8, 40, max_len=64)


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


def base():
    torch.manual_seed(0)
    return random_model(CONFIG, dtype="float32")


def adapted(targets=("q", "v", "down"), seed=1):
    adapter = attach(base(), LoRA(3, 6, targets), seed=seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return adapter


TOKENS = torch.arange(18).view(3, 6)

# ── the judge's own references ───────────────────────────────────────────────────────────────────────


def test_the_layer_that_judges_is_autograds():
    x, w, a, b = (
        torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((4, 5), (6, 5), (2, 5), (6, 2))
    )
    y = torch.nn.functional.linear(x, w + 3.0 / 2 * b @ a)
    y.sum().backward()
    value, gradients = by_hand(x, w, a, b, 3.0)
    assert np.allclose(value, y.detach().numpy())
    for got, t in zip(gradients, (x, a, b), strict=True):
        assert np.allclose(got, t.grad.numpy())


def test_the_batch_that_judges_is_a_product_with_each_rows_whole_matrix():
    x, ids, a, b, scale = _draw(Trial(LocalSubject(len), (), 5, "a test"), [1, -1, 0, 2], 3, 5, 4, 2)
    whole = scale[:, None, None] * b @ a
    want = torch.stack([whole[g] @ row if g >= 0 else torch.zeros(4) for g, row in zip(ids, x, strict=True)])
    assert np.allclose(row_by_row(x, ids, a, b, scale), want.numpy(), atol=1e-5)


def test_the_grouping_that_judges_is_the_packages():
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(-1, 5, rng.integers(0, 12)).tolist()
        assert groups_of(ids) == packages_own(ids)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 52):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, str(found))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert verdict(name, lambda *args: None).state == "failed"
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2), [], "text", float("nan"), [0, "a"]):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_right_batches_that_copy_adapters_fail_on_their_bytes_alone():
    found = verdict(
        "multi_lora", next(m.fn for m in EXERCISES["multi_lora"].mistakes if m.name == "gathered")
    )
    assert [r.check.name for r in found.results if not r.ok] == ["cost"]


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alternative", EXERCISES["lora_linear"].alternatives, ids=lambda a: a.name)
def test_a_model_adapted_by_a_learners_layer_is_the_packages_own_forward_and_backward(alternative):
    found = []
    for fn in (None, alternative.fn):
        adapter = adapted()
        with plug(**({"lora_linear": fn} if fn else {})) as used:
            logits = adapter.model(TOKENS)
            logits.square().sum().backward()
        found.append((logits.detach(), [p.grad for p in adapter.parameters()]))
    assert used.calls["lora_linear"] == 6
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alternative", EXERCISES["merged"].alternatives, ids=lambda a: a.name)
def test_a_learners_merge_gives_the_same_logits_and_takes_them_back(alternative):
    adapter = adapted()
    before, plain = adapter.model(TOKENS).detach(), base()(TOKENS)
    with plug(merged=alternative.fn) as used:
        adapter.merge()
        torch.testing.assert_close(adapter.model(TOKENS).detach(), before, atol=1e-4, rtol=1e-4)
        adapter.unmerge()
    assert used.calls["merged"] == 12
    adapter.remove()
    torch.testing.assert_close(adapter.model(TOKENS), plain, atol=1e-4, rtol=1e-4)


def test_a_batch_of_adapters_is_served_by_a_learners_functions():
    served = serve(base(), [adapted(seed=1), adapted(("k", "up"), seed=2)])
    prompts, ids = [[1, 2, 3], [4, 5], [6, 7, 8], [9]], [1, 0, -1, 1]
    own = served.answers(prompts, ids, tokens=4)
    for one in EXERCISES["multi_lora"].alternatives:
        for two in EXERCISES["grouped"].alternatives:
            with plug(multi_lora=one.fn, grouped=two.fn) as used:
                assert served.answers(prompts, ids, tokens=4) == own
            assert used.calls["grouped"] == 1
            assert used.calls["multi_lora"] > 10


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("lora_linear", lambda x, w, a, b, alpha: None, "None"),
        ("lora_linear", lambda x, w, a, b, alpha: x, "has shape"),
        ("merged", lambda w, a, b, alpha, sign: w.double(), "float64"),
        ("grouped", lambda ids: ([0, 0, 1], [3], [0]), "no grouping"),
        ("grouped", lambda ids: (1, 2, 3), "a list of ints"),
        ("grouped", lambda ids: [0], "order, lengths, adapters"),
        ("multi_lora", lambda x, ids, a, b, scale: x[:1], "has shape"),
    ],
)
def test_what_does_not_fit_is_refused(name, wrong, says):
    adapter = adapted()

    def use():
        adapter.model(TOKENS)
        adapter.merge()
        adapter.unmerge()
        serve(base(), [adapter]).answers([[1], [2, 3], [4]], [0, -1, 0], tokens=2)

    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        use()
