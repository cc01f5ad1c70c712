"""LoRA on models: nothing changes until it is trained; trained, merged and taken out; peft agrees."""

from __future__ import annotations

import json

import pytest
import torch

from llmcourse.compress.quantize import Scheme
from llmcourse.compress.quantized_linear import QuantizedLinear, quantize_model
from llmcourse.errors import ModelError, ShapeError
from llmcourse.finetune import adapter_file
from llmcourse.finetune.bill import bills, sizes, trainable
from llmcourse.finetune.lora import PLACES, Adapter, LoRA, LoRAError, attach
from llmcourse.models import ModelConfig, Transformer, random_model
from llmcourse.models.peer import llama
from llmcourse.train.fit import fit
from llmcourse.train.saved import saved_tensors
from llmcourse.train.small import small
from llmcourse.train.tasks import Text

CONFIG = ModelConfig(99, 48, 3, 6, 2, 8, 80, max_len=64, name="odd")
TOKENS = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))
ALL = tuple(PLACES)


def base(dtype: str = "float32", config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(3)
    return random_model(config, dtype=dtype)


def disturbed(adapter: Adapter, seed: int = 1) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return adapter


def test_a_fresh_adapter_changes_no_bit():
    model = base()
    before = model(TOKENS)
    attach(model, LoRA(4, 8, ALL))
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("gate",), ("o", "down"), ALL])
def test_the_output_is_that_of_the_weight_with_the_correction_in_it(targets):
    adapter = disturbed(attach(base(), LoRA(3, 5, targets, layers=(0, 2))))
    other = base()
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            weight = other.get_submodule(name).weight
            for a, (target, rows) in zip(layer.A, layer.rows.items(), strict=True):
                weight[rows] += 5 / 3 * layer.B[target] @ a
    torch.testing.assert_close(adapter.model(TOKENS), other(TOKENS), atol=1e-5, rtol=1e-4)
    apart = adapter.model.fuse(False)(TOKENS)
    torch.testing.assert_close(apart, other(TOKENS), atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_adapter_alone_and_equal_those_through_the_whole_weight():
    adapter = disturbed(attach(base(), LoRA(3, 6, ("q", "v", "up"))))
    adapter.model(TOKENS).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    trained = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in adapter.model.parameters() if id(p) not in trained)
    merged = disturbed(attach(base(), LoRA(3, 6, ("q", "v", "up"))))
    merged.merge()
    for layer in merged.layers.values():
        layer.base.requires_grad_(True)
    merged.model(TOKENS).square().sum().backward()
    for name, layer in adapter.layers.items():
        whole = merged.layers[name].base.weight.grad
        for part, (target, rows) in enumerate(layer.rows.items()):
            torch.testing.assert_close(
                layer.B[target].grad, 2 * whole[rows] @ layer.A[part].T, rtol=1e-3, atol=1e-3
            )
            torch.testing.assert_close(
                layer.A.grad[part], 2 * layer.B[target].T @ whole[rows], rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_merged_the_logits_are_the_same_and_taken_out_the_model_is_the_old_one(dtype, tolerance):
    model = base(dtype)
    plain = model(TOKENS)
    adapter = disturbed(attach(model, LoRA(4, 4, ALL)))
    beside = model(TOKENS)
    assert (beside - plain).abs().max() > 10 * tolerance
    adapter.merge()
    torch.testing.assert_close(model(TOKENS), beside, atol=tolerance, rtol=tolerance)
    adapter.unmerge()
    with adapter.off():
        torch.testing.assert_close(model(TOKENS), plain, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(model(TOKENS), beside, atol=tolerance, rtol=tolerance)
    adapter.remove()
    assert not any("base" in name for name in model.state_dict())


def test_a_merged_and_removed_adapter_leaves_a_plain_model_that_costs_what_it_did():
    model = base()
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    adapter = disturbed(attach(model, LoRA(2, 2)))
    beside = model(TOKENS)
    adapter.merge()
    adapter.remove()
    assert {name: t.shape for name, t in model.state_dict().items()} == shapes
    torch.testing.assert_close(model(TOKENS), beside, atol=1e-5, rtol=1e-4)


def test_what_is_trained_is_what_the_bill_says():
    lora = LoRA(5, 5, ("q", "o", "gate", "down"), layers=(1,))
    assert attach(base(), lora).n_params == trainable(CONFIG, lora)
    full, thin, small_ = bills(CONFIG, LoRA(2, 4, ALL))
    assert full.total == 16 * CONFIG.n_params
    assert thin.trained == small_.trained == attach(base(), LoRA(2, 4, ALL)).n_params
    assert small_.weights < thin.weights < full.total
    shapes = sizes(CONFIG)
    assert shapes["v"] == (16, 48)
    assert shapes["down"] == (48, 80)


def test_frozen_products_keep_no_inputs_for_backward():
    kept = {}
    for name in ("full", "lora"):
        model = base()
        if name == "full":
            model.requires_grad_(True)
        else:
            attach(model, LoRA(2, 2, ("q",), layers=(0,)))
        with saved_tensors(model) as saved:
            model(TOKENS)
        kept[name] = saved.bytes
    assert kept["lora"] < kept["full"]


def test_training_an_adapter_lowers_the_loss_and_leaves_the_weights():
    text = Text("the quick brown fox jumps over the lazy dog; " * 40)
    model = base(config=small(text.vocab_size, 2))
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    adapter = attach(model, LoRA(4, 8, ALL))
    curve = fit(model, text.batches(batch=8, length=24, seed=0), steps=30, lr=2e-2, weight_decay=0.0)
    assert curve[-1] < curve[0] - 0.3
    adapter.remove()
    for name, t in model.state_dict().items():
        assert torch.equal(t, weights[name])


def test_qlora_trains_over_four_bit_weights_and_is_not_merged_into_them():
    text = Text("the quick brown fox jumps over the lazy dog; " * 40)
    model = quantize_model(base(config=small(text.vocab_size, 2)), Scheme(4, 32))
    assert isinstance(model, Transformer)
    adapter = attach(model, LoRA(4, 8, ALL))
    assert all(isinstance(layer.base, QuantizedLinear) for layer in adapter.layers.values())
    curve = fit(model, text.batches(batch=8, length=24, seed=0), steps=30, lr=2e-2, weight_decay=0.0)
    assert curve[-1] < curve[0] - 0.3
    with pytest.raises(LoRAError, match="quantized"):
        adapter.merge()


def test_ranks_divide_alpha_or_its_root():
    assert LoRA(16, 8).scale == 0.5
    assert LoRA(16, 8, rank_scaled=True).scale == 2


def test_what_cannot_be_done_is_refused():
    model = base()
    with pytest.raises(ModelError, match="projection called 'query'"):
        LoRA(targets=("query",))
    with pytest.raises(ShapeError, match="rank 0"):
        LoRA(r=0)
    with pytest.raises(ModelError, match="no block 3"):
        attach(model, LoRA(layers=(3,)))
    adapter = attach(model, LoRA())
    with pytest.raises(LoRAError, match="already"):
        attach(model, LoRA())
    with pytest.raises(LoRAError, match="not merged"):
        adapter.unmerge()
    adapter.merge()
    with pytest.raises(LoRAError, match="is merged"):
        adapter.merge()


# ── files, and peft ──────────────────────────────────────────────────────────────────────────────────


def test_peft_reads_what_is_saved_here(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = disturbed(attach(base(), LoRA(4, 8, ("q", "v", "o", "up", "down"), layers=(0, 2))))
    adapter_file.save(adapter, tmp_path)
    peer = peft.PeftModel.from_pretrained(llama(base()), str(tmp_path))
    torch.testing.assert_close(peer(TOKENS).logits, adapter.model(TOKENS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank_scaled", [False, True])
def test_what_peft_saves_is_read_here(tmp_path, rank_scaled):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=5,
        lora_alpha=3,
        target_modules=["k_proj", "gate_proj", "q_proj", "o_proj"],
        use_rslora=rank_scaled,
        task_type="CAUSAL_LM",
    )
    peer = peft.get_peft_model(llama(base()), config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    peer.save_pretrained(str(tmp_path))
    adapter = adapter_file.load(base(), tmp_path)
    torch.testing.assert_close(adapter.model(TOKENS), peer(TOKENS).logits, atol=1e-5, rtol=1e-4)


def test_saved_and_loaded_an_adapter_is_the_same_and_a_second_save_changes_no_byte(tmp_path):
    adapter = disturbed(attach(base(), LoRA(4, 8, ALL, rank_scaled=True)))
    folder = adapter_file.save(adapter, tmp_path / "one")
    again = adapter_file.load(base(), folder)
    assert again.lora == adapter.lora
    assert torch.equal(again.model(TOKENS), adapter.model(TOKENS))
    other = adapter_file.save(again, tmp_path / "two")
    for name in (adapter_file.CONFIG, adapter_file.WEIGHTS):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"r": 3}, "of shape"),
        ({"target_modules": ["q_proj"]}, "no place"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing"),
    ],
)
def test_adapters_that_would_be_computed_wrongly_are_refused_and_leave_the_model_alone(
    tmp_path, change, says
):
    adapter_file.save(attach(base(), LoRA(2, 4, ("q", "v"))), tmp_path)
    file = tmp_path / adapter_file.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = base()
    with pytest.raises(ModelError, match=says):
        adapter_file.load(model, tmp_path)
    attach(model, LoRA(2, 4, ("q", "v")))


def test_a_folder_that_is_no_adapter_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        adapter_file.load(base(), tmp_path)
