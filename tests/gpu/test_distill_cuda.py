"""On a GPU: gradients in bfloat16 pieces, conversations by CUDA graphs, and the draft's whole pipeline."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmcourse.bench import distill as bench
from llmcourse.compress.distill import forward_kl
from llmcourse.compress.draft import about_draft, load_draft
from llmcourse.compress.linear_kl import linear_kl
from llmcourse.compress.self_written import Turns, conversations, decoder_for
from llmcourse.models import load

QUICK = replace(
    bench.FULL, rows=64, length=96, write_s=1.0, play_length=64, stretches=64, prompts=4, answer=16,
    tokens_per_step=2048, trial_s=1.0, total_s=60.0, rates=(2e-3,),
)  # fmt: skip


def test_pieces_in_bfloat16_give_the_gradients_of_float32():
    torch.manual_seed(0)
    shapes = ((96, 64), (4096, 64), (96, 128), (4096, 128))
    x, weight, teacher_x, teacher_weight = (torch.randn(*s, device="cuda") / s[1] ** 0.25 for s in shapes)
    (a, w), (b, u) = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    want = forward_kl(a @ w.T, teacher_x @ teacher_weight.T).mean()
    want.backward()
    got = linear_kl(b, u, teacher_x, teacher_weight, rows=40, dtype=torch.bfloat16)
    got.backward()
    assert abs(float(got - want)) < 0.02 * float(want)
    for mine, right in ((b.grad, a.grad), (u.grad, w.grad)):
        assert torch.nn.functional.cosine_similarity(mine.flatten(), right.flatten(), dim=0) > 0.999


def test_conversations_by_graphs_follow_the_format_and_start_anew_each_time():
    model, tokenizer = load(device="cuda")
    turns = Turns.of(tokenizer)
    decoder = decoder_for(model, 64, 160)
    first, second, again = (
        conversations(model, tokenizer, rows=64, length=160, seed=s, decoder=decoder) for s in (0, 1, 0)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, second.tokens)
    rows = first.tokens.tolist()
    assert all(row[: len(turns.opening)] == turns.opening for row in rows)
    answered = [row for row in rows if turns.answer[0] in row[len(turns.opening) : 150]]
    assert len(answered) > 20
    for row in answered:
        at = row.index(turns.answer[0], len(turns.opening))
        assert row[at : at + len(turns.answer)] == turns.answer


def test_a_minute_of_distilling_gives_a_draft_that_is_accepted_sometimes(tmp_path):
    rows = bench.draft_rows(QUICK, "cuda", tmp_path)
    made = next(r for r in rows if r["kind"] == "draft")
    assert made["bytes"] < 16_000_000
    assert 0 < made["cost"] < 0.6
    tests = [r for r in rows if r["kind"] == "acceptance"]
    assert len(tests) == 6
    assert max(r["rate"] for r in tests) > 0.05
    assert load_draft(tmp_path / "draft.safetensors").device.type == "cuda"
    assert about_draft(tmp_path / "draft.safetensors")["acceptance"][0]["name"] == "questions"
