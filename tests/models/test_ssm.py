"""The selective scan against a plain loop, against transformers' Mamba layer, and cut into pieces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcourse.kernels import language
from llmcourse.models import KVCache, ModelConfig, SSMSizes, Transformer
from llmcourse.models.short_conv import ShortConv
from llmcourse.models.ssm import SCANS, SSM, LinearRecurrence, SSMState, selective_scan

SIZES = dict(vocab_size=53, d_model=20, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=10, d_ff=24)
CONFIG = ModelConfig(**SIZES, max_len=64, layers=("ssm",) * 2, ssm=SSMSizes(d_state=5), position="none")
FRESH = SimpleNamespace(start=0)


def inputs(length: int, batch: int = 2, channels: int = 3, states: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, dt = draw(batch, length, channels), draw(batch, length, channels).exp()
    A = -draw(channels, states).exp()
    return [x, dt, A, draw(batch, length, states), draw(batch, length, states), draw(batch, channels, states)]


def by_definition(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, number by number."""
    h, y = h.clone(), torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for c in range(x.shape[2]):
                h[b, c] = torch.exp(dt[b, t, c] * A[c]) * h[b, c] + dt[b, t, c] * B[b, t] * x[b, t, c]
                y[b, t, c] = C[b, t] @ h[b, c]
    return y, h


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (2, 1), (23, 64), (23, 5), (32, 8), (33, 32)])
def test_every_scan_equals_the_definition_for_any_chunk(scan, length, chunk):
    given_ = inputs(length)
    y, h = selective_scan(*given_, scan=scan, chunk=chunk)
    want_y, want_h = by_definition(*given_)
    torch.testing.assert_close(y, want_y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(h, want_h, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scan", SCANS)
def test_the_gradient_of_a_scan_is_right(scan):
    a, b, h = (torch.rand(2, 9, 3).double().requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda a, b, h: LinearRecurrence.apply(a, b, h, SCANS[scan]),
        (a, b, h[:, 0].detach().requires_grad_()),
    )


def test_gradients_of_the_scans_are_the_same():
    gradients = []
    for scan in SCANS:
        leaves = [x.requires_grad_() for x in inputs(37)]
        y, h = selective_scan(*leaves, scan=scan, chunk=16)
        (y.square().sum() + h.sum()).backward()
        gradients.append([x.grad for x in leaves])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_the_layer_equals_transformers_mamba_mixer_with_the_same_weights():
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig

    torch.manual_seed(0)
    theirs_config = MambaConfig(
        hidden_size=20, state_size=5, conv_kernel=4, expand=2, time_step_rank=3, num_hidden_layers=1
    )
    theirs = mamba.MambaMixer(theirs_config, layer_idx=0).double().eval()
    config = ModelConfig(**SIZES, ssm=SSMSizes(d_state=5, dt_rank=3))
    ours = SSM(config).double()
    weights = {
        name: t.squeeze(1) if name == "conv1d.weight" else t for name, t in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    with torch.no_grad():
        theirs.A_log += torch.randn_like(theirs.A_log) / 3  # not the same rates in all channels
        ours.A_log.copy_(theirs.A_log)
    x = torch.randn(2, 41, 20).double()
    with torch.inference_mode():
        want = theirs(x)
        for scan in SCANS:
            ours.scan = scan
            # Theirs rounds A and B to float32 on the way.
            torch.testing.assert_close(ours(x, FRESH, None), want, atol=2e-6, rtol=2e-6)


def test_the_kernel_is_taken_where_it_can_run_and_nobody_wants_a_gradient():
    def chosen(tokens=8, dtype=torch.float32, device="meta", learns=False):
        u = torch.empty(1, tokens, 4, dtype=dtype, device=device).requires_grad_(learns)
        return SSM.way(u, torch.empty(4, 2, dtype=dtype, device=device))

    best = "fused" if language.INSTALLED else "parallel"
    assert chosen() == chosen(dtype=torch.bfloat16) == best
    assert chosen(learns=True) == chosen(dtype=torch.float64) == "parallel"
    with torch.no_grad():
        assert chosen(learns=True) == best
    assert chosen(tokens=1) == chosen(device="cpu") == "sequential"


def test_the_short_convolution_equals_pytorchs():
    torch.manual_seed(0)
    conv = ShortConv(6, 4).double()
    theirs = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3).double()
    with torch.no_grad():
        theirs.weight.copy_(conv.weight.unsqueeze(1))
        theirs.bias.copy_(conv.bias)
    x = torch.randn(2, 11, 6).double()
    y, tail = conv(x)
    torch.testing.assert_close(y, theirs(x.mT)[..., :11].mT, atol=1e-12, rtol=1e-12)
    assert torch.equal(tail, x[:, -3:])
    first, tail = conv(x[:, :2])
    rest, _ = conv(x[:, 2:], tail)
    torch.testing.assert_close(torch.cat((first, rest), 1), y, atol=1e-12, rtol=1e-12)


def test_a_short_convolution_of_width_one_keeps_nothing():
    conv = ShortConv(3, 1)
    x = torch.randn(1, 5, 3)
    y, tail = conv(x)
    assert tail.shape == (1, 0, 3)
    torch.testing.assert_close(y, x * conv.weight[:, 0] + conv.bias)


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


def test_a_token_with_a_step_of_zero_leaves_no_trace_and_a_large_one_overwrites():
    x, dt, A, B, C, h = inputs(1)
    _, unmoved = selective_scan(x, torch.zeros_like(dt), A, B, C, h)
    assert torch.equal(unmoved, h)
    _, after = selective_scan(x, torch.full_like(dt, 1e3), A, B, C, h)
    _, without = selective_scan(x, torch.full_like(dt, 1e3), A, B, C, torch.zeros_like(h))
    torch.testing.assert_close(after, without)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_low_precision_stays_near_float64(dtype, limit):
    torch.manual_seed(3)
    layer = SSM(CONFIG).to(dtype)
    exact = SSM(CONFIG).double()
    exact.load_state_dict({name: t.double() for name, t in layer.state_dict().items()})
    x = torch.randn(2, 50, 20).to(dtype)
    with torch.inference_mode():
        got, want = layer(x, FRESH, None), exact(x.double(), FRESH, None)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < limit * want.abs().max()


def test_new_step_sizes_lie_between_a_thousandth_and_a_tenth():
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(SSM(CONFIG).dt_proj.bias)
    assert 0.9e-3 < steps.min() < 3e-3
    assert 3e-2 < steps.max() < 1.1e-1


def test_sizes_are_what_the_formulas_say():
    for config in (CONFIG, ModelConfig(**(SIZES | {"bias": True}), ssm=SSMSizes(7, 3, 1, 5))):
        layer = SSM(config)
        assert sum(p.numel() for p in layer.parameters()) == SSM.n_params(config)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            state = SSMState(config, 3, 1000, dtype=dtype)
            assert state.nbytes == 3 * SSM.cache_bytes(config, 1000, dtype.itemsize)
            assert state.nbytes == SSMState(config, 3, 1, dtype=dtype).nbytes
