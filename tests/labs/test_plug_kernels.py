"""A learner's kernels in the place of the model's own operations: the logits stay, the calls are counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcourse.models import KVCache
from llmcourse.models.config import ModelConfig
from llmcourse.models.loading import random_model
from llmcourse.plug import PlugError, plug

CONFIG = ModelConfig(
    vocab_size=50, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, max_len=64
)


def swiglu(gate, up):
    assert gate.is_contiguous()
    assert up.is_contiguous()
    return F.silu(gate) * up


def softmax(x):
    assert x.dim() == 2
    return torch.softmax(x, dim=1)


def rms_norm(x, weight, eps):
    assert x.dim() == 2
    return F.rms_norm(x, x.shape[1:], weight, eps)


def add_rms_norm(x, residual, weight, eps):
    h = x + residual
    return h, rms_norm(h, weight, eps)


def matmul(a, b):
    assert a.dim() == b.dim() == 2
    return a @ b


MINE = {f.__name__: f for f in (swiglu, softmax, rms_norm, add_rms_norm, matmul)}
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(CONFIG, dtype="float32")


def through_a_cache(model):
    """A prefix of three tokens, two more at once, and then one."""
    cache = KVCache(CONFIG, batch=2, max_len=8)
    pieces = (TOKENS[:, :3], TOKENS[:, 3:], TOKENS[:, :1])
    with torch.no_grad():
        return torch.cat([model(piece, cache) for piece in pieces], dim=1)


@pytest.mark.parametrize("names", [*([name] for name in MINE), list(MINE)], ids="+".join)
def test_the_logits_are_the_model_s_own(model, names):
    own = through_a_cache(model)
    with plug(**{name: MINE[name] for name in names}) as used:
        plugged = through_a_cache(model)
    assert torch.allclose(own, plugged, rtol=1e-4, atol=1e-5)
    assert all(used.calls[name] > 0 for name in names)
    assert torch.equal(own, through_a_cache(model))


def test_calls_are_those_of_the_layers(model):
    with plug(**MINE) as used, torch.no_grad():
        model(TOKENS)
    layers = CONFIG.n_layers
    assert used.calls == {
        "swiglu": layers,
        "softmax": layers,
        "rms_norm": layers + 1,
        "add_rms_norm": layers,
        "matmul": 4 * layers + 1,
    }


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("softmax", lambda x: None, "None"),
        ("softmax", lambda x: x[:, :1], "has shape"),
        ("rms_norm", lambda x, w, eps: x.double(), "torch.float64"),
        ("add_rms_norm", lambda x, r, w, eps: x + r, "and should be"),
        ("matmul", lambda a, b: (a @ b).numpy(), "an array of shape"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, name, wrong, says):
    with pytest.raises(PlugError, match=says), plug(**{name: wrong}), torch.no_grad():
        model(TOKENS)
