"""A draft: its shape and file, the text that a model writes itself, and the benchmark that makes it."""

from __future__ import annotations

import json

import pytest
import torch

from llmcourse.assets import MODEL
from llmcourse.bench import distill as bench
from llmcourse.bench.records import recorded
from llmcourse.compress import acceptance
from llmcourse.compress.draft import (
    DRAFT,
    about_draft,
    directions,
    draft_config,
    has_draft,
    initial_draft,
    load_draft,
    save_draft,
)
from llmcourse.compress.draft_training import DraftLoss, corpus_of, features, pieces, train_draft
from llmcourse.compress.self_written import Turns, Written, conversations, without
from llmcourse.engine import LLM, SamplingParams
from llmcourse.errors import CourseError, ModelError, ShapeError
from llmcourse.models import ModelConfig, Transformer, load
from llmcourse.train.fit import build

TINY = ModelConfig(
    vocab_size=300, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, eos_ids=(1,)
)


class Bytes:
    """A tokenizer of characters, with a chat format of five control tokens."""

    marks = ("<|end|>", "<|user|>", "<|bot|>")
    eos_ids = (1,)

    def encode(self, text):
        ids = []
        while text:
            found = next((m for m in self.marks if text.startswith(m)), text[0])
            ids.append(self.marks.index(found) + 1 if found in self.marks else 4 + ord(found))
            text = text[len(found) :]
        return ids

    def chat(self, messages, *, answer=True):
        roles = {"user": "<|user|>", "assistant": "<|bot|>"}
        text = "".join(f"{roles[m['role']]}{m['content']}<|end|>" for m in messages)
        return "sys" + text + "<|bot|>" * answer


@pytest.fixture(scope="module")
def target():
    model = build(Transformer, TINY, seed=0).eval().requires_grad_(False)
    model.embedding.weight *= 8  # it is the head as well: surer of what comes next
    return model


def a_draft(target, width=16):
    config = draft_config(TINY, width=width, layers=1, d_ff=24)
    return initial_draft(target, config)


# ── shape and file ───────────────────────────────────────────────────────────────────────────────────


def test_the_real_drafts_file_stays_below_16_megabytes():
    smollm = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, max_len=8192)
    config = draft_config(smollm)
    scales = 2 * (config.vocab_size + config.n_layers * (512 + 256 + 2 * config.d_ff + 256))
    assert config.vocab_size == smollm.vocab_size
    assert config.n_params + scales + 20_000 < 16_000_000


def test_the_directions_are_those_of_a_singular_value_decomposition():
    e = torch.randn(60, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned, held = directions(e, 4)
    u, s, vh = torch.linalg.svd(e, full_matrices=False)
    best = u[:, :4] * s[:4] @ vh[:4]
    assert torch.allclose(e @ turned @ turned.T, best, atol=1e-9)
    assert held == pytest.approx(float((s[:4] ** 2).sum() / (s**2).sum()))
    with pytest.raises(ShapeError, match="10 directions"):
        directions(e, 10)


def test_a_draft_comes_back_from_its_file_within_the_steps_of_int8(target, tmp_path):
    draft = a_draft(target)
    size = save_draft(draft, tmp_path / "d.safetensors", about={"command": "make it", "acceptance": [1, 2]})
    again = load_draft(tmp_path / "d.safetensors", device="cpu")
    assert again.config == draft.config
    for name, weight in draft.named_parameters():
        back = dict(again.named_parameters())[name]
        step = weight.abs().amax(-1, keepdim=True) / 127 if weight.dim() == 2 else torch.zeros(())
        assert ((back - weight).abs() <= 0.7 * step + 1e-6).all(), name
    about = about_draft(tmp_path / "d.safetensors")
    assert (about["bytes"], about["command"], about["acceptance"]) == (size, "make it", [1, 2])
    assert not any(p.requires_grad for p in again.parameters())


def test_a_missing_or_foreign_file_is_told(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ModelError, match="there is no draft"):
        load_draft(tmp_path / "none.safetensors")
    assert not has_draft(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="its format is None"):
        load_draft(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not a tensor")
    with pytest.raises(ModelError, match="is not a draft"):
        load_draft(tmp_path / "text.safetensors")


def test_a_model_that_the_file_cannot_hold_is_refused(tmp_path):
    odd = build(Transformer, ModelConfig(50, 16, 1, 1, 1, 16, 24, tie_embeddings=False), seed=0)
    with pytest.raises(ShapeError, match="tied"):
        save_draft(odd, tmp_path / "d.safetensors", about={})
    assert not list(tmp_path.iterdir())


# ── training ─────────────────────────────────────────────────────────────────────────────────────────


def test_features_times_the_head_are_the_logits(target):
    tokens = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(features(target, tokens) @ target.head.weight.T, target(tokens), atol=1e-4)
    corpus = corpus_of(target, tokens, tokens_at_once=24)
    assert torch.allclose(corpus.features, features(target, tokens), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"variation": 0.9}, {"labels": True}], ids=str)
def test_a_draft_learns_what_its_target_says(target, options):
    tokens = torch.randint(0, 300, (6, 20), generator=torch.Generator().manual_seed(0))
    corpora = [corpus_of(target, tokens), corpus_of(target, tokens[:2, :9])]
    draft = a_draft(target)
    loss = DraftLoss(target.head.weight, rows=16, **options)
    curve = train_draft(draft, corpora, loss, steps=20, tokens_per_step=40, lr=1e-2)
    assert curve[-1] < curve[0]
    assert loss.steps == 20


def test_pieces_come_from_each_corpus_by_its_size(target):
    short, long = (corpus_of(target, torch.zeros(n, s, dtype=torch.long)) for n, s in ((20, 4), (20, 16)))
    source = pieces([short, long], tokens_per_step=16, seed=0)
    shapes = [tuple(next(source).tokens.shape) for _ in range(200)]
    assert set(shapes) == {(4, 4), (1, 16)}
    assert 130 < shapes.count((1, 16)) < 190  # four fifths of the tokens


def test_no_text_is_refused(target):
    with pytest.raises(ShapeError, match="no text"):
        train_draft(a_draft(target), [], DraftLoss(target.head.weight), steps=1, tokens_per_step=8)


# ── text that a model writes itself ──────────────────────────────────────────────────────────────────


def test_turns_are_read_off_the_chat_format():
    turns = Turns.of(Bytes())
    assert turns.opening == Bytes().encode("sys<|user|>")
    assert turns.answer == Bytes().encode("<|end|><|bot|>")
    assert turns.ask == Bytes().encode("<|end|><|user|>")


def test_conversations_follow_the_format_in_every_row(target):
    turns = Turns.of(Bytes())
    loud = build(Transformer, TINY, seed=1)
    with torch.no_grad():
        loud.head.weight.mul_(0.01)  # all tokens equally likely, the end of a turn too
    made = conversations(loud, Bytes(), rows=40, length=200, seed=0)
    assert made.tokens.shape == (40, 200)
    links, speakers = 0, (turns.answer, turns.ask)
    for row, chosen in zip(made.tokens.tolist(), made.chosen.tolist(), strict=True):
        assert row[: len(turns.opening)] == turns.opening
        who, i = 0, len(turns.opening)
        while i < len(row):
            assert chosen[i]
            if row[i] == 1:
                link = speakers[who][1:]
                assert row[i + 1 : i + 1 + len(link)] == link[: len(row) - i - 1]
                assert not any(chosen[i + 1 : i + 1 + len(link)])
                who, i, links = 1 - who, i + len(link), links + 1
            i += 1
    assert links > 10
    again = conversations(loud, Bytes(), rows=40, length=200, seed=0)
    assert torch.equal(again.tokens, made.tokens)


def test_rows_that_repeat_a_held_out_question_are_left_out():
    tokens = torch.tensor([[1, 2, 3, 4], [9, 2, 3, 9], [5, 3, 2, 1]])
    kept, dropped = without(Written(tokens, tokens > 0), [[2, 3], [4, 4, 4, 4, 4]])
    assert kept.tokens.tolist() == [[5, 3, 2, 1]]
    assert dropped == 2


def test_a_length_that_the_opening_fills_is_refused(target):
    with pytest.raises(CourseError, match="1 conversations of 4 tokens"):
        conversations(target, Bytes(), rows=1, length=4, seed=0)


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────────


def test_the_description_in_the_file_can_be_written_as_json():
    made = [{"kind": "writing", "name": "conversations", "tokens": 5}]
    about = bench.description(
        bench.FULL, {"lr": 1e-3, "variation": 0.9}, {"steps": 3, "tokens": 9}, made, "cuda"
    )
    assert "5 tokens that the target wrote" in about["data"]
    assert json.loads(json.dumps(about))["command"].startswith("llmcourse bench distill --device cuda")


def test_steps_of_both_models_are_timed(target):
    found = bench.cost_row(target, a_draft(target).eval())
    assert found["cost"] == pytest.approx(found["draft_step_s"] / found["target_step_s"])


# ── the draft that is shipped ────────────────────────────────────────────────────────────────────────


def test_the_shipped_draft_is_small_and_says_where_it_comes_from():
    assert DRAFT.stat().st_size <= 20_000_000
    about = about_draft()
    assert about["bytes"] == DRAFT.stat().st_size
    assert MODEL.sha256 in about["target"]
    assert about["command"] == "llmcourse bench distill --device cuda --out FOLDER"
    record = recorded("distill")
    tested = {(r["name"], r["temperature"]): r["rate"] for r in record.results if r["kind"] == "acceptance"}
    assert {(r["name"], r["temperature"]): r["rate"] for r in about["acceptance"]} == tested


def test_the_shipped_draft_guesses_what_the_model_writes_as_often_as_was_measured():
    model, tokenizer = load(device="cpu", dtype="bfloat16")
    asked = [tokenizer.encode(tokenizer.chat(q)) for q in bench.QUESTIONS]
    done = LLM((model, tokenizer)).generate(asked, SamplingParams(max_tokens=48))
    texts = [(a, d.tokens) for a, d in zip(asked, done, strict=True)]
    found = acceptance.measure(model, load_draft(device="cpu", dtype="bfloat16"), texts, temperature=0.0)
    measured = next(r["rate"] for r in about_draft()["acceptance"] if r["name"] == "questions")
    # Of 1,100 guesses: the record's share, of longer answers, within 4σ. Untrained, hardly any passes.
    assert abs(found.rate - measured) < 4 * (measured * (1 - measured) / found.count) ** 0.5
