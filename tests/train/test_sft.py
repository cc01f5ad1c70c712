"""Supervised fine-tuning: the real model's chat format, masks, and a loss that transformers agrees with."""

from __future__ import annotations

import pytest
import torch

from llmcourse.errors import ShapeError
from llmcourse.models import load
from llmcourse.text.bpe import BPE
from llmcourse.train.fit import build, fit, one_thread
from llmcourse.train.pretrain import read_plays
from llmcourse.train.sft import (
    CHATML,
    ChatBatch,
    chat_batch,
    chat_batches,
    dialogues,
    encode_chat,
    every_token,
    masked_sft_loss,
    sft_loss,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who goes there?"},
    {"role": "assistant", "content": "A friend, my lord."},
    {"role": "user", "content": "Stand!"},
    {"role": "assistant", "content": "I stand."},
]


@pytest.fixture(scope="module")
def bpe():
    return BPE.train(read_plays(1)[:40_000], 300, special=CHATML.special)


def test_the_format_is_the_real_model_s_own():
    _, tokenizer = load()
    assert CHATML.text(CHAT) == tokenizer.chat(CHAT, answer=False)
    assert CHATML.text(CHAT[:2], answer=True) == tokenizer.chat(CHAT[:2])
    assert encode_chat(tokenizer, CHAT)[0] == tokenizer.encode(tokenizer.chat(CHAT, answer=False))


def test_only_the_answers_and_their_ends_are_learned(bpe):
    ids, learned = encode_chat(bpe, CHAT)
    assert len(ids) == len(learned)
    answers = bpe.decode([i for i, wanted in zip(ids, learned, strict=True) if wanted])
    assert answers == "A friend, my lord.<|im_end|>I stand.<|im_end|>"
    assert bpe.decode(ids) == CHATML.text(CHAT)


def test_the_prompt_of_an_answer_is_what_inference_gives(bpe):
    ids, learned = encode_chat(bpe, CHAT[:3])
    assert bpe.encode(CHATML.text(CHAT[:2], answer=True)) == ids[: learned.index(True)]


def test_a_batch_is_padded_behind_and_cut_to_its_length(bpe):
    examples = [encode_chat(bpe, CHAT[:3]), encode_chat(bpe, CHAT)]
    batch = chat_batch(examples, length=10_000)
    assert batch.tokens.shape == batch.learned.shape == (2, len(examples[1][0]))
    short = len(examples[0][0])
    assert batch.tokens[0, :short].tolist() == examples[0][0]
    assert not batch.learned[0, short:].any()
    assert chat_batch(examples, length=20).tokens.shape == (2, 20)


def test_the_loss_is_that_of_transformers_with_ignored_labels():
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 11, 29), torch.randint(0, 29, (3, 11))
    learned = torch.rand(3, 11) < 0.4
    labels = tokens.masked_fill(~learned, -100)
    want = ForCausalLMLoss(logits, labels, vocab_size=29)
    assert masked_sft_loss(logits, tokens, learned).item() == pytest.approx(want.item(), rel=1e-6)


def test_padding_and_questions_get_no_gradient():
    logits = torch.randn(2, 9, 7, requires_grad=True)
    learned = torch.zeros(2, 9, dtype=torch.bool)
    learned[0, 4:7] = True
    masked_sft_loss(logits, torch.randint(0, 7, (2, 9)), learned).backward()
    assert logits.grad is not None
    asked = logits.grad.abs().sum(-1) > 0
    assert asked.nonzero().tolist() == [[0, 3], [0, 4], [0, 5]]


def test_a_batch_without_answers_gives_zero_and_no_nan():
    logits = torch.randn(1, 5, 7, requires_grad=True)
    loss = masked_sft_loss(logits, torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@one_thread()
def test_fine_tuning_teaches_to_answer_and_to_end(bpe):
    from llmcourse.models import Transformer
    from llmcourse.train.small import small

    chats = [
        [{"role": "user", "content": c}, {"role": "assistant", "content": c.upper()}] for c in "abcdefgh"
    ]
    examples = [encode_chat(bpe, chat) for chat in chats]
    model = build(Transformer, small(bpe.vocab_size, 1), seed=0)
    fit(model, chat_batches(examples, batch=16, length=48, seed=0), steps=60, lr=1e-2, loss=sft_loss)
    for chat in chats:
        ids = bpe.encode(CHATML.text(chat[:1], answer=True))
        for _ in range(2):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert bpe.decode(ids[-2:]) == chat[1]["content"] + "<|im_end|>"


def test_learning_every_token_leaves_padding_out(bpe):
    ids, learned = encode_chat(bpe, CHAT[:3])
    batch = chat_batch([(ids, learned), encode_chat(bpe, CHAT)], length=10_000)
    whole = every_token(batch)
    assert whole.learned[0].sum() == len(ids)
    assert whole.learned[1].all()


def test_conversations_without_an_answer_in_sight_are_refused(bpe):
    with pytest.raises(ShapeError, match="no answer in 1 conversations"):
        next(chat_batches([encode_chat(bpe, CHAT)], batch=2, length=5, seed=0))


def test_dialogues_are_two_speeches_in_a_row():
    play = (
        "# ACT I\n\n**A**\nGo.\n\n**B**\nI go, and\ncome.\n\n_Exit_\n\n**A**\nAlone.\n\n**B**\n"
        + "long " * 50
    )
    assert dialogues(play) == [
        [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "I go, and\ncome."}]
    ]
    assert len(dialogues(read_plays(1))) > 100


def test_batches_are_the_same_for_the_same_seed(bpe):
    examples = [encode_chat(bpe, chat) for chat in dialogues(read_plays(1))[:40]]
    a, b = (next(chat_batches(examples, batch=4, length=64, seed=3)) for _ in range(2))
    assert isinstance(a, ChatBatch)
    assert torch.equal(a.tokens, b.tokens)
    assert a.learned.any(dim=1).all()
