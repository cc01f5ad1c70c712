"""Long convolutions by FFT against scipy, modal filters against their recurrence, Hyena cut into pieces."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.models import HyenaSizes, KVCache, ModelConfig, Transformer
from llmcourse.models.fft_conv import direct_conv, fft_conv, fft_size, toeplitz
from llmcourse.models.hyena import Hyena, HyenaState
from llmcourse.models.long_filter import ImplicitFilter, ModalFilter

SIZES = dict(vocab_size=53, d_model=12, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=6, d_ff=24)
FRESH = SimpleNamespace(start=0)
KINDS = ("implicit", "modal")


def config(kind: str, **changes) -> ModelConfig:
    sizes = SIZES | {"max_len": 64, "layers": ("hyena",) * 2, "position": "none"} | changes
    return ModelConfig(**{"hyena": HyenaSizes(kind, d_filter=6, d_state=3)} | sizes)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    return {kind: Transformer(config(kind)).double().eval() for kind in KINDS}


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 80), taps=st.integers(1, 80), seed=st.integers(0, 9))
def test_fft_convolution_equals_scipys(length, taps, seed):
    signal = pytest.importorskip("scipy.signal")
    rng = np.random.default_rng(seed)
    u, h = rng.standard_normal((3, length)), rng.standard_normal((3, taps))
    want = signal.fftconvolve(u, h, axes=1)[:, :length]
    got = fft_conv(torch.from_numpy(u), torch.from_numpy(h))
    np.testing.assert_allclose(got, want, atol=1e-12, rtol=0)
    by_hand = np.stack([np.convolve(a, b)[:length] for a, b in zip(u, h, strict=True)])
    np.testing.assert_allclose(direct_conv(torch.from_numpy(u), torch.from_numpy(h)), by_hand, atol=1e-12)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 2), (5, 3), (64, 64), (65, 65), (100, 7)])
def test_the_transform_is_long_enough_that_nothing_wraps_around(length, taps):
    n = fft_size(length, taps)
    assert n >= length + taps - 1
    assert n & (n - 1) == 0
    u = torch.zeros(length).double()
    u[-1] = 1  # whatever came round the end would show at the start
    y = fft_conv(u, torch.ones(taps).double())
    assert y[: length - 1].abs().sum() < 1e-12
    assert abs(y[-1].item() - 1) < 1e-12


def test_fft_convolution_has_the_gradient_of_the_direct_one():
    u, h = (torch.randn(2, 3, 19).double().requires_grad_() for _ in range(2))
    gradients = []
    for conv in (fft_conv, direct_conv):
        gradients.append(torch.autograd.grad(conv(u, h).square().sum(), (u, h)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_leading_dimensions_broadcast():
    u, h = torch.randn(4, 3, 10).double(), torch.randn(3, 10).double()
    want = torch.stack([direct_conv(row, h) for row in u])
    torch.testing.assert_close(fft_conv(u, h), want)


def test_a_low_precision_convolution_is_computed_in_float32():
    u, h = torch.randn(2, 500).bfloat16(), torch.randn(2, 500).bfloat16()
    got = fft_conv(u, h)
    assert got.dtype == torch.bfloat16
    want = direct_conv(u.double(), h.double())
    assert (got.double() - want).abs().max() < 2**-8 * want.abs().max()


def test_the_toeplitz_matrix_has_the_same_number_along_each_diagonal():
    h = torch.tensor([5.0, 7.0, 11.0])
    want = torch.tensor([[5.0, 0, 0, 0], [7, 5, 0, 0], [11, 7, 5, 0], [0, 11, 7, 5]])
    assert torch.equal(toeplitz(h, 4), want)


def test_a_modal_filter_is_the_sum_of_its_poles_powers():
    layer = ModalFilter(config("modal")).double()
    poles, residues = layer.poles().exp(), layer.residues()
    assert (poles.abs() < 1).all()
    want = torch.stack([(residues * poles**t).sum(1).real for t in range(30)], dim=1)
    torch.testing.assert_close(layer(30), want, atol=1e-12, rtol=1e-12)


def test_a_pole_and_its_conjugate_give_twice_the_real_part():
    layer = ModalFilter(config("modal")).double()
    poles, residues = layer.poles().exp(), layer.residues()
    pairs = sum((residues.unsqueeze(-1) * poles.unsqueeze(-1) ** torch.arange(20)).sum(1) for _ in (0,))
    pairs = pairs + (residues.conj().unsqueeze(-1) * poles.conj().unsqueeze(-1) ** torch.arange(20)).sum(1)
    assert pairs.imag.abs().max() < 1e-12
    torch.testing.assert_close(pairs.real / 2, layer(20), atol=1e-12, rtol=1e-12)


def test_modes_stay_stable_whatever_the_parameters():
    layer = ModalFilter(config("modal"))
    torch.nn.init.normal_(layer.log_rate, std=3.0)
    assert (layer.poles().exp().abs() <= 1).all()
    assert layer(5000).isfinite().all()


def test_the_recurrence_of_a_modal_filter_equals_its_convolution():
    torch.manual_seed(5)
    setup = config("modal")
    layer, u = ModalFilter(setup).double(), torch.randn(2, 12, 47).double()
    want = direct_conv(u, layer(47))
    torch.testing.assert_close(layer.convolve(u, FRESH, None), want, atol=1e-11, rtol=1e-11)
    for cuts in ([47], [1] * 47, [5, 1, 20, 1, 1, 19]):
        state = HyenaState(setup, 2, 100, dtype=torch.float64)
        pieces = [layer.convolve(part, FRESH, state) for part in u.split(cuts, dim=-1)]
        torch.testing.assert_close(torch.cat(pieces, dim=-1), want, atol=1e-11, rtol=1e-11)


def test_a_filter_does_not_depend_on_how_much_of_it_is_asked_for():
    for layer in (ImplicitFilter(config("implicit")).double(), ModalFilter(config("modal")).double()):
        torch.testing.assert_close(layer(64)[:, :17], layer(17), atol=1e-12, rtol=1e-12)


def test_the_windows_of_an_implicit_filter_reach_from_a_few_tokens_to_the_context():
    layer = ImplicitFilter(config("implicit", max_len=512))
    window = layer.window(torch.arange(512.0))
    fallen = (window < window[0] / torch.e).float().argmax(0)
    assert fallen[0] == 9
    assert fallen[-2] > 300
    energy = window.square().sum(0)
    assert (energy[:-2] > 0.3).all()
    assert (energy < 0.7).all()


@settings(max_examples=16, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), kind=st.sampled_from(KINDS))
def test_reading_in_any_pieces_gives_the_same_logits(models, cuts, kind):
    ids = torch.randint(0, 53, (2, sum(cuts)))
    cache = KVCache(models[kind].config, 2, 60, dtype=torch.float64)
    with torch.inference_mode():
        pieces = [models[kind](part, cache) for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), models[kind](ids), atol=1e-10, rtol=1e-10)


def test_new_weights_give_new_taps_in_a_cache_that_is_used_again(models):
    model = Transformer(config("implicit")).double().eval()
    ids = torch.randint(0, 53, (1, 9))
    cache = KVCache(model.config, 1, 20, dtype=torch.float64)
    with torch.no_grad():
        model(ids, cache)
        model.blocks[0].mixer.filter.leave.weight.mul_(-2)
        cache.lengths = [0]
        torch.testing.assert_close(model(ids, cache), model(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_low_precision_stays_near_float64(kind, dtype, limit):
    torch.manual_seed(3)
    layer = Hyena(config(kind)).to(dtype)
    exact = Hyena(config(kind)).double()
    exact.load_state_dict({name: t.double() for name, t in layer.state_dict().items()})
    x = torch.randn(2, 50, 12).to(dtype)
    with torch.inference_mode():
        got, want = layer(x, FRESH, None), exact(x.double(), FRESH, None)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < limit * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_what_the_formulas_say(kind):
    for setup in (config(kind), config(kind, bias=True, hyena=HyenaSizes(kind, 4, 10, 5))):
        layer = Hyena(setup)
        assert sum(p.numel() for p in layer.parameters()) == Hyena.n_params(setup)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            state = HyenaState(setup, 3, 1000, dtype=dtype)
            assert state.nbytes == 3 * Hyena.cache_bytes(setup, 1000, dtype.itemsize)
    grows = Hyena.cache_bytes(setup, 2000, 2) > Hyena.cache_bytes(setup, 1000, 2)
    assert grows == (kind == "implicit")


def test_torch_compile_takes_a_layer_with_its_modes():
    torch.manual_seed(2)
    layer, x = Hyena(config("modal")), torch.randn(2, 9, 12)
    kept = [HyenaState(config("modal"), 2, 20) for _ in range(2)]
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        for part in x.split([4, 5], dim=1):
            torch.testing.assert_close(compiled(part, FRESH, kept[0]), layer(part, FRESH, kept[1]))
    torch.testing.assert_close(kept[0].modes, kept[1].modes)
