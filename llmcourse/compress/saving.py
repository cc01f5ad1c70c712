"""A model of this package as a folder: sizes, weights and tokenizer, codes stay codes.

    config.json          {"model_type": "llmcourse", "sizes": {…}, "quantized": {layer: its scheme, …}}
    model.safetensors    weights under this package's names; of a quantized layer packed, scale, zero, bias
    tokenizer.json, chat_template.jinja, generation_config.json

`models.load(folder)` and `LLM(folder)` read it. Scales are stored in 16 bits where these hold them exactly:
what is read back computes the same, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.compress.quantize import TENSOR, Quantized, Scheme, packed_columns
from llmcourse.compress.quantized_linear import QuantizedLinear
from llmcourse.errors import CourseError, DiskError, ModelError
from llmcourse.models.config import ModelConfig
from llmcourse.models.loading import assemble
from llmcourse.models.sizes import HyenaSizes, LatentSizes, RopeScaling, SSMSizes
from llmcourse.models.transformer import Transformer
from llmcourse.text.tokenizer import Tokenizer

KIND = "llmcourse"
PARTS = ("packed", "scale", "zero", "bias")


def save(
    model: Transformer, tokenizer: Tokenizer, folder: str | Path, *, about: Mapping[str, str] | None = None
) -> int:
    """Write a model, quantized or not, as a folder for `models.load`; returns the bytes of its weights.

    about   how it was made (command, data, versions), kept in the metadata of model.safetensors

    The folder appears whole or not at all. Raises DiskError where there is something already, and ModelError
    for a model with layers that the folder could not describe.
    """
    from safetensors.torch import save_file

    folder = Path(folder).expanduser()
    if folder.exists():
        raise DiskError(
            f"{folder} exists already.",
            "A model is written into a folder of its own, and nothing is written over.",
            "another name, or deleting the folder first.",
        )
    schemes, tensors = describe(model)
    config = {"model_type": KIND, "sizes": asdict(model.config), "quantized": schemes}
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:40]}."))
    try:
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt", **(about or {})})
        _write(scratch / "config.json", config)
        _write(scratch / "generation_config.json", {"eos_token_id": list(tokenizer.eos_ids)})
        tokenizer.backend.save(str(scratch / "tokenizer.json"))
        if tokenizer.chat_template is not None:
            (scratch / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(t.nbytes for t in tensors.values())


def describe(model: Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The scheme of every quantized layer, and all tensors that are stored."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    plain = plain_names(model.config)
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings and "head" not in layers:
        tensors.pop("head.weight", None)
        plain.discard("head.weight")
    own = {f"{name}.{part}" for name in layers for part in PARTS}
    known = own | plain
    replaced = {f"{name}.weight" for name in layers} | {f"{name}.bias" for name in layers}
    strange = sorted(tensors.keys() - known) or sorted(plain - tensors.keys() - replaced)
    if strange:
        raise ModelError(
            f"{strange[0]} is no weight of a {model.config.name} and of no quantized layer, or is missing.",
            "A saved folder says how its layers are built, and knows dense and quantized ones only.",
            "saving the model before its layers are replaced, or merging what was added to them.",
        )
    schemes = {
        name: {**asdict(layer.scheme), "shape": [layer.out_features, layer.in_features]}
        for name, layer in layers.items()
    }
    scales = {f"{name}.scale" for name in layers}
    stored = {n: (smallest(t) if n in scales else t).detach().contiguous().cpu() for n, t in tensors.items()}
    return schemes, stored


def plain_names(config: ModelConfig) -> set[str]:
    """Names of the weights of an unquantized model of these sizes."""
    with torch.device("meta"):
        return set(Transformer(config).state_dict())


def smallest(values: Tensor) -> Tensor:
    """The same numbers in 16 bits where these hold them exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return values.to(dtype)
    return values


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `save` wrote."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("model_type") == KIND


def read(folder: Path) -> Transformer:
    """The model in a folder that `save` wrote. Raises ModelError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = sizes_from(fields["sizes"])
        state = load_file(folder / "model.safetensors")
        layers = {name: layer_from(name, about, state) for name, about in fields["quantized"].items()}
        return assemble(config, state, layers)
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, OSError, AttributeError, CourseError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be read ({type(error).__name__}: {error}).",
            "A file of the folder is missing, cut short, or altered.",
            "saving or copying the folder again.",
        ) from error


def sizes_from(fields: Mapping[str, Any]) -> ModelConfig:
    """A configuration from its `asdict`."""
    parts = {"rope_scaling": RopeScaling, "latent": LatentSizes, "ssm": SSMSizes, "hyena": HyenaSizes}
    nested = {n: kind(**fields[n]) for n, kind in parts.items() if fields.get(n) is not None}
    tuples = {n: tuple(fields[n]) for n in ("eos_ids", "layers")}
    return ModelConfig(**{**fields, **nested, **tuples})


def layer_from(name: str, about: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A quantized layer, its tensors taken out of `state`. Raises ModelError for what does not fit."""
    rows, columns = about["shape"]
    scheme = Scheme(**{key: value for key, value in about.items() if key != "shape"})
    groups = [1, 1] if scheme.group == TENSOR else [rows, scheme.groups(columns)]

    def take(part: str, shape: list[int]) -> Tensor:
        got = state.pop(f"{name}.{part}", None)
        if got is None or list(got.shape) != shape or (part == "scale") != got.is_floating_point():
            found = "missing" if got is None else f"{str(got.dtype).removeprefix('torch.')} {list(got.shape)}"
            raise ModelError(
                f"{name}.{part} is {found}; {scheme} of {rows} × {columns} asks for {shape}.",
                "The schemes in config.json and the tensors in model.safetensors do not belong together.",
                "saving or copying the folder again.",
            )
        return got

    packed, scale = take("packed", [rows, packed_columns(columns, scheme.bits)]), take("scale", groups)
    zero = None if scheme.symmetric else take("zero", groups)
    quantized = Quantized.from_packed(packed, scale, zero, scheme, (rows, columns))
    return QuantizedLinear(quantized, state.pop(f"{name}.bias", None))


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
