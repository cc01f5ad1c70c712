"""The encoder-decoder gives what PyTorch's gives, and the same when it reads once and writes in pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.errors import ShapeError
from llmcourse.models import ModelConfig
from llmcourse.models.encoder_decoder import EncoderDecoder
from llmcourse.train import build

from .test_encoder import PLAIN, SMALL, copy_attention, copy_linear, random_weights, torch_encoder


def model_of(config: ModelConfig, seed: int = 0) -> EncoderDecoder:
    model = random_weights(build(EncoderDecoder, config, seed=seed), seed)
    assert isinstance(model, EncoderDecoder)
    return model


def torch_decoder(model: EncoderDecoder) -> nn.TransformerDecoder:
    """PyTorch's own decoder, with the weights of ours."""
    c = model.config
    layer = nn.TransformerDecoderLayer(
        c.d_model, c.n_heads, c.d_ff, 0.0, c.mlp, c.norm_eps, batch_first=True, norm_first=not c.post_norm
    )
    last = None if c.post_norm else nn.LayerNorm(c.d_model, c.norm_eps)
    theirs = nn.TransformerDecoder(layer, c.n_layers, last).eval()
    with torch.no_grad():
        for a, b in zip(theirs.layers, model.decoder.blocks, strict=True):
            copy_attention(a.self_attn, b.mixer)
            copy_attention(a.multihead_attn, b.cross)
            for there, here in ((a.norm1, b.mixer_norm), (a.norm2, b.cross_norm), (a.norm3, b.mlp_norm)):
                copy_linear(there, here)
            for there, here in ((a.linear1, b.mlp.up), (a.linear2, b.mlp.down)):
                copy_linear(there, here)
        if last is not None:
            copy_linear(theirs.norm, model.decoder.norm)
    return theirs


@pytest.mark.parametrize("position", ["none", "learned"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_logits_equal_torch_nn_transformer(position, activation, post_norm):
    model = model_of(replace(PLAIN, position=position, mlp=activation, post_norm=post_norm), seed=1)
    encoder, decoder = torch_encoder(model.encoder), torch_decoder(model)
    source, target, lengths = (
        torch.randint(0, 31, (3, 11)),
        torch.randint(0, 31, (3, 7)),
        torch.tensor([4, 11, 1]),
    )
    padding = torch.arange(11) >= lengths[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    with torch.inference_mode():
        s, t = (
            stack.positions(stack.embedding(x), torch.arange(x.shape[1]).expand(3, -1))
            for stack, x in ((model.encoder.stack, source), (model.decoder, target))
        )
        memory = encoder(s, src_key_padding_mask=padding)
        features = decoder(t, memory, causal, memory_key_padding_mask=padding, tgt_is_causal=True)
        expected = features @ model.decoder.head.weight.T
        torch.testing.assert_close(model(source, target, lengths), expected, atol=1e-5, rtol=1e-5)
        assert (model(source, target) - expected).abs().max() > 1e-2  # the padding mask is seen to matter


def test_the_reference_is_not_blind_to_the_source():
    model = model_of(PLAIN, seed=1)
    source, target = torch.randint(0, 31, (1, 9)), torch.randint(0, 31, (1, 5))
    with torch.inference_mode():
        before = model(source, target)
        source[0, 3] = (source[0, 3] + 1) % 31
        assert ((model(source, target) - before).abs().amax(-1) > 1e-5).all()


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    rows=st.integers(1, 3),
    position=st.sampled_from(["rope", "learned", "none"]),
    groups=st.sampled_from([1, 2, 4]),
    qk_norm=st.booleans(),
)
def test_reading_once_and_writing_in_any_pieces_gives_the_same_logits(cuts, rows, position, groups, qk_norm):
    model = model_of(replace(SMALL, position=position, n_kv_heads=groups, qk_norm=qk_norm), seed=2)
    torch.manual_seed(sum(cuts))
    source, target = torch.randint(0, 31, (rows, 9)), torch.randint(0, 31, (rows, sum(cuts)))
    lengths = torch.randint(1, 10, (rows,))
    with torch.inference_mode():
        reading = model.read(source, lengths, room=sum(cuts) + 2)
        pieces = [model.decoder(part, reading) for part in target.split(cuts, dim=1)]
        whole = model(source, target, lengths)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_the_keys_and_values_of_the_source_are_computed_once():
    model = model_of(SMALL)
    reads = []
    for block in model.decoder.blocks:
        block.cross.remember = lambda x, original=block.cross.remember: (reads.append(1), original(x))[1]
    source = torch.randint(0, 31, (2, 9))
    with torch.inference_mode():
        reading = model.read(source, room=4)
        before = [(state.k.clone(), state.v.clone()) for state in reading.layers]
        for _ in range(4):
            model.decoder(torch.zeros(2, 1, dtype=torch.long), reading)
    assert len(reads) == SMALL.n_layers
    for state, (k, v) in zip(reading.layers, before, strict=True):
        assert torch.equal(state.k, k)
        assert torch.equal(state.v, v)
    kv = 2 * SMALL.n_kv_heads * SMALL.head_dim * 4  # bytes of a token in a layer
    assert reading.nbytes == SMALL.n_layers * 2 * kv * (9 + 4)


def test_a_row_of_a_reading_continues_alone():
    model = model_of(SMALL)
    source, target = torch.randint(0, 31, (3, 9)), torch.randint(0, 31, (3, 4))
    lengths = torch.tensor([9, 2, 5])
    with torch.inference_mode():
        reading = model.read(source, lengths, room=4)
        alone = model.decoder(target[1:2], reading.row(1))
    torch.testing.assert_close(alone, model(source, target, lengths)[1:2], atol=1e-5, rtol=1e-5)


def test_generate_is_the_argmax_of_whole_passes():
    model = model_of(SMALL, seed=5)
    source, lengths = torch.randint(0, 31, (4, 8)), torch.tensor([8, 3, 5, 1])
    written = model.generate(source, lengths, start=1, end=2, room=10)
    for row in range(4):
        tokens = [1]
        with torch.inference_mode():
            while len(tokens) <= 10:
                logits = model(source[row : row + 1, : lengths[row]], torch.tensor([tokens]))
                if (best := int(logits[0, -1].argmax())) == 2:
                    break
                tokens.append(best)
        assert written[row] == tokens[1:]


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula_counts_the_parameters(norm, position, tied, bias):
    config = replace(SMALL, norm=norm, position=position, tie_embeddings=tied, bias=bias, post_norm=bias)
    assert EncoderDecoder.n_params(config) == sum(p.numel() for p in EncoderDecoder(config).parameters())


def test_a_batch_of_targets_must_match_the_sources():
    with pytest.raises(ShapeError, match="2 sources came with 3 targets"):
        EncoderDecoder(SMALL)(torch.zeros(2, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long))


def test_no_room_to_write_is_refused():
    model = EncoderDecoder(SMALL).eval()
    source = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ShapeError, match="room = 0"):
        model.generate(source, start=1, end=2, room=0)
    with pytest.raises(ShapeError, match="room = -1"):
        model.read(source, room=-1)
