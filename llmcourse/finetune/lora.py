"""LoRA: a frozen matrix and a trained correction of low rank beside it (Hu et al. 2021, arXiv:2106.09685).

    y = W·x + s·B·(A·x)          W [M, K] frozen   A [r, K]   B [M, r]   s = alpha / r

Trained are r·(M + K) numbers in place of M·K, and gradient, optimizer state and saved file shrink with them.
What does not shrink: the forward pass, and the activations that lie on the way to the adapters.

The frozen matrix has no gradient and no optimizer state, so nothing forbids to keep it in four bits: QLoRA
(Dettmers et al. 2023, arXiv:2305.14314) is `attach` on a model of `compress.quantize_model`, whose
layers pass gradients through to x.

B begins as zeros, so that the first step starts from the model as it was; A begins random, because two
zero factors would give each other no gradient. s divides by r so that another rank needs no other learning
rate: under Adam every entry of B moves by the same amount, and r terms are summed
(`LoRA(rank_scaled=True)` divides by √r: Kalajdzievski 2023, arXiv:2312.03732).

    adapter = attach(model, LoRA(r=8, alpha=16, targets=("q", "v")), seed=0)
    fit(model, batches, steps=40, lr=3e-3, loss=sft_loss)
    adapter.merge()              # W + s·B·A in place of W: no cost at inference

Our models stack Q, K, V and gate, up in one weight. An adapter still has an A and a B for each projection, as
peft's has: the As are stacked too and read x once, and each B adds to its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from llmcourse.errors import CourseError, ModelError, ShapeError
from llmcourse.models import Transformer

PLACES = {
    "q": ("mixer.qkv", 0),
    "k": ("mixer.qkv", 1),
    "v": ("mixer.qkv", 2),
    "o": ("mixer.out", 0),
    "gate": ("mlp.gate_up", 0),
    "up": ("mlp.gate_up", 1),
    "down": ("mlp.down", 0),
}
"""The projections of a block: the layer that holds each, and which of the parts stacked there it is."""


class LoRAError(CourseError, RuntimeError):
    """An adapter that cannot be put on, merged or taken off as things are."""


@dataclass(frozen=True)
class LoRA:
    """What is adapted, and by how much.

    r            rank of each correction
    alpha        its weight: s = alpha / r
    targets      projections of a block: q, k, v, o, gate, up, down
    layers       numbers of the blocks; empty: all
    rank_scaled  s = alpha / √r
    """

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    layers: tuple[int, ...] = ()
    rank_scaled: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(t for t in PLACES if t in self.targets or _unknown(self)))
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.r < 1 or not self.targets:
            raise ShapeError(
                f"rank {self.r} for {len(self.targets)} projections.",
                "A correction of rank 0 is none, and so is one of no projection.",
                'r=8, targets=("q", "v").',
            )

    @property
    def scale(self) -> float:
        """s, by which the correction is multiplied."""
        return self.alpha / (math.sqrt(self.r) if self.rank_scaled else self.r)


def _unknown(lora: LoRA) -> bool:
    """False; raises for a target that no block has."""
    if strange := [t for t in lora.targets if t not in PLACES]:
        raise ModelError(
            f"a block has no projection called {strange[0]!r}.",
            f"Its projections are {', '.join(PLACES)}.",
            "one or more of these.",
        )
    return False


class LoRALinear(nn.Module):
    """A frozen linear layer with a correction beside it.

    base    Linear, or a quantized layer;  rows  for each projection the rows of the weight that it is
    A [P, r, K], one for each of P projections;  B[name] [rows of the projection, r].  Both float32: what a
    small learning rate adds to a bfloat16 number is mostly rounded away (notebook 12)
    """

    def __init__(self, base: nn.Module, rows: dict[str, slice], lora: LoRA) -> None:
        super().__init__()
        wide, device = _sizes(base)[1], _device(base)
        self.base, self.rows, self.r, self.scale = base, rows, lora.r, lora.scale
        self.A = nn.Parameter(torch.empty(len(rows), lora.r, wide, device=device))
        self.B = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(s.stop - s.start, lora.r, device=device))
                for name, s in rows.items()
            }
        )
        self.merged, self.on = False, True

    def reset(self, generator: torch.Generator) -> None:
        """A from the uniform distribution on ±1/√K, by which peft begins too; B zero."""
        with torch.no_grad():
            for part in self.A:
                drawn = torch.rand(part.shape, generator=generator) * 2 - 1
                part.copy_(drawn / math.sqrt(part.shape[1]))
            for b in self.B.values():
                b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., M]: two thin products beside the frozen one, and never B·A."""
        y = cast(Tensor, self.base(x))
        if self.merged or not self.on:
            return y
        down = x.to(self.A.dtype) @ self.A.flatten(0, 1).T  # [..., P·r], x read once for all parts
        pieces, at = [], 0
        for part, (name, rows) in zip(down.split(self.r, dim=-1), self.rows.items(), strict=True):
            correction = (part * self.scale) @ self.B[name].T
            pieces += [y[..., at : rows.start], y[..., rows] + correction.to(y.dtype)]
            at = rows.stop
        pieces = [piece for piece in (*pieces, y[..., at:]) if piece.shape[-1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def delta(self) -> Tensor:
        """s·B·A in the rows of each projection, zero elsewhere: [M, K] float32."""
        out = torch.zeros(_sizes(self.base), device=self.A.device)
        for a, (name, rows) in zip(self.A, self.rows.items(), strict=True):
            out[rows] = self.scale * (self.B[name] @ a)
        return out

    @property
    def weight(self) -> Tensor:
        """The weight that this layer stands for [M, K]; what runs projections apart takes slices of it."""
        weight = cast(Tensor, self.base.weight)
        return weight if self.merged or not self.on else (weight.float() + self.delta()).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.base, "bias", None))

    @torch.no_grad()
    def add(self, sign: int) -> None:
        """Add the correction to the weight itself (+1) or take it away (−1), rounded once."""
        weight = cast(Tensor, self.base.weight)
        weight.copy_((weight.float() + sign * self.delta()).to(weight.dtype))
        self.merged = sign > 0


class Adapter:
    """All corrections of one model, from `attach` until `remove`. `layers`: LoRALinear by the base's name."""

    def __init__(self, model: Transformer, lora: LoRA, layers: dict[str, LoRALinear]) -> None:
        self.model, self.lora, self.layers = model, lora, layers

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of every layer: what is trained."""
        for layer in self.layers.values():
            yield from (layer.A, *layer.B.values())

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def merged(self) -> bool:
        return any(layer.merged for layer in self.layers.values())

    def merge(self) -> None:
        """Put s·B·A into the weights: the same outputs up to rounding, by the frozen products alone.

        Raises LoRAError for merged adapters, and for quantized weights, on whose grid most of it is lost.
        """
        self._stands(merged=False, doing="merged")
        for name, layer in self.layers.items():
            if is_quantized(layer.base):
                raise LoRAError(
                    f"{name} is quantized, and an adapter cannot be merged into it.",
                    "A correction is smaller than the steps between the weight's few levels: rounding would "
                    "undo most of it.",
                    "serving the adapter beside the weights, or merging into the model before quantization.",
                )
        for layer in self.layers.values():
            layer.add(+1)

    def unmerge(self) -> None:
        """Take s·B·A out again: the weights of before, up to the rounding of one sum and one difference."""
        self._stands(merged=True, doing="taken out")
        for layer in self.layers.values():
            layer.add(-1)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The frozen model alone inside the `with`: a reference that costs no second copy of it."""
        self._stands(merged=False, doing="turned off")
        for layer in self.layers.values():
            layer.on = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.on = True

    def remove(self) -> None:
        """Put the plain layers back into the model. What was merged stays."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base)

    def _stands(self, *, merged: bool, doing: str) -> None:
        if self.merged != merged:
            raise LoRAError(
                f"the adapter is {'' if self.merged else 'not '}merged, and cannot be {doing}.",
                "Merged, it is part of the weights; until then it stands beside them.",
                "adapter.unmerge() first." if self.merged else "adapter.merge() first.",
            )


def attach(model: Transformer, lora: LoRA, *, seed: int = 0) -> Adapter:
    """Freeze the model and put fresh corrections beside its projections. Its outputs are as before.

    The model is changed in place, and `Adapter.remove` changes it back. Layers may be quantized (QLoRA).

    Raises ModelError when a layer or projection is not there, LoRAError when one has an adapter already.
    """
    blocks = lora.layers or tuple(range(len(model.blocks)))
    if wrong := [i for i in blocks if not 0 <= i < len(model.blocks)]:
        raise ModelError(
            f"there is no block {wrong[0]}.", f"The model has {len(model.blocks)}, from 0.", "one of them."
        )
    model.requires_grad_(False)
    generator, layers = torch.Generator().manual_seed(seed), {}
    for i in blocks:
        for path, rows in _rows(model.blocks[i], lora.targets).items():
            name = f"blocks.{i}.{path}"
            base = model.get_submodule(name)
            if hasattr(base, "on_rows") or isinstance(base, LoRALinear):
                raise LoRAError(
                    f"{name} has an adapter already.",
                    "A second one would train on top of the first.",
                    "adapter.remove() first, after adapter.merge() to keep it.",
                )
            layers[name] = LoRALinear(base, rows, lora)
            layers[name].reset(generator)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return Adapter(model, lora, layers)


def _rows(block: nn.Module, targets: tuple[str, ...]) -> dict[str, dict[str, slice]]:
    """The layers of a block that hold targets, and the rows of each target in its layer."""
    out: dict[str, dict[str, slice]] = {}
    for target in targets:
        path, part = PLACES[target]
        try:
            layer = block.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"this block has no layer {path}, which would hold {target!r}.",
                "Adapters go to the projections of attention and of the SwiGLU layer.",
                "layers=(…), the numbers of blocks that have it, or other targets.",
            ) from None
        total = _sizes(layer)[0]
        sizes = {"mixer.qkv": getattr(block.mixer, "sizes", ()), "mlp.gate_up": [total // 2] * 2}
        ends = torch.tensor([0, *sizes.get(path, [total])]).cumsum(0).tolist()
        out.setdefault(path, {})[target] = slice(ends[part], ends[part + 1])
    return out


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(M, K) of a linear layer, quantized or not."""
    if isinstance(layer, LoRALinear):
        return _sizes(layer.base)
    return int(cast(int, layer.out_features)), int(cast(int, layer.in_features))


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is kept as codes (`compress.quantized_linear.QuantizedLinear`)."""
    return not isinstance(layer, nn.Linear)


def _device(layer: nn.Module) -> torch.device:
    return next(iter((*layer.parameters(), *layer.buffers()))).device
