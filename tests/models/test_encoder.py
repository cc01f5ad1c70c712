"""The encoder is the decoder's stack without the causal mask, and gives what PyTorch's encoder gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from llmcourse.errors import ShapeError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.encoder import Encoder
from llmcourse.train import build

SMALL = ModelConfig(
    vocab_size=31, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, max_len=64
)
# What torch.nn's layers compute: biases everywhere, LayerNorm, one key/value head for each query head.
PLAIN = replace(
    SMALL, n_kv_heads=4, norm="layer", bias=True, mlp="gelu", position="none", tie_embeddings=False
)


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases away from one and zero, which would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def copy_attention(theirs: nn.MultiheadAttention, ours) -> None:
    theirs.in_proj_weight.copy_(ours.qkv.weight)
    theirs.in_proj_bias.copy_(ours.qkv.bias)
    copy_linear(theirs.out_proj, ours.out)


def copy_linear(theirs: nn.Module, ours: nn.Module) -> None:
    theirs.weight.copy_(ours.weight)
    theirs.bias.copy_(ours.bias)


def torch_encoder(encoder: Encoder) -> nn.TransformerEncoder:
    """PyTorch's own encoder, with the weights of ours."""
    c, stack = encoder.config, encoder.stack
    layer = nn.TransformerEncoderLayer(
        c.d_model, c.n_heads, c.d_ff, 0.0, c.mlp, c.norm_eps, batch_first=True, norm_first=not c.post_norm
    )
    last = None if c.post_norm else nn.LayerNorm(c.d_model, c.norm_eps)
    theirs = nn.TransformerEncoder(layer, c.n_layers, last, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for a, b in zip(theirs.layers, stack.blocks, strict=True):
            copy_attention(a.self_attn, b.mixer)
            for there, here in ((a.norm1, b.mixer_norm), (a.norm2, b.mlp_norm)):
                copy_linear(there, here)
            for there, here in ((a.linear1, b.mlp.up), (a.linear2, b.mlp.down)):
                copy_linear(there, here)
        if last is not None:
            copy_linear(theirs.norm, stack.norm)
    return theirs


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_features_equal_torch_nn_transformer_encoder(position, activation, post_norm):
    config = replace(PLAIN, position=position, mlp=activation, post_norm=post_norm)
    encoder = random_weights(build(Encoder, config, classes=0, seed=1))
    theirs = torch_encoder(encoder)
    tokens, lengths = torch.randint(0, 31, (3, 13)), torch.tensor([13, 1, 8])
    with torch.inference_mode():
        x = encoder.stack.positions(encoder.stack.embedding(tokens), torch.arange(13).expand(3, -1))
        torch.testing.assert_close(encoder(tokens), theirs(x), atol=1e-5, rtol=1e-5)
        padding = torch.arange(13) >= lengths[:, None]
        ours, expected = encoder(tokens, lengths), theirs(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


def test_the_comparison_with_torch_can_fail():
    encoder = random_weights(build(Encoder, PLAIN, classes=0, seed=1))
    theirs = torch_encoder(encoder)
    tokens = torch.randint(0, 31, (2, 9))
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    with torch.inference_mode():
        expected = theirs(encoder.stack.embedding(tokens), mask=causal, is_causal=True)
        assert (encoder(tokens) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_what_stands_in_the_padding_changes_nothing(position):
    encoder = random_weights(build(Encoder, replace(SMALL, position=position), classes=5, seed=2))
    tokens, lengths = torch.randint(0, 31, (3, 17)), torch.tensor([17, 4, 9])
    other = torch.where(torch.arange(17) < lengths[:, None], tokens, (tokens + 7) % 31)
    with torch.inference_mode():
        padded, changed = encoder(tokens, lengths), encoder(other, lengths)
        for row, n in enumerate(lengths.tolist()):
            assert torch.equal(padded[row, :n], changed[row, :n])
            alone = encoder(tokens[row : row + 1, :n])
            torch.testing.assert_close(padded[row : row + 1, :n], alone, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(encoder(tokens)[1, :4], padded[1, :4], atol=1e-3)


def test_only_the_mask_makes_it_a_decoder():
    """The same weights: with the causal mask a Transformer, without it an Encoder."""
    decoder = random_weights(build(Transformer, SMALL, seed=3))
    encoder = Encoder(SMALL).eval()
    encoder.stack.load_state_dict(decoder.state_dict())
    tokens = torch.randint(0, 31, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 31
    with torch.inference_mode():
        assert torch.equal(decoder(tokens)[:, :7], decoder(changed)[:, :7])
        assert ((encoder(tokens) - encoder(changed)).abs().amax(-1) > 1e-4).all()  # every position sees it
        last = encoder(tokens[:, :1]), decoder(tokens[:, :1])  # one token: nothing to mask
        torch.testing.assert_close(*last, atol=1e-6, rtol=1e-6)


def test_without_positions_an_encoder_does_not_know_the_order():
    encoder = random_weights(build(Encoder, PLAIN, classes=0, seed=4))
    tokens, order = torch.randint(0, 31, (2, 11)), torch.randperm(11)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(tokens)[:, order], encoder(tokens[:, order]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [None, 0, 3])
def test_the_head_is_the_vocabulary_features_or_classes(classes):
    encoder = build(Encoder, SMALL, classes=classes, seed=5)
    width = {None: 31, 0: 24, 3: 3}[classes]
    assert encoder(torch.randint(0, 31, (2, 7))).shape == (2, 7, width)
    head = 3 * 24 if classes == 3 else 0
    assert sum(p.numel() for p in encoder.parameters()) == SMALL.n_params + head


@pytest.mark.parametrize("lengths", [[3, 0], [3, 8], [3], [1, 2, 3]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    encoder = Encoder(SMALL)
    with pytest.raises(ShapeError, match="lengths"):
        encoder(torch.zeros(2, 7, dtype=torch.long), torch.tensor(lengths))


def test_lengths_may_be_a_list():
    encoder, tokens = Encoder(SMALL), torch.randint(0, 31, (2, 7))
    with torch.no_grad():
        assert encoder(tokens, [3, 7]).equal(encoder(tokens, torch.tensor([3, 7])))


def test_layers_of_one_direction_are_refused():
    with pytest.raises(ShapeError, match="window"):
        Encoder(replace(SMALL, layers=("attention", "window"), window=4))


def test_more_tokens_than_learned_positions_are_refused():
    encoder = Encoder(replace(SMALL, position="learned", max_len=8))
    encoder(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ShapeError, match="8 learned positions"):
        encoder(torch.zeros(1, 9, dtype=torch.long))
