"""A learner's pieces, and a learner's block, in the place of the model's own: what it says stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcourse.engine import LLM, SamplingParams
from llmcourse.labs import find_lab
from llmcourse.models import KVCache, LatentSizes, ModelConfig, RopeScaling, Transformer
from llmcourse.models.encoder import Encoder
from llmcourse.models.encoder_decoder import EncoderDecoder
from llmcourse.plug import PlugError, plug
from llmcourse.plug.same_text import TIE, SameText, same_text

RIGHT = {e.name: e.alternatives[0].fn for e in find_lab("07").exercises}
BLOCK = {"decoder_block": RIGHT["decoder_block"]}
PIECES = {name: fn for name, fn in RIGHT.items() if name not in BLOCK}

GQA = ModelConfig(
    vocab_size=50, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, max_len=64
)
LATENT = LatentSizes(q_rank=12, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=5)
FORMS = {
    "multi-head": replace(GQA, n_kv_heads=4),
    "grouped": GQA,
    "multi-query": replace(GQA, n_kv_heads=1, rope_theta=100.0),
}
MORE = {
    "biases": replace(GQA, qkv_bias=True, bias=True),
    "norms of heads": replace(GQA, qk_norm=True),
    "window": replace(GQA, layers=("attention", "window"), window=3, sinks=1),
    "latent": replace(GQA, layers=("latent",) * 2, latent=LATENT),
    "learned positions": replace(GQA, position="learned", norm="layer", mlp="gelu", post_norm=True),
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def a_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5) + (p.dim() == 1))
    return model


def through_a_cache(model: Transformer, pieces: tuple[int, ...]) -> torch.Tensor:
    cache = KVCache(model.config, batch=2, max_len=16)
    with torch.no_grad():
        return torch.cat([model(part, cache) for part in TOKENS.split(pieces, dim=1)], dim=1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


# ── the numbers stay ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("functions", [*({n: RIGHT[n]} for n in RIGHT), PIECES], ids="+".join)
@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_the_model_s_own_for_any_split(form, functions):
    model = a_model(FORMS[form])
    with torch.no_grad():
        own = model(TOKENS)
    for split in ((7,), (3, 1, 3), (1,) * 7):
        with plug(**functions) as used:
            assert same(own, through_a_cache(model, split))
        assert all(used.calls.values())
    with plug(**functions), torch.no_grad():
        assert same(own, model(TOKENS))
    assert same(own, through_a_cache(model, (4, 3)))


@pytest.mark.parametrize("form", MORE)
def test_pieces_fit_the_other_kinds_of_attention_too(form):
    model = a_model(MORE[form])
    pieces = {n: fn for n, fn in PIECES.items() if form != "latent" or n != "project_heads"}
    own = [through_a_cache(model, split) for split in ((7,), (3, 1, 3))]
    for name in pieces:
        with plug(**{name: pieces[name]}) as used:
            again = [through_a_cache(model, split) for split in ((7,), (3, 1, 3))]
        assert all(same(a, b) for a, b in zip(own, again, strict=True)), name
        assert (used.calls[name] > 0) == (name != "apply_rope" or form != "learned positions")


def test_sequences_of_unequal_length_go_on_at_their_own_positions():
    model = a_model(GQA)

    def three_steps():
        cache = KVCache(GQA, batch=2, max_len=12)
        for b, length in enumerate((5, 2)):
            row = cache.row(b)
            with torch.no_grad():
                model(TOKENS[b : b + 1, :length], row)
            cache.lengths[b] = length
        with torch.no_grad():
            return torch.cat([model(TOKENS[:, i : i + 1], cache) for i in range(3)], dim=1)

    own = three_steps()
    for functions in (PIECES, BLOCK):
        with plug(**functions):
            assert same(own, three_steps())


def test_attention_is_replaced_in_encoders_and_between_two_stacks():
    config = replace(GQA, n_kv_heads=4)
    torch.manual_seed(1)
    encoder, both = Encoder(config, classes=3).eval(), EncoderDecoder(config).eval()
    with torch.no_grad():
        own = encoder(TOKENS), both(TOKENS, TOKENS[:, :3])
        with plug(attention=RIGHT["attention"]) as used:
            again = encoder(TOKENS), both(TOKENS, TOKENS[:, :3])
        with plug(softmax=lambda x: x.softmax(-1)) as softmax:
            third = encoder(TOKENS), both(TOKENS, TOKENS[:, :3])
    for a, b, c in zip(own, again, third, strict=True):
        assert same(a, b)
        assert same(a, c)
    assert used.calls["attention"] == softmax.calls["softmax"] == 2 + 2 + 2 * 2


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("project_heads", lambda x, wq, wk, wv, d: (x, x), r"should be \(q, k, v\)"),
        ("project_heads", lambda x, wq, wk, wv, d: (x, x, x), "q has shape"),
        ("apply_rope", lambda x, positions, theta: x.double(), "float64"),
        ("causal_mask", lambda positions, n, first: torch.ones(2, 1, 7, 7), "float32"),
        ("causal_mask", lambda positions, n, first: torch.ones(7, 7, dtype=torch.bool), "has shape"),
        ("attention", lambda q, k, v, mask: q, r"should be \(y, weights\)"),
        ("attention", lambda q, k, v, mask: (q[:, :1], None), "y has shape"),
        ("decoder_block", lambda x, w, c, k, v: x, r"should be \(y, keys, values\)"),
        ("decoder_block", lambda x, w, c, k, v: (x, k, v), "keys has shape"),
        ("decoder_block", lambda x, w, c, k, v: (None, k, v), "a `return` at its end"),
    ],
)
def test_what_the_model_cannot_go_on_with_is_refused(name, wrong, says):
    with pytest.raises(PlugError, match=says), plug(**{name: wrong}), torch.no_grad():
        a_model(GQA)(TOKENS)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("biases", "biases"),
        ("norms of heads", "norms on queries and keys"),
        ("window", "not plain attention"),
        ("latent", "not plain attention"),
        ("learned positions", "positions that are not plain RoPE"),
    ],
)
def test_a_block_is_not_put_where_it_would_leave_something_out(form, says):
    with pytest.raises(PlugError, match=says), plug(**BLOCK), torch.no_grad():
        a_model(MORE[form])(TOKENS)


def test_stretched_wavelengths_are_refused_since_the_function_is_told_theta_alone():
    model = a_model(replace(GQA, rope_scaling=RopeScaling("linear", factor=2.0)))
    for name in ("apply_rope", "decoder_block"):
        with pytest.raises(PlugError), plug(**{name: RIGHT[name]}), torch.no_grad():
            model(TOKENS)


def test_a_wrong_block_changes_the_logits():
    model = a_model(GQA)
    own = through_a_cache(model, (4, 1, 2))
    for mistake in find_lab("07").exercise("decoder_block").mistakes:
        if mistake.name in ("in_place", "new_alone", "nothing_added", "cache_forgotten"):
            continue  # refused, or right as far as the model can see
        with plug(decoder_block=mistake.fn):
            assert not same(own, through_a_cache(model, (4, 1, 2))), mistake.name


# ── the real model ───────────────────────────────────────────────────────────────────────────────────

PROMPT, GREEDY = "Once upon a time, a small robot", SamplingParams(max_tokens=12)


@pytest.mark.parametrize("functions", [PIECES, BLOCK], ids="+".join)
def test_the_real_model_says_the_same_token_for_token(smol, functions):
    llm = LLM(smol)
    (own,) = llm.generate([PROMPT], GREEDY)
    with plug(**functions) as used:
        (mine,) = llm.generate([PROMPT], GREEDY)
    found = same_text(llm, PROMPT, own.tokens, mine.tokens)
    assert found.differs_at is None
    assert own.tokens == mine.tokens
    assert "".join(found.mine) == mine.text
    assert all(lead >= 0 for lead in found.leads)
    assert found.verdict.startswith("✓ 12 of 12 tokens")
    layers = llm.model.config.n_layers
    assert set(used.calls.values()) <= {12, 12 * layers}


def test_a_block_without_positions_makes_another_text_and_the_verdict_says_where(smol):
    llm = LLM(smol)
    (own,) = llm.generate([PROMPT], GREEDY)
    wrong = {m.name: m.fn for m in find_lab("07").exercise("decoder_block").mistakes}["no_positions"]
    with plug(decoder_block=wrong):
        (mine,) = llm.generate([PROMPT], GREEDY)
    found = same_text(llm, PROMPT, own.tokens, mine.tokens)
    assert found.differs_at is not None
    assert own.tokens[: found.differs_at] == mine.tokens[: found.differs_at]
    assert not found.tie
    assert str(found).startswith(f"✗ after {found.differs_at} equal tokens")


def test_a_tie_is_called_a_tie_and_an_early_end_is_a_difference():
    same_tokens = SameText(["a", "b"], ["a", "b"], [2.0, TIE / 2])
    assert same_tokens.differs_at is None
    assert not same_tokens.tie
    tie = SameText(["a", "b"], ["a", "c"], [2.0, TIE / 2])
    assert tie.tie
    assert tie.verdict.startswith("≈ the first 1 of 2")
    apart = SameText(["a", "b"], ["a", "c"], [2.0, 1.0])
    assert apart.verdict == "✗ after 1 equal tokens comes 'c', and should be 'b', which led by 1 logits"
    ended = SameText(["a", "b"], ["a"], [2.0, 1.0])
    assert ended.differs_at == 1
    assert "comes the end" in ended.verdict
    assert "should be the end" in SameText(["a"], ["a", "b"], [2.0]).verdict
    assert SameText(["a", "b"], ["a", "c"], [2.0, 1.0]).table().rows[1][:2] == ["'b'", "'c'"]
