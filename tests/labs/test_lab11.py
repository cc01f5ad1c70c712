"""Lab 11: references that scipy and the definitions agree with, and a learner's functions in a hybrid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve

from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab
from llmcourse.labs.lab11_subquadratic.causal_fft_conv import expected as convolved
from llmcourse.labs.lab11_subquadratic.modal_step import _draw as draw_modes
from llmcourse.labs.lab11_subquadratic.modal_step import taps
from llmcourse.labs.lab11_subquadratic.reference import draw, linear_attention
from llmcourse.labs.lab11_subquadratic.selective_scan import _draw as draw_scan
from llmcourse.labs.lab11_subquadratic.selective_scan import expected as scanned
from llmcourse.models import HyenaSizes, KVCache, ModelConfig, SSMSizes, random_model
from llmcourse.plug import PlugError, plug

LAB = find_lab("11")
EXERCISES = {e.name: e for e in LAB.exercises}


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


def a_trial(seed=5):
    return Trial(LocalSubject(len), (), seed, "a test")


# ── the judge's own references ───────────────────────────────────────────────────────────────────────


def test_the_convolution_that_judges_equals_scipy_s():
    t = a_trial()
    for length, n in ((9, 9), (9, 4), (5, 8)):
        u, h = torch.from_numpy(t.normal(2, 3, length)), torch.from_numpy(t.normal(3, n))
        want = fftconvolve(u.numpy(), h.numpy()[None], axes=-1)[..., :length]
        assert np.allclose(convolved(u, h), want)


def test_the_filter_that_judges_is_the_impulse_response_of_its_poles():
    poles, residues = draw_modes(a_trial(), 2, 3)
    wide = torch.complex128
    powers = poles.to(wide)[..., None] ** torch.arange(6)
    assert np.allclose(taps(poles, residues, 6), (residues.to(wide)[..., None] * powers).sum(1).real.numpy())


def test_the_linear_attention_that_judges_equals_the_table_of_weights():
    q, k, v = (x.double() for x in draw(a_trial(), 2, 3, 7, 4, 5))
    weights = (q @ k.mT).tril()
    y, state, total = linear_attention(q, k, v)
    assert np.allclose(y, (weights / weights.sum(-1, keepdim=True) @ v).numpy())
    assert np.allclose(state, (k.mT @ v).numpy())
    assert np.allclose(total, k.sum(2).numpy())


def test_the_scan_that_judges_solves_the_differential_equation_for_small_steps():
    # h' = A h + B x, x constant: after time T, h = (exp(T A) − 1) / A · B x, to first order in the step.
    given = draw_scan(a_trial(), 1, 400, 2, 3)
    x, dt, A, B, C, h = (g.double() for g in given)
    x[:], dt[:], B[:], C[:] = 1.0, 1e-3, 1.0, 1.0
    y, last = scanned(x, dt, A, B, C, h)
    want = torch.expm1(0.4 * A) / A
    assert np.allclose(last[0], want.numpy(), rtol=3e-3)
    assert np.allclose(y[0, -1], want.sum(-1).numpy(), rtol=3e-3)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 52):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, found)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert "return" in str(verdict(name, lambda *args: None))
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2), "text", float("nan")):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_the_three_forms_of_linear_attention_that_are_right_agree_with_each_other():
    parallel, step, chunked = (
        EXERCISES[f"linear_attention_{form}"].alternatives[0].fn for form in ("parallel", "step", "chunked")
    )
    q, k, v = (x.double() for x in draw(a_trial(), 2, 3, 11, 4, 5))
    state, total = v.new_zeros(2, 3, 4, 5), v.new_zeros(2, 3, 4)
    want = parallel(*(x.float() for x in (q, k, v))).double()
    assert torch.allclose(chunked(q, k, v, state, total, 4)[0], want, rtol=1e-4, atol=1e-5)
    for t in range(11):
        y, state, total = step(state, total, q[:, :, t], k[:, :, t], v[:, :, t])
        assert torch.allclose(y, want[:, :, t], rtol=1e-4, atol=1e-5)


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────

TOKENS = torch.randint(0, 50, (2, 23), generator=torch.Generator().manual_seed(1))


def hybrid(kinds, kind="modal"):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        d_model=24,
        n_layers=len(kinds),
        n_heads=4,
        n_kv_heads=2,
        head_dim=6,
        d_ff=32,
        max_len=64,
        layers=kinds,
        ssm=SSMSizes(d_state=5, expand=2),
        hyena=HyenaSizes(kind=kind, d_state=6),
    )
    model = random_model(config, dtype="float32")
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)  # values that differ from token to token
    return model


@torch.no_grad()
def read(model, pieces):
    """Logits in one pass without a cache (pieces empty), or piece by piece."""
    if not pieces:
        return model(TOKENS)
    cache = KVCache(model.config, batch=2, max_len=40)
    return torch.cat([model(piece, cache) for piece in TOKENS.split(pieces, dim=1)], dim=1)


PIECES = ([], [23], [5, 1, 1, 9, 1, 2, 4], [1] * 23)
NAMES = ["no cache", "whole", "pieces", "tokens"]
KINDS = {
    "causal_fft_conv": ("hyena", "hyena"),
    "modal_step": ("hyena", "hyena"),
    "linear_attention_parallel": ("linear", "linear"),
    "linear_attention_step": ("linear", "linear"),
    "linear_attention_chunked": ("linear", "linear"),
    "selective_scan": ("ssm", "ssm"),
}


@pytest.mark.parametrize("pieces", PIECES, ids=NAMES)
@pytest.mark.parametrize("name", KINDS)
def test_each_point_gives_the_model_s_logits(name, pieces):
    model = hybrid(KINDS[name])
    for block in model.blocks:
        if hasattr(block.mixer, "form"):
            block.mixer.form = "parallel" if name.endswith("parallel") else "chunked"
    own = read(model, pieces)
    for alternative in EXERCISES[name].alternatives:
        with plug(**{name: alternative.fn}) as used:
            assert torch.allclose(own, read(model, pieces), rtol=1e-4, atol=1e-5), alternative.name
        alone = [n for n in pieces or [23] if n == 1]
        longer = [n for n in pieces or [23] if n > 1]
        calls = 2 * len(alone if name.endswith("step") else longer)
        if name == "selective_scan":
            calls = 2 * len(pieces or [23])
        if name.endswith("parallel"):
            calls = 2 * (len(pieces) < 2)  # behind other tokens it has no table
            calls += 2 * (pieces[:1] == [5])
        assert used.calls[name] == calls, alternative.name
    assert torch.equal(own, read(model, pieces))


@pytest.mark.parametrize("kind", ["modal", "implicit"])
@pytest.mark.parametrize("pieces", PIECES, ids=NAMES)
def test_all_points_together_run_a_hybrid(pieces, kind):
    model = hybrid(("hyena", "linear", "ssm", "attention"), kind)
    own = read(model, pieces)
    mine = {name: exercise.alternatives[0].fn for name, exercise in EXERCISES.items()}
    with plug(**mine):
        assert torch.allclose(own, read(model, pieces), rtol=1e-4, atol=1e-5)
    assert torch.equal(own, read(model, pieces))


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("causal_fft_conv", lambda u, h: None, "None"),
        ("causal_fft_conv", lambda u, h: u.double(), "torch.float64"),
        ("modal_step", lambda modes, u, poles, residues: u, "should be"),
        ("modal_step", lambda modes, u, poles, residues: (u, modes.real), "modes is torch.float32"),
        ("linear_attention_step", lambda s, z, q, k, v: (v, s), "a tuple of 2"),
        ("linear_attention_step", lambda s, z, q, k, v: (v, s.mT[..., :1], z), "state has shape"),
        ("linear_attention_chunked", lambda q, k, v, s, z, chunk: (v, s, s), "total has shape"),
        ("linear_attention_chunked", lambda q, k, v, s, z, chunk: (v[:, :, :1], s, z), "y has shape"),
        ("selective_scan", lambda x, dt, A, B, C, h: (x, None), "h is None"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(name, wrong, says):
    model = hybrid(KINDS[name])
    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        read(model, [5, 1, 17])


def test_a_wrong_function_changes_the_logits():
    model = hybrid(("hyena", "linear"))
    own = read(model, [9, 13, 1])
    for name, mistake in (("causal_fft_conv", "circular"), ("linear_attention_chunked", "replaced")):
        wrong = next(m.fn for m in EXERCISES[name].mistakes if m.name == mistake)
        with plug(**{name: wrong}):
            assert not torch.allclose(own, read(model, [9, 13, 1]), rtol=1e-3, atol=1e-4), name
