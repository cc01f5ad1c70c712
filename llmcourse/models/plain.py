"""A Llama-family forward pass with nothing in the way: one sequence, float64, and only the arithmetic.

It is what the model is held against, and it shares no code with it: rotary embedding is a product of complex
numbers here, grouped queries are repeated keys and values, softmax is written out by PyTorch, and neither
attention kernels nor stacked or cached projections take part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.errors import ModelError
from llmcourse.models.config import ModelConfig


@torch.no_grad()
def plain_logits(c: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [S, V] in float64 for tokens [S], from the sizes and the `state_dict()` of a Transformer.

    Raises ModelError for a configuration that is more than Llama (see `supported`).
    """
    supported(c)

    def w(name: str) -> Tensor:
        return weights[f"{name}.weight"].double()

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w(name)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)  # feature i is the real part of a number whose imaginary part is i + D/2
        z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag), dim=-1)

    positions = torch.arange(len(tokens), device=tokens.device).double()
    steps = torch.arange(0, c.head_dim, 2, device=tokens.device).double() / c.head_dim
    angles = positions[:, None] * c.rope_theta**-steps
    future = torch.full((len(tokens),) * 2, -torch.inf, device=tokens.device).triu(1)

    x = w("embedding")[tokens]
    for block in (f"blocks.{i}" for i in range(c.n_layers)):
        qkv = rms(x, f"{block}.mixer_norm") @ w(f"{block}.mixer.qkv").T
        heads = qkv.unflatten(-1, (-1, c.head_dim)).transpose(0, 1)  # [Hq + 2·Hkv, S, D]
        q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads])
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, dim=0) for t in (turn(k), v))
        scores = turn(q) @ k.mT / c.head_dim**0.5 + future
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ w(f"{block}.mixer.out").T
        gate, up = (rms(x, f"{block}.mlp_norm") @ w(f"{block}.mlp.gate_up").T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ w(f"{block}.mlp.down").T
    return rms(x, "norm") @ w("embedding" if c.tie_embeddings else "head").T


def supported(c: ModelConfig) -> None:
    """Refuse what the few lines above would compute wrongly."""
    known: dict[str, object] = {"norm": "rms", "mlp": "swiglu", "position": "rope"}
    known |= dict.fromkeys(("post_norm", "bias", "qkv_bias", "qk_norm"), False)
    for name, value in known.items():
        if getattr(c, name) != value:
            raise refused(f"{name} = {getattr(c, name)!r}")
    if c.rope_scaling.kind != "default":
        raise refused(f"rope_scaling = {c.rope_scaling.kind!r}")
    if set(c.kinds) != {"attention"}:
        raise refused(f"layers = {c.layers!r}")


def refused(what: str) -> ModelError:
    return ModelError(
        f"the plain forward pass does not know {what}.",
        "It is Llama without options, to be read in one look.",
        "a model like SmolLM2 or Llama 2.",
    )
