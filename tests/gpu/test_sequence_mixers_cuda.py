"""Linear attention, SSM and Hyena layers on a GPU: the CPU's numbers, cached and not, and the kernel's."""

from __future__ import annotations

import pytest
import torch

from llmcourse.kernels.selective_scan import selective_scan as fused
from llmcourse.models import HyenaSizes, KVCache, ModelConfig, Transformer
from llmcourse.models.ssm import selective_scan

SIZES = dict(vocab_size=53, d_model=48, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=64, max_len=512)
STACKS = {
    "linear": ModelConfig(**SIZES, n_layers=1, layers=("linear",)),
    "ssm": ModelConfig(**SIZES, n_layers=1, layers=("ssm",)),
    "hyena": ModelConfig(**SIZES, n_layers=1, layers=("hyena",)),
    "modal": ModelConfig(**SIZES, n_layers=1, layers=("hyena",), hyena=HyenaSizes("modal")),
    "striped": ModelConfig(**SIZES, n_layers=3, layers=("hyena", "hyena", "attention")),
}


@pytest.mark.parametrize("name", STACKS)
def test_logits_equal_the_cpus_in_one_pass_and_in_pieces(name):
    torch.manual_seed(0)
    model = Transformer(STACKS[name]).double().eval()
    ids = torch.randint(0, 53, (2, 301))
    with torch.inference_mode():
        want = model(ids)
        model, ids = model.cuda(), ids.cuda()
        torch.testing.assert_close(model(ids).cpu(), want, atol=1e-9, rtol=1e-9)
        cache = KVCache(model.config, 2, 310, dtype=torch.float64, device="cuda")
        pieces = [model(part, cache) for part in ids.split([150, 1, 1, 99, 50], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1).cpu(), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", STACKS)
def test_sequences_of_unequal_length_decode_as_if_alone(name):
    torch.manual_seed(0)
    model = Transformer(STACKS[name]).double().eval().cuda()
    prompts = [torch.randint(0, 53, (1, n), device="cuda") for n in (1, 130, 6)]
    following = torch.randint(0, 53, (3, 4), device="cuda")
    cache = KVCache(model.config, 3, 140, dtype=torch.float64, device="cuda")
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            row = cache.row(i)
            model(prompt, row)
            cache.lengths[i] = row.lengths[0]
        together = torch.cat([model(following[:, t : t + 1], cache) for t in range(4)], dim=1)
        for i, prompt in enumerate(prompts):
            alone = model(torch.cat((prompt, following[i : i + 1]), dim=1))[:, -4:]
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "states"), [(1, 1, 32, 16), (2, 777, 100, 16), (3, 256, 64, 5)]
)
def test_the_fused_scan_equals_float64(batch, tokens, channels, states, dtype):
    torch.manual_seed(tokens)
    x = torch.randn(batch, tokens, channels, device="cuda").to(dtype)
    dt = torch.rand(batch, tokens, channels, device="cuda") / 4
    A = -torch.randn(channels, states, device="cuda").exp()
    B, C = torch.randn(2, batch, tokens, states, device="cuda").to(dtype)
    h = torch.randn(batch, channels, states, device="cuda")
    want_y, want_h = selective_scan(*(t.double() for t in (x, dt, A, B, C, h)))
    y, after = fused(x, dt, A, B, C, h)
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    assert (y.double() - want_y).abs().max() < limit * want_y.abs().max()
    assert (after.double() - want_h).abs().max() < 1e-5 * want_h.abs().max()
