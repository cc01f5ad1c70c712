"""`load()`: a model and its tokenizer, from the course's own asset or from a local checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llmcourse.errors import DeviceError, ModelError
from llmcourse.models.config import ModelConfig
from llmcourse.models.gguf_file import read_gguf, read_gguf_fields
from llmcourse.models.safetensors_folder import read_folder
from llmcourse.models.transformer import Transformer
from llmcourse.text.tokenizer import Tokenizer


def load(
    path: str | Path | None = None, *, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, ready to run.

    path     None: the course's SmolLM2-135M-Instruct (fetched once, then cached). Otherwise a GGUF
             file of architecture llama, a Llama/Mistral/Qwen2/Qwen3 safetensors folder, or a folder
             that `compress.saving.save` wrote, whose quantized layers stay quantized.
    device   cpu, cuda, or auto (cuda where there is one)
    dtype    float32, bfloat16, float16, or auto (bfloat16 on cuda, float32 on cpu)

    Raises ModelError, AssetError or DeviceError, each saying what came and what to try.
    """
    place = resolve_device(device)
    number = resolve_dtype(dtype, place)
    path = _place_of(path)
    if path.is_dir() and (own := _saved(path)) is not None:
        return own.to(place, number).eval().requires_grad_(False), Tokenizer.from_folder(path)
    if path.is_dir():
        config, state = read_folder(path)
        tokenizer = Tokenizer.from_folder(path)
    elif path.is_file():
        config, state, fields = read_gguf(path)
        tokenizer = Tokenizer.from_gguf(fields)
    else:
        raise _nothing_at(path)
    return assemble(config, state).to(place, number).eval().requires_grad_(False), tokenizer


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """A model's tokenizer without its weights. `path` and errors as in `load`."""
    path = _place_of(path)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    if not path.is_file():
        raise _nothing_at(path)
    return Tokenizer.from_gguf(read_gguf_fields(path))


def _place_of(path: str | Path | None) -> Path:
    if path is None:
        from llmcourse.assets import model_path

        path = model_path()
    return Path(path).expanduser()


def _nothing_at(path: Path) -> ModelError:
    return ModelError(
        f"there is no model at {path}.",
        "A model is a .gguf file, or a folder with config.json, tokenizer.json and *.safetensors.",
        "a path that exists; without one, the course's own model is used.",
    )


def _saved(folder: Path) -> Transformer | None:
    """The model in a folder that this package wrote; None for another's folder."""
    from llmcourse.compress import saving

    return saving.read(folder) if saving.is_saved(folder) else None


def assemble(
    config: ModelConfig, state: dict[str, torch.Tensor], layers: Mapping[str, nn.Module] | None = None
) -> Transformer:
    """A model of these sizes around these weights, which are neither copied nor moved.

    layers   modules that stand in the place of some of its own, by name, with the weights they have

    Raises ModelError that names the first weight that is missing, has another shape, or has no place.
    """
    with torch.device("meta"):
        model = Transformer(config)
    model.rope = type(model.rope)(config)  # its tables are no weights: they are made, not read
    layers = layers or {}
    for name in layers:
        model.set_submodule(name, nn.Identity())
    tied = config.tie_embeddings and "head" not in layers
    if tied and "embedding.weight" in state:
        state = state | {"head.weight": state["embedding.weight"]}
    check_shapes(config, model, state)
    model.load_state_dict(state, assign=True)
    for name, module in layers.items():
        model.set_submodule(name, module)
    if tied:
        model.head.weight = model.embedding.weight
    return model


def random_model(
    config: ModelConfig, *, device: str = "cpu", dtype: str | torch.dtype = "auto"
) -> Transformer:
    """A model of these sizes with random weights: right for timing, its text means nothing."""
    place = resolve_device(device)
    with torch.device(place):
        model = Transformer(config).to(resolve_dtype(dtype, place))
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


def check_shapes(config: ModelConfig, model: Transformer, state: dict[str, torch.Tensor]) -> None:
    """Name the first weight that is missing, has another shape than the sizes say, or has no place there."""
    wanted = model.state_dict()
    for name, want in wanted.items():
        got = state.get(name)
        if got is None or got.shape != want.shape:
            found = "missing" if got is None else f"of shape {list(got.shape)}"
            raise ModelError(
                f"the weight {name} is {found}; the sizes of {config.name} ask for {list(want.shape)}.",
                "The configuration and the weights do not belong together, or a file is incomplete.",
                "downloading the checkpoint again.",
            )
        if not got.is_floating_point() or got.itemsize < 2:
            raise ModelError(
                f"the weight {name} is stored as {str(got.dtype).removeprefix('torch.')}.",
                "Such numbers stand for others by scales, which are not applied here.",
                "a checkpoint in bfloat16, float16 or float32.",
            )
    if left := sorted(state.keys() - wanted.keys()):
        raise ModelError(
            f"the weight {left[0]} has no place in a model of the sizes of {config.name}.",
            "Left out, the model would compute something else than the one it was trained in.",
            "the configuration that belongs to the weights.",
        )


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device 'cuda' was asked for, and PyTorch sees no NVIDIA GPU.",
            f"This is PyTorch {torch.__version__}: a CPU build, no driver and no GPU all look like this.",
            "device='cpu' (every chapter runs there), or `llmcourse doctor` to see what is missing.",
        )
    return torch.device(device)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise DeviceError(
            f"dtype {dtype!r} is not a number format that the model runs in.",
            f"Known formats: {', '.join(names)}.",
            "dtype='bfloat16' to halve the bytes, 'float32' for the reference.",
        )
    return names[dtype]
