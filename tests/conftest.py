"""What the tests share: the real model, loaded once a worker, and its peer in transformers."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Test workers run side by side. A thread each, that sleeps when it waits: threads of two processes that
# spin for each other on the same cores are ten times slower than either alone. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module", autouse=True)
def what_other_modules_left_is_not_searched() -> None:
    """A worker holds every test and what the modules before this one loaded: millions of objects, through
    which `gc.collect()`, called where leaks are counted, would go each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    from llmcourse.assets import model_path

    return model_path()


@pytest.fixture(scope="session")
def smol(gguf_path):
    """(model, tokenizer): SmolLM2-135M-Instruct in float32 on the CPU."""
    from llmcourse import models

    return models.load(gguf_path, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def hf_smol(gguf_path):
    """The same file read by transformers' own GGUF loader: (model, tokenizer), float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_path.parent), gguf_path.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=name)


@pytest.fixture(scope="session")
def tiny(smol):
    """(model, tokenizer): a small random model with the real tokenizer, for tests of the machinery."""
    import torch

    from llmcourse.models import ModelConfig, random_model

    torch.manual_seed(7)
    tokenizer = smol[1]
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=48,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        head_dim=8,
        d_ff=64,
        max_len=512,
    )
    return random_model(config, dtype="float32"), tokenizer
