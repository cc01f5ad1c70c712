"""On a GPU: the ledger within 5 % of the allocator; checkpointing, offload and masters as on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcourse.bench.training_memory import GPU_SETUPS, peak_row
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.checkpoint import Checkpointed
from llmcourse.train.fit import build
from llmcourse.train.offload import offload
from llmcourse.train.precision import LossScaler, MasterWeights

CONFIG = ModelConfig(301, 128, 3, 4, 2, 32, 200, max_len=128)


@pytest.mark.parametrize("name", GPU_SETUPS)
def test_the_ledger_is_within_5_percent_of_the_allocators_peak(name):
    setup = GPU_SETUPS[name]
    if torch.cuda.get_device_properties(0).total_memory < 60e9 and setup.config.d_model > 1024:
        pytest.skip("needs a GPU of 60 GB or more")
    row = peak_row(name, setup, "cuda")
    assert abs(row["error"]) < 0.05, row


def gradients(net, tokens, targets):
    for p in net.parameters():
        p.grad = None
    F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten()).backward()
    return [p.grad.clone() for p in net.parameters()]


def case():
    model = build(Transformer, CONFIG, seed=0).double().cuda()
    tokens = torch.randint(0, 301, (3, 77), device="cuda")
    return model, tokens, tokens.roll(-1, 1)


@pytest.mark.parametrize("by", ["hand", "torch"])
def test_checkpointed_gradients_equal_plain_ones(by):
    model, tokens, targets = case()
    want = gradients(Checkpointed(model, 0), tokens, targets)
    for every in (1, 2):
        got = gradients(Checkpointed(model, every, by=by), tokens, targets)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_dropout_on_the_gpu_draws_the_same_numbers_again():
    from llmcourse.train.checkpoint import checkpoint

    x = torch.randn(64, 100, device="cuda", requires_grad=True)
    torch.manual_seed(5)
    y = checkpoint(lambda t: F.dropout(t, 0.5), x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.bool(), y.bool())


def test_offloaded_gradients_equal_plain_ones_and_memory_falls():
    model, tokens, targets = case()
    want = gradients(Checkpointed(model, 0), tokens, targets)
    for p in model.parameters():
        p.grad = None
    with offload(model, least=0) as moved:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    assert moved.out > 0
    assert moved.back >= moved.out
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-12)


def test_what_is_offloaded_is_not_in_the_gpus_memory():
    x = torch.randn(1 << 22, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    with offload(x) as moved:
        y = x.exp().sin().cos()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() - before
    assert moved.out == 2 * x.nbytes  # exp keeps its output, which sin keeps too; cos keeps its input
    assert held < 1.5 * x.nbytes
    del y


def test_masters_and_a_scaler_train_on_the_gpu():
    model = build(Transformer, CONFIG, seed=0).cuda().half()
    masters, scaler = MasterWeights(model.parameters()), LossScaler(2.0**30)
    optimizer = torch.optim.AdamW(masters.parameters, lr=3e-3)
    tokens = torch.randint(0, 301, (4, 64), device="cuda")
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        scaler.scale_loss(loss).backward()
        masters.take_gradients()
        if scaler.unscale(masters.parameters):
            optimizer.step()
            masters.write_back()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scaler.skipped > 0
    assert losses[-1] < losses[0] / 2
