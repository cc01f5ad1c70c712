"""Byte-pair encoding: the merges, ids and text of Hugging Face's `tokenizers`, which nobody here wrote."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmcourse.errors import ShapeError
from llmcourse.text.bpe import BPE, split
from llmcourse.train.pretrain import read_plays

SPECIAL = ("<|im_start|>", "<|im_end|>")


def peer(text, vocab_size, special=()):
    """`tokenizers`' own training, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer, [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def written(bpe):
    return [(bpe.written(a), bpe.written(b)) for a, b in bpe.merges]


@pytest.fixture(scope="module")
def play():
    return read_plays(1)


@pytest.fixture(scope="module")
def bpe(play):
    return BPE.train(play, 900, special=SPECIAL)


def test_the_merges_on_a_play_are_those_of_tokenizers_one_by_one(play, bpe):
    tokenizer, merges = peer(play, 900, SPECIAL)
    assert written(bpe) == merges
    assert {bpe.written(i): i for i in range(bpe.vocab_size)} == tokenizer.get_vocab()
    assert bpe.encode(play) == tokenizer.encode(play).ids


@pytest.mark.parametrize("seed", range(6))
def test_the_merges_on_random_words_full_of_ties_are_the_same(seed):
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdé漢🦜"
    words = ("".join(rng.choice(letters) for _ in range(rng.randint(1, 9))) for _ in range(300))
    text = " ".join(words)
    _, merges = peer(text, 330)
    assert written(BPE.train(text, 330)) == merges


def test_training_stops_when_no_pair_is_left():
    assert BPE.train("ab ab", 1000).vocab_size == 256 + 2  # ab and ·ab
    assert BPE.train("", 300).merges == ()


HARD = [
    "I'll say they're don't 've 'S it's",
    "two  blanks\n\n\tand tabs \n at the end   ",
    "digits 12345 ½ Ⅷ ٣ x² 1st",
    "naïve café e\u0301 Straße ǅ ª",
    "日本語と漢字、한국어 עברית العربية हिन्दी",
    "🦜👨‍👩‍👧 \u200d\ufeff _under_score_ __init__ a_b",
    "\x00\x01\x1c\x1f\x7f\x85\xa0\u2028\u3000 control",
]


@pytest.mark.parametrize("text", HARD)
def test_hard_text_is_cut_and_encoded_as_tokenizers_does(text, bpe):
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert split(text) == [text[a:b] for _, (a, b) in pieces]
    assert bpe.encode(text) == bpe.to_tokenizer().encode(text)
    assert bpe.decode(bpe.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    bpe = BPE([(321 - 256, 66), (256, 67)])
    assert "".join(split(text)) == text
    assert bpe.decode(bpe.encode(text)) == text


def test_control_tokens_are_ids_of_their_own_and_can_be_dropped(bpe):
    text = "<|im_start|>user\nWhere goes the king?<|im_end|>\n"
    ids = bpe.encode(text)
    assert ids[0] == 0 and ids.count(1) == 1  # noqa: PT018
    assert bpe.decode(ids) == text
    assert bpe.decode(ids, special=False) == "user\nWhere goes the king?\n"
    assert ids == bpe.to_tokenizer().encode(text)
    assert bpe.to_tokenizer().eos_ids == (1,)


def test_half_a_character_shows_as_a_replacement_mark(bpe):
    ids = BPE(()).encode("é")
    assert len(ids) == 2
    assert BPE(()).decode(ids[:1]) == "\ufffd"


def test_more_merges_make_fewer_tokens(play):
    held_out, lengths = play[-20_000:], []
    for vocab in (256, 300, 400, 600):
        lengths.append(len(BPE.train(play[:60_000], vocab).encode(held_out)))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == len(held_out.encode())


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ShapeError, match="258 or more"):
        BPE.train("text", 257, special=SPECIAL)
    with pytest.raises(ShapeError, match="merge 1 joins the ids 70 and 300"):
        BPE([(70, 71), (70, 300)])
