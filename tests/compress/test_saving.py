"""A model written as a folder is read back bit for bit, and damage is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.compress.quantized_linear import QuantizedLinear, quantize_model
from llmcourse.compress.saving import save
from llmcourse.engine import LLM, SamplingParams
from llmcourse.errors import DiskError, ModelError
from llmcourse.models import LatentSizes, ModelConfig, RopeScaling, load, random_model

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=96,
    rope_scaling=RopeScaling("linear", factor=2.0),
    qkv_bias=True,
    eos_ids=(2, 5),
)
IDS = torch.tensor([[3, 50, 95, 0, 7]])


def saved(tmp_path, smol, how=None, config=CONFIG, dtype="float32", **options):
    torch.manual_seed(1)
    model = random_model(config, dtype=dtype)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    smaller = model if how is None else quantize_model(model, how, **options)
    return smaller, save(smaller, smol[1], tmp_path / "m"), tmp_path / "m"


@pytest.mark.parametrize(
    "how",
    [
        None,
        Scheme(8),
        Scheme(8, -1),
        Scheme(4, 32, symmetric=False),
        Scheme(3, 20),
        Scheme(4, 32, codes="nf4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_folder_gives_identical_logits(tmp_path, smol, how, dtype):
    model, nbytes, folder = saved(tmp_path, smol, how, dtype=dtype)
    again, tokenizer = load(folder, device="cpu", dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(again(IDS), model(IDS))
    assert again.config == model.config
    assert nbytes == model.weight_bytes
    assert tokenizer.eos_ids == smol[1].eos_ids
    assert tokenizer.chat("hello") == smol[1].chat("hello")
    assert tokenizer.encode("To be, or not to be") == smol[1].encode("To be, or not to be")


def test_a_quantized_head_leaves_the_embedding_it_was_tied_to(tmp_path, smol):
    how = lambda name, layer: quantize(layer.weight, Scheme(8)) if name == "head" else None  # noqa: E731
    model, _, folder = saved(tmp_path, smol, how, skip=())
    again, _ = load(folder, device="cpu", dtype="float32")
    assert isinstance(again.head, QuantizedLinear)
    with torch.inference_mode():
        assert torch.equal(again(IDS), model(IDS))


def test_other_kinds_of_layers_are_saved_too(tmp_path, smol):
    config = ModelConfig(
        vocab_size=96, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=48,
        layers=("latent", "window", "attention"), window=4, sinks=1,
        latent=LatentSizes(q_rank=14, kv_rank=10, nope_dim=5, rope_dim=6, v_dim=7), tie_embeddings=False,
    )  # fmt: skip
    model, _, folder = saved(tmp_path, smol, Scheme(4, 16), config)
    again, _ = load(folder, device="cpu", dtype="float32")
    with torch.inference_mode():
        assert torch.equal(again(IDS), model(IDS))


def test_the_engine_reads_a_folder_and_answers_the_same(tmp_path, smol):
    model, _, folder = saved(tmp_path, smol, Scheme(8))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    a = LLM((model, smol[1])).generate([[1, 2, 3]], params)[0].tokens
    assert LLM(folder, device="cpu", dtype="float32").generate([[1, 2, 3]], params)[0].tokens == a


def test_how_it_was_made_is_kept_beside_the_weights(tmp_path, smol):
    model = quantize_model(random_model(CONFIG, dtype="float32"), Scheme(8))
    save(model, smol[1], tmp_path / "m", about={"command": "llmcourse bench quantize"})
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata()["command"] == "llmcourse bench quantize"


def test_nothing_is_written_over_and_nothing_half_written_stays(tmp_path, smol, monkeypatch):
    model, _, folder = saved(tmp_path, smol, Scheme(8))
    with pytest.raises(DiskError, match="exists already"):
        save(model, smol[1], folder)
    monkeypatch.setattr("llmcourse.compress.saving._write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, smol[1], tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_layers_that_a_folder_could_not_describe_are_refused(tmp_path, smol):
    model = random_model(CONFIG, dtype="float32")
    model.blocks[0].mlp.down = torch.nn.Sequential(model.blocks[0].mlp.down)
    with pytest.raises(ModelError, match="down"):
        save(model, smol[1], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_scheme(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["quantized"]["blocks.0.mlp.down"]["bits"] = 4
    (folder / "config.json").write_text(json.dumps(fields))


def lost_scale(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.1.mixer.out.scale"]
    save_file(tensors, folder / "model.safetensors")


def lost_norm(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def no_sizes(folder):
    (folder / "config.json").write_text('{"model_type": "llmcourse", "quantized": {}}')


def strange_layer(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["quantized"]["blocks.9.mlp.down"] = fields["quantized"]["blocks.1.mlp.down"]
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_short, "cannot be read"),
        (other_scheme, r"blocks.0.mlp.down.packed is uint8 \[64, 96\]"),
        (lost_scale, "blocks.1.mixer.out.scale is missing"),
        (lost_norm, "norm.weight is missing"),
        (no_sizes, "sizes"),
        (strange_layer, "blocks.9.mlp.down"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_damage_is_named(tmp_path, smol, damage, says):
    _, _, folder = saved(tmp_path, smol, Scheme(8))
    damage(folder)
    with pytest.raises(ModelError, match=says):
        load(folder, device="cpu", dtype="float32")
