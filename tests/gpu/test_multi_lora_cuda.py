"""On a GPU: the grouped kernels against float64 and under graphs, a served model, and fine-tuning."""

from __future__ import annotations

import pytest
import torch

from llmcourse.bench.multi_lora import LLAMA_8B, layers_of, random_bank
from llmcourse.finetune.lora import PLACES, LoRA, attach
from llmcourse.finetune.serve import serve
from llmcourse.kernels import multi_lora as ml
from llmcourse.kernels.multi_lora_segments import multi_lora_segments
from llmcourse.models import ModelConfig, random_model

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def expected(y, x, ids, bank):
    out = y.double()
    for i, g in enumerate(ids.tolist()):
        offset = 0
        for p, (first, end) in enumerate(bank.parts):
            if g >= 0:
                b = bank.b[g, offset : offset + end - first].double()
                out[i, first:end] += bank.scale[g].double() * (b @ (bank.a[g, p].double() @ x[i].double()))
            offset += end - first
    return out


def drawn(n, features, parts, rank, adapters, dtype):
    bank = random_bank(adapters, features, parts, rank, "cuda")
    bank = ml.Bank(bank.a.to(dtype), bank.b.to(dtype), torch.rand(adapters, device="cuda") + 0.5, parts)
    x = torch.randn(n, features, device="cuda", dtype=dtype)
    y = torch.randn(n, parts[-1][1], device="cuda", dtype=dtype)
    return y, x, torch.randint(-1, adapters, (n,), device="cuda"), bank


def agree(got, want):
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance * 4, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 4096, ((0, 4096),), 16, 3), (64, 1003, ((0, 517), (600, 901)), 5, 64), (17, 64, ((3, 4),), 1, 2)],
    ids=str,
)
def test_every_row_gets_its_own_adapters_correction(shape, dtype):
    y, x, ids, bank = drawn(*shape, dtype)
    agree(ml.multi_lora(y.clone(), x, ids, bank), expected(y, x, ids, bank))


@pytest.mark.parametrize("name", layers_of(LLAMA_8B))
def test_the_layers_of_a_large_model_with_64_adapters(name):
    features, parts = layers_of(LLAMA_8B)[name]
    y, x, ids, bank = drawn(64, features, parts, 16, 64, torch.bfloat16)
    agree(ml.multi_lora(y.clone(), x, ids, bank), expected(y, x, ids, bank))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_stretches_of_rows(dtype):
    y, x, _, bank = drawn(203, 520, ((0, 300), (310, 617)), 16, 4, dtype)
    lengths, adapters = [1, 100, 37, 65], [3, 0, -1, 1]
    ids = torch.tensor(adapters).repeat_interleave(torch.tensor(lengths))
    agree(multi_lora_segments(y.clone(), x, lengths, adapters, bank), expected(y, x, ids, bank))


def test_a_captured_graph_follows_the_ids_that_are_written_later():
    y, x, ids, bank = drawn(8, 256, ((0, 128),), 8, 4, torch.bfloat16)
    out = torch.empty_like(y)

    def once():
        out.copy_(y)
        ml.multi_lora(out, x, ids, bank)

    once()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        once()
    for seed in range(3):
        ids.copy_(torch.randint(-1, 4, (8,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        agree(out, expected(y, x, ids, bank))


@torch.no_grad()
def test_a_served_model_is_each_rows_own_model():
    config = ModelConfig(99, 48, 3, 6, 2, 8, 80, max_len=64)

    def base():
        torch.manual_seed(3)
        return random_model(config, device="cuda", dtype="float32")

    adapters = []
    for i, targets in enumerate((("q", "v"), ("o", "up"), tuple(PLACES))):
        adapter = attach(base(), LoRA(4, 8, targets), seed=i)
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn_like(p))
        adapters.append(adapter)
    served = serve(base(), adapters)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1]]
    ids = [2, -1, 0, 1]
    got = served.answers(prompts, ids, tokens=4)
    for prompt, i, answer in zip(prompts, ids, got, strict=True):
        model, tokens = (adapters[i].model if i >= 0 else base()), list(prompt)
        for _ in range(4):
            tokens.append(int(model(torch.tensor([tokens], device="cuda"))[0, -1].argmax()))
        assert tokens[len(prompt) :] == answer


def test_adapters_train_in_bfloat16_models_and_merge():
    torch.manual_seed(0)
    model = random_model(ModelConfig(99, 64, 2, 4, 2, 16, 96, max_len=64), device="cuda", dtype="bfloat16")
    adapter = attach(model, LoRA(4, 8, tuple(PLACES)))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    tokens = torch.randint(0, 99, (4, 16), device="cuda")
    losses = []
    for _ in range(20):
        logits = model(tokens[:, :-1]).float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        beside = model(tokens)
        adapter.merge()
        assert (model(tokens) - beside).abs().max() < 0.1 * beside.abs().max()
