"""Linear attention: three ways to the same numbers, and a state that carries them over any cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcourse.models import KVCache, ModelConfig, Transformer
from llmcourse.models.linear_attention import (
    FORMS,
    LinearAttention,
    LinearState,
    Memory,
    chunked,
    features,
    parallel,
    recurrent,
)

SIZES = dict(vocab_size=53, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=32)
CONFIG = ModelConfig(**SIZES, max_len=128, layers=("linear",) * 2, position="none")


def inputs(length: int, lead: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = (features(torch.randn(*lead, length, 5, generator=generator, dtype=dtype)) for _ in range(2))
    return [q, k, torch.randn(*lead, length, 7, generator=generator, dtype=dtype)]


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One output after the other, from the sums in the paper's equation 9."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for t in range(q.shape[-2]):
        weights = torch.stack([(q[..., t, :] * k[..., s, :]).sum(-1) for s in range(t + 1)], dim=-1)
        out[..., t, :] = (weights.unsqueeze(-1) * v[..., : t + 1, :]).sum(-2) / weights.sum(-1, keepdim=True)
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 37, 64, 65])
def test_every_form_equals_the_definition(form, length):
    q, k, v = inputs(length)
    out, _ = FORMS[form](q, k, v)
    torch.testing.assert_close(out, by_definition(q, k, v), atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 70), cut=st.integers(0, 70), chunk=st.integers(1, 20))
def test_forms_agree_after_a_memory_whatever_the_chunk(length, cut, chunk):
    q, k, v = inputs(length + cut)
    _, memory = recurrent(q[..., :cut, :], k[..., :cut, :], v[..., :cut, :]) if cut else (None, None)
    rest = [x[..., cut:, :] for x in (q, k, v)]
    results = [parallel(*rest, memory), recurrent(*rest, memory), chunked(*rest, memory, chunk=chunk)]
    for out, after in results[1:]:
        torch.testing.assert_close(out, results[0][0], atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(after.s, results[0][1].s, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(after.z, results[0][1].z, atol=1e-11, rtol=1e-11)


def test_gradients_of_the_forms_are_the_same():
    gradients = []
    for form in FORMS.values():
        leaves = [x.requires_grad_() for x in inputs(67)]
        s, z = torch.full((2, 3, 5, 7), 0.1).double(), torch.full((2, 3, 5), 0.2).double()
        memory = Memory(s.requires_grad_(), z.requires_grad_())
        out, after = form(*leaves, memory)
        (out.square().sum() + after.s.sum()).backward()
        gradients.append([x.grad for x in (*leaves, s, z)])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_group_of_query_heads_shares_one_memory():
    q, k, v = inputs(33, lead=(2, 4))
    alone = torch.stack([chunked(q[:, i], k[:, i // 2], v[:, i // 2])[0] for i in range(4)], dim=1)
    shared, memory = chunked(
        q.unflatten(1, (2, 2)), k.unflatten(1, (2, 2))[:, :, :1], v.unflatten(1, (2, 2))[:, :, :1]
    )
    expected = torch.stack([chunked(q[:, i], k[:, i // 2 * 2], v[:, i // 2 * 2])[0] for i in range(4)], dim=1)
    assert not torch.allclose(alone, expected)  # the heads differ, so the test can tell them apart
    torch.testing.assert_close(shared.flatten(1, 2), expected, atol=1e-12, rtol=1e-12)
    assert memory.s.shape == (2, 2, 1, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_stays_near_float64(form, dtype):
    exact = [x.to(dtype).double() for x in inputs(200)]
    want, _ = parallel(*exact)
    got, memory = FORMS[form](*(x.to(dtype) for x in exact))
    assert got.dtype == dtype
    assert memory.s.dtype == memory.z.dtype == torch.float32
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert (got.double() - want).abs().max() < limit


def test_the_first_tokens_of_a_low_precision_sum_are_not_lost():
    """512 tokens of weight 1 and one of value 1: in bfloat16 a running sum would stop at 256."""
    q = k = torch.ones(1, 600, 1, dtype=torch.bfloat16)
    v = torch.ones(1, 600, 1, dtype=torch.bfloat16)
    for form in (recurrent, chunked):
        _, memory = form(q, k, v)
        assert memory.z.item() == memory.s.item() == 600


def test_a_token_whose_features_underflow_gives_zeros_and_no_nan():
    q, k = (features(torch.full((1, 3, 4), -200.0)) for _ in range(2))
    for form in FORMS.values():
        out, _ = form(q, k, torch.ones(1, 3, 2))
        assert torch.equal(out, torch.zeros(1, 3, 2))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_reading_in_any_pieces_gives_the_same_logits(cuts, batch):
    torch.manual_seed(1)
    model = Transformer(CONFIG).double().eval()
    ids = torch.randint(0, 53, (batch, sum(cuts)))
    cache = KVCache(CONFIG, batch, 60, dtype=torch.float64)
    with torch.inference_mode():
        pieces = [model(part, cache) for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-10, rtol=1e-10)


def test_the_form_of_the_layer_changes_nothing():
    torch.manual_seed(2)
    model = Transformer(CONFIG).double().eval()
    ids = torch.randint(0, 53, (2, 70))
    logits = []
    for form in FORMS:
        for block in model.blocks:
            block.mixer.form = form
        logits.append(model(ids))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-10, rtol=1e-10)


def test_sizes_are_what_the_formulas_say():
    for config in (CONFIG, ModelConfig(**(SIZES | {"bias": True}), layers=("linear",) * 2)):
        layer = LinearAttention(config)
        assert sum(p.numel() for p in layer.parameters()) == LinearAttention.n_params(config)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        state = LinearState(CONFIG, 3, 1000, dtype=dtype)
        assert state.nbytes == 3 * LinearAttention.cache_bytes(CONFIG, 1000, dtype.itemsize)
        assert state.nbytes == LinearState(CONFIG, 3, 1, dtype=dtype).nbytes
