"""The points of a transformer: the pieces of a decoder block, and the block itself.

A learner's pieces know tensors only; the package's know a `Step`, a state that keys and values are written
into, and weights that are stacked. The adapters translate, and look at the shape, number format and device of
what comes back. They ask the host for positions where the package does not, so that a CUDA graph cannot
capture them: `LLM(cuda_graphs=False)` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmcourse.plug.kernels import ATTEND, MODELS, mask_of, tensor
from llmcourse.plug.point import LearnersCode, Point, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.models.attention import Attention
    from llmcourse.models.block import Block
    from llmcourse.models.cache import KVCache, KVState
    from llmcourse.models.config import ModelConfig
    from llmcourse.models.rope import Rope
    from llmcourse.models.step import Step
    from llmcourse.models.transformer import Transformer


# ── the pieces ───────────────────────────────────────────────────────────────────────────────────────


def project_heads(code: LearnersCode) -> Callable[[Attention, Tensor], tuple[Tensor, Tensor]]:
    def project(self: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        weights = self.qkv.weight.detach().split(self.sizes)
        results = code.parts(code(x, *weights, self.head_dim), ("q", "k", "v"))
        heads = []
        for name, value, width in zip("qkv", results, self.sizes, strict=True):
            shape = (len(x), width // self.head_dim, x.shape[1], self.head_dim)
            heads.append(tensor(code, value, x, shape, name))
        if self.qkv.bias is not None:
            biases = (b.view(-1, 1, self.head_dim) for b in self.qkv.bias.split(self.sizes))
            heads = [value + bias for value, bias in zip(heads, biases, strict=True)]
        return torch.cat(heads[:2], dim=1), heads[2]

    return project


def apply_rope(code: LearnersCode) -> Callable[[Rope, Tensor], tuple[Tensor, Tensor]]:
    def tables(self: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The model's tables of cos and sin, read off the learner's function.

        All layers share them. A function that turns every pair makes (cos φ, sin φ) of the pair (1, 0).
        """
        import torch

        config, half = self.config, self.config.rope_dim // 2
        if (scaling := config.rope_scaling.kind) != "default":
            code.refuse(
                f"{config.name} stretches its wavelengths ({scaling} scaling)",
                "The function is told θ alone, and would turn by other angles.",
                "a model without it.",
            )
        ones = torch.ones(len(positions), 1, positions.shape[1], half, device=positions.device)
        pairs = torch.cat((ones, torch.zeros_like(ones)), dim=-1)
        turned = tensor(code, code(pairs, positions, config.rope_theta), pairs, pairs.shape, "the result")
        cos, sin = turned.to(self.cos.dtype).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    return tables


def causal_mask(code: LearnersCode) -> Callable[..., Step]:
    from llmcourse.models.transformer import Transformer

    own = Transformer.plan

    def plan(self: Transformer, tokens: Tensor, cache: KVCache | None) -> Step:
        step = own(self, tokens, cache)
        positions = step.position_ids
        like = positions.new_zeros(0).bool()
        shape = (len(positions), 1, positions.shape[1], step.span)
        seen = code(positions, step.span, positions.new_zeros(len(positions)))
        return replace(step, mask=tensor(code, seen, like, shape, "the mask"), causal=False)

    return plan


def attention(code: LearnersCode) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float | None = None) -> Tensor:
        if scale is not None:  # the function divides by √D
            q = q * (scale * q.shape[-1] ** 0.5)
        mask = mask_of(step, q, k)
        y, _ = code.parts(code(q, k, v, mask), ("y", "weights"))
        return tensor(code, y, q, (*q.shape[:3], v.shape[-1]), "y")

    return attend


# ── the block ────────────────────────────────────────────────────────────────────────────────────────


def decoder_block(code: LearnersCode) -> Callable[..., Tensor]:
    def run(
        self: Transformer, tokens: Tensor, step: Step, cache: KVCache | None, *, last_only: bool = False
    ) -> Tensor:
        _check_form(code, self)
        x = self.positions(self.embedding(tokens), step.position_ids)
        for i, block in enumerate(self.blocks):
            state = None if cache is None else cache.layers[i]
            x = _through(code, block, self.config, x, step, state)  # type: ignore[arg-type]
        return self.head(self.norm(x[:, -1:] if last_only else x))

    return run


def weights_of(block: Block) -> dict[str, Tensor]:
    """A block's weights by the names that a learner's block knows them by; views, no copies."""
    attention, mlp = block.mixer, block.mlp
    q, k, v = attention.qkv.weight.split(attention.sizes)  # type: ignore[union-attr, operator]
    gate, up = mlp.gate_up.weight.chunk(2)  # type: ignore[union-attr, operator]
    named = {"attention_norm": block.mixer_norm.weight, "q": q, "k": k, "v": v}
    named |= {"out": attention.out.weight, "mlp_norm": block.mlp_norm.weight}  # type: ignore[union-attr]
    named |= {"gate": gate, "up": up, "down": mlp.down.weight}  # type: ignore[union-attr]
    return {name: weight.detach() for name, weight in named.items()}  # type: ignore[operator, union-attr]


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """What a learner's block is told of the model."""
    return {
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "theta": config.rope_theta,
        "eps": config.norm_eps,
    }


def _through(
    code: LearnersCode, block: Block, config: ModelConfig, x: Tensor, step: Step, state: KVState | None
) -> Tensor:
    """One layer: sequences of unequal length one after the other, since each has a past of its own."""
    import torch

    weights, sizes = weights_of(block), sizes_of(config)
    starts = [step.start] if step.start is not None else step.positions.tolist()
    rows = [slice(None)] if step.start is not None else [slice(b, b + 1) for b in range(len(x))]
    results = []
    for row, start in zip(rows, starts, strict=True):
        part = x[row]
        end, shape = start + part.shape[1], (len(part), config.n_kv_heads, 0, config.head_dim)
        if state is None:
            past = (x.new_empty(shape), x.new_empty(shape))
        else:
            past = (state.k[row, :, :start], state.v[row, :, :start])
        found = code.parts(code(part, weights, sizes, *past), ("y", "keys", "values"))
        results.append(tensor(code, found[0], part, tuple(part.shape), "y"))
        grown = (*shape[:2], end, config.head_dim)
        for name, value, like in zip(("keys", "values"), found[1:], past, strict=True):
            tensor(code, value, like, grown, name)
        if state is not None:
            state.k[row, :, start:end] = found[1][:, :, start:]
            state.v[row, :, start:end] = found[2][:, :, start:]
    return torch.cat(results)


def _check_form(code: LearnersCode, model: Transformer) -> None:
    """Refuse a model whose blocks hold what the learner's block is not told of."""
    config = model.config
    other = {
        "layers that are not plain attention": set(config.kinds) != {"attention"},
        "blocks of another form": config.post_norm or config.norm != "rms" or config.mlp != "swiglu",
        "no feed-forward parts": not config.d_ff,
        "biases": config.bias or config.qkv_bias,
        "norms on queries and keys": config.qk_norm,
        "positions that are not plain RoPE": config.position != "rope"
        or config.rope_scaling.kind != "default",
        "cross-attention": any(hasattr(block, "cross") for block in model.blocks),
    }
    if found := [what for what, there in other.items() if there]:
        code.refuse(
            f"{config.name} has {' and '.join(found)}",
            "The function gets the weights of a block of Llama's form, and would leave the rest out.",
            "the course's own model, or another of Llama's family.",
        )


for _point in (
    Point(
        "project_heads",
        ("x", "wq", "wk", "wv", "head_dim"),
        "(q, k, v)",
        "x [B, S, E] times each weight [H·D, E], as heads [B, H, S, D].",
        (f"{MODELS}.attention:Attention.project",),
        project_heads,
    ),
    Point(
        "apply_rope",
        ("x", "positions", "theta"),
        "tensor",
        "x [B, H, S, D] with its pairs (i, i + D/2) turned by positions [B, S] times θ^(−2i/D).",
        (f"{MODELS}.rope:Rope.forward",),
        apply_rope,
    ),
    Point(
        "causal_mask",
        ("positions", "n_keys", "first"),
        "tensor",
        "True where first [B] ≤ key ≤ positions [B, S]: a bool tensor [B, 1, S, n_keys].",
        (f"{MODELS}.transformer:Transformer.plan",),
        causal_mask,
    ),
    Point(
        "attention",
        ("q", "k", "v", "mask"),
        "(y, weights)",
        "softmax(q·kᵀ / √D)·v over the keys where mask [B, 1, S, T] is True, and the softmax.",
        ATTEND,
        attention,
    ),
    Point(
        "decoder_block",
        ("x", "weights", "config", "keys", "values"),
        "(y, keys, values)",
        "One block on new tokens x [B, S, E], behind the P tokens of keys, values [B, Hkv, P, D].",
        (f"{MODELS}.transformer:Transformer.run",),
        decoder_block,
    ),
):
    register(_point)
