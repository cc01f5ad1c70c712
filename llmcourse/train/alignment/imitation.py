"""The model that alignment begins with: it imitates demonstrators, and they do not agree.

Supervised fine-tuning goes downhill on −log p of what was demonstrated, and its best possible end is the
demonstrators' own distribution: where one of three is right, a model that imitates perfectly is right one
time in three. More of the same data does not change that. A judgement does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from llmcourse.models import Transformer
from llmcourse.train.alignment.rewards import Sorting
from llmcourse.train.alignment.sampling import padded
from llmcourse.train.fit import build, fit, one_thread
from llmcourse.train.small import small
from llmcourse.train.tasks import IGNORE, Batch


def demonstrations(
    task: Sorting, *, batch: int, seed: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Prompts with a demonstrator's answer: tokens [B, T−1], targets IGNORE within the prompt."""
    rng = random.Random(seed)
    while True:
        prompts = task.prompts(batch, rng)
        tokens, mask = padded([p + task.demonstration(p, rng) for p in prompts], [len(p) for p in prompts])
        yield Batch((tokens[:, :-1],), tokens[:, 1:].masked_fill(~mask, IGNORE)).to(device)


@one_thread()
def imitate(
    task: Sorting,
    *,
    seed: int = 0,
    steps: int = 200,
    batch: int = 64,
    lr: float = 1e-2,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A small transformer after supervised fine-tuning on demonstrations."""
    config = small(
        task.vocab_size, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64, max_len=32, name="imitator"
    )
    model = build(Transformer, config, seed=seed).to(device)
    fit(model, demonstrations(task, batch=batch, seed=seed, device=device), steps=steps, lr=lr)
    return model.eval().requires_grad_(False)
