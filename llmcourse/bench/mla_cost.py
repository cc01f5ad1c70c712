"""What MLA's two forms compute and move, counted on the module itself.

PyTorch's FLOP counter watches the matrix products of `LatentAttention` on tensors without memory (device
"meta"), so a layer of DeepSeek-V3's size is counted on a laptop in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from llmcourse.models import ModelConfig
from llmcourse.models.mla import LatentAttention, latent_sizes
from llmcourse.models.step import Step


@dataclass(frozen=True)
class Cost:
    """Of one layer and one sequence. flops: multiplications and additions; nbytes: see `mla_cost`."""

    flops: int
    nbytes: int


def mla_cost(config: ModelConfig, form: str, *, queries: int, tokens: int, itemsize: int = 2) -> Cost:
    """`queries` new tokens over `tokens` kept ones, themselves included, between projections and output.

    form   "expanded" or "absorbed"

    FLOPs are of the products as they are asked for: scores that a causal mask hides count too. Bytes are
    those of the kept latents, read once, and in the expanded form of the keys and values of all heads, which
    are written and read again. Weights are left out: both forms read the same.
    """
    sizes, heads = latent_sizes(config), config.n_heads
    with torch.device("meta"):
        layer = LatentAttention(config)
        nope = torch.empty(1, heads, queries, sizes.nope_dim)
        rope = torch.empty(1, heads, queries, sizes.rope_dim)
        latent = torch.empty(1, tokens, sizes.kv_rank + sizes.rope_dim)
        positions = torch.arange(tokens - queries, tokens)[None]
    step = Step(positions, tokens - queries, tokens, causal=queries > 1)
    with FlopCounterMode(display=False) as counter:
        getattr(layer, form)(nope, rope, latent, step)
    made = 2 * tokens * heads * (sizes.qk_dim + sizes.v_dim) if form == "expanded" else 0
    return Cost(counter.get_total_flops(), itemsize * (latent.numel() + made))
