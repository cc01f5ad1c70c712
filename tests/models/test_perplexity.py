"""How surprised a model is by a text."""

from __future__ import annotations

import pytest
import torch

from llmcourse.errors import ShapeError
from llmcourse.models import ModelConfig, random_model
from llmcourse.models.perplexity import perplexity

CONFIG = ModelConfig(
    vocab_size=40, d_model=24, n_layers=2, n_heads=6, n_kv_heads=6, head_dim=4, d_ff=32, qkv_bias=True
)
TOKENS = torch.randint(0, 40, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return random_model(CONFIG, dtype=torch.float64)


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_loss_however_the_text_is_read(model):
    logits = model(TOKENS)[:, :-1].log_softmax(-1)
    want = (-logits.gather(-1, TOKENS[:, 1:, None]).mean()).exp().item()
    for piece in (0, 1, 4, 12, 13, 50):
        assert perplexity(model, TOKENS, piece=piece) == pytest.approx(want, rel=1e-5)


def test_a_model_that_knows_nothing_is_as_unsure_as_its_vocabulary_is_large(model):
    silent = random_model(CONFIG, dtype=torch.float64)
    for p in silent.parameters():
        p.zero_()
    assert perplexity(silent, TOKENS) == pytest.approx(CONFIG.vocab_size)


def test_one_token_has_no_perplexity(model):
    with pytest.raises(ShapeError):
        perplexity(model, TOKENS[:, :1])


def test_a_negative_piece_is_refused_and_not_read_as_nothing(model):
    with pytest.raises(ShapeError, match="piece = -3"):
        perplexity(model, TOKENS, piece=-3)
