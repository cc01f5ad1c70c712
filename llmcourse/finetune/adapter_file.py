"""Adapters on disk, in the format of Hugging Face's peft: megabytes beside a model of gigabytes.

    folder/adapter_config.json          what is adapted: rank, alpha, projections, blocks
    folder/adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight, …

peft has an A and a B for every projection, as here; only the names differ, and that we keep the As of a
stacked weight together. Rotary pairs lie in halves in both (features i and i + D/2 of a head), so that the
rows of q and k mean the same. What is read was checked: a feature that these layers would compute wrongly
(DoRA, biases, ranks that differ between layers) is refused, never left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from llmcourse.errors import ModelError
from llmcourse.files import write_whole
from llmcourse.finetune.lora import PLACES, Adapter, LoRA, LoRALinear, attach
from llmcourse.models import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
"""Our projections under the names of Hugging Face's Llama."""
OTHER_MATHEMATICS = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "use_qalora": False,
    "exclude_modules": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "arrow_config": None,
}
"""Settings of peft that change what is computed, with the value at which they do not."""


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """A [r, K] and B [M, r] of every projection under peft's names."""
    out = {}
    for name, layer in adapter.layers.items():
        for part, target in enumerate(layer.rows):
            module = _module(name, target)
            out[f"{module}.lora_A.weight"] = layer.A[part].detach().clone()
            out[f"{module}.lora_B.weight"] = layer.B[target].detach().clone()
    return out


def _module(layer: str, target: str) -> str:
    return f"base_model.model.model.layers.{layer.split('.')[1]}.{MODULES[target]}"


def config_of(adapter: Adapter) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    lora = adapter.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.model.config.name,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "target_modules": [MODULES[t].split(".")[1] for t in lora.targets],
        "layers_to_transform": list(lora.layers) or None,
        "use_rslora": lora.rank_scaled,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "bias": "none",
    }


def save(adapter: Adapter, folder: str | Path) -> Path:
    """Write an adapter into a folder, each file whole or not at all. Gives the folder."""
    folder = Path(folder)
    write_whole(folder / WEIGHTS, serialized(tensors(adapter), metadata={"format": "pt"}))
    write_whole(folder / CONFIG, json.dumps(config_of(adapter), indent=2, sort_keys=True) + "\n")
    return folder


def load(model: Transformer, folder: str | Path) -> Adapter:
    """Attach a saved adapter to a model, whoever saved it.

    Raises ModelError for a folder that is no adapter, one of other mathematics, or one of another model.
    """
    config, found = read(folder)
    adapter = attach(model, config)
    try:
        _fill(adapter, found)
    except ModelError:
        adapter.remove()
        raise
    return adapter


def read(folder: str | Path) -> tuple[LoRA, dict[str, Tensor]]:
    """What an adapter's folder holds: its sizes, and its tensors under peft's names."""
    folder = Path(folder)
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be read as an adapter ({error}).",
            f"An adapter is a folder with {CONFIG} and {WEIGHTS}.",
            "the folder that save, or peft's save_pretrained, has written.",
        ) from error
    return lora_of(fields if isinstance(fields, dict) else {}), found


def lora_of(fields: dict[str, Any]) -> LoRA:
    """The settings in an adapter_config.json. Raises ModelError for what would be computed wrongly."""
    if fields.get("peft_type") != "LORA":
        raise ModelError(
            f"this is an adapter of type {fields.get('peft_type')}.",
            "LoRA's A and B are read here, and nothing else.",
            "an adapter whose peft_type is LORA.",
        )
    for name, plain in OTHER_MATHEMATICS.items():
        if fields.get(name, plain) not in (plain, None, False, [], {}):
            raise ModelError(
                f"the adapter was trained with {name} = {fields[name]!r:.60}.",
                "These layers know y = W·x + s·B·A·x with one rank and one s, and would compute another.",
                "merging it with peft (merge_and_unload), and loading the merged model.",
            )
    names = {module.split(".")[1]: target for target, module in MODULES.items()}
    wanted = fields.get("target_modules")
    if not isinstance(wanted, list) or not set(wanted) <= set(names):
        raise ModelError(
            f"the adapter's target_modules are {wanted!r:.80}.",
            f"Known projections: {', '.join(names)}.",
            "an adapter of these, given as a list.",
        )
    layers = fields.get("layers_to_transform")
    layers = (layers,) if isinstance(layers, int) else tuple(layers or ())
    targets = tuple(t for t in PLACES if t in {names[w] for w in wanted})
    return LoRA(fields["r"], fields["lora_alpha"], targets, layers, bool(fields.get("use_rslora")))


@torch.no_grad()
def _fill(adapter: Adapter, found: dict[str, Tensor]) -> None:
    """Put tensors under peft's names into the layers; every one must have its place and its shape."""
    left = dict(found)
    for name, layer in adapter.layers.items():
        for part, target in enumerate(layer.rows):
            _copy(layer, part, target, _module(name, target), left)
    if left:
        raise ModelError(
            f"the tensor {min(left)} has no place in {adapter.model.config.name}.",
            "Left out, the adapter would be another than the one that was trained.",
            "the model that it was trained for.",
        )


def _copy(layer: LoRALinear, part: int, target: str, module: str, left: dict[str, Tensor]) -> None:
    for kind, to in (("A", layer.A[part]), ("B", layer.B[target])):
        got = left.pop(f"{module}.lora_{kind}.weight", None)
        if got is None or got.shape != to.shape:
            what = "missing" if got is None else f"of shape {list(got.shape)}"
            raise ModelError(
                f"the tensor {module}.lora_{kind}.weight is {what}; the model asks for {list(to.shape)}.",
                "An adapter belongs to the model that it was trained for.",
                "that model, or a complete folder.",
            )
        to.copy_(got)
