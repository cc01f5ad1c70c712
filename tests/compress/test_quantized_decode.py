"""The benchmark of the decode step: what its rows say of bytes and times. Times themselves are no test."""

from __future__ import annotations

import pytest
import torch

from llmcourse.bench import BENCHMARKS
from llmcourse.bench.quantized_decode import SCHEMES, measure, smaller, step_bytes
from llmcourse.compress.quantized_linear import QuantizedLinear
from llmcourse.engine import LLM, SamplingParams
from llmcourse.models import ModelConfig, random_model

CONFIG = ModelConfig(
    vocab_size=49152, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128, max_len=512
)


@pytest.fixture(scope="module")
def models():
    model = random_model(CONFIG, dtype="bfloat16")
    return {name: smaller(model, scheme) for name, scheme in SCHEMES.items()}


def test_a_step_reads_the_bytes_of_its_codes(models):
    head = CONFIG.vocab_size * CONFIG.d_model
    layers = CONFIG.n_layers * 64 * (128 + 64 + 3 * 128)
    rows = CONFIG.vocab_size * 2, CONFIG.n_layers * (128 + 64 + 256 + 64) * 2  # a scale of 2 bytes each
    norms = sum(p.nbytes for n, p in models["bf16"].named_parameters() if "norm" in n)
    assert step_bytes(models["bf16"]) == 2 * (head + layers) + norms
    assert step_bytes(models["INT8"]) == head + layers + sum(rows) + norms
    assert step_bytes(models["INT4 g64"]) == head + rows[0] + layers // 2 + layers // 64 * 2 + norms


def test_rows_hold_medians_and_bests_after_the_warm_up(models, smol):
    seconds = {
        name: iter(times)
        for name, times in zip(models, ([9, 4, 2, 3], [9, 2, 1, 2], [9, 1, 1, 5]), strict=True)
    }
    names = {id(m): n for n, m in models.items()}
    rows = measure(models, smol[1], rounds=3, clock=lambda llm, _: next(seconds[names[id(llm.model)]]))
    assert [(r["tpot_ms"], r["best_tpot_ms"]) for r in rows] == [(3e3, 2e3), (2e3, 1e3), (1e3, 1e3)]
    assert [r["speedup"] for r in rows] == [1, 1.5, 3]
    assert [r["best_speedup"] for r in rows] == [1, 2, 2]


def test_every_quantized_layer_of_a_decode_step_takes_a_kernel(models, smol, monkeypatch):
    """What makes a step fast, checked without a clock: no weight is written out, and the bytes are fewer."""
    if not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
        pytest.skip("this PyTorch has no 4-bit kernel for CPUs")
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    for name in ("INT8", "INT4 g64"):
        llm = LLM((models[name], smol[1]), kv_cache=True)
        llm.generate([[1, 2, 3]], params)  # rearranges the codes
        monkeypatch.setattr(
            QuantizedLinear, "quantized", property(lambda self: pytest.fail("a weight was written out"))
        )
        llm.generate([[1, 2, 3]], params)
        monkeypatch.undo()
    assert step_bytes(models["INT4 g64"]) < step_bytes(models["INT8"]) < 0.6 * step_bytes(models["bf16"])


def test_it_can_be_run_by_name():
    assert "quantized_decode" in BENCHMARKS
