"""What fine-tuning holds in memory, in three ways: all weights, LoRA, QLoRA.

    per parameter, bytes        full            LoRA: frozen | adapter      QLoRA: frozen | adapter
    weight                      2 (bfloat16)    2            | 4            0.53  | 4
    gradient                    2               –            | 4            –     | 4
    AdamW's moments             8               –            | 8            –     | 8
    float32 master              4               –            | –            –     | –

An adapter is a percent of the parameters, so that all that full fine-tuning holds besides the weights all but
vanishes. Activations do not: the gradient still goes through every layer after the first adapter, and the
ledger of notebook 12 holds for them. What goes are the inputs of frozen products, which are kept for the
gradient of their weight and of nothing else.

0.53 bytes are INT4 or NF4 codes with a bfloat16 scale for every 64 weights: (4 + 16/64) / 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmcourse.finetune.lora import PLACES, LoRA
from llmcourse.models import ModelConfig

FOUR_BITS = (4 + 16 / 64) / 8


@dataclass(frozen=True)
class Bill:
    """Bytes of one way to fine-tune. trained: parameters with a gradient."""

    name: str
    trained: int
    weights: int
    gradients: int
    moments: int
    masters: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.masters


def sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(M, K) of each projection of a block."""
    q, kv, e, f = (
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
        config.d_model,
        config.d_ff,
    )
    shapes = ((q, e), (kv, e), (kv, e), (e, q), (f, e), (f, e), (e, f))
    return dict(zip(PLACES, shapes, strict=True))


def trainable(config: ModelConfig, lora: LoRA) -> int:
    """Numbers in A and B: r·(M + K) for each projection of each adapted block."""
    each = sum(sum(sizes(config)[target]) for target in lora.targets)
    return lora.r * each * (len(lora.layers) or config.n_layers)


def bills(config: ModelConfig, lora: LoRA) -> list[Bill]:
    """Full fine-tuning in bfloat16 with masters, LoRA on bfloat16, QLoRA on four bits."""
    n, r = config.n_params, trainable(config, lora)
    in_blocks = config.n_layers * sum(m * k for m, k in sizes(config).values())
    small = 2 * (n - in_blocks) + round(FOUR_BITS * in_blocks)
    return [
        Bill("full", n, 2 * n, 2 * n, 8 * n, 4 * n),
        Bill("LoRA", r, 2 * n + 4 * r, 4 * r, 8 * r),
        Bill("QLoRA", r, small + 4 * r, 4 * r, 8 * r),
    ]
