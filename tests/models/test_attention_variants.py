"""Attention variants: the cache changes nothing, degenerate sizes give the plain form, torch agrees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.errors import ShapeError
from llmcourse.models import HyenaSizes, KVCache, LatentSizes, ModelConfig, SSMSizes, random_model
from llmcourse.models.sizes import RopeScaling
from llmcourse.models.step import window_mask

PLAIN = ModelConfig(
    vocab_size=61, d_model=24, n_layers=2, n_heads=6, n_kv_heads=6, head_dim=6, d_ff=32, max_len=96
)
LATENT = LatentSizes(q_rank=14, kv_rank=10, nope_dim=5, rope_dim=6, v_dim=7)
VARIANTS = {
    "MHA": PLAIN,
    "GQA": replace(PLAIN, n_kv_heads=2),
    "MQA": replace(PLAIN, n_kv_heads=1),
    "window": replace(PLAIN, n_kv_heads=2, layers=("window",) * 2, window=5),
    "window of one": replace(PLAIN, layers=("window",) * 2, window=1),
    "window and sinks": replace(PLAIN, n_kv_heads=3, layers=("window",) * 2, window=4, sinks=3),
    "window every other layer": replace(PLAIN, layers=("window", "attention"), window=7, sinks=1),
    "MLA": replace(PLAIN, layers=("latent",) * 2, latent=LATENT),
    "MLA, full-rank queries": replace(PLAIN, layers=("latent",) * 2, latent=replace(LATENT, q_rank=0)),
    "MLA beside GQA": replace(PLAIN, n_kv_heads=2, layers=("latent", "attention"), latent=LATENT),
    "GPT-2's": replace(PLAIN, norm="layer", mlp="gelu", position="learned", bias=True),
    "of 2017": replace(PLAIN, norm="layer", mlp="relu", position="sinusoidal", post_norm=True, bias=True),
    "without positions": replace(PLAIN, position="none", n_kv_heads=3),
    "mixers alone": replace(PLAIN, d_ff=0),
}


def model_of(config: ModelConfig, seed: int = 5):
    torch.manual_seed(seed)
    model = random_model(config, dtype="float32")
    with torch.no_grad():  # at their usual size the random weights would make attention nearly uniform
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), min_size=1, max_size=7), batch=st.integers(1, 3))
def test_reading_in_any_pieces_through_the_cache_gives_the_same_logits(name, cuts, batch):
    config = VARIANTS[name]
    model = model_of(config)
    ids = torch.randint(0, 61, (batch, sum(cuts)))
    cache = KVCache(config, batch, sum(cuts) + 3)
    with torch.inference_mode():
        pieces = [model(part, cache) for part in ids.split(cuts, dim=1)]
        close(torch.cat(pieces, dim=1), model(ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_sequences_of_unequal_length_decode_as_if_alone(name):
    config = VARIANTS[name]
    model = model_of(config)
    prompts = [torch.randint(0, 61, (1, n)) for n in (1, 13, 6)]
    following = torch.randint(0, 61, (3, 8))
    cache = KVCache(config, 3, 32)
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            row = cache.row(i)
            model(prompt, row)
            cache.lengths[i] = row.lengths[0]
        together = torch.cat([model(following[:, t : t + 1], cache) for t in range(8)], dim=1)
        for i, prompt in enumerate(prompts):
            close(together[i : i + 1], model(torch.cat((prompt, following[i : i + 1]), dim=1))[:, -8:])


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_are_counted_as_they_are(name):
    config = VARIANTS[name]
    model = model_of(config)
    assert config.n_params == sum(p.numel() for p in model.parameters())
    for tokens in (1, 4, 9, 50):
        cache = KVCache(config, 3, tokens, dtype=torch.bfloat16)
        assert cache.nbytes == 3 * config.cache_bytes(tokens, itemsize=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_never_sees_what_comes_after_it(name):
    model = model_of(VARIANTS[name])
    ids = torch.randint(0, 61, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 61
    with torch.inference_mode():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12], b[:, 12])


class TestDegenerateSizesGiveThePlainForm:
    def test_as_many_groups_as_heads(self):
        """GQA whose key/value heads were each repeated is MHA with those heads."""
        grouped, plain = model_of(VARIANTS["GQA"]), model_of(PLAIN)
        state = grouped.state_dict()
        for i in range(2):
            q, k, v = state[f"blocks.{i}.mixer.qkv.weight"].split([36, 12, 12])
            k, v = (t.view(2, 6, 24).repeat_interleave(3, dim=0).reshape(36, 24) for t in (k, v))
            state[f"blocks.{i}.mixer.qkv.weight"] = torch.cat((q, k, v))
        plain.load_state_dict(state)
        ids = torch.randint(0, 61, (2, 19))
        with torch.inference_mode():
            close(grouped(ids), plain(ids))

    @pytest.mark.parametrize(("window", "sinks"), [(19, 0), (15, 4), (96, 7)])
    def test_a_window_as_long_as_the_text(self, window, sinks):
        plain = model_of(PLAIN)
        sliding = model_of(replace(PLAIN, layers=("window",) * 2, window=window, sinks=sinks))
        sliding.load_state_dict(plain.state_dict())
        ids = torch.randint(0, 61, (2, 19))
        cache = KVCache(sliding.config, 2, 30)
        with torch.inference_mode():
            close(sliding(ids), plain(ids))
            close(torch.cat([sliding(t, cache) for t in ids.split([6, 1, 12], 1)], dim=1), plain(ids))

    def test_a_window_that_is_shorter_by_one_differs(self):
        plain = model_of(PLAIN)
        sliding = model_of(replace(PLAIN, layers=("window",) * 2, window=18))
        sliding.load_state_dict(plain.state_dict())
        ids = torch.randint(0, 61, (2, 19))
        with torch.inference_mode():
            assert torch.allclose(sliding(ids)[:, :18], plain(ids)[:, :18], atol=1e-5)
            assert not torch.allclose(sliding(ids)[:, 18], plain(ids)[:, 18], atol=1e-3)

    def test_latent_attention_of_full_rank(self):
        """With a latent as wide as all heads' keys and values, and no norm to speak of, MLA computes MHA."""
        width, heads, dim = 24, 4, 6
        full = LatentSizes(q_rank=0, kv_rank=2 * heads * dim, nope_dim=dim, rope_dim=2, v_dim=dim)
        config = replace(PLAIN, n_heads=heads, n_kv_heads=heads, position="none")
        plain = model_of(config).blocks[0].mixer
        mla = model_of(replace(config, layers=("latent",) * 2, latent=full)).blocks[0].mixer
        mla.kv_norm = torch.nn.Identity()
        mla.scale = dim**-0.5
        q, k, v = plain.qkv.weight.detach().split([heads * dim] * 3)
        with torch.no_grad():
            # Without position: the rotary part is zero. The latent is all keys and values, side by side.
            mla.q_up.weight.zero_().view(heads, dim + 2, width)[:, :dim] = q.view(heads, dim, width)
            mla.kv_down.weight.zero_()[: 2 * heads * dim] = torch.cat((k, v))
            up = mla.kv_up.weight.zero_().view(heads, 2, dim, 2, heads, dim)
            for h in range(heads):
                for half in range(2):
                    up[h, half, :, half, h] = torch.eye(dim)
            mla.out.weight.copy_(plain.out.weight)
        x = torch.randn(2, 11, width)
        step = model_of(config).plan(torch.zeros(2, 11, dtype=torch.long), None)
        with torch.inference_mode():
            for mla.absorb in (False, True):
                close(mla(x, step, None), plain(x, step, None))


class TestLatentAttention:
    @pytest.mark.parametrize("name", ["MLA", "MLA, full-rank queries", "MLA beside GQA"])
    def test_expanded_and_absorbed_agree_to_1e_5(self, name):
        config = VARIANTS[name]
        model = model_of(config)
        ids = torch.randint(0, 61, (2, 23))
        found = {}
        for form in (False, True):
            for block in model.blocks:
                block.mixer.absorb = form
            cache = KVCache(config, 2, 23)
            with torch.inference_mode():
                found[form] = torch.cat([model(t, cache) for t in ids.split([9, 1, 1, 12], dim=1)], dim=1)
        assert (found[True] - found[False]).abs().max() <= 1e-5 * found[False].abs().max()

    def test_the_cache_holds_the_latent_and_one_rotary_key(self):
        cache = KVCache(VARIANTS["MLA"], 2, 9)
        assert cache.layers[0].latent.shape == (2, 9, 10 + 6)

    def test_deepseek_v3_keeps_70272_bytes_of_a_token(self):
        # 61 layers of a latent of 512 and a rotary key of 64 in bfloat16 (arXiv:2412.19437, section 4.2).
        sizes = LatentSizes(1536, 512, 128, 64, 128)
        config = ModelConfig(129280, 7168, 61, 128, 128, 192, 18432, layers=("latent",) * 61, latent=sizes)
        assert config.kv_bytes_per_token() == 70_272


class TestWindow:
    @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (3, 2), (30, 1)])
    def test_the_mask_is_the_definition(self, window, sinks):
        positions = torch.arange(17)[None]
        mask = window_mask(positions, positions, window, sinks)[0, 0]
        for q in range(17):
            for k in range(17):
                visible = k <= q and (q - k < window or k < sinks)
                assert mask[q, k] == visible

    def test_its_memory_stops_growing(self):
        config = VARIANTS["window and sinks"]
        assert KVCache(config, 1, 7).nbytes == KVCache(config, 1, 90).nbytes
        assert config.cache_bytes(1000) == config.cache_bytes(7) > config.cache_bytes(6)

    def test_sinks_let_a_token_see_the_first_ones_for_ever(self):
        for sinks, differs in ((0, False), (1, True)):
            config = replace(PLAIN, n_layers=1, layers=("window",), window=3, sinks=sinks)
            model = model_of(config)
            ids = torch.randint(0, 61, (1, 40))
            changed = ids.clone()
            changed[0, 0] = (ids[0, 0] + 1) % 61
            with torch.inference_mode():
                same = torch.equal(model(ids)[:, 20:], model(changed)[:, 20:])
            assert same != differs


class TestAgainstTorch:
    @pytest.mark.parametrize("kv_heads", [1, 2, 6])
    def test_attention_is_torchs_on_the_same_weights(self, kv_heads):
        config = replace(PLAIN, n_kv_heads=kv_heads, position="none")
        mixer = model_of(config).blocks[0].mixer
        x = torch.randn(2, 13, 24)
        q, k, v = mixer.qkv.weight.split(mixer.sizes)
        k, v = (t.view(kv_heads, 1, 6, 24).expand(-1, 6 // kv_heads, -1, -1).reshape(36, 24) for t in (k, v))
        project = torch.nn.MultiheadAttention(36, 6, bias=False, batch_first=True)
        with torch.no_grad():
            project.in_proj_weight.copy_(torch.eye(36).repeat(3, 1))
            project.out_proj.weight.copy_(torch.eye(36))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(13)
        step = model_of(config).plan(torch.zeros(2, 13, dtype=torch.long), None)
        with torch.inference_mode():
            heads, _ = project(x @ q.T, x @ k.T, x @ v.T, attn_mask=mask, is_causal=True)
            close(mixer(x, step, None), heads @ mixer.out.weight.T)

    def test_a_post_norm_layer_of_2017_is_torchs(self):
        config = replace(VARIANTS["of 2017"], n_layers=1, layers=(), head_dim=4)
        block = model_of(config).blocks[0]
        theirs = torch.nn.TransformerEncoderLayer(24, 6, 32, dropout=0.0, batch_first=True).eval()
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": block.mixer.qkv.weight,
                "self_attn.in_proj_bias": block.mixer.qkv.bias,
                "self_attn.out_proj.weight": block.mixer.out.weight,
                "self_attn.out_proj.bias": block.mixer.out.bias,
                "linear1.weight": block.mlp.up.weight,
                "linear1.bias": block.mlp.up.bias,
                "linear2.weight": block.mlp.down.weight,
                "linear2.bias": block.mlp.down.bias,
                "norm1.weight": block.mixer_norm.weight,
                "norm1.bias": block.mixer_norm.bias,
                "norm2.weight": block.mlp_norm.weight,
                "norm2.bias": block.mlp_norm.bias,
            }
        )
        x = torch.randn(2, 13, 24)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(13)
        step = model_of(config).plan(torch.zeros(2, 13, dtype=torch.long), None)
        with torch.no_grad():
            close(block(x, step, None), theirs(x, mask, is_causal=True))

    @pytest.mark.parametrize("name", ["window", "window and sinks"])
    def test_gradients_flow_through_every_weight(self, name):
        model = model_of(VARIANTS[name]).requires_grad_(True).train()
        ids = torch.randint(0, 61, (2, 15))
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"layers": ("attention",)}, "1 kinds of layers came for 2 layers"),
        ({"layers": ("attention", "attenton")}, "a layer cannot be 'attenton'"),
        ({"layers": ("window",) * 2}, "window of 0"),
        ({"layers": ("latent",) * 2}, "without their sizes"),
        ({"layers": ("latent", "attention"), "latent": replace(LATENT, rope_dim=4)}, "4 features, attention"),
        ({"head_dim": 5}, "head_dim = 5 is odd"),
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm' is not known"),
        ({"mlp": "silu"}, "swiglu, gelu, relu"),
        ({"position": "rotary"}, "position = 'rotary'"),
        ({"n_kv_heads": 0}, "n_kv_heads = 0"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"d_ff": -1}, "d_ff = -1"),
        ({"sinks": -1}, "sinks = -1"),
        ({"head_dim": 2, "rope_scaling": RopeScaling("ntk", factor=2.0)}, "one pair"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(sizes, says):
    with pytest.raises(ShapeError, match="Try") as error:
        replace(PLAIN, **sizes)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RopeScaling("dynamic", factor=2.0), "kind = 'dynamic'"),
        (lambda: RopeScaling("linear", factor=0.0), "factor of 0.0"),
        (lambda: LatentSizes(0, 0, 4, 6, 5), "kv_rank = 0"),
        (lambda: LatentSizes(0, 8, 0, 0, 5), "qk_dim = 0"),
        (lambda: SSMSizes(d_conv=0), "d_conv = 0"),
        (lambda: HyenaSizes("moda"), "implicit, modal"),
        (lambda: HyenaSizes("modal", d_state=0), "d_state = 0"),
    ],
)
def test_sizes_of_single_layers_are_looked_at_when_they_are_given(make, says):
    with pytest.raises(ShapeError, match="Try") as error:
        make()
    assert says in str(error.value)


def test_learned_positions_end():
    model = model_of(VARIANTS["GPT-2's"])
    with pytest.raises(ShapeError, match="97 tokens came for 96 learned positions"):
        model(torch.zeros(1, 97, dtype=torch.long))
