"""Lab 08: references that others agree with, and a learner's functions at work in the package."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmcourse.grading.trial import LocalSubject
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab
from llmcourse.labs.lab08_pretraining_to_rlhf.bpe_merges import expected as merges_of
from llmcourse.labs.lab08_pretraining_to_rlhf.masked_sft_loss import expected as loss_of
from llmcourse.plug import PlugError, plug
from llmcourse.text.bpe import BPE
from llmcourse.train.sft import masked_sft_loss

EXERCISES = {e.name: e for e in find_lab("08").exercises}
MINE = ("bpe_merges", "masked_sft_loss")


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


# ── the judge's own references ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_the_merges_that_judge_are_those_of_tokenizers(seed):
    rng = random.Random(seed)
    text = " ".join("".join(rng.choice("abcd") for _ in range(rng.randint(1, 7))) for _ in range(200))
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    peer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=280, initial_alphabet=letters, show_progress=False)
    )
    theirs = [tuple(pair) for pair in json.loads(peer.to_str())["model"]["merges"]]
    with plug(bpe_merges=merges_of):
        own = BPE.train(text, 280)
    assert [(own.written(a), own.written(b)) for a, b in own.merges] == theirs


def test_the_loss_that_judges_is_pytorch_s_with_ignored_targets():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 8, 13), torch.randint(0, 13, (3, 8))
    learned = torch.rand(3, 8) < 0.5
    targets = tokens.masked_fill(~learned, -100)[:, 1:].flatten()
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    assert loss_of(logits, tokens, learned) == pytest.approx(want.item(), rel=1e-6)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 52):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, found)


def test_the_package_s_own_loss_passes():
    assert verdict("masked_sft_loss", masked_sft_loss).ok


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert "return" in str(verdict(name, lambda *args: None))
    for nonsense in (torch.zeros(2), [(1, 2, 3)], (1, 2), "text", float("nan")):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_merges_as_lists_and_as_tuples_are_both_right():
    assert verdict("bpe_merges", lambda w, f, n: [list(p) for p in merges_of(w, f, n)]).ok
    assert verdict("bpe_merges", lambda w, f, n: tuple(merges_of(w, f, n))).ok


# ── at work ──────────────────────────────────────────────────────────────────────────────────────


def test_a_tokenizer_is_trained_through_each_right_function():
    text = "the cat and the hat and the rat that sat on the mat " * 3
    own = BPE.train(text, 290)
    for alternative in EXERCISES["bpe_merges"].alternatives:
        with plug(bpe_merges=alternative.fn) as used:
            mine = BPE.train(text, 290)
        assert used.calls["bpe_merges"] == 1
        assert mine.merges == own.merges, alternative.name


def test_merges_that_spell_a_token_twice_become_the_package_s_ids():
    # ab + c and a + bc are one token of the package, and two of the learner's.
    words = {"abc": 9, "ab": 9, "bc": 3, "xbc": 8}
    text = " ".join(" ".join([word] * n) for word, n in words.items())
    a, b, c = BPE(()).encode("abc")
    found = [(a, b), (b, c), (256, c), (a, 257), (258, 259)]
    with plug(bpe_merges=lambda words, first, count: found):
        mine = BPE.train(text, 256 + 5)
    assert mine.tokens[256:] == [b"ab", b"bc", b"abc", b"abcabc"]
    assert mine.merges[-1] == (258, 258)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("bpe_merges", lambda words, first, count: None, "None"),
        ("bpe_merges", lambda words, first, count: [(1, 2)] * 9, "9 merges came"),
        ("bpe_merges", lambda words, first, count: [(1, 2, 3)], "merge 0 is a tuple of 3"),
        ("bpe_merges", lambda words, first, count: [(1, first)], "merge 0 joins"),
        ("masked_sft_loss", lambda logits, tokens, learned: 0.5, "the loss is a float"),
        ("masked_sft_loss", lambda logits, tokens, learned: logits.sum(-1), "has shape"),
        ("masked_sft_loss", lambda logits, tokens, learned: logits.double().sum(), "float64"),
    ],
)
def test_what_does_not_fit_the_package_is_refused(name, wrong, says):
    from llmcourse.train import sft

    def use():
        if name == "bpe_merges":
            return BPE.train("some text", 260)
        tokens = torch.zeros(1, 3, dtype=torch.long)
        return sft.masked_sft_loss(torch.zeros(1, 3, 4), tokens, tokens == 0)

    with plug(**{name: wrong}), pytest.raises(PlugError, match=says):
        use()


def test_fine_tuning_runs_on_each_right_function_and_differs_on_a_wrong_one():
    from llmcourse.models import Transformer
    from llmcourse.train.fit import build, fit, one_thread
    from llmcourse.train.sft import chat_batches, sft_loss
    from llmcourse.train.small import small

    rng = random.Random(0)
    examples = [([rng.randrange(20) for _ in range(9)], [False] * 5 + [True] * 4) for _ in range(6)]

    @one_thread()
    def curve():
        model = build(Transformer, small(20, 1), seed=0)
        return fit(model, chat_batches(examples, batch=4, length=9, seed=0), steps=3, loss=sft_loss)

    own = curve()
    exercise = EXERCISES["masked_sft_loss"]
    for alternative in exercise.alternatives:
        with plug(masked_sft_loss=alternative.fn) as used:
            assert curve() == pytest.approx(own, rel=1e-4), alternative.name
        assert used.calls["masked_sft_loss"] == 3
    wrong = next(m.fn for m in exercise.mistakes if m.name == "mask_not_shifted")
    with plug(masked_sft_loss=wrong):
        assert curve() != pytest.approx(own, rel=1e-3)
