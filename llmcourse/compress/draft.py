"""A draft model: what speculative decoding guesses with. Its shape, its first weights, and its file.

A draft must speak its target's vocabulary, and for a small model that is the largest part: 49,152 embeddings
of 256 numbers are 12.6 million parameters, four blocks of that width 3 million. So

* embedding and output head are one matrix, and it does not begin at random: the target's embedding is turned
  so that its first 256 directions hold most of it (by SVD), and the rest is cut off;
* the file stores every matrix in INT8 with a scale a row. `load_draft` makes an ordinary `Transformer` of
  them, which runs wherever any model runs.

The file is one .safetensors; its metadata say by which command, from which texts and with which versions it
was made, and the acceptance rates that were measured then. The tokenizer is the target's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcourse.compress.quantize import Quantized, Scheme, quantize
from llmcourse.errors import ModelError, ShapeError
from llmcourse.files import write_whole
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.loading import assemble, resolve_device, resolve_dtype
from llmcourse.train.fit import build

DRAFT = Path(__file__).parent / "draft.safetensors"
"""The draft that is shipped, made by `llmcourse bench distill --device cuda`."""

FORMAT = "llmcourse draft 1"
BYTES = Scheme(8)
SIZES = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_len")
KEPT = (*SIZES, "rope_theta", "norm_eps", "eos_ids", "name")


def draft_config(
    target: ModelConfig, *, width: int = 256, layers: int = 4, d_ff: int = 704, max_len: int = 2048
) -> ModelConfig:
    """Sizes of a draft for `target`: its vocabulary, its heads' width, two query heads a key/value head."""
    heads = max(1, width // target.head_dim)
    return ModelConfig(
        vocab_size=target.vocab_size,
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=max(1, heads // 2) if heads % 2 == 0 else heads,
        head_dim=target.head_dim,
        d_ff=d_ff,
        max_len=min(max_len, target.max_len),
        rope_theta=target.rope_theta,
        norm_eps=1e-5,
        eos_ids=target.eos_ids,
        name=f"draft of {layers} × {width}",
    )


def directions(embedding: Tensor, width: int) -> tuple[Tensor, float]:
    """The `width` directions [E, width] that hold most of an embedding [V, E], and the share that they hold.

    They are its first right singular vectors; the share is that of the sum of squares.
    """
    if not 1 <= width <= embedding.shape[1]:
        raise ShapeError(
            f"{width} directions of an embedding of width {embedding.shape[1]}.",
            "Cutting leaves fewer directions than there were.",
            f"a width from 1 to {embedding.shape[1]}.",
        )
    e = embedding.double()
    values, vectors = torch.linalg.eigh(e.T @ e)  # of the Gram matrix [E, E]: V need not go through an SVD
    kept = vectors[:, -width:].flip(1)
    return kept.to(embedding.dtype), float(values[-width:].sum() / values.sum())


def initial_draft(target: Transformer, config: ModelConfig, *, seed: int = 0) -> Transformer:
    """A draft to be trained: blocks at random, embedding cut from the target's, in float32."""
    draft = build(Transformer, config, seed=seed)
    embedding = target.embedding.weight.detach().float()
    turned, _ = directions(embedding, config.d_model)
    with torch.no_grad():
        draft.embedding.weight.copy_((embedding @ turned).cpu())
        for name, weight in draft.named_parameters():
            if name.endswith(("mixer.out.weight", "mlp.down.weight")):
                weight.div_((2 * config.n_layers) ** 0.5)  # 2·L parts are added to the stream
        for gain in draft.norm.parameters():
            gain.fill_(0.3)  # at 1 the first logits would be as far apart as the target's, and mean nothing
    return draft.to(target.device)


# ------------------------------------------------------------------ the file


def save_draft(draft: Transformer, path: Path, *, about: dict[str, Any]) -> int:
    """Write a draft, matrices in INT8, and what is to be known `about` it. Returns the file's bytes.

    The file is there whole or not at all. Raises ShapeError for a model that such a file cannot hold.
    """
    from safetensors.torch import save

    config = draft.config
    if ModelConfig(**{name: getattr(config, name) for name in KEPT}) != config:
        raise ShapeError(
            f"{config.name} is more than a Llama-like model with tied embeddings.",
            "A draft's file keeps its sizes and nothing else.",
            f"a configuration that differs from the defaults in {', '.join(SIZES)} alone.",
        )
    tensors: dict[str, Tensor] = {}
    for name, weight in draft.named_parameters():
        if weight.dim() == 2:
            stored = quantize(weight.detach().float().cpu(), BYTES)
            tensors[f"{name}.codes"], tensors[f"{name}.scale"] = (
                stored.codes.contiguous(),
                stored.scale.contiguous(),
            )
        else:
            tensors[name] = weight.detach().float().cpu().contiguous()
    sizes = {name: getattr(config, name) for name in KEPT}
    metadata = {"format": FORMAT, "config": json.dumps(sizes)}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    data = save(tensors, metadata)
    write_whole(path, data)
    return len(data)


def load_draft(
    path: Path | str | None = None, *, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> Transformer:
    """The draft in a file (None: the one that is shipped), as an ordinary model, ready to run.

    Raises ModelError where there is none, or the file is not a draft's.
    """
    place = resolve_device(device)
    config, tensors = _read(Path(path) if path is not None else DRAFT)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".codes"):
            stem = name.removesuffix(".codes")
            rows, columns = tensor.shape
            stored = Quantized(tensor, tensors[f"{stem}.scale"], None, BYTES, (rows, columns))
            state[stem] = stored.dequantize()
        elif not name.endswith(".scale"):
            state[name] = tensor
    return assemble(config, state).to(place, resolve_dtype(dtype, place)).eval().requires_grad_(False)


def about_draft(path: Path | str | None = None) -> dict[str, Any]:
    """What a draft's file says of itself: command, date, versions, texts, acceptance, bytes."""
    path = Path(path) if path is not None else DRAFT
    metadata = _metadata(path)
    known: dict[str, Any] = {"bytes": path.stat().st_size}
    for key, text in metadata.items():
        try:
            known[key] = json.loads(text)
        except ValueError:
            known[key] = text
    return known


def has_draft(path: Path | None = None) -> bool:
    """Whether the draft is there: it is made on a GPU, and a copy of the course may be without it."""
    return (path or DRAFT).is_file()


def _read(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    from safetensors import safe_open

    metadata = _metadata(path)
    try:
        sizes = json.loads(metadata["config"])
        config = ModelConfig(**{**sizes, "eos_ids": tuple(sizes["eos_ids"])})
    except (KeyError, TypeError, ValueError) as error:
        raise _not_a_draft(path, f"its sizes cannot be read ({error})") from error
    with safe_open(path, framework="pt") as file:
        return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelError(
            f"there is no draft at {path}.",
            "A draft is distilled from the course's model on a GPU, in a few minutes.",
            "llmcourse bench distill --device cuda --out FOLDER, or the path of a draft that you have.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise _not_a_draft(path, str(error)) from error
    if metadata.get("format") != FORMAT:
        raise _not_a_draft(path, f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    return metadata


def _not_a_draft(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path} is not a draft's file: {what}.",
        "Such a file holds INT8 matrices with their scales, and its sizes in its metadata.",
        "a file that `llmcourse bench distill` wrote; other checkpoints go through models.load.",
    )
