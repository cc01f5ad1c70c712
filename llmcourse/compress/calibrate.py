"""What the linear layers of a model see: the statistics that compression methods decide by.

Rounding or removing a weight changes a layer's output y = W x by an amount that depends on the inputs: an
error in column k costs nothing where x_k is always zero and a lot where it is large. The expected squared
error of the output, summed over a text's tokens, is

    Σ ‖W x − Ŵ x‖² = tr((W − Ŵ) G (W − Ŵ)ᵀ)        G = Σ x xᵀ   [K, K], the Gram matrix

so G is all that a method needs to know of a text, however long. Its diagonal holds the squared norms of the
columns (Wanda), and it is half the Hessian of the layer's squared error (GPTQ, SparseGPT). Kept beside it are
each feature's largest magnitude (SmoothQuant, LLM.int8) and mean magnitude (AWQ).

Two ways to collect them:

    calibrate                  once, with the whole model as it is
    block_by_block             one block at a time, each behind the blocks already compressed, so that it is
                               fitted to the inputs it will really get, and one block's Gram matrices are in
                               memory at a time (as GPTQ's and SparseGPT's authors do)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.models.transformer import Transformer

HEAD = "head"


@dataclass
class Inputs:
    """Sums over the rows x [K] that came into one linear layer.

    gram      Σ x xᵀ [K, K], float32 unless asked otherwise
    absmax    largest |x_k| [K]
    abssum    Σ |x_k| [K]
    count     rows
    """

    gram: Tensor
    absmax: Tensor
    abssum: Tensor
    count: int

    @classmethod
    def empty(
        cls, features: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Inputs:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(zeros(features, features), zeros(features), zeros(features), 0)

    @classmethod
    def of(cls, x: Tensor, *, dtype: torch.dtype = torch.float32) -> Inputs:
        """The statistics of rows x [..., K]."""
        return cls.empty(x.shape[-1], device=x.device, dtype=dtype).add(x)

    @property
    def absmean(self) -> Tensor:
        """Mean |x_k| [K]."""
        return self.abssum / max(1, self.count)

    @property
    def norm(self) -> Tensor:
        """‖x_k‖₂ of each feature over all rows [K]."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @torch.no_grad()
    def add(self, x: Tensor) -> Inputs:
        """Count rows x [..., K] in."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.gram.dtype)
        if rows.shape[1] != len(self.absmax):
            raise ShapeError(
                f"rows of {rows.shape[1]} features came to statistics of {len(self.absmax)}.",
                "The inputs of one layer all have its width.",
                "one Inputs for each layer.",
            )
        if len(rows):
            magnitude = rows.abs()
            self.gram.addmm_(rows.T, rows)
            torch.maximum(self.absmax, magnitude.amax(0), out=self.absmax)
            self.abssum += magnitude.sum(0)
            self.count += len(rows)
        return self

    def error(self, change: Tensor) -> float:
        """Σ ‖change · x‖² over the rows seen, for a change [N, K] of the layer's weight."""
        change = change.to(self.gram.dtype)
        return float(((change @ self.gram) * change).sum())


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model's blocks by name, in the order of the blocks; not the output head.

    The head of a small model is its embedding, a table to look up and a product in one, and stays as it is.
    """
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: module for name, module in found if name.rpartition(".")[2] != HEAD}


@torch.no_grad()
def calibrate(
    model: Transformer,
    tokens: Tensor,
    names: Iterable[str] | None = None,
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Inputs]:
    """The statistics of every linear layer's inputs while the model reads tokens [B, S].

    names   layers to watch; all of `layers_of` unless given. Layers that never run are left out.
    rows    sequences that are read at once
    dtype   the sums are kept in

    Memory   K² numbers a layer: 0.4 GB for the real model in float32.
    Raises   UnknownNameError for a name that is no linear layer's, ShapeError as the model does.
    """
    with _watched(_chosen(model, names), dtype) as seen, _fused(model):
        for part in tokens.split(rows):
            model(part.to(model.device), last_only=True)
    return dict(seen)


Compress = Callable[[str, nn.Linear, Inputs], Tensor | None]
"""(name, layer, its inputs) → the weight [N, K] to go on with, or None to leave the layer alone."""


@torch.no_grad()
def block_by_block(
    model: Transformer,
    tokens: Tensor,
    compress: Compress,
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Replace the weights of a model's linear layers in place, from the first block to the last.

    Each block is watched while tokens [B, S] go through it; `compress` then gives the new weights, and the
    tokens go through it once more, so that the next block sees what the new weights make of them.
    """
    parts = [part.to(model.device) for part in tokens.split(rows)]
    steps = [model.plan(part, None) for part in parts]
    streams = [
        model.positions(model.embedding(part), step.position_ids)
        for part, step in zip(parts, steps, strict=True)
    ]
    with _fused(model):
        for i, block in enumerate(model.blocks):
            layers = {f"blocks.{i}.{name}": layer for name, layer in layers_of(block).items()}
            with _watched(layers, dtype) as seen:
                for x, step in zip(streams, steps, strict=True):
                    block(x, step, None)
            for name, inputs in seen.items():
                weight = compress(name, layers[name], inputs)
                if weight is not None:
                    layers[name].weight.copy_(weight)
            streams = [block(x, step, None) for x, step in zip(streams, steps, strict=True)]


def _chosen(model: nn.Module, names: Iterable[str] | None) -> Mapping[str, nn.Linear]:
    layers = layers_of(model)
    if names is None:
        return layers
    wanted = list(names)
    if unknown := [name for name in wanted if name not in layers]:
        raise UnknownNameError(
            f"there is no linear layer called {unknown[0]!r}.",
            f"The model has {len(layers)}, e.g. {', '.join(list(layers)[:4])}.",
            "one of layers_of(model).",
        )
    return {name: layers[name] for name in wanted}


@contextmanager
def _watched(layers: Mapping[str, nn.Linear], dtype: torch.dtype) -> Iterator[dict[str, Inputs]]:
    """Statistics of what comes into these layers inside the `with`, by name, in the order of first use."""
    seen: dict[str, Inputs] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in seen:
                seen[name] = Inputs.empty(x.shape[-1], device=x.device, dtype=dtype)
            seen[name].add(x)

        return hook

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _fused(model: Transformer) -> Iterator[None]:
    """Stacked projections run as one layer inside the `with`: apart, they would go around it."""
    before = {m: m.fused for m in model.modules() if hasattr(m, "fused")}
    model.fuse(True)
    try:
        yield
    finally:
        for module, fused in before.items():
            module.fused = fused  # type: ignore[assignment]
