"""The engine: every switch gives the same tokens, streams as it generates, stops where it should."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmcourse.engine import LLM, SamplingParams
from llmcourse.engine.timing import dollars_per_million_tokens
from llmcourse.errors import ShapeError

PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog, and", "1 2 3 4"]


@pytest.mark.parametrize(("kv_cache", "fused"), list(itertools.product([True, False], repeat=2)))
def test_greedy_tokens_are_the_same_under_every_switch(tiny, kv_cache, fused):
    plain = LLM(tiny, kv_cache=False, fused=False)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = [plain.generate([p], params)[0].tokens for p in PROMPTS]
    llm = LLM(tiny, kv_cache=kv_cache, fused=fused)
    assert [llm.generate([p], params)[0].tokens for p in PROMPTS] == expected
    assert [c.tokens for c in llm.generate(PROMPTS, params)] == expected


def test_the_real_model_answers_the_same_in_a_batch_as_alone(smol):
    llm = LLM(smol)
    prompts = [smol[1].chat(q) for q in ("What is the capital of France?", "What is 2+2?")]
    params = SamplingParams(max_tokens=16)
    alone = [llm.generate([p], params)[0].text for p in prompts]
    assert [c.text for c in llm.generate(prompts, params)] == alone
    assert alone[0] == "The capital of France is Paris."


def test_a_stream_is_the_generated_text_in_pieces(tiny):
    llm = LLM(tiny)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5)
    pieces = list(llm.stream("Hello", params))
    whole = llm.generate(["Hello"], params)[0]
    assert "".join(p.text for p in pieces) == whole.text
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish == whole.finish


def test_a_request_draws_the_same_tokens_whatever_the_batch_around_it(tiny):
    llm = LLM(tiny)
    params = [SamplingParams(max_tokens=10, temperature=1.0, seed=s, ignore_eos=True) for s in range(3)]
    alone = [llm.generate([p], s)[0].tokens for p, s in zip(PROMPTS, params, strict=True)]
    assert [c.tokens for c in llm.generate(PROMPTS, params)] == alone
    other = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=10, temperature=1.0, seed=9, ignore_eos=True))
    assert other[0].tokens != alone[0]


def test_an_answer_ends_at_eos_and_other_sequences_go_on(tiny):
    llm = LLM(tiny)
    free = llm.generate(PROMPTS, SamplingParams(max_tokens=20, ignore_eos=True))
    eos = free[1].tokens[4]
    tokenizer = type(tiny[1])(tiny[1].backend, chat_template=None, eos_ids=[eos])
    ended = LLM((tiny[0], tokenizer)).generate(PROMPTS, SamplingParams(max_tokens=20))
    for before, after in zip(free, ended, strict=True):
        cut = before.tokens.index(eos) if eos in before.tokens else 20
        assert after.tokens == before.tokens[:cut]
        assert after.finish == ("stop" if cut < 20 else "length")


def test_a_stop_string_split_over_tokens_never_shows(smol):
    llm = LLM(smol)
    params = SamplingParams(max_tokens=40)
    text = llm.generate(["The capital of France is"], params)[0].text
    assert len(text) > 30
    for stop in (text[20:27], text[3:5], text[25:26]):
        params = SamplingParams(max_tokens=40, stop=("never there", stop))
        pieces = [p.text for p in llm.stream("The capital of France is", params)]
        assert "".join(pieces) == text[: text.find(stop)]


def test_closing_a_stream_ends_the_work(tiny):
    stream = LLM(tiny).stream("Hello", SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()
    assert list(stream) == []


def test_timing_counts_tokens_and_orders_its_moments(tiny):
    done = LLM(tiny).generate(PROMPTS, SamplingParams(max_tokens=9, ignore_eos=True))
    timing = done[0].timing
    assert timing.tokens == 27
    assert len(timing.stamps) == 9
    assert timing.prompt_tokens == sum(c.prompt_tokens for c in done)
    assert timing.started < timing.stamps[0]
    assert timing.seconds == pytest.approx(timing.ttft + 8 * timing.tpot)
    assert timing.throughput == pytest.approx(27 / timing.seconds)


def test_cost_per_million_tokens():
    # 1,000 tokens/s is 3.6 million an hour; at $3.60 an hour a million costs a dollar.
    assert dollars_per_million_tokens(1000, 3.6) == pytest.approx(1.0)


@pytest.mark.parametrize("prompt", ["", [49152], [-1], []])
def test_prompts_without_a_valid_token_are_refused(tiny, prompt):
    with pytest.raises(ShapeError, match="Try"):
        LLM(tiny).generate([prompt])


def test_more_tokens_than_the_context_holds_are_refused_before_any_work(tiny):
    with pytest.raises(ShapeError, match="contexts of 512"):
        LLM(tiny).generate(["Hello"], SamplingParams(max_tokens=512))


def test_bfloat16_stays_close_to_float32_on_the_real_model(smol, gguf_path):
    from llmcourse import models

    half, tokenizer = models.load(gguf_path, device="cpu", dtype="bfloat16")
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        a, b = smol[0](ids).float().log_softmax(-1), half(ids).float().log_softmax(-1)
    kl = (a.exp() * (a - b)).sum(-1).max()
    assert kl < 0.02
    # Packed weights are the same numbers in another order.
    llm, params = LLM((half, tokenizer)), SamplingParams(max_tokens=8, ignore_eos=True)
    plain = LLM((half, tokenizer), packed=False)
    assert llm.generate(PROMPTS, params)[1].tokens == plain.generate(PROMPTS, params)[1].tokens
