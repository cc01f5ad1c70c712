"""Looking into attention: the weights that a model's own queries and keys give, and the habits of its heads.

Attention kernels never store their weights. Here they are worked out again from the module's own projections,
for as long as a picture needs them: [L, Hq, S, S] numbers, which is why nothing that serves a model does so.

Four patterns that heads of trained decoders are known to follow, each scored as the mean weight of a query on
the keys of the pattern, from 0 to 1:

    previous    the token before (Elhage et al. 2021, "A mathematical framework for transformer circuits")
    first       the first token, where heads with nothing to say leave their weight (Xiao et al. 2023,
                arXiv:2309.17453: the attention sink)
    local       one of the four tokens before, the nearest left out
    induction   the token after an earlier occurrence of this one (Olsson et al. 2022, arXiv:2209.11895)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models.attention import Attention, WindowAttention
from llmcourse.models.encoder_decoder import CrossAttention, CrossState
from llmcourse.models.step import Step
from llmcourse.models.transformer import Transformer

PATTERNS = ("previous", "first", "local", "induction")
LOCAL = 4  # tokens back that still count as near


@dataclass(frozen=True)
class Head:
    """What one head does: its scores by pattern, and the pattern that has most of its weight, if one has."""

    layer: int
    head: int
    scores: dict[str, float] = field(hash=False)

    @property
    def kind(self) -> str:
        """The pattern with the largest score; "mixed" where none has 0.4 of the weight."""
        best = max(self.scores, key=self.scores.__getitem__)
        return best if self.scores[best] >= 0.4 else "mixed"


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Tensor, cross: bool = False) -> Tensor:
    """The attention weights of every layer and head for one sequence: [L, Hq, S, T], rows summing to 1.

    model    any model of this package whose layers are attention (full or windowed)
    inputs   what it is called with, a batch of one: `attention_maps(model, tokens)`
    cross    the decoder's weights on the source, of an encoder-decoder, instead of each stack's on itself

    Layers of other kinds have no weights and are left out.

    Raises ShapeError for a batch of several, for models without such layers, and where they differ in size.
    """
    if len(inputs[0]) != 1:
        raise ShapeError(
            f"a batch of {len(inputs[0])} sequences came.",
            "The weights of one sequence are L·Hq·S·S numbers already.",
            "one sequence, tokens[:1].",
        )
    maps: list[Tensor] = []
    with _watching(model, maps, cross=cross):
        model(*inputs)
    if not maps:
        raise ShapeError(
            f"{type(model).__name__} has no {'cross-' if cross else ''}attention layers.",
            "Only attention gives each pair of tokens a weight.",
            "a model whose layers are 'attention' or 'window'.",
        )
    if len(shapes := {m.shape for m in maps}) > 1:
        raise ShapeError(
            f"the layers' weights have shapes {', '.join(str(list(shape)) for shape in shapes)}.",
            "One stack reads the source and another the target, and the two are not equally long.",
            "attention_maps(model.encoder, source), or cross=True.",
        )
    return torch.stack(maps)


@contextmanager
def _watching(model: nn.Module, maps: list[Tensor], *, cross: bool) -> Iterator[None]:
    """While open, every attention layer that runs adds its weights [Hq, S, T] to `maps`."""

    def look(module: nn.Module, inputs: tuple[Tensor, Step, object]) -> None:
        assert isinstance(module, Attention)
        maps.append(weights(module, *inputs)[0])

    handles = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if isinstance(module, Attention) and isinstance(module, CrossAttention) == cross
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights(attention: Attention, x: Tensor, step: Step, state: object = None) -> Tensor:
    """softmax(q·kᵀ/√D + mask) of a layer that reads x [B, S, E] without a cache: [B, Hq, S, T]."""
    if isinstance(attention, CrossAttention):
        assert isinstance(state, CrossState)
        q, k, mask = attention.queries(x), state.k, state.mask
    else:
        q, k, _ = attention.heads(x, step)
        if isinstance(attention, WindowAttention):
            step = step.windowed(attention.window, attention.sinks)
        mask = step.mask
        if step.causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def on_pattern(maps: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Mean weight on each pattern's keys for maps [L, Hq, S, S] over tokens [S], as [L, Hq] each.

    A row counts for a pattern where the pattern names a key: the first token has no previous one, and a token
    that comes for the first time has nothing to induce from (all rows like this: 0).
    """
    i, j = torch.meshgrid(torch.arange(len(tokens)), torch.arange(len(tokens)), indexing="ij")
    before = torch.cat((tokens[:1] * 0 - 1, tokens[:-1])).to("cpu")  # the token before each key
    patterns = {
        "previous": j == i - 1,
        "first": (j == 0) & (i > 1),
        "local": (j >= i - LOCAL) & (j < i - 1) & (j > 0),
        "induction": (before == tokens.to("cpu")[:, None]) & (j < i),
    }
    found = {}
    for name, keys in patterns.items():
        rows = keys.any(-1)
        held = (maps * keys.to(maps)).sum(-1)
        found[name] = held[..., rows].mean(-1) if bool(rows.any()) else torch.zeros_like(held[..., 0])
    return found


def heads(model: Transformer, *, vocab_size: int, length: int = 32, seed: int = 0) -> list[Head]:
    """What every head of a decoder does on `length` random tokens that come twice.

    Random tokens have no grammar or meaning to attend to, so what is left is the head's habit; and the repeat
    is the only thing that an induction head can find.
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(0, vocab_size, (length,), generator=generator)
    tokens = torch.cat((once, once)).to(next(model.parameters()).device)
    scores = on_pattern(attention_maps(model, tokens[None]), tokens)
    blocks = [i for i, block in enumerate(model.blocks) if isinstance(block.mixer, Attention)]
    return [
        Head(layer, head, {name: float(scores[name][row, head]) for name in PATTERNS})
        for row, layer in enumerate(blocks)
        for head in range(scores["first"].shape[1])
    ]


@contextmanager
def silenced(model: Transformer, chosen: Iterable[Head]) -> Iterator[None]:
    """While open, these heads of a decoder add nothing: what they mixed is zeroed before it is projected."""

    def mute(columns: list[int]) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def before(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            x = inputs[0].clone()
            x[..., columns] = 0
            return (x,)

        return before

    width, by_layer = model.config.head_dim, dict[int, list[int]]()
    for h in chosen:
        by_layer.setdefault(h.layer, []).extend(range(h.head * width, (h.head + 1) * width))
    handles = [
        model.blocks[layer].mixer.out.register_forward_pre_hook(mute(columns))  # type: ignore[union-attr]
        for layer, columns in by_layer.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
