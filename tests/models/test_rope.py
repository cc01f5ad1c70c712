"""Rotary embedding: relative, reversible, and stretched as transformers stretches it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.models import ModelConfig, RopeScaling
from llmcourse.models.positions import sinusoids
from llmcourse.models.rope import Rope, attention_factor, frequencies, half_split, rotate

CONFIG = ModelConfig(
    vocab_size=9, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=16, d_ff=8, rope_theta=500.0
)
SCALINGS = {
    "default": (RopeScaling(), {}),
    "linear": (RopeScaling("linear", 4.0), {"factor": 4.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_len=64),
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        RopeScaling("yarn", 4.0, original_max_len=100),
        {"factor": 4.0, "original_max_position_embeddings": 100},
    ),
    "yarn, a wide band": (
        RopeScaling("yarn", 16.0, original_max_len=64, beta_fast=20.0, beta_slow=0.5, mscale=0.7),
        {"factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 20.0, "beta_slow": 0.5},
    ),
    "yarn, no band": (
        RopeScaling("yarn", 2.0, original_max_len=8, beta_fast=1.0, beta_slow=1.0),
        {"factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 1.0, "beta_slow": 1.0},
    ),
    "ntk": (RopeScaling("ntk", 4.0), {"factor": 4.0}),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dim", [8, 18, 64])
def test_frequencies_are_those_of_transformers(name, dim):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, fields = SCALINGS[name]
    ours, factor = frequencies(dim, 500.0, scaling), attention_factor(scaling)
    kind, long = scaling.kind, None
    if kind == "ntk":  # transformers' dynamic form, at a length for which the base is raised by the factor
        kind, long = "dynamic", 128
        fields = {"factor": 4.0, "original_max_position_embeddings": 128}
    config = LlamaConfig(
        head_dim=dim,
        max_position_embeddings=128,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0} | fields,
    )
    if kind == "default":
        theirs, their_factor = 500.0 ** -(torch.arange(0, dim, 2).float() / dim), 1.0
    elif long:
        # factor·T/T0 − (factor − 1) is the factor itself at T = T0·(2·factor − 1)/factor.
        theirs, their_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=int(long * 7 / 4))
    else:
        theirs, their_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert factor == pytest.approx(their_factor)


def turned(x, positions, scaling=None):
    config = CONFIG if scaling is None else ModelConfig(**vars(CONFIG) | {"rope_scaling": scaling})
    rope = Rope(config, 400)
    return rotate(x, *rope(positions))


@settings(max_examples=30, deadline=None)
@given(p=st.integers(0, 150), q=st.integers(0, 150), shift=st.integers(0, 200))
def test_a_dot_product_depends_on_the_distance_alone(p, q, shift):
    torch.manual_seed(p + 7 * q)
    a, b = torch.randn(2, 1, 1, 1, 16).double()
    here = turned(a, torch.tensor([[p]])) * turned(b, torch.tensor([[q]]))
    there = turned(a, torch.tensor([[p + shift]])) * turned(b, torch.tensor([[q + shift]]))
    assert here.sum() == pytest.approx(there.sum().item(), abs=1e-4)


def test_turning_keeps_lengths_and_position_0_as_it_is():
    x = torch.randn(2, 3, 5, 16)
    positions = torch.arange(5).expand(2, 5)
    y = turned(x, positions)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    assert not torch.allclose(y[:, :, 1], x[:, :, 1])


def test_yarn_multiplies_by_its_attention_factor():
    x = torch.randn(1, 1, 1, 16)
    scaling = RopeScaling("yarn", 4.0, original_max_len=64)
    y = turned(x, torch.tensor([[7]]), scaling)
    torch.testing.assert_close(y.norm(), x.norm() * attention_factor(scaling))
    assert attention_factor(scaling) > 1.1


def test_interleaved_pairs_become_halves():
    weight = torch.arange(12.0).view(12, 1)
    assert half_split(weight, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_are_the_formula(width):
    table = sinusoids(torch.arange(40), width).double()
    for i in range(width):
        angle = torch.arange(40).double() * 10_000.0 ** -((i - i % 2) / width)
        torch.testing.assert_close(table[:, i], angle.cos() if i % 2 else angle.sin(), atol=1e-5, rtol=1e-5)


def test_tables_rounded_to_a_short_type_are_worked_out_anew_in_a_longer_one():
    positions = torch.arange(200)[None]
    rope, exact = Rope(CONFIG), Rope(CONFIG)
    rope.to(torch.bfloat16).grow(200)
    assert rope(positions)[0].dtype == torch.bfloat16
    rope.to(torch.float32).grow(200)
    for ours, theirs in zip(rope(positions), exact(positions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_model_that_turns_nothing_has_no_tables():
    scaling = RopeScaling("yarn", factor=4.0)
    config = ModelConfig(**vars(CONFIG) | {"position": "none", "head_dim": 5, "rope_scaling": scaling})
    assert Rope(config).cos.numel() == 0
