"""Folding scales: the model computes what it computed before, whatever the scales."""

from __future__ import annotations

import pytest
import torch
from compress_cases import small_model, some_tokens

from llmcourse.compress.calibrate import layers_of
from llmcourse.compress.fold import fold_all, joints

SHAPES = {
    "grouped": {},
    "multi-head": {"n_kv_heads": 6},
    "one key head": {"n_kv_heads": 1},
    "biases": {"bias": True},
    "layer norm": {"norm": "layer", "qkv_bias": True},
    "query norms": {"qk_norm": True},
    "plain MLP": {"mlp": "gelu"},
    "window": {"layers": ("attention", "window"), "window": 7, "sinks": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_positive_scales_leave_the_logits_as_they_were(shape):
    model, tokens = small_model(**SHAPES[shape]).double(), some_tokens(2, 19)
    want = model(tokens)
    before = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    draw = torch.Generator().manual_seed(3)
    fold_all(model, lambda j: torch.rand(j.layer.in_features, generator=draw, dtype=torch.float64) * 5 + 0.2)
    torch.testing.assert_close(model(tokens), want, rtol=1e-9, atol=1e-9)
    changed = [
        name for name, layer in layers_of(model).items() if not torch.allclose(layer.weight, before[name])
    ]
    assert len(changed) == (4 if shape == "plain MLP" else 8)


def test_value_heads_that_several_query_heads_share_get_one_scale():
    joint = next(j for j in joints(small_model()) if j.name == "blocks.0.mixer.out")
    tied = joint.tie(torch.rand(48) + 0.5).view(2, 3, 8)  # key/value head, query head of its group, feature
    assert torch.equal(tied[:, 0], tied[:, 1])
    assert torch.equal(tied[:, 0], tied[:, 2])
    assert not torch.equal(tied[0, 0], tied[1, 0])
    scale = torch.rand(48) + 0.5
    torch.testing.assert_close(joint.tie(scale).view(2, 3, 8)[:, 0], scale.view(2, 3, 8).log().mean(1).exp())


def test_blocks_without_a_place_to_fold_into_have_no_joints():
    assert joints(small_model(post_norm=True)) == []
