"""Lab 10: its references against torch, its counts against the counters, its kernel inside a model."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cpu_time import least

from llmcourse.grading.trial import LocalSubject
from llmcourse.grading.verdict import judge
from llmcourse.kernels.compile_report import compile_report
from llmcourse.kernels.counters import counting
from llmcourse.labs import find_lab
from llmcourse.labs.lab10_flash_attention.reference import attention, gradients, visible
from llmcourse.models import KVCache
from llmcourse.models.config import ModelConfig
from llmcourse.models.loading import random_model
from llmcourse.plug import PlugError, plug
from llmcourse.plug.flash_at_work import Attending, bytes_of, of_one_head

LAB = find_lab("10")
EXPECTED_BYTES = import_module("llmcourse.labs.lab10_flash_attention.flash_bytes").expected
LAUNCHED = import_module("llmcourse.labs.lab10_flash_attention.flash_forward").launched


def verdict(name, fn, seed=0):
    return judge(LAB.exercise(name), LocalSubject(fn, name), seed)


# ── the references, against somebody else's ──────────────────────────────────────────────────────────


@pytest.mark.parametrize(("S", "T", "causal"), [(7, 7, True), (5, 12, True), (1, 9, True), (6, 11, False)])
def test_the_reference_and_its_gradients_are_torch_s(S, T, causal):
    torch.manual_seed(S * T)
    q, k, v = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (S, T, T))
    dout = torch.randn(S, 8, dtype=torch.float64)
    mask = visible(S, T, causal)
    own = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.from_numpy(mask))
    own.backward(dout)
    out, lse = attention(q.detach(), k.detach(), v.detach(), mask)
    assert np.allclose(out, own.detach())
    scores = (q @ k.T / 8**0.5).masked_fill(~torch.from_numpy(mask), -torch.inf)
    assert np.allclose(lse, scores.logsumexp(1).detach())
    found = gradients(*(x.detach() for x in (q, k, v)), out, lse, dout, mask)
    for got, leaf in zip(found, (q, k, v), strict=True):
        assert np.allclose(got, leaf.grad)


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity():
    q, k = np.ones((2, 4)), np.ones((3, 4))
    out, lse = attention(q, k, k, np.array([[True, True, False], [False, False, False]]))
    assert not out[1].any()
    assert lse[1] == -np.inf


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("S", "T"), [(1, 1), (1, 50), (33, 33), (17, 60), (64, 64)])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 64)])
def test_the_formula_of_bytes_is_what_the_counters_count(S, T, causal, blocks):
    q, k, v = (torch.randn(1, n, 16).half() for n in (S, T, T))
    with counting() as moved:
        LAUNCHED(q, k, v, causal, *blocks)
    assert moved.bytes == EXPECTED_BYTES(S, T, 16, *blocks, causal, 2)


@pytest.mark.parametrize("kernel", ["flash_kernel", "two_loops_kernel"])
def test_the_bank_s_kernels_compile_for_a_gpu_too(kernel):
    module = import_module("llmcourse.labs.lab10_flash_attention.flash_forward")
    q, lse = torch.empty(4, 64, 32, dtype=torch.float16, device="meta"), torch.empty(4, 64, device="meta")
    sizes = {"D": 32, "BM": 16, "BN": 32, "CAUSAL": True}
    report = compile_report(
        getattr(module, kernel), q, q, q, q, lse, 64, 64, 2, 0.1, **sizes, capabilities=(90,)
    )
    assert report[90].tensor_core_opcodes
    assert report[90].spills == 0


# ── what a learner is told ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [e.name for e in LAB.exercises])
def test_a_verdict_takes_less_than_two_seconds(name):
    exercise = LAB.exercise(name)
    verdict(name, exercise.alternatives[0].fn)
    assert least(lambda: verdict(name, exercise.mistakes[-1].fn, 0), within=2) < 2


def test_a_backward_pass_left_to_torch_is_rejected_where_lse_knows_more_than_the_keys():
    def flash_backward(q, k, v, out, lse, dout, causal, block):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        mask = torch.ones(len(q), len(k), dtype=torch.bool)
        mask = mask.tril(len(k) - len(q)) if causal else mask
        F.scaled_dot_product_attention(*(x[None] for x in leaves), attn_mask=mask).backward(dout[None])
        return tuple(x.grad for x in leaves)

    found = verdict("flash_backward", flash_backward)
    assert found.first_failure is not None
    assert found.first_failure.check.name == "shard"


def test_attention_of_torch_s_own_kernels_fails_for_running_no_kernel_of_the_learner_s():
    def flash_forward(q, k, v, causal, block_m, block_n):
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        mask = mask.tril(k.shape[1] - q.shape[1]) if causal else mask
        shared = [x.repeat_interleave(len(q) // len(k), 0) for x in (k, v)]
        out = F.scaled_dot_product_attention(q, *shared, attn_mask=mask)
        scores = (q.float() @ shared[0].float().mT * q.shape[2] ** -0.5).masked_fill(~mask, -torch.inf)
        return out, scores.logsumexp(-1)

    found = verdict("flash_forward", flash_forward)
    assert [r.check.name for r in found.results if not r.ok] == ["traffic"]


# ── in the place of the model's own ──────────────────────────────────────────────────────────────────

CONFIG = ModelConfig(
    vocab_size=50, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_len=64
)
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def by_torch(q, k, v, causal):
    """The point's function: q [Hq, S, D], k and v [Hkv, T, D]."""
    assert q.is_contiguous()
    assert q.dim() == 3
    assert q.shape[1] <= k.shape[1]
    shared = [x.repeat_interleave(len(q) // len(k), 0) for x in (k, v)]
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    mask = mask.tril(k.shape[1] - q.shape[1]) if causal else mask
    scores = (q @ shared[0].mT * q.shape[2] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ shared[1], scores.logsumexp(-1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(CONFIG, dtype="float32")


def through_a_cache(model):
    """A prefix, two more tokens at once, one; and one token for sequences of unequal length."""
    cache = KVCache(model.config, batch=2, max_len=12)
    with torch.no_grad():
        found = [model(piece, cache) for piece in (TOKENS[:, :3], TOKENS[:, 3:], TOKENS[:, :1])]
        model(TOKENS[:1, :2], cache.row(0))
        cache.lengths = [8, 6]
        found.append(model(TOKENS[:, 1:2], cache))
    return torch.cat(found, dim=1)


def test_the_logits_are_the_model_s_own(model):
    own = through_a_cache(model)
    with plug(flash_forward=by_torch) as used:
        plugged = through_a_cache(model)
    assert torch.allclose(own, plugged, rtol=1e-4, atol=1e-5)
    assert used.calls["flash_forward"] == CONFIG.n_layers * (4 + 2)
    with torch.no_grad(), plug(flash_forward=by_torch):
        plugged = model(TOKENS)
    assert torch.allclose(model(TOKENS), plugged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda q, k, v, causal: None, "is None"),
        (lambda q, k, v, causal: by_torch(q, k, v, causal)[0], r"\(out, lse\)"),
        (lambda q, k, v, causal: (q[:, :1], q[:, :, 0]), "out has shape"),
        (lambda q, k, v, causal: (q, q[0, :, 0]), "lse has shape"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, wrong, says):
    with pytest.raises(PlugError, match=says), plug(flash_forward=wrong), torch.no_grad():
        model(TOKENS)


def test_a_sliding_window_is_refused_since_the_function_cannot_know_it():
    torch.manual_seed(0)
    config = replace(CONFIG, layers=("window", "window"), window=3, sinks=0)
    windowed = random_model(config, dtype="float32")
    with pytest.raises(PlugError, match="hides keys"), plug(flash_forward=by_torch), torch.no_grad():
        windowed(TOKENS)


# ── the five functions at work ───────────────────────────────────────────────────────────────────────


def of_bank(name, which=0):
    return LAB.exercise(name).alternatives[which].fn


def test_what_the_bank_s_right_functions_say_of_a_head_is_torch_s_and_the_counters():
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    off, grads_off = of_one_head(of_bank("online_attention"), of_bank("flash_backward"), q[0], k[0], v[0])
    assert max(off, grads_off) < 1e-5
    said, counted = bytes_of(of_bank("flash_bytes"), of_bank("flash_forward"), q, k, v)
    assert said == counted > 0


def test_a_decoding_step_is_attended_to_in_two_parts_and_merged(model):
    def whole(q, k, v, causal, block_m, block_n):
        return by_torch(q, k, v, causal)

    attending = Attending(whole, of_bank("merge_partials"))
    own = through_a_cache(model)
    with plug(flash_forward=attending):
        merged = through_a_cache(model)
    assert torch.allclose(own, merged, rtol=1e-4, atol=1e-5)
    assert attending.merged == CONFIG.n_layers * 3  # a step of both sequences, and one of each
    assert attending.first is not None
    assert attending.first[0].shape == (8, 3, 8)
