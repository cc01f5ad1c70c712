"""Attention maps are the weights that the model itself uses; heads are told apart by what they look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from matplotlib.text import Text

from llmcourse.errors import ShapeError
from llmcourse.models import ModelConfig, Transformer, random_model
from llmcourse.models.attention import Attention
from llmcourse.models.encoder import Encoder
from llmcourse.models.encoder_decoder import CrossAttention, EncoderDecoder
from llmcourse.models.inspect_attention import PATTERNS, attention_maps, heads, on_pattern, silenced
from llmcourse.train import build
from llmcourse.widgets.attention_patterns import LONGEST, attention_patterns, label

SMALL = ModelConfig(
    vocab_size=31, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, max_len=64
)
WINDOWED = replace(SMALL, layers=("window", "attention", "window"), window=4, sinks=1)
PROMPT = "The keeper of the red lamp sat by the door. The keeper of the red"


@pytest.fixture(autouse=True)
def forward_only() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs_of_attention(model, *inputs):
    """What each attention layer of a pass was given and gave: [(module, x, step, state, out)]."""
    seen, handles = [], []
    for module in model.modules():
        if isinstance(module, Attention):
            handles.append(module.register_forward_hook(lambda m, i, o: seen.append((m, *i, o))))
    model(*inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (Transformer, SMALL),
        (Transformer, replace(SMALL, qk_norm=True, position="learned", n_kv_heads=1)),
        (Transformer, replace(SMALL, post_norm=True)),
        (Transformer, WINDOWED),
        (Encoder, SMALL),
    ],
)
def test_weights_times_values_are_the_layers_own_output(make, config):
    model = build(make, config, seed=1).eval()
    tokens = torch.randint(0, 31, (1, 15))
    maps = attention_maps(model, tokens)
    assert maps.shape == (3, 4, 15, 15)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 15))
    for weights, (module, x, step, _, out) in zip(maps, inputs_of_attention(model, tokens), strict=True):
        _, _, v = module.heads(x, step)
        mixed = weights[None] @ v.repeat_interleave(4 // v.shape[1], dim=1)
        torch.testing.assert_close(module.out(mixed.transpose(1, 2).flatten(2)), out, atol=1e-5, rtol=1e-5)


def test_the_same_holds_for_every_layer_of_the_real_model(smol):
    model, tokenizer = smol
    tokens = torch.tensor([tokenizer.encode(PROMPT)])
    maps = attention_maps(model, tokens)
    for weights, (module, x, step, _, out) in zip(maps, inputs_of_attention(model, tokens), strict=True):
        _, _, v = module.heads(x, step)
        mixed = weights[None] @ v.repeat_interleave(3, dim=1)
        difference = (module.out(mixed.transpose(1, 2).flatten(2)) - out).abs().max()
        assert difference <= 1e-5 * max(1.0, out.abs().max())


def test_cross_attention_has_maps_of_its_own():
    model = build(EncoderDecoder, SMALL, seed=2).eval()
    source, target = torch.randint(0, 31, (1, 9)), torch.randint(0, 31, (1, 5))
    lengths = torch.tensor([6])
    maps = attention_maps(model, source, target, lengths, cross=True)
    assert maps.shape == (3, 4, 5, 9)
    assert (maps[..., 6:] == 0).all()  # nothing looks at padding
    passes = inputs_of_attention(model, source, target, lengths)
    crossings = [seen for seen in passes if isinstance(seen[0], CrossAttention)]
    for weights, (module, _, _, state, out) in zip(maps, crossings, strict=True):
        mixed = weights[None] @ state.v.repeat_interleave(2, dim=1)
        torch.testing.assert_close(module.out(mixed.transpose(1, 2).flatten(2)), out, atol=1e-5, rtol=1e-5)


def test_nothing_looks_ahead_or_out_of_its_window():
    maps = attention_maps(build(Transformer, WINDOWED, seed=3), torch.randint(0, 31, (1, 12)))
    assert (maps.triu(1) == 0).all()
    i, j = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    hidden = (i - j >= 4) & (j >= 1)
    assert (maps[0][:, hidden] == 0).all()
    assert (maps[1][:, hidden & (j <= i)] > 0).all()


def test_a_pattern_that_is_there_scores_one_and_the_others_little():
    tokens = torch.cat((torch.arange(10), torch.arange(10)))
    n = len(tokens)
    i = torch.arange(n)
    drawn = {
        "previous": (i - 1).clamp(0),
        "first": i * 0,
        "local": (i - 3).clamp(0),
        "induction": torch.where(i < 10, 0, i - 9),
    }
    for name, column in drawn.items():
        maps = torch.nn.functional.one_hot(column, n).float()[None, None]
        scores = {k: float(v) for k, v in on_pattern(maps, tokens).items()}
        assert scores[name] > 0.8, (name, scores)
        assert max(scores, key=scores.__getitem__) == name
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    assert all(float(v) < 0.4 for v in on_pattern(uniform[None, None], tokens).values())


def test_without_a_repeat_there_is_nothing_to_induce():
    maps = attention_maps(build(Transformer, SMALL, seed=3), torch.arange(12)[None])
    assert (on_pattern(maps, torch.arange(12))["induction"] == 0).all()


def test_the_real_model_has_sinks_previous_token_heads_and_induction_heads_above_them(smol):
    model, tokenizer = smol
    for seed in (0, 1):
        table = heads(model, vocab_size=tokenizer.vocab_size, seed=seed)
        assert len(table) == 270
        by = {kind: [h for h in table if h.kind == kind] for kind in (*PATTERNS, "mixed")}
        assert len(by["first"]) > 60
        assert max(h.scores["previous"] for h in table) > 0.8
        assert max(h.scores["induction"] for h in table) > 0.7
        # An induction head needs a previous-token head in a layer below it (Olsson et al. 2022).
        assert min(h.layer for h in by["previous"]) < min(h.layer for h in by["induction"])


def test_a_random_model_has_no_induction_heads():
    torch.manual_seed(4)
    table = heads(random_model(SMALL, dtype="float32"), vocab_size=31)
    assert max(h.scores["induction"] for h in table) < 0.2


def test_several_sequences_or_no_attention_are_refused():
    model = build(Transformer, SMALL, seed=1)
    with pytest.raises(ShapeError, match="batch of 2"):
        attention_maps(model, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ShapeError, match="no cross-attention"):
        attention_maps(model, torch.zeros(1, 5, dtype=torch.long), cross=True)
    assert not any(m._forward_pre_hooks for m in model.modules())  # nothing stays attached


def test_heads_of_a_hybrid_are_named_by_their_block():
    config = replace(SMALL, layers=("ssm", "attention", "window"), window=8)
    model = build(Transformer, config, seed=5).eval()
    table = heads(model, vocab_size=31)
    assert [h.layer for h in table] == [1] * 4 + [2] * 4
    tokens = torch.randint(0, 31, (1, 9))
    with silenced(model, table[:1]):
        one_muted = model(tokens)
    assert not torch.allclose(one_muted, model(tokens))


def test_stacks_of_unequal_lengths_have_no_common_maps():
    model = build(EncoderDecoder, SMALL, seed=2).eval()
    source, target = torch.randint(0, 31, (1, 7)), torch.randint(0, 31, (1, 4))
    with pytest.raises(ShapeError, match="not equally long"):
        attention_maps(model, source, target)
    assert attention_maps(model.encoder, source).shape == (3, 4, 7, 7)


@pytest.fixture
def explorable(tiny):
    return attention_patterns(*tiny, PROMPT)


def drawn_text(explorable) -> str:
    values = {name: control.value for name, control in explorable.controls.items()}
    return "\n".join(text.get_text() for text in explorable.draw(**values).findobj(Text))


def test_each_control_changes_the_picture_and_back_the_same(explorable):
    first = bytes(explorable.image.value)
    assert first.startswith(b"\x89PNG")
    for name, value in {"prompt": "another prompt, another", "layer": 1, "head": 5}.items():
        control = explorable.controls[name]
        before, control.value = control.value, value
        assert bytes(explorable.image.value) != first, name
        control.value = before
        assert bytes(explorable.image.value) == first, name


def test_the_picture_names_the_head_its_kind_and_the_tokens(explorable, tiny):
    explorable.controls["layer"].value, explorable.controls["head"].value = 1, 2
    found = drawn_text(explorable)
    this = heads(tiny[0], vocab_size=tiny[0].config.vocab_size)[6 + 2]
    assert f"layer 1, head 2: {this.kind}" in found
    assert all(f"{name} {this.scores[name]:.2f}" in found for name in PATTERNS)
    assert "·keeper" in found


def test_an_empty_or_endless_prompt_is_drawn_too(explorable):
    for prompt in ("", "$x_1$ " * 50, "é ± \n\n"):
        explorable.controls["prompt"].value = prompt
        explorable.draw(prompt, 0, 0).draw_without_rendering()
    assert explorable.draw("a b " * 99, 0, 0).axes[0].get_images()[0].get_array().shape == (LONGEST,) * 2


def test_blanks_and_line_ends_can_be_seen_in_labels():
    assert label(" the") == "·the"
    assert label("\n") == "↵"
    assert label("") == "∅"


def test_a_silenced_head_adds_nothing_and_comes_back():
    model = build(Transformer, SMALL, seed=6).eval()
    tokens = torch.randint(0, 31, (1, 9))
    before, table = model(tokens), heads(model, vocab_size=31)
    with silenced(model, [h for h in table if (h.layer, h.head) in {(0, 1), (0, 3), (2, 0)}]):
        muted = model(tokens)
    changed = build(Transformer, SMALL, seed=6).eval()
    for layer, head in ((0, 1), (0, 3), (2, 0)):
        changed.blocks[layer].mixer.out.weight[:, head * 6 : head * 6 + 6] = 0
    torch.testing.assert_close(muted, changed(tokens))
    assert not torch.allclose(muted, before)
    assert torch.equal(model(tokens), before)
    with silenced(model, table):  # all heads: what remains is each token on its own
        swapped = model(tokens.flip(1))
        torch.testing.assert_close(model(tokens), swapped.flip(1))
