"""The same weights under another configuration: shared, not copied, and refused where they would not fit."""

from __future__ import annotations

import pytest
import torch

from llmcourse.errors import ModelError, ShapeError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.reconfigure import reconfigured, with_window
from llmcourse.models.sizes import RopeScaling


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(37, 24, 2, 4, 2, 6, 40)).eval().requires_grad_(False)


def test_the_weights_are_the_same_memory(model) -> None:
    windowed = reconfigured(model, layers=("window",) * 2, window=3, sinks=1)
    for name, weight in model.state_dict().items():
        assert windowed.state_dict()[name].data_ptr() == weight.data_ptr(), name
    assert windowed.head.weight is windowed.embedding.weight


def test_a_window_as_long_as_the_text_changes_nothing_and_a_shorter_one_does(model) -> None:
    tokens = torch.randint(37, (2, 11))
    for window, same in ((11, True), (5, False)):
        windowed = reconfigured(model, layers=("window",) * 2, window=window)
        assert torch.allclose(windowed(tokens), model(tokens), atol=1e-6) == same


def test_positions_follow_the_new_configuration(model) -> None:
    tokens = torch.randint(37, (1, 9))
    stretched = reconfigured(model, rope_scaling=RopeScaling("linear", factor=4.0))
    assert not torch.allclose(stretched(tokens), model(tokens), atol=1e-4)


def test_a_change_of_shapes_is_refused_by_name(model) -> None:
    with pytest.raises(ModelError, match=r"mixer\.qkv\.weight is of shape \[48, 24\]; .* ask for \[72, 24\]"):
        reconfigured(model, n_kv_heads=4)
    with pytest.raises(ModelError, match=r"is missing"):
        reconfigured(model, n_layers=3)


def test_a_window_can_be_put_on_by_its_size(model) -> None:
    tokens = torch.randint(37, (2, 11))
    assert torch.allclose(with_window(model, 11)(tokens), model(tokens), atol=1e-6)
    assert not torch.allclose(with_window(model, 10)(tokens), model(tokens), atol=1e-6)
    assert with_window(model, 3, sinks=1).config.kinds == ("window", "window")
    with pytest.raises(ShapeError):
        with_window(model, 0)


def test_a_weight_that_would_be_left_out_is_named() -> None:
    model = Transformer(ModelConfig(37, 24, 2, 4, 2, 6, 40, qk_norm=True)).eval()
    with pytest.raises(ModelError, match=r"blocks\.0\.mixer\.k_norm\.weight has no place"):
        reconfigured(model, qk_norm=False)


def test_a_window_on_layers_that_have_none_is_refused() -> None:
    model = Transformer(ModelConfig(37, 24, 2, 4, 2, 6, 40, layers=("ssm", "linear")))
    with pytest.raises(ModelError, match="linear, ssm"):
        with_window(model, 4)
